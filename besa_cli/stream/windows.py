"""Reconstruction windows, whose linears are compressed together: a block, several blocks, or half a block."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from besa_cli.decoder import submodule
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError, UsageError

BLOCK, HALVES = "block", "attn-mlp"
_KEPT = 2  # widest window, in blocks, whose activations are all kept for the backward pass; wider ones recompute them


class Window(Protocol):
    """Part of the model whose linears are compressed together so that its output is preserved.

    Attributes
    ----------
    blocks : range
        Blocks in which the window lies.
    linears : dict of name to nn.Linear
        Names inside the block; with several blocks each is prefixed by its block's number.
    locations : dict of name to (block, name inside the block)
    """

    blocks: range
    linears: dict[str, nn.Linear]
    locations: dict[str, tuple[int, str]]

    def inputs_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the window's inputs, computed from the inputs of its first block."""

    def forward(self, inputs: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the output for inputs of shape (samples, seqlen, hidden); `weights` replace the linears' own."""

    def output_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the window's output, computed from the inputs of its first block."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive blocks and the windows that cover them, in order."""

    blocks: range
    windows: tuple[Window, ...]


class WholeBlocks(Window):
    """Window of one or several whole blocks."""

    def __init__(self, decoder: Decoder, blocks: range) -> None:
        self._decoder, self.blocks = decoder, blocks
        single = len(blocks) == 1
        self.locations = {
            inner if single else f"{index}.{inner}": (index, inner)
            for index in blocks
            for inner in decoder.linears(index)
        }
        self.linears = _linears(decoder, self.locations)

    @override
    def inputs_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return hidden

    @override
    def forward(self, inputs: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        hidden = inputs
        for index in self.blocks:
            named = _inside(weights, self.locations, index)
            if named and kept_blocks(len(self.blocks)) < len(self.blocks):
                hidden = checkpoint(self._decoder.forward, index, hidden, tokens, named, use_reentrant=False)
            else:
                hidden = self._decoder.forward(index, hidden, tokens, named)
        return hidden

    @override
    def output_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.forward(hidden, tokens)


class _Half(Window):
    """Half a block, ending with the output of the submodule `part`."""

    def __init__(self, decoder: Decoder, index: int, part: str) -> None:
        self._decoder, self._index, self._part, self.blocks = decoder, index, part, range(index, index + 1)
        self.locations = {name: (index, name) for name in decoder.linears(index) if name.startswith(f"{part}.")}
        self.linears = _linears(decoder, self.locations)

    @override
    def output_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return submodule.forward_to(self._decoder, self._index, self._part, hidden, tokens)

    def _inside(self, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        return _inside(weights, self.locations, self._index)


class Attention(_Half):
    """First half of a block: up to the output of the submodule `part`."""

    @override
    def inputs_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return hidden

    @override
    def forward(self, inputs: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        return submodule.forward_to(self._decoder, self._index, self._part, inputs, tokens, self._inside(weights))


class MLP(_Half):
    """Second half of a block: the submodule `part` alone."""

    @override
    def inputs_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return submodule.inputs_of(self._decoder, self._index, self._part, hidden, tokens)

    @override
    def forward(self, inputs: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        return submodule.forward_part(self._decoder, self._index, self._part, inputs, self._inside(weights))


def kept_blocks(blocks: int) -> int:
    """Return the number of blocks, of a window of `blocks`, whose activations learning holds at the same time."""
    return blocks if blocks <= _KEPT else 1


def check(option: str) -> None:
    """Check that a value of ``--window`` is valid.

    Raises
    ------
    UsageError
        The value is not ``block``, ``attn-mlp`` or a positive number of blocks.
    """
    if option not in (BLOCK, HALVES) and not (option.isdecimal() and int(option)):
        raise UsageError(
            f"--window '{option}' is not block, attn-mlp or a number of blocks",
            "--window 2 reconstructs two blocks together",
        )


def segments(decoder: Decoder, option: str) -> list[Segment]:
    """Split the model into windows, as ``--window block|attn-mlp|N`` requests.

    Raises
    ------
    UsageError
        The option is invalid.
    BesaError
        The option is ``attn-mlp``, but the linears of a block are not in exactly two modules.
    """
    check(option)
    if option == HALVES:
        return [_halves(decoder, index) for index in range(len(decoder))]
    width = 1 if option == BLOCK else int(option)
    ranges = [range(start, min(start + width, len(decoder))) for start in range(0, len(decoder), width)]
    return [Segment(blocks=blocks, windows=(WholeBlocks(decoder, blocks),)) for blocks in ranges]


def sizes(segments: Sequence[Segment]) -> Iterator[int]:
    """Yield the number of weights in the linears of each window, in order."""
    for segment in segments:
        for window in segment.windows:
            yield sum(linear.weight.numel() for linear in window.linears.values())


def budgets(segments: Sequence[Segment], pruned: Sequence[int]) -> list[int]:
    """Return the weights that each window prunes, for those of each block: a window of several prunes their sum.

    Several windows of a block share its number by size.
    """
    counts = []
    for segment in segments:
        left, within = sum(pruned[index] for index in segment.blocks), list(sizes([segment]))
        for number, size in enumerate(within):
            share = round(Fraction(left * size, sum(within[number:])))
            counts.append(share)
            left -= share
    return counts


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
    found = {index: decoder.linears(index) for index in dict.fromkeys(index for index, _ in locations.values())}
    return {name: found[index][inner] for name, (index, inner) in locations.items()}


def _inside(
    weights: Mapping[str, Tensor] | None, locations: Mapping[str, tuple[int, str]], index: int
) -> dict[str, Tensor] | None:
    """Return the weights of one block, by parameter name inside the block."""
    if weights is None:
        return None
    return {
        f"{inner}.weight": weights[name]
        for name, (block, inner) in locations.items()
        if block == index and name in weights
    }
