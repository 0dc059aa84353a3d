"""What is said of a block and its linears once they are done."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from annotated_types import Ge

_Count = Annotated[int, Ge(0)]
_Size = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class LinearReport:
    """What was done to one linear: `pruned` weights by the mask, `zeros` in the stored tensor."""

    name: str
    rows: _Size
    cols: _Size
    pruned: _Count
    zeros: _Count

    @property
    def sparsity(self) -> float:
        """Pruned share of the linear's weights."""
        return self.pruned / (self.rows * self.cols)


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """What was done to one block.

    Attributes
    ----------
    error_before, error_after : float or None
        Mean over the calibration tokens of ‖output − target‖² / ‖target‖²: under the uniform mask, or of clipping with
        the nearest codes (methods that compare; over the samples compared), and as delivered.
    learned_loss : float or None
        Mean reconstruction loss of the learning's last tenth of steps.
    kept_uniform : bool
        What was learned was not better than the uniform allocation, or the nearest codes, which were kept.
    resumed : bool
        The block was found finished on disk; `seconds` is then the time of its replay.
    """

    index: _Count
    blocks: _Size
    linears: tuple[LinearReport, ...]
    error_before: float | None
    error_after: float | None
    learned_loss: float | None = None
    kept_uniform: bool = False
    resumed: bool = False
    seconds: float = 0.0
    peak_memory: int = 0

    @property
    def problem(self) -> str:
        """What contradicts itself in the report; empty where nothing does."""
        if not 0 <= self.index < self.blocks:
            return f"block {self.index} of {self.blocks}"
        for linear in self.linears:
            if not linear.pruned <= linear.zeros <= linear.rows * linear.cols:
                size = linear.rows * linear.cols
                return f"{linear.name} with {linear.pruned} pruned and {linear.zeros} zeros of {size} weights"
        return ""

    def record(self) -> dict[str, Any]:
        """The part of the report that is the same whenever and however often the command is run."""
        fields = asdict(self)
        for name in ("resumed", "seconds", "peak_memory"):
            del fields[name]
        return fields

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "BlockReport":
        """The inverse of `record`, of a block that was finished before."""
        linears = tuple(LinearReport(**linear) for linear in record["linears"])
        return cls(**{**record, "linears": linears, "resumed": True})
