"""Pruning methods: one file (or folder) each, with `Options` and the function `prune(block, options) -> Decision`.

`Options` derives from `besa_cli.stream.method.MethodOptions` and says what a job has to know before it starts, memory
included. A new method is a file in this folder and a line in `PRUNERS`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from besa_cli.choices import GivenOptions
    from besa_cli.ops.affine import Grid
    from besa_cli.stream.block import Block, Decision
    from besa_cli.stream.method import MethodOptions

PRUNERS: dict[str, str] = {
    "besa": "learned sparsity of every row or linear, so that each block keeps its output (ICLR 2024)",
    "wanda": "|weight| times the norm of its input, compared within each row",
    "sparsegpt": "column by column, the surviving weights make up for the error",
    "magnitude": "|weight|, compared within each row",
}

# Methods whose results have changed since their first version. Raise the number with every change that makes a method
# decide differently by more than rounding: figures of an older version are then marked as old.
VERSIONS: dict[str, int] = {"besa": 4}


class PruneFunction(Protocol):
    """Function `prune` of a method's module."""

    def __call__(self, block: "Block", options: "MethodOptions") -> "Decision":
        """Decide the masks of a block, and its weights where they change."""


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """A pruning method with its options; see `besa_cli.stream.method.Method`."""

    name: str
    options: "MethodOptions"
    prune: PruneFunction

    @property
    def grid(self) -> "Grid | None":
        """Grid that the method puts weights on while it prunes, if any."""
        return self.options.weight_grid()

    def decide(self, block: "Block") -> "Decision":
        """Decide which weights of a block are pruned."""
        return self.prune(block, self.options)


def load(name: str, given: "GivenOptions") -> Pruner:
    """Resolve a pruning method.

    Parameters
    ----------
    name : str
        A key of `PRUNERS`.
    given : mapping
        The method's own options that were given; the others keep their defaults.

    Raises
    ------
    UsageError
        The method is unknown, it lacks one of the options, or a value is invalid.
    """
    from besa_cli.stream.method import resolve

    module, options = resolve("pruners", PRUNERS, name, given)
    return Pruner(name=name, options=options, prune=module.prune)
