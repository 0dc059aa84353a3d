"""Whether a decoder gives the same block by block as whole, and as stock transformers makes it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from besa_cli.decoder import architecture
from besa_cli.decoder.conduct import TOLERANCE, following, not_causal, relative_error, require_finite
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError

_CHECK_TOKENS = 32  # length of the samples on which stream and whole model are compared
SMALL = 64 << 20  # bytes of a model that is compared with stock's in any case


def verify(decoder: Decoder, tokens: Tensor, *, room: int = SMALL) -> None:
    """Compare stream and whole model on three short samples; the whole model's blocks are loaded as they are called.

    The first is one of `tokens`; the second holds every special token, which a model's code may treat in another way;
    the third has another last token than the first, which must change nothing before it. Where there is room for all
    weights at a time, the model that stock transformers loads is compared, too, logits included.

    Parameters
    ----------
    tokens : Tensor of shape (samples, seqlen)
    room : int
        Bytes that may be taken.

    Raises
    ------
    BesaError
        They differ: the blocks depend on more than the hidden states before them, or the model calls them in another
        order, or its names, tied weights or buffers are not those that stock transformers makes of the checkpoint.
        Or tokens see those after them, or the dtype does not hold the hidden states.
    """
    rows = _rows(decoder, tokens)
    stream = _Stream(decoder, rows)
    model = type(decoder.model).__name__
    with following(decoder.model), torch.no_grad(), stream.beside_the_model():
        expected = decoder.whole(rows)
    require_finite(expected, model)
    require_finite(stream.hidden, model)
    error = relative_error(decoder.normed(stream.hidden, rows), expected)
    if stream.passed != list(range(len(decoder))) or not error < 1e-3:
        raise BesaError(
            f"{model} gives other hidden states block by block than as a whole ({error:.2g})",
            "its blocks depend on each other in a way that besa cannot follow",
        )
    if relative_error(expected[2, :-1], expected[0, :-1]) > TOLERANCE[decoder.dtype]:
        raise not_causal(decoder.model)
    if decoder.weight_bytes() <= room:
        _compare_with_stock(decoder, stream.hidden, rows)


def _rows(decoder: Decoder, tokens: Tensor) -> Tensor:
    """The samples of the comparison: (3, seqlen)."""
    sample = tokens[:1, :_CHECK_TOKENS]
    changed = sample.clone()
    changed[0, -1] = (sample[0, -1] + 1) % decoder.vocabulary
    return torch.cat([sample, decoder.with_special_tokens(sample), changed])


def _compare_with_stock(decoder: Decoder, hidden: Tensor, rows: Tensor) -> None:
    """Refuse other logits than those of the model that transformers loads by itself.

    Parameters
    ----------
    hidden : Tensor of shape (samples, seqlen, hidden)
        What left the last block.
    rows : Tensor of shape (samples, seqlen)
    """
    expected = _stock_logits(decoder, rows)
    found = decoder.finish(hidden, rows)
    decoder.drop_head()
    known = expected.isfinite() & found.isfinite()  # some models give -inf to what is no token
    error = relative_error(found[known], expected[known])
    if bool(found.isnan().any()) or not error < TOLERANCE[decoder.dtype]:
        raise BesaError(
            f"{type(decoder.model).__name__} gives other logits than stock transformers ({error:.2g}) "
            f"for {decoder.weights.directory}",
            "besa reads this checkpoint in another way than transformers does: nothing made of it could be trusted",
        )


def _stock_logits(decoder: Decoder, rows: Tensor) -> Tensor:
    """Logits of the whole model as transformers loads it, of shape (samples, seqlen, vocabulary)."""
    from transformers.utils import logging

    directory, said = decoder.weights.directory, logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        stock: Any = architecture.whole(directory, decoder.dtype)
    finally:
        logging.set_verbosity(said)
    with following(decoder.model), torch.no_grad():
        logits: Tensor = stock.to(decoder.device)(input_ids=rows.to(decoder.device), use_cache=False).logits
    return logits


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
