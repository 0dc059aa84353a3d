"""Divergences from the dense model on held-out samples in words, for `besa prune`, `besa tune` and `besa show`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from besa_cli.checkpoint.manifests import HeldOut, StageManifest, WholeModel


def in_words(found: "HeldOut") -> str:
    """Return both figures in one line."""
    kl, uniform = ("not finite" if value is None else f"{value:.4f}" for value in (found["kl"], found["kl_uniform"]))
    return (
        f"KL divergence from the dense model: {kl} nats a token, {uniform} with uniform masks "
        f"(on {found['samples']} samples held out)"
    )


def whole_model_in_words(found: "WholeModel") -> str:
    """Return one line on the passes in which the whole model learned its rates or its kept weights."""
    first, kept = found["divergence"][0], found["kept"]
    if not kept:
        return f"whole model: no pass was better than the start (KL divergence to dense {first:.4f}), which is kept"
    way = f", at {found['part']:.0%} of the way" if "part" in found else ""
    return (
        f"whole model: KL divergence to dense {first:.4f} -> {found['divergence'][kept]:.4f} on samples held out{way}"
    )


def warning(manifest: "StageManifest") -> str:
    """Return one line that warns of a result worse than uniform, with both figures and the remedy; else empty."""
    found = manifest.get("held_out")
    if found is None or not _is_worse(found["kl"], found["kl_uniform"]):
        return ""
    return f"warning: worse than uniform sparsity: {in_words(found)}; try --method wanda, or another --loss"


def _is_worse(kl: float | None, uniform: float | None) -> bool:
    return uniform is not None and (kl is None or kl > uniform)
