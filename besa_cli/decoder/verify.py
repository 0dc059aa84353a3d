"""Check that a decoder computes the same block by block as the whole model and as stock transformers."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from besa_cli.decoder import architecture
from besa_cli.decoder.conduct import TOLERANCE, following, not_causal, relative_error, require_finite
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.system import compute

_CHECK_TOKENS = 32  # length of the samples on which stream and whole model are compared
SMALL = 64 << 20  # bytes of weights up to which a model is always compared with stock transformers


def room(peak: int, limit: int | None) -> int:
    """Return the bytes that `verify` may take: no more than the work after it, or little.

    Parameters
    ----------
    peak : int
        Bytes of the process while it works.
    limit : int, optional
        Maximum bytes of the process.
    """
    most = max(peak, compute.resident() + SMALL)
    return (most if limit is None else min(most, limit)) - compute.resident()


def verify(decoder: Decoder, tokens: Tensor, *, room: int = SMALL) -> None:
    """Compare stream and whole model on three short samples; the whole model's blocks are loaded as they are called.

    The first sample is the start of `tokens`; the second contains the special tokens, which the model's code may treat
    specially; the third differs from the first in the last token, which must not change earlier hidden states. If all
    weights fit in `room`, the logits are also compared with those of the model loaded by stock transformers.

    Parameters
    ----------
    tokens : Tensor of shape (samples, seqlen)
    room : int
        Bytes of memory available.

    Raises
    ------
    BesaError
        The results differ: blocks depend on more than their input, are called in another order, or names, tied weights
        or buffers differ from stock transformers'. Or the model is not causal, or the hidden states overflow the dtype.
    """
    rows = _rows(decoder, tokens)
    stream = _Stream(decoder, rows)
    model = type(decoder.model).__name__
    with following(decoder.model), torch.no_grad(), stream.beside_the_model():
        expected = decoder.head_inputs(rows)
    require_finite(expected, model)
    require_finite(stream.hidden, model)
    error = relative_error(decoder.head_inputs_from(stream.hidden, rows), expected)
    if stream.passed != list(range(len(decoder))) or not error < 1e-3:
        raise BesaError(
            f"{model} gives other hidden states block by block than as a whole (relative error {error:.2g})",
            "use another model: the blocks of this one depend on more than their input, which besa does not support",
        )
    if relative_error(expected[2, :-1], expected[0, :-1]) > TOLERANCE[decoder.dtype]:
        raise not_causal(decoder.model)
    if decoder.weight_bytes() <= room:
        _compare_with_stock(decoder, stream.hidden, rows)


def _rows(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Return the samples of the comparison, of shape (3, seqlen)."""
    sample = tokens[:1, :_CHECK_TOKENS]
    changed = sample.clone()
    changed[0, -1] = (sample[0, -1] + 1) % decoder.vocabulary
    return torch.cat([sample, decoder.with_special_tokens(sample), changed])


def _compare_with_stock(decoder: Decoder, hidden: Tensor, rows: Tensor) -> None:
    """Refuse logits that differ from those of the model loaded by stock transformers.

    Parameters
    ----------
    hidden : Tensor of shape (samples, seqlen, hidden)
        Outputs of the last block.
    rows : Tensor of shape (samples, seqlen)
    """
    expected = _stock_logits(decoder, rows)
    logits = decoder.finish(hidden, rows)
    decoder.drop_head()
    finite = expected.isfinite() & logits.isfinite()  # some models give -inf to ids that are not tokens
    error = relative_error(logits[finite], expected[finite])
    if bool(logits.isnan().any()) or not error < TOLERANCE[decoder.dtype]:
        raise BesaError(
            f"{type(decoder.model).__name__} gives other logits than stock transformers (relative error {error:.2g}) "
            f"for {decoder.weights.directory}",
            "use another model: besa reads this checkpoint differently from transformers",
        )


def _stock_logits(decoder: Decoder, rows: Tensor) -> Tensor:
    """Return the logits of the model loaded by stock transformers, of shape (samples, seqlen, vocabulary)."""
    from transformers.utils import logging

    directory, verbosity = decoder.weights.directory, logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        stock: Any = architecture.load_stock(directory, decoder.dtype)
    finally:
        logging.set_verbosity(verbosity)
    with following(decoder.model), torch.no_grad():
        logits: Tensor = stock.to(decoder.device)(input_ids=rows.to(decoder.device), use_cache=False).logits
    return logits


class _Stream:
    """Hidden states of samples that pass through each block while the whole model has it loaded, so it is read once.

    `passed` lists the indices of the blocks in the order in which the model called them.
    """

    def __init__(self, decoder: Decoder, sample: Tensor) -> None:
        self._decoder, self._sample = decoder, sample
        self.hidden = decoder.embed(sample)
        self.passed: list[int] = []
        self._passing = False

    @contextlib.contextmanager
    def beside_the_model(self) -> Iterator[None]:
        """Make a call of the model load each block, pass the stream through it, and drop it again."""
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
