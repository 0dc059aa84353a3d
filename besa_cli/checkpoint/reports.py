"""Reports of a finished block and its linears."""

from dataclasses import asdict, dataclass
from typing import Annotated

from annotated_types import Ge

from besa_cli.system.disk import Json, JsonObject

_Count = Annotated[int, Ge(0)]
_Size = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class LinearReport:
    """Report of one linear: weights `pruned` by the mask, and `zeros` in the stored tensor."""

    name: str
    rows: _Size
    cols: _Size
    pruned: _Count
    zeros: _Count

    @property
    def sparsity(self) -> float:
        """Share of the linear's weights that are pruned."""
        return self.pruned / (self.rows * self.cols)


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """Report of one block.

    Attributes
    ----------
    error_before, error_after : float or None
        Mean over the calibration tokens of ‖output − target‖² / ‖target‖². Before: with the uniform mask, or for
        clipping with the nearest codes (only of methods that compare, over the samples compared). After: as stored.
    learned_loss : float or None
        Mean reconstruction loss over the last tenth of the learning steps.
    kept_uniform : bool
        The learned result was not better than the uniform allocation (or the nearest codes), which was kept.
    resumed : bool
        The block was already finished on disk; `seconds` is then the time of its replay.
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
        """Description of the first contradiction in the report; empty if there is none."""
        if not 0 <= self.index < self.blocks:
            return f"block {self.index} of {self.blocks}"
        for linear in self.linears:
            if not linear.pruned <= linear.zeros <= linear.rows * linear.cols:
                size = linear.rows * linear.cols
                return f"{linear.name} with {linear.pruned} pruned and {linear.zeros} zeros of {size} weights"
        return ""

    def record(self) -> JsonObject:
        """Return the part of the report that does not depend on the run: all but times, memory and `resumed`."""
        fields = asdict(self)
        for name in ("resumed", "seconds", "peak_memory"):
            del fields[name]
        return fields

    @classmethod
    def from_record(cls, record: Json) -> "BlockReport":
        """Return the report of a finished block from its `record`."""
        linears = tuple(LinearReport(**linear) for linear in record["linears"])
        return cls(**{**record, "linears": linears, "resumed": True})


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """Report of a pass over the samples.

    Attributes
    ----------
    number : int
        0: before the first pass.
    epochs : int
        Passes in all.
    held_out : float
        KL divergence to the dense model in nats, the mean over the tokens of samples that are not learned from.
    learned : float or None
        The same over the samples of the pass, each before its step.
    resumed : bool
        An earlier run made the pass.
    """

    number: int
    epochs: int
    held_out: float
    learned: float | None = None
    resumed: bool = False
