"""Quantization methods: one file each, with `Options` and the function `quantize(block, grid, options) -> Decision`.

`Options` derives from `besa_cli.stream.method.MethodOptions` and says what a job has to know before it starts: the
memory needed, and whether calibration samples are. A new method is a file in this folder and a line in `QUANTIZERS`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from besa_cli.choices import GivenOptions
    from besa_cli.ops.affine import Grid
    from besa_cli.stream.block import Block, Decision
    from besa_cli.stream.method import MethodOptions

QUANTIZERS: dict[str, str] = {
    "rtn": "round to nearest",
    "gptq": "column by column, the surviving weights make up for the error",
    "clip": "learned clipping: how far each group's grid reaches, so that the block keeps its output",
}

# As `besa_cli.pruners.VERSIONS`.
VERSIONS: dict[str, int] = {"gptq": 2, "clip": 2}


class QuantizeFunction(Protocol):
    """Function `quantize` of a method's module."""

    def __call__(self, block: "Block", grid: "Grid", options: "MethodOptions") -> "Decision":
        """Decide the codes of a block; pruned weights stay exactly zero."""


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """A quantization method with its options and grid; see `besa_cli.stream.method.Method`."""

    name: str
    options: "MethodOptions"
    grid: "Grid"
    quantize: QuantizeFunction

    def decide(self, block: "Block") -> "Decision":
        """Decide the codes of a block."""
        return self.quantize(block, self.grid, self.options)


def load(name: str, grid: "Grid", given: "GivenOptions") -> Quantizer:
    """Resolve a quantization method.

    Parameters
    ----------
    name : str
        A key of `QUANTIZERS`.
    grid : Grid
        Grid that weights are put on.
    given : mapping
        The method's own options that were given; the others keep their defaults.

    Raises
    ------
    UsageError
        The method is unknown, it lacks one of the options, or a value is invalid.
    """
    from besa_cli.stream.method import resolve

    module, options = resolve("quantizers", QUANTIZERS, name, given)
    return Quantizer(name=name, options=options, grid=grid, quantize=module.quantize)
