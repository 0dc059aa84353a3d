"""Hidden states passed through the embedding and through loaded blocks, batch by batch."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from besa_cli.decoder.conduct import require_finite
from besa_cli.decoder.decoder import Decoder
from besa_cli.stream.activations import ActivationStore
from besa_cli.system import compute


def batches(samples: int, batch: int) -> Iterator[slice]:
    """Slices of at most `batch` samples that cover `samples`."""
    for start in range(0, samples, batch):
        yield slice(start, min(start + batch, samples))


def embed(decoder: Decoder, tokens: Tensor, batch: int, shelf: ActivationStore | None = None) -> Tensor:
    """What enters the first block: Tensor of shape (samples, seqlen, hidden), from the shelf if there is one."""
    return collected((decoder.embed(tokens[part]) for part in batches(len(tokens), batch)), len(tokens), shelf)


def collected(parts: Iterable[Tensor], samples: int, shelf: ActivationStore | None) -> Tensor:
    """The parts one after the other in one tensor."""
    if shelf is None:
        return torch.cat(list(parts))
    whole, done = None, 0
    for part in parts:
        if whole is None:
            whole = shelf.empty((samples, *part.shape[1:]), part.dtype)
        whole[done : done + len(part)] = part
        done += len(part)
        shelf.release()
    if whole is None:
        raise ValueError("nothing to collect")
    return whole


def advance(
    decoder: Decoder,
    index: int,
    hidden: Tensor,
    tokens: Tensor,
    batch: int,
    on_part: Callable[[slice, Tensor], None] | None = None,
) -> None:
    """Replace the hidden states by the output of the loaded block `index`, in place, batch by batch.

    The hidden states may lie on another device than the block.

    Raises
    ------
    BesaError
        The block gives NaN or infinity.
    """
    with torch.no_grad(), compute.repeated_passes():
        for part in batches(len(hidden), batch):
            output = decoder.forward(index, hidden[part].to(decoder.device), tokens[part])
            require_finite(output, f"block {index}")
            if on_part:
                on_part(part, output)
            hidden[part] = output
