"""Propagation of hidden states through the embedding and through loaded blocks, batch by batch."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from besa_cli.decoder.conduct import require_finite
from besa_cli.decoder.decoder import Decoder
from besa_cli.stream.activations import ActivationStore
from besa_cli.system import compute


def batches(samples: int, batch: int) -> Iterator[slice]:
    """Yield consecutive slices of at most `batch` samples that cover `samples`."""
    for start in range(0, samples, batch):
        yield slice(start, min(start + batch, samples))


def embed(decoder: Decoder, tokens: Tensor, batch: int, activations: ActivationStore | None = None) -> Tensor:
    """Return the input of the first block, of shape (samples, seqlen, hidden), allocated by `activations` if given."""
    return concatenate((decoder.embed(tokens[part]) for part in batches(len(tokens), batch)), len(tokens), activations)


def concatenate(parts: Iterable[Tensor], samples: int, activations: ActivationStore | None) -> Tensor:
    """Concatenate tensors along their first dimension, `samples` in all, in memory from `activations` if given."""
    if activations is None:
        return torch.cat(list(parts))
    output, done = None, 0
    for part in parts:
        if output is None:
            output = activations.empty((samples, *part.shape[1:]), part.dtype)
        output[done : done + len(part)] = part
        done += len(part)
        activations.release()
    if output is None:
        raise ValueError("there are no tensors to concatenate")
    return output


def advance(
    decoder: Decoder,
    index: int,
    hidden: Tensor,
    tokens: Tensor,
    batch: int,
    on_batch: Callable[[slice, Tensor], None] | None = None,
) -> None:
    """Overwrite the hidden states with the output of the loaded block `index`, batch by batch.

    The hidden states may be on another device than the block. `on_batch` gets each slice and its output.

    Raises
    ------
    BesaError
        The output contains NaN or infinity.
    """
    with torch.no_grad(), compute.repeated_passes():
        for part in batches(len(hidden), batch):
            output = decoder.forward(index, hidden[part].to(decoder.device), tokens[part])
            require_finite(output, f"block {index}")
            if on_batch:
                on_batch(part, output)
            hidden[part] = output
