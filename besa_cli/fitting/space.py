"""Space of candidates: sparsities and bits of a model, with the bytes that each takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from besa_cli.errors import UsageError
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid

HIGHEST = 0.9  # sparsity of a candidate


@dataclass(frozen=True, order=True)
class Candidate:
    """Compressed model that may be made.

    Attributes
    ----------
    sparsity : float
        Share of the linears' weights that are pruned, in [0, 1).
    bits : int, optional
        Bits of a code; None leaves the kept weights in the model's own dtype.
    """

    sparsity: float
    bits: int | None = None

    @property
    def name(self) -> str:
        """Name of its run directory."""
        kept = f"sparsity-{100 * self.sparsity:g}" if self.sparsity else "dense"
        return kept if self.bits is None else f"{kept}-bits-{self.bits}"


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Shapes of a model, from which the sizes of its compressed forms follow.

    Attributes
    ----------
    linears : tuple of (rows, cols)
        Linears that are pruned.
    value_bits : int
        Bits of a weight in the model's own dtype.
    rest : int
        Bytes of all other tensors.
    """

    linears: tuple[tuple[int, int], ...]
    value_bits: int
    rest: int

    @property
    def weights(self) -> int:
        """Number of weights in the linears."""
        return sum(rows * cols for rows, cols in self.linears)

    def linear_bits(self, candidate: Candidate, grid: Grid | None) -> int:
        """Return the packed size of the linears: values, scales, and a mask where it saves space."""
        total = 0
        for rows, cols in self.linears:
            kept = rows * cols - round(candidate.sparsity * rows * cols)
            if grid is None:
                total += affine.value_bits(rows * cols, kept, self.value_bits)
            else:
                total += affine.bits_needed(rows, cols, kept, grid)
        return total


@dataclass(frozen=True, kw_only=True)
class Space:
    """Candidates of a search: a line of sparsities for each number of bits.

    Attributes
    ----------
    shapes : Shapes
    sparsities : tuple of float
        In ascending order.
    grids : mapping of bits to Grid
        None, for the model's own dtype, has no grid.
    """

    shapes: Shapes
    sparsities: tuple[float, ...]
    grids: Mapping[int | None, Grid | None]

    @cached_property
    def lines(self) -> dict[int | None, list[Candidate]]:
        """The candidates by their bits, the least sparse first; those that are no smaller than one less sparse are out.

        A mask costs a bit a weight: with few bits and a low sparsity it saves nothing.
        """
        found: dict[int | None, list[Candidate]] = {}
        for bits in self.grids:
            line: list[Candidate] = []
            for sparsity in self.sparsities:
                candidate = Candidate(sparsity, bits)
                if not line or self.bytes(candidate) < self.bytes(line[-1]):
                    line.append(candidate)
            found[bits] = line
        return found

    @cached_property
    def candidates(self) -> list[Candidate]:
        """All candidates."""
        return [candidate for line in self.lines.values() for candidate in line]

    def bytes(self, candidate: Candidate) -> int:
        """Return the size of the packed model."""
        return self.shapes.rest + -(-self._linear_bits(candidate) // 8)

    def bits_per_weight(self, candidate: Candidate) -> float:
        """Return the packed size of the linears per weight."""
        return self._linear_bits(candidate) / max(self.shapes.weights, 1)

    def _linear_bits(self, candidate: Candidate) -> int:
        return self.shapes.linear_bits(candidate, self.grids[candidate.bits])


def sparsities(step: float) -> tuple[float, ...]:
    """Return 0, `step`, 2·`step`, … up to `HIGHEST`.

    Raises
    ------
    UsageError
        The step is not in [0.01, 0.5], or has more than three digits.
    """
    exact = Fraction(str(step)) if 0.01 <= step <= 0.5 else Fraction(0)
    if not exact or (1000 % exact.denominator):
        raise UsageError(f"--step {step} is not a step between sparsities", "give 0.05, or another from 0.01 to 0.5")
    return tuple(float(number * exact) for number in range(int(Fraction(str(HIGHEST)) / exact) + 1))
