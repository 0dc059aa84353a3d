"""Requests of `besa prune`."""

from typing_extensions import Unpack

from besa_cli import pruners
from besa_cli.choices import Budget, GivenOptions
from besa_cli.errors import UsageError
from besa_cli.jobs.request import Placement, StageRequest
from besa_cli.stream.method import MethodOptions


def request(
    *,
    method: str = "besa",
    sparsity: float = 0.5,
    nm: tuple[int, int] | None = None,
    budget: Budget = "uniform",
    options: GivenOptions | None = None,
    **placement: Unpack[Placement],
) -> StageRequest:
    """Check what is asked of `besa prune`, and resolve its method.

    Parameters
    ----------
    method : str
        A key of `besa_cli.pruners.PRUNERS`.
    sparsity : float
        Share of the linears' weights to prune, in [0, 1).
    nm : (n, m), optional
        Prune n of every m columns instead.
    budget : {"uniform", "model"}
        How the pruned weights are shared between blocks.
    options : mapping, optional
        The method's own options that were given.
    **placement
        Where and how it is computed: see `Placement`.

    Raises
    ------
    UsageError
        The method is unknown, lacks an option, or a value is invalid.
    """
    if not 0 <= sparsity < 1:
        raise UsageError(f"--sparsity {sparsity} is not in [0, 1)", "0.5 prunes half of the weights")
    if nm and not 0 < nm[0] < nm[1]:
        raise UsageError(
            f"--nm '{nm[0]}:{nm[1]}' is not an N:M pattern with 0 < N < M", "2:4 prunes 2 of every 4 columns"
        )
    if nm and budget != "uniform":
        raise UsageError(
            f"--budget {budget} cannot be combined with --nm {nm[0]}:{nm[1]}, which gives every block the same share",
            "leave one of the two out",
        )
    pruner = pruners.load(method, {**(options or {}), **({"nm": nm} if nm else {})})
    _require_learnable(sparsity, pruner.options, (options or {}).get("preset"))
    shares = {} if budget == "uniform" else {"budget": budget}  # in manifests the default is absent, as it ever was
    return StageRequest(
        command="prune",
        method=pruner,
        target_sparsity=None if nm else sparsity,
        budget=budget,
        command_options={"nm": f"{nm[0]}:{nm[1]}"} if nm else {"sparsity": sparsity, **shares},
        **placement,
    )


def _require_learnable(sparsity: float, options: MethodOptions, preset: str | None) -> None:
    low, high = options.sparsity_range()
    if not low <= sparsity <= high:
        raise UsageError(
            f"--sparsity {sparsity} is beyond what --preset {preset} can learn: {low:.3f} to {high:.3f}",
            "leave the preset out; the released program itself needs --no-sigmoid-smooth there",
        )
