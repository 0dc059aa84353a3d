"""Whether a decoder gives the same block by block as whole."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from besa_cli.decoder.running import Decoder
from besa_cli.errors import BesaError

_CHECK_TOKENS = 32  # length of the sample on which stream and whole model are compared


def verify(decoder: Decoder, tokens: Tensor) -> None:
    """Compare stream and whole model on one short sample; the whole model's blocks are loaded as they are called.

    Raises
    ------
    BesaError
        They differ: the blocks depend on more than the hidden states before them.
    """
    sample = tokens[:1, :_CHECK_TOKENS]
    with _lazily_loaded(decoder):
        expected = decoder.model.base_model(input_ids=sample.to(decoder.device), use_cache=False)[0]
    hidden = decoder.embed(sample)
    for index in range(len(decoder)):
        decoder.load(index)
        with torch.no_grad():
            hidden = decoder.forward(index, hidden, sample)
        decoder.drop(index)
    found = decoder.normed(hidden, sample)
    error = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))
    if not error < 1e-3:
        raise BesaError(
            f"{type(decoder.model).__name__} gives other hidden states block by block than as a whole ({error:.2g})",
            "its blocks depend on each other in a way that besa cannot follow",
        )


@contextlib.contextmanager
def _lazily_loaded(decoder: Decoder) -> Iterator[None]:
    handles = []
    with torch.no_grad():
        for number, block in enumerate(decoder.blocks):
            handles.append(block.register_forward_pre_hook(lambda *_, number=number: decoder.load(number) and None))
            handles.append(block.register_forward_hook(lambda *_, number=number: decoder.drop(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
