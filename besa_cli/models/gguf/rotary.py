"""Rotary embeddings of a GGUF file as `rope_parameters` of transformers."""

import math
from collections.abc import Callable, Sequence

from besa_cli.models.gguf.metadata import LONGEST_CONTEXT, Metadata

Rope = dict[str, str | float | list[float]]
Read = Callable[[str], Sequence[float]]

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_BASE = 10000.0  # the default
_LOW, _HIGH = 1.0, 4.0  # Llama 3's bounds, in wavelengths of the original context
_CLOSE = 1e-5


def parameters(metadata: Metadata, width: int, read: Read) -> Rope:
    """Build the `rope_parameters` of a model whose rotary embedding covers `width` channels of each head.

    Parameters
    ----------
    metadata : Metadata
    width : int
    read : callable
        Returns the values of a tensor of factors by its name.

    Raises
    ------
    BesaError
        The scaling is of a kind, or has parameters, that transformers would compute differently.
    """
    rope: Rope = {"rope_theta": metadata.real("rope.freq_base", _BASE), "rope_type": "default"}
    kind = metadata.text("rope.scaling.type", "linear")
    factor = metadata.real("rope.scale_linear" if metadata.has("rope.scale_linear") else "rope.scaling.factor", 1.0)
    for key, value in (("alpha", 0), ("yarn_ext_factor", 1), ("yarn_attn_factor", 1), ("yarn_log_multiplier", 0)):
        metadata.expect(f"rope.scaling.{key}", value)
    context = metadata.integer("context_length", most=LONGEST_CONTEXT)
    original = metadata.integer("rope.scaling.original_context_length", context, most=LONGEST_CONTEXT)
    if LONG in metadata.header.tensors or SHORT in metadata.header.tensors:
        return rope | _longrope(
            _factors(metadata, SHORT, width, read),
            _factors(metadata, LONG, width, read),
            original,
            metadata.real("rope.scaling.attn_factor", 1.0),
        )
    metadata.expect("rope.scaling.attn_factor", 1)
    if kind not in ("none", "linear", "yarn"):
        metadata.refuse("rope.scaling.type", f"is '{kind:.40}'; besa reads none, linear, yarn, and tensors of factors")
    if FACTORS in metadata.header.tensors:
        metadata.expect("rope.scaling.factor", 1, f"is given together with {FACTORS}; besa reads only one of them")
        factors = _factors(metadata, FACTORS, width, read)
        if set(factors) == {1.0}:
            return rope
        frequencies = [float(str(rope["rope_theta"])) ** (-2 * index / width) for index in range(width // 2)]
        return rope | (_llama3(factors, frequencies) or _longrope(factors, factors, context, 1.0))
    if kind == "none" or factor == 1.0:
        return rope
    if kind == "yarn":
        betas = {f"beta_{end}": metadata.real(f"rope.scaling.yarn_beta_{end}", value) for end, value in _BETAS.items()}
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}
    return rope | {"rope_type": "linear", "factor": factor}


_BETAS = {"fast": 32.0, "slow": 1.0}


def _factors(metadata: Metadata, name: str, width: int, read: Read) -> list[float]:
    """Read the divisor of each frequency."""
    tensor = metadata.header.tensors.get(name)
    if tensor is None or tensor.shape != (width // 2,):
        metadata.refuse_tensor(name, f"must have one factor for each of {width // 2} frequencies")
    values = [float(value) for value in read(name)]
    if not all(0 < value < math.inf for value in values):
        metadata.refuse_tensor(name, "holds a factor that is not a number above 0")
    return values


def _longrope(short: list[float], long: list[float], original: int, strength: float) -> Rope:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        "attention_factor": strength,
        "factor": 1.0,  # only the default of the line above
    }


def _llama3(factors: list[float], frequencies: list[float]) -> Rope | None:
    """Recover Llama 3's scaling parameters if the factors are computed from them; else None."""
    largest = max(factors)
    for original in (2**power for power in range(4, 25)):
        expected = [_llama3_factor(2 * math.pi / frequency / original, largest) for frequency in frequencies]
        if all(math.isclose(value, other, rel_tol=_CLOSE) for value, other in zip(expected, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    return None


def _llama3_factor(length: float, largest: float) -> float:
    """Compute the divisor of a frequency whose wavelength is `length` times the original context."""
    share = min(1.0, max(0.0, (1 / length - _LOW) / (_HIGH - _LOW)))
    return 1 / ((1 - share) / largest + share)
