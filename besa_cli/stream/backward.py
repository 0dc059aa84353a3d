"""Backward pass through a decoder that runs block by block: gradients of the end's loss at every block.

The forward pass keeps the inputs of every block, in memory or in files. The backward pass goes from the last block to
the first, loads each, computes it again and passes the gradient on, so that the weights of one block are enough.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from besa_cli.decoder.conduct import require_finite
from besa_cli.decoder.decoder import Decoder
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.memory_model import HEAD_TOKENS
from besa_cli.stream.propagation import batches, embed
from besa_cli.system import compute

HeadLoss = Callable[[Tensor, slice, slice], Tensor]  # logits, samples, positions: the sum of their losses
Visit = Callable[[int, Mapping[str, Tensor] | None, Tensor], None]  # block, its weights, the gradient at its outputs


class Blocks(Protocol):
    """Source of the blocks of a pass, one after the other."""

    def load(self, index: int) -> Mapping[str, Tensor] | None:
        """Load block `index`; return weights to use instead of its own, by parameter name inside the block."""

    def drop(self, index: int) -> None:
        """Free block `index`, which is not needed until it is loaded again."""


class StoredBlocks(Blocks):
    """Blocks of a decoder's own checkpoint.

    Parameters
    ----------
    decoder : Decoder
    resident : bool
        Let blocks stay loaded until `drop_all`.
    """

    def __init__(self, decoder: Decoder, *, resident: bool = False) -> None:
        self._decoder, self._resident = decoder, resident
        self._loaded: set[int] = set()

    def load(self, index: int) -> Mapping[str, Tensor] | None:
        """Load block `index` with its own weights, unless it is loaded."""
        if index not in self._loaded:
            self._read(index)
            self._loaded.add(index)
        return None

    def _read(self, index: int) -> None:
        """Read block `index` from the checkpoint."""
        self._decoder.load(index)

    def drop(self, index: int) -> None:
        """Free block `index`, unless it stays."""
        if not self._resident:
            self._decoder.drop(index)
            self._loaded.discard(index)

    def drop_all(self) -> None:
        """Free every block."""
        for index in self._loaded:
            self._decoder.drop(index)
        self._loaded.clear()


class BackwardStream:
    """Passes of one set of samples through a decoder, forward and backward.

    Parameters
    ----------
    decoder : Decoder
    blocks : Blocks
    tokens : Tensor of shape (samples, seqlen)
    batch : int
        Samples in a pass.
    activations : ActivationStore, optional
        Storage of the inputs of all blocks; in memory by default.
    depth : int, optional
        Number of blocks to pass, from the first on; all by default.
    """

    def __init__(
        self,
        decoder: Decoder,
        blocks: Blocks,
        tokens: Tensor,
        *,
        batch: int = 1,
        activations: ActivationStore | None = None,
        depth: int | None = None,
    ) -> None:
        self._depth = len(decoder) if depth is None else depth
        self._decoder, self._blocks, self._tokens, self._batch = decoder, blocks, tokens, batch
        self._activations = activations or ActivationStore()
        self._inputs: list[Tensor] = []

    @property
    def inputs(self) -> list[Tensor]:
        """Inputs of the blocks that the backward pass has not reached, each of shape (samples, seqlen, hidden)."""
        return list(self._inputs)

    def forward(self) -> Tensor:
        """Return the outputs of the last block, of shape (samples, seqlen, hidden), and keep the inputs of all blocks.

        Raises
        ------
        BesaError
            An output contains NaN or infinity.
        """
        hidden = embed(self._decoder, self._tokens, self._batch, self._activations)
        self._inputs = []
        for index in range(self._depth):
            self._inputs.append(hidden)
            weights = self._blocks.load(index)
            output = self._activations.empty(hidden.shape, hidden.dtype)
            with torch.no_grad(), compute.repeated_passes():
                for part in batches(len(hidden), self._batch):
                    passed = self._decoder.forward(
                        index, hidden[part].to(self._decoder.device), self._tokens[part], weights
                    )
                    require_finite(passed, f"block {index}")
                    output[part] = passed
            self._blocks.drop(index)
            self._activations.release()
            hidden = output
        return hidden

    def head_gradient(self, outputs: Tensor, loss: HeadLoss) -> tuple[float, Tensor]:
        """Return a loss of the logits, summed, and its gradient at the outputs of the last block, of their shape.

        Parameters
        ----------
        outputs : Tensor of shape (samples, seqlen, hidden)
        loss : function of logits of shape (samples, positions, vocabulary), of the samples and of the positions
            Returns the sum of the losses of these positions.
        """
        gradient = self._activations.empty(outputs.shape, outputs.dtype)
        total, seqlen = 0.0, self._tokens.shape[1]
        for part in batches(len(outputs), self._batch):
            states = outputs[part].to(self._decoder.device).detach().requires_grad_()
            for positions in batches(seqlen, HEAD_TOKENS):
                logits = self._decoder.finish(states, self._tokens[part], positions, gradients=True)
                value = loss(logits, part, positions)
                value.backward()
                total += float(value.detach())
            if states.grad is not None:
                gradient[part] = states.grad
        self._activations.release()
        return total, gradient

    def backward(self, gradient: Tensor, visit: Visit) -> None:
        """Pass a gradient from the outputs of the last block back to the first, overwriting it.

        Parameters
        ----------
        gradient : Tensor of shape (samples, seqlen, hidden)
            Gradient at the outputs of the last block; at the end that at the inputs of the first.
        visit : function of the block's number, its weights with their gradients, and the gradient at its outputs
            Called for each block, from the last to the first, before the block is dropped. The weights are those that
            `Blocks.load` returned; those that require a gradient have one.
        """
        for index in reversed(range(self._depth)):
            weights = self._blocks.load(index)
            inputs = self._inputs.pop()
            arrived = self._activations.empty(gradient.shape, gradient.dtype)
            arrived.copy_(gradient)
            with compute.repeated_passes():
                for part in batches(len(inputs), self._batch):
                    states = inputs[part].to(self._decoder.device).detach().requires_grad_()
                    output = self._decoder.forward(index, states, self._tokens[part], weights)
                    output.backward(gradient[part].to(output))
                    if states.grad is not None:
                        gradient[part] = states.grad
            visit(index, weights, arrived)
            self._blocks.drop(index)
            self._activations.release()
