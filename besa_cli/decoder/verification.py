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
        They differ: the blocks depend on more than the hidden states before them, or the model calls them in another
        order.
    """
    sample = tokens[:1, :_CHECK_TOKENS]
    stream = _Stream(decoder, sample)
    with torch.no_grad(), stream.beside_the_model():
        expected = decoder.model.base_model(input_ids=sample.to(decoder.device), use_cache=False)[0]
    found = decoder.normed(stream.hidden, sample)
    error = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))
    if stream.passed != list(range(len(decoder))) or not error < 1e-3:
        raise BesaError(
            f"{type(decoder.model).__name__} gives other hidden states block by block than as a whole ({error:.2g})",
            "its blocks depend on each other in a way that besa cannot follow",
        )


class _Stream:
    """A sample's hidden states, passed through each block while the whole model has it loaded: each is read once.

    `passed` are the blocks in the order in which the model called them.
    """

    def __init__(self, decoder: Decoder, sample: Tensor) -> None:
        self._decoder, self._sample = decoder, sample
        self.hidden = decoder.embed(sample)
        self.passed: list[int] = []
        self._passing = False

    @contextlib.contextmanager
    def beside_the_model(self) -> Iterator[None]:
        """Within, a call of the model loads block after block, and drops it when the stream has passed it, too."""
        handles = []
        for number, block in enumerate(self._decoder.blocks):
            handles.append(block.register_forward_pre_hook(lambda *_, number=number: self._load(number)))
            handles.append(block.register_forward_hook(lambda *_, number=number: self._pass(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _load(self, number: int) -> None:
        if not self._passing:
            self._decoder.load(number)

    def _pass(self, number: int) -> None:
        if self._passing:  # the stream's own call of the block
            return
        self._passing = True
        self.hidden = self._decoder.forward(number, self.hidden, self._sample)
        self._passing = False
        self.passed.append(number)
        self._decoder.drop(number)
