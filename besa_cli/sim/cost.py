"""Settings and results of a simulation."""

from dataclasses import dataclass
from typing import Literal

from besa_cli.errors import UsageError

Bound = Literal["compute", "memory"]


@dataclass(frozen=True, kw_only=True)
class SimulationSettings:
    """Settings of a simulation beside the mask and the accelerator.

    Attributes
    ----------
    threshold : float
        A column is denser if it keeps more than this share of its rows.
    search : bool
        Search the threshold as the released program does (`columns.searched`); ``vitcod-released`` always does.
    batch : int
        Input vectors that the linear processes together.
    weight_bits : int or None
        Bits of a stored weight; None uses the accelerator's.
    """

    threshold: float = 0.5
    search: bool = False
    batch: int = 1
    weight_bits: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(
                f"--threshold {self.threshold} is not a share of the rows", "give a number from 0 to 1, as 0.5"
            )
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch} is not a number of inputs", "give 1 or more")
        if self.weight_bits is not None and not 1 <= self.weight_bits <= 64:
            raise UsageError(f"--word-bits {self.weight_bits} is not a width of a weight", "give 4, 8, 16 or 32")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Division of a linear between ViTCoD's two engines.

    Attributes
    ----------
    columns : int
        Number of denser columns.
    kept : int
        Kept weights in the denser columns.
    lanes : tuple of int
        Lanes of the denser engine, one number for each patch that the linear is cut into.
    denser_cycles, sparser_cycles : int
        Cycles of each engine, summed over patches.
    """

    columns: int
    kept: int
    lanes: tuple[int, ...]
    denser_cycles: int
    sparser_cycles: int

    @property
    def slower(self) -> int:
        """Cycles of the slower engine, for a linear in one patch."""
        return max(self.denser_cycles, self.sparser_cycles)


@dataclass(frozen=True, kw_only=True)
class Roof:
    """The compute and memory bounds of a roofline, and the bytes that the memory transfers.

    Attributes
    ----------
    compute_cycles, memory_cycles : int
        Cycles of the array and of the memory; the larger one is the cost.
    value_bytes, mask_bytes, scale_bytes : int
        Bytes of the stored weights, counted for every read.
    input_bytes, output_bytes : int
        Bytes of the activations; inputs counted for every read.
    dense_bytes : int
        All bytes that the dense linear transfers.
    """

    compute_cycles: int
    memory_cycles: int
    value_bytes: int
    mask_bytes: int
    scale_bytes: int
    input_bytes: int
    output_bytes: int
    dense_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All bytes over the memory bus."""
        return self.value_bytes + self.mask_bytes + self.scale_bytes + self.input_bytes + self.output_bytes

    @property
    def bound(self) -> Bound:
        """The larger bound: "memory" or "compute"."""
        return "memory" if self.memory_cycles > self.compute_cycles else "compute"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one linear on one accelerator.

    Attributes
    ----------
    dense_cycles : int
        Cycles of the dense linear, with no weight zero.
    cycles : int
        Cycles of the pruned linear.
    useful : int
        Multiplications by nonzero weights.
    pes : int
        Processing elements of the accelerator.
    split, roof : Split or None, Roof or None
        Details of the ViTCoD dataflows and of the roofline.
    """

    dense_cycles: int
    cycles: int
    useful: int
    pes: int
    split: Split | None = None
    roof: Roof | None = None

    @property
    def speedup(self) -> float:
        """`dense_cycles` / `cycles`; infinite if `cycles` is 0."""
        return self.dense_cycles / self.cycles if self.cycles else float("inf")

    @property
    def utilisation(self) -> float:
        """Share of the array's multiplications that use a nonzero weight; 0 if `cycles` is 0."""
        return self.useful / (self.cycles * self.pes) if self.cycles else 0.0
