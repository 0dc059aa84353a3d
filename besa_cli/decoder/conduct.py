"""What a model has to do so that it can be followed block by block, and the refusals of one that does otherwise."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from besa_cli.errors import BesaError, reason_of
from besa_cli.system import compute

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}  # what rounding may do


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, of the same shape."""
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))


def not_causal(model: nn.Module) -> BesaError:
    """The refusal of a model whose tokens see those after them."""
    return BesaError(
        f"{type(model).__name__} is not causal: a token changes what the model makes of those before it",
        "besa prunes and measures models that predict each token from those before it",
    )


@contextlib.contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """Turn whatever the model's own code raises into one line that names the model.

    Raises
    ------
    BesaError
        It raised anything but a `BesaError` or out of memory.
    """
    try:
        yield
    except (BesaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        narrow = next(model.parameters()).dtype != torch.float32
        raise BesaError(
            f"{type(model).__name__} cannot be run block by block: {type(error).__name__}: {reason_of(error)}",
            ("its code may need --dtype float32; else " if narrow else "")
            + "besa passes hidden states from block to block, and this decoder cannot be followed that way",
        ) from error


def require_finite(states: Tensor, source: str) -> None:
    """Refuse hidden states that the dtype could not hold.

    Parameters
    ----------
    states : Tensor
    source : str
        What gave them.

    Raises
    ------
    BesaError
        There is a NaN or an infinity.
    """
    if not bool(states.isfinite().all()):
        raise overflow(f"{source} gives hidden states that are NaN or infinite", states.dtype)


def require_logits(logits: Tensor, source: str) -> None:
    """Refuse logits of which no probabilities can be made.

    Parameters
    ----------
    logits : Tensor
        −inf is one of them, for what is no token.
    source : str
        What gave them.

    Raises
    ------
    BesaError
        There is a NaN or a positive infinity, or nothing else than −inf.
    """
    if not math.isfinite(float(logits.amax())):
        raise overflow(f"{source} gives logits that are NaN or infinite", logits.dtype)


def overflow(what: str, dtype: torch.dtype) -> BesaError:
    """The error for NaN or infinity, with the remedy where the dtype may be the cause.

    Parameters
    ----------
    what : str
        What gives it, in words that ``in float16`` can follow.
    dtype : torch.dtype
        That was computed in.
    """
    damaged = "the model's own numbers overflow: fetch it again, or use another one"
    return BesaError(
        f"{what} in {compute.name_of(dtype)}",
        damaged if dtype == torch.float32 else "compute with --dtype float32",
    )
