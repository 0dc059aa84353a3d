"""Rotary embeddings of a GGUF file in the words of transformers."""

import math
from collections.abc import Callable, Sequence

from besa_cli.models.gguf.metadata import LONGEST_CONTEXT, Metadata

Rope = dict[str, str | float | list[float]]
Read = Callable[[str], Sequence[float]]

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_BASE = 10000.0  # where none is given
_LOW, _HIGH = 1.0, 4.0  # Llama 3's bounds, in wavelengths of the original context
_CLOSE = 1e-5


def parameters(facts: Metadata, width: int, read: Read) -> Rope:
    """`rope_parameters` of a model whose heads turn `width` channels.

    Parameters
    ----------
    facts : Facts
    width : int
    read : callable
        Gives the values of a tensor of factors by its name.

    Raises
    ------
    BesaError
        The scaling is of a kind, or with details, that transformers would compute in another way.
    """
    found: Rope = {"rope_theta": facts.real("rope.freq_base", _BASE), "rope_type": "default"}
    kind = facts.text("rope.scaling.type", "linear")
    factor = facts.real("rope.scale_linear" if facts.has("rope.scale_linear") else "rope.scaling.factor", 1.0)
    for key, value in (("alpha", 0), ("yarn_ext_factor", 1), ("yarn_attn_factor", 1), ("yarn_log_multiplier", 0)):
        facts.expect(f"rope.scaling.{key}", value)
    context = facts.whole("context_length", most=LONGEST_CONTEXT)
    original = facts.whole("rope.scaling.original_context_length", context, most=LONGEST_CONTEXT)
    if LONG in facts.header.tensors or SHORT in facts.header.tensors:
        return found | _longrope(
            _factors(facts, SHORT, width, read),
            _factors(facts, LONG, width, read),
            original,
            facts.real("rope.scaling.attn_factor", 1.0),
        )
    facts.expect("rope.scaling.attn_factor", 1)
    if kind not in ("none", "linear", "yarn"):
        facts.refuse("rope.scaling.type", f"is '{kind:.40}'; besa reads none, linear, yarn, and tensors of factors")
    if FACTORS in facts.header.tensors:
        facts.expect("rope.scaling.factor", 1, f"is given beside {FACTORS}; besa reads either of them alone")
        factors = _factors(facts, FACTORS, width, read)
        if set(factors) == {1.0}:
            return found
        plain = [float(str(found["rope_theta"])) ** (-2 * index / width) for index in range(width // 2)]
        return found | (_llama3(factors, plain) or _longrope(factors, factors, context, 1.0))
    if kind == "none" or factor == 1.0:
        return found
    if kind == "yarn":
        betas = {f"beta_{end}": facts.real(f"rope.scaling.yarn_beta_{end}", value) for end, value in _BETAS.items()}
        return found | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}
    return found | {"rope_type": "linear", "factor": factor}


_BETAS = {"fast": 32.0, "slow": 1.0}


def _factors(facts: Metadata, name: str, width: int, read: Read) -> list[float]:
    """What each frequency is divided by."""
    tensor = facts.header.tensors.get(name)
    if tensor is None or tensor.shape != (width // 2,):
        facts.refuse_tensor(name, f"is not there with one factor for each of {width // 2} frequencies")
    values = [float(value) for value in read(name)]
    if not all(0 < value < math.inf for value in values):
        facts.refuse_tensor(name, "holds a factor that is not a number above 0")
    return values


def _longrope(short: list[float], long: list[float], original: int, strength: float) -> Rope:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        "attention_factor": strength,
        "factor": 1.0,  # would only give a default for the line above
    }


def _llama3(factors: list[float], plain: list[float]) -> Rope | None:
    """The few numbers that Llama 3 has its factors from, if these are such factors."""
    largest = max(factors)
    for original in (2**power for power in range(4, 25)):
        made = [_llama3_factor(2 * math.pi / frequency / original, largest) for frequency in plain]
        if all(math.isclose(one, other, rel_tol=_CLOSE) for one, other in zip(made, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    return None


def _llama3_factor(length: float, largest: float) -> float:
    """What a frequency is divided by whose wavelength is `length` original contexts."""
    share = min(1.0, max(0.0, (1 / length - _LOW) / (_HIGH - _LOW)))
    return 1 / ((1 - share) / largest + share)
