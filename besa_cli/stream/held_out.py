"""Check on held-out samples: is the pruned model nearer to the dense one than the same model with uniform masks?

A calibration set has a few samples beside those that are learned from, drawn after them from other text: no step learns
from them, no statistic counts them, and no masks are compared on them. They only pass through three streams: the dense
model, the pruned model as it is stored, and the model with the uniform masks of the same scores. At the end, each of
the two is compared with the dense model through the head. Sets of too little text, or of older versions, have none.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from besa_cli.checkpoint.manifests import HeldOut
from besa_cli.decoder.decoder import Decoder
from besa_cli.ops import losses
from besa_cli.stream.memory_model import CHECK_TOKENS
from besa_cli.stream.propagation import advance, batches, embed
from besa_cli.stream.rank_share import Store

Stream = Literal["dense", "pruned", "uniform"]

STREAMS: tuple[Stream, ...] = ("dense", "pruned", "uniform")


class HeldOutCheck:
    """Streams of the held-out samples through the model, block by block.

    Parameters
    ----------
    decoder : Decoder
    tokens : Tensor of shape (samples, seqlen)
    batch : int
        Samples in a pass.
    state : mapping of name to Tensor
        State after some finished blocks, from `state`; empty at the beginning.
    """

    def __init__(self, decoder: Decoder, tokens: Tensor, batch: int, state: Mapping[str, Tensor]) -> None:
        self._decoder, self._tokens, self._batch = decoder, tokens, batch
        first = None if state else embed(decoder, tokens, batch).cpu()
        self._hidden: dict[Stream, Tensor] = {name: state[name] if first is None else first.clone() for name in STREAMS}

    def advance(self, stream: Stream, index: int) -> None:
        """Pass one of the streams through the loaded block `index`."""
        advance(self._decoder, index, self._hidden[stream], self._tokens, self._batch)

    def state(self, blocks: int) -> dict[str, Tensor]:
        """Return a copy of the streams after so many finished blocks."""
        copies = {str(name): hidden.clone() for name, hidden in self._hidden.items()}
        return {**copies, "blocks": torch.tensor(blocks)}

    def figures(self) -> HeldOut:
        """Return the mean divergence per token of the two models from the dense one, after the last block.

        A figure is None if logits are beyond the range of the compute dtype.
        """
        dense = self._hidden["dense"]
        found = {
            name: mean_divergence(self._decoder, self._hidden[name], dense, self._tokens)
            for name in ("pruned", "uniform")
        }
        finite = {name: value if math.isfinite(value) else None for name, value in found.items()}
        return {"samples": len(self._tokens), "kl": finite["pruned"], "kl_uniform": finite["uniform"]}


def stored_divergence(decoder: Decoder, store: Store, tokens: Tensor, batch: int) -> float:
    """Compute `mean_divergence` of the blocks in a store from the decoder's own.

    Parameters
    ----------
    decoder : Decoder
        The dense model.
    store : Store
        All blocks.
    tokens : Tensor of shape (samples, seqlen)
    batch : int
        Samples in a pass.
    """
    dense = embed(decoder, tokens, batch)
    hidden = dense.clone()
    for index in range(len(decoder)):
        decoder.load(index)
        advance(decoder, index, dense, tokens, batch)
        decoder.load(index, store.read(index))
        advance(decoder, index, hidden, tokens, batch)
        decoder.drop(index)
    return mean_divergence(decoder, hidden, dense, tokens)


def mean_divergence(decoder: Decoder, hidden: Tensor, dense: Tensor, tokens: Tensor) -> float:
    """Compute the mean divergence per token of a model's predictions from those of the dense one, in nats.

    Parameters
    ----------
    decoder : Decoder
        Its head turns the hidden states into logits.
    hidden, dense : Tensors of shape (samples, seqlen, hidden)
        Outputs of the last block in the model and in the dense one.
    tokens : Tensor of shape (samples, seqlen)
    """
    total = 0.0
    with torch.no_grad():
        for sample in batches(len(tokens), 1):
            for positions in batches(tokens.shape[1], CHECK_TOKENS):
                found, expected = (
                    decoder.finish(states[sample].to(decoder.device), tokens[sample], positions)
                    for states in (hidden, dense)
                )
                total += float(losses.divergence(found, expected))
    return total / tokens.numel()
