"""What a simulation is asked for, and what it comes to."""

from dataclasses import dataclass
from typing import Literal

from besa_cli.errors import UsageError

Bound = Literal["compute", "memory"]


@dataclass(frozen=True, kw_only=True)
class SimulationSettings:
    """What is left open by mask and machine.

    Attributes
    ----------
    threshold : float
        A column is denser if it keeps more than this share of its rows.
    search : bool
        Move the threshold as the released program does (`search`); that formula always does.
    batch : int
        Input vectors that go through the linear together.
    weight_bits : int or None
        Bits of a stored weight; None leaves it to the accelerator.
    """

    threshold: float = 0.5
    search: bool = False
    batch: int = 1
    weight_bits: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(
                f"--threshold {self.threshold} is no share of the rows", "give a number from 0 to 1, as 0.5"
            )
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch} is no number of inputs", "give 1 or more")
        if self.weight_bits is not None and not 1 <= self.weight_bits <= 64:
            raise UsageError(f"--word-bits {self.weight_bits} is no width of a weight", "give 4, 8, 16 or 32")


@dataclass(frozen=True, kw_only=True)
class Split:
    """How ViTCoD divides a linear between its two engines.

    Attributes
    ----------
    columns : int
        Denser columns.
    kept : int
        Kept weights in them.
    lanes : tuple of int
        Lanes of the denser engine; one number for each patch that the linear is cut into.
    denser_cycles, sparser_cycles : int
        What each engine takes; summed over patches.
    """

    columns: int
    kept: int
    lanes: tuple[int, ...]
    denser_cycles: int
    sparser_cycles: int

    @property
    def slower(self) -> int:
        """Cycles of the slower engine, of a linear in one patch."""
        return max(self.denser_cycles, self.sparser_cycles)


@dataclass(frozen=True, kw_only=True)
class Roof:
    """The two bounds of a roofline, and the bytes behind the second.

    Attributes
    ----------
    compute_cycles, memory_cycles : int
        What the array and the memory take; the larger one is the cost.
    value_bytes, mask_bytes, scale_bytes : int
        The stored weights, as often as they are read.
    input_bytes, output_bytes : int
        Activations, inputs as often as they are read.
    dense_bytes : int
        All bytes of the dense linear.
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
        """All bytes over the memory's bus."""
        return self.value_bytes + self.mask_bytes + self.scale_bytes + self.input_bytes + self.output_bytes

    @property
    def bound(self) -> Bound:
        """Which of the two holds."""
        return "memory" if self.memory_cycles > self.compute_cycles else "compute"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one linear costs on one machine.

    Attributes
    ----------
    dense_cycles : int
        What it would take if no weight were zero.
    cycles : int
    useful : int
        Multiplications with weights that are not zero.
    pes : int
        Processing elements of the machine.
    """

    dense_cycles: int
    cycles: int
    useful: int
    pes: int
    split: Split | None = None
    roof: Roof | None = None

    @property
    def speedup(self) -> float:
        """Dense cycles by cycles; infinite where nothing is left to do."""
        return self.dense_cycles / self.cycles if self.cycles else float("inf")

    @property
    def utilisation(self) -> float:
        """Share of the array's cycles that multiply with a weight that is not zero; 0 where nothing is left to do."""
        return self.useful / (self.cycles * self.pes) if self.cycles else 0.0
