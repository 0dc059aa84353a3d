"""Figures of the tokens of a window: losses of a model, and the comparison with the predictions of its baseline."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from besa_cli.decoder.decoder import Decoder
from besa_cli.ops.losses import compare_predictions
from besa_cli.stream.memory_model import HEAD_TOKENS


def token_losses(decoder: Decoder, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return −log p of every token but the first, fp32.

    Parameters
    ----------
    hidden : Tensor of shape (samples, seqlen, hidden)
        Output of the last block.
    tokens : Tensor of shape (samples, seqlen)

    Returns
    -------
    Tensor of shape (samples, seqlen − 1)
    """
    return torch.cat([_losses(decoder, hidden, tokens, part)[1] for part in _parts(tokens)], dim=1)


class TokenComparison(NamedTuple):
    """Figures of every token but the first, in a model and its baseline; each has the shape (samples, seqlen − 1).

    Attributes
    ----------
    losses, baseline : Tensor
        −log p of the model and of its baseline, fp32.
    divergences : Tensor
        KL(baseline ‖ model) in nats, fp32.
    same : Tensor
        True where both predict the same token as the most likely one.
    """

    losses: Tensor
    baseline: Tensor
    divergences: Tensor
    same: Tensor


def compare_tokens(model: tuple[Decoder, Tensor], baseline: tuple[Decoder, Tensor], tokens: Tensor) -> TokenComparison:
    """Compute the losses of a model and of its baseline, and compare their predictions, some positions at a time.

    Parameters
    ----------
    model, baseline : (Decoder, Tensor of shape (samples, seqlen, hidden))
        The decoder that turns the outputs of the last block into logits, and these outputs.
    tokens : Tensor of shape (samples, seqlen)
    """
    parts = [_compared(model, baseline, tokens, part) for part in _parts(tokens)]
    return TokenComparison(*(torch.cat(figures, dim=1) for figures in zip(*parts, strict=True)))


def _compared(
    model: tuple[Decoder, Tensor], baseline: tuple[Decoder, Tensor], tokens: Tensor, part: slice
) -> TokenComparison:
    logits, own = _losses(*model, tokens, part)
    target, others = _losses(*baseline, tokens, part)
    return TokenComparison(own, others, *compare_predictions(logits, target))


def _parts(tokens: Tensor) -> Iterator[slice]:
    """Yield slices of the positions that predict a token, of which the last has none to predict."""
    last = tokens.shape[1] - 1
    for start in range(0, last, HEAD_TOKENS):
        yield slice(start, min(start + HEAD_TOKENS, last))


def _losses(decoder: Decoder, hidden: Tensor, tokens: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Return the logits of some positions, of shape (samples, positions, vocabulary), and their losses, both fp32."""
    logits = decoder.finish(hidden, tokens, part).float()
    return logits, _cross_entropy(logits, tokens, part)


def losses_of_logits(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return −log p of every token but the first from the logits of a whole model, some positions at a time, fp32.

    Parameters
    ----------
    logits : Tensor of shape (samples, seqlen, vocabulary)
    tokens : Tensor of shape (samples, seqlen)

    Returns
    -------
    Tensor of shape (samples, seqlen − 1)
    """
    return torch.cat([_cross_entropy(logits[:, part].float(), tokens, part) for part in _parts(tokens)], dim=1)


def _cross_entropy(logits: Tensor, tokens: Tensor, part: slice) -> Tensor:
    """Return −log p of the tokens behind some positions, from their logits in fp32."""
    targets = tokens[:, part.start + 1 : part.stop + 1].to(logits.device)
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape)  # flattened first, because torch would copy logits to move their classes
