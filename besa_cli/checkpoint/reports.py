"""Reports of a finished block and its linears."""

from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated

from annotated_types import Ge

from besa_cli.checkpoint.tensor_places import TensorPlace
from besa_cli.system.disk import Json, JsonObject

_Count = Annotated[int, Ge(0)]
_Size = Annotated[int, Ge(1)]


@dataclass(frozen=True, kw_only=True)
class LinearReport:
    """Report of one linear.

    Attributes
    ----------
    name : str
        Name inside the block.
    rows, cols : int
    pruned, zeros : int
        Weights pruned by the mask, and zeros of the stored matrix.
    tensor : str, optional
        Name of the stored tensor, if it does not follow from the name of the linear.
    expert : int, optional
        Number of the part of a stored tensor that holds a part for each expert.
    transposed : bool
        True if the matrix is stored as (cols, rows).
    unreached : bool
        True if no token of the samples reached this linear, of an expert; it was pruned by magnitude.
    """

    name: str
    rows: _Size
    cols: _Size
    pruned: _Count
    zeros: _Count
    tensor: str | None = None
    expert: _Count | None = None
    transposed: bool = False
    unreached: bool = False

    @property
    def sparsity(self) -> float:
        """Share of the linear's weights that are pruned."""
        return self.pruned / (self.rows * self.cols)

    def place(self, index: int, stored: Collection[str]) -> TensorPlace | None:
        """Return the place of the linear among the stored tensors of block `index`, by name; None if it has none."""
        ending = f".{index}.{self.name}.weight"
        tensor = self.tensor or next((name for name in stored if f".{name}".endswith(ending)), None)
        if tensor is None or tensor not in stored:
            return None
        return TensorPlace(tensors=(tensor,), expert=self.expert, transposed=self.transposed)

    def record(self) -> JsonObject:
        """Return the report, without the fields that most linears leave at their defaults."""
        values = asdict(self)
        for field in fields(self):
            if field.default is not MISSING and values[field.name] == field.default:
                del values[field.name]
        return values


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
    curve : tuple of float
        Loss over all learning steps in at most 50 points, each the mean of as many steps; empty without learning.
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
    curve: tuple[float, ...] = ()
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
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("resumed", "seconds", "peak_memory"):
            del values[name]
        if not self.curve:
            del values["curve"]
        return {**values, "linears": [linear.record() for linear in self.linears]}

    @classmethod
    def from_record(cls, record: Json) -> "BlockReport":
        """Return the report of a finished block from its `record`."""
        linears = tuple(LinearReport(**linear) for linear in record["linears"])
        curve = tuple(record.get("curve", ()))
        return cls(**{**record, "linears": linears, "curve": curve, "resumed": True})


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
    part : float
        Part of the way from the start at which `held_out` was found.
    resumed : bool
        An earlier run made the pass.
    """

    number: int
    epochs: int
    held_out: float
    learned: float | None = None
    part: float = 1.0
    resumed: bool = False
