"""What a job is told to do."""

from collections.abc import Sequence
from typing import Any, Protocol

from besa_cli.choices import Target
from besa_cli.footprint import Held
from besa_cli.ops.affine import Grid
from besa_cli.stream.block import Block, Pruned


class Plan(Protocol):
    """What is asked of a job: see `besa_cli.pruning.Request` and `besa_cli.quantizing.Request`."""

    @property
    def stage(self) -> str:
        """The stage that is made."""

    @property
    def command(self) -> str:
        """The command that makes it."""

    @property
    def device(self) -> str:
        """As on the command line, ``auto`` included."""

    @property
    def dtype(self) -> str:
        """As on the command line, ``auto`` included."""

    @property
    def seed(self) -> int:
        """Seed of every random choice."""

    @property
    def calibration(self) -> str | None:
        """Directory of a calibration set that was named, for the record."""

    @property
    def max_memory(self) -> int | None:
        """Bytes that the process is to stay within; the hidden states go to files where they would not fit."""

    @property
    def window(self) -> str:
        """What is reconstructed together, see `besa_cli.windows.segments`."""

    @property
    def target(self) -> Target:
        """What a window should keep, see `besa_cli.stream.walk.compress`."""

    @property
    def grid(self) -> Grid | None:
        """The grid that weights are put on."""

    @property
    def observes(self) -> bool:
        """Whether anything is decided from calibration samples; where not, none pass through the model."""

    def record(self) -> dict[str, Any]:
        """All options with their values, under the names of the command line."""

    def facts(self) -> dict[str, Any]:
        """What else the manifest says of what is made."""

    def doing(self, model: str) -> str:
        """What is done to a model of this name, in a few words."""

    def budgets(self, sizes: Sequence[int]) -> list[int] | None:
        """Weights that each window prunes, from the windows' numbers of weights; None where none are counted out."""

    def change(self, block: Block) -> Pruned:
        """What becomes of a block."""

    def held(self) -> Held:
        """What the method holds in memory."""
