"""Reconstruction windows: what is pruned together so that its output stays: a block, several blocks, half a block."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from besa_cli.decoder import submodule
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError, UsageError

BLOCK, HALVES = "block", "attn-mlp"
_KEPT = 2  # blocks whose activations are all kept for the backward pass; a wider window computes them twice


class Window(Protocol):
    """What is pruned together.

    Attributes
    ----------
    blocks : range
        The blocks that it lies in.
    linears : dict of name to nn.Linear
        Names are those inside the block; with several blocks each has its block's number before it.
    locations : dict of name to (block, name inside the block)
    """

    blocks: range
    linears: dict[str, nn.Linear]
    locations: dict[str, tuple[int, str]]

    def inputs_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The window's own inputs for what enters its first block."""

    def forward(self, inputs: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output for inputs of shape (samples, seqlen, hidden), with `weights` in place of the linears' own."""

    def output_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The output for what enters its first block."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The windows between two block boundaries, in the order in which they are pruned."""

    blocks: range
    windows: tuple[Window, ...]


class WholeBlocks:
    """One or several whole blocks."""

    def __init__(self, decoder: Decoder, blocks: range) -> None:
        self._decoder, self.blocks = decoder, blocks
        alone = len(blocks) == 1
        self.locations = {
            inner if alone else f"{index}.{inner}": (index, inner)
            for index in blocks
            for inner in decoder.linears(index)
        }
        self.linears = _linears(decoder, self.locations)

    def inputs_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `Window`: the hidden states themselves."""
        return hidden

    def forward(self, inputs: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """See `Window`."""
        hidden = inputs
        for index in self.blocks:
            named = _inside(weights, self.locations, index)
            if named and kept(len(self.blocks)) < len(self.blocks):
                hidden = checkpoint(self._decoder.forward, index, hidden, tokens, named, use_reentrant=False)
            else:
                hidden = self._decoder.forward(index, hidden, tokens, named)
        return hidden

    def output_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `Window`."""
        return self.forward(hidden, tokens)


class _Half:
    """Half a block, which ends with the output of the module `part`."""

    def __init__(self, decoder: Decoder, index: int, part: str) -> None:
        self._decoder, self._index, self._part, self.blocks = decoder, index, part, range(index, index + 1)
        self.locations = {name: (index, name) for name in decoder.linears(index) if name.startswith(f"{part}.")}
        self.linears = _linears(decoder, self.locations)

    def output_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `Window`."""
        return submodule.forward_to(self._decoder, self._index, self._part, hidden, tokens)

    def _inside(self, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        return _inside(weights, self.locations, self._index)


class Attention(_Half):
    """The first half of a block: up to the output of the module `part`."""

    def inputs_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `Window`: the hidden states themselves."""
        return hidden

    def forward(self, inputs: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """See `Window`."""
        return submodule.forward_to(self._decoder, self._index, self._part, inputs, tokens, self._inside(weights))


class MLP(_Half):
    """The second half of a block: the module `part` alone."""

    def inputs_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """See `Window`: what the block hands to the module."""
        return submodule.inputs_of(self._decoder, self._index, self._part, hidden, tokens)

    def forward(self, inputs: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """See `Window`."""
        return submodule.forward_part(self._decoder, self._index, self._part, inputs, self._inside(weights))


def kept(blocks: int) -> int:
    """How many of a window's blocks have their activations in memory at a time while it is learned."""
    return blocks if blocks <= _KEPT else 1


def check(option: str) -> None:
    """Refuse what is no window.

    Raises
    ------
    UsageError
        Neither ``block`` nor ``attn-mlp`` nor a number of blocks.
    """
    if option not in (BLOCK, HALVES) and not (option.isdecimal() and int(option)):
        raise UsageError(
            f"--window '{option}' is neither block nor attn-mlp nor a number of blocks",
            "2 reconstructs two blocks together",
        )


def segments(decoder: Decoder, option: str) -> list[Segment]:
    """All windows of the model for ``--window block|attn-mlp|N``.

    Raises
    ------
    BesaError
        Half blocks are asked for, and a block has no such two.
    """
    check(option)
    if option == HALVES:
        return [_halves(decoder, index) for index in range(len(decoder))]
    width = 1 if option == BLOCK else int(option)
    spans = [range(start, min(start + width, len(decoder))) for start in range(0, len(decoder), width)]
    return [Segment(blocks=blocks, windows=(WholeBlocks(decoder, blocks),)) for blocks in spans]


def sizes(segments: Sequence[Segment]) -> Iterator[int]:
    """Weights in the linears of each window, in order."""
    for segment in segments:
        for window in segment.windows:
            yield sum(linear.weight.numel() for linear in window.linears.values())


def _halves(decoder: Decoder, index: int) -> Segment:
    names = list(dict.fromkeys(name.split(".")[0] for name in decoder.linears(index)))
    direct = [name for name in names if name in decoder.linears(index)]
    if len(names) != 2 or direct:
        raise BesaError(
            f"a block of {type(decoder.model).__name__} has its linears in {', '.join(names)}, "
            "not in an attention and an MLP module",
            "--window block reconstructs the whole block",
        )
    first, second = names
    windows = (Attention(decoder, index, first), MLP(decoder, index, second))
    return Segment(blocks=range(index, index + 1), windows=windows)


def _linears(decoder: Decoder, locations: Mapping[str, tuple[int, str]]) -> dict[str, nn.Linear]:
    return {name: decoder.linears(index)[inner] for name, (index, inner) in locations.items()}


def _inside(
    weights: Mapping[str, Tensor] | None, locations: Mapping[str, tuple[int, str]], index: int
) -> dict[str, Tensor] | None:
    """The weights of one block, by parameter name inside it."""
    if weights is None:
        return None
    return {
        f"{inner}.weight": weights[name]
        for name, (block, inner) in locations.items()
        if block == index and name in weights
    }
