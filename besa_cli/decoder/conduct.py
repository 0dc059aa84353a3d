"""Checks that a model can be run block by block (causal, finite), and the errors if it cannot."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from besa_cli.errors import BesaError, reason_of
from besa_cli.system import compute

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}  # of rounding


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ‖actual − expected‖ / ‖expected‖ of two tensors of the same shape, computed in fp32."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))


def not_causal(model: nn.Module) -> BesaError:
    """Return the error for a model in which a token attends to later tokens."""
    return BesaError(
        f"{type(model).__name__} is not causal: a token changes the hidden states of earlier tokens",
        "use a causal model, in which each token is predicted from earlier tokens alone",
    )


@contextlib.contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """Convert exceptions of the model's own code to a `BesaError` that names the model.

    Raises
    ------
    BesaError
        The code raised any exception except a `BesaError` or an out-of-memory error, which pass unchanged.
    """
    try:
        yield
    except (BesaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        narrow = next(model.parameters()).dtype != torch.float32
        raise BesaError(
            f"{type(model).__name__} cannot be run block by block: {type(error).__name__}: {reason_of(error)}",
            ("try --dtype float32, which its code may need; else " if narrow else "")
            + "use another model: besa passes hidden states from block to block, which this decoder does not support",
        ) from error


def require_finite(states: Tensor, source: str) -> None:
    """Refuse hidden states that overflowed their dtype.

    Parameters
    ----------
    states : Tensor
    source : str
        The model or directory that computed them, named in the error.

    Raises
    ------
    BesaError
        A value is NaN or infinite.
    """
    if not bool(states.isfinite().all()):
        raise overflow(f"{source} gives hidden states that are NaN or infinite", states.dtype)


def require_logits(logits: Tensor, source: str) -> None:
    """Refuse logits whose softmax is not defined.

    Parameters
    ----------
    logits : Tensor
        −inf is allowed: some models give it to ids that are not tokens.
    source : str
        The model or directory that computed them, named in the error.

    Raises
    ------
    BesaError
        A value is NaN or +inf, or all are −inf.
    """
    if not math.isfinite(float(logits.amax())):
        raise overflow(f"{source} gives logits that are NaN or infinite", logits.dtype)


def overflow(problem: str, dtype: torch.dtype) -> BesaError:
    """Return the error for NaN or infinity, with the remedy that the dtype suggests.

    Parameters
    ----------
    problem : str
        The start of the message, to which ``in float16`` is added.
    dtype : torch.dtype
        The dtype of the computation.
    """
    overflows = "the model overflows even in float32: fetch it again, or use another one"
    return BesaError(
        f"{problem} in {compute.name_of(dtype)}",
        overflows if dtype == torch.float32 else "compute with --dtype float32",
    )
