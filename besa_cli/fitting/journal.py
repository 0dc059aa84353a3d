"""Record of a search on disk: what is searched in, the probe, and every measured candidate."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from besa_cli.checkpoint import manifests
from besa_cli.errors import BesaError
from besa_cli.fitting.search import Quality
from besa_cli.fitting.space import Candidate
from besa_cli.system import disk, records

FILE = "fit.json"


@records.strict
@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Record of a measured candidate.

    Attributes
    ----------
    sparsity, bits
        The candidate.
    bytes : int
        Size of the packed model.
    bits_per_weight : float
        Packed size of the linears per weight.
    perplexity, kl, same_token : float
        As `besa eval ppl` gives them.
    seconds : float
        Duration of the commands that made and measured it.
    run : str
        Name of its run directory.
    """

    sparsity: Annotated[float, Ge(0), Lt(1)]
    bits: int | None
    bytes: int
    bits_per_weight: float
    perplexity: Annotated[float, Gt(0)]
    kl: Annotated[float, Ge(0)]
    same_token: float
    seconds: float
    run: str

    @property
    def candidate(self) -> Candidate:
        """The candidate."""
        return Candidate(self.sparsity, self.bits)

    @property
    def quality(self) -> Quality:
        """Its quality."""
        return Quality(self.perplexity, self.kl)


@records.strict
@dataclass(frozen=True, kw_only=True)
class Journal:
    """State of a search.

    Attributes
    ----------
    recipe : dict
        All options that a candidate's quality depends on, the model's digest among them.
    dense : float
        Perplexity of the dense model.
    probed : tuple of (sparsity, bits, divergence)
        Divergences that the probe gave.
    attempts : tuple of Attempt
        In the order in which they were measured.
    """

    recipe: dict[str, str | int | None]
    versions: dict[str, str]
    dense: Annotated[float, Gt(0)]
    probed: tuple[tuple[float, int | None, float], ...] = ()
    attempts: tuple[Attempt, ...] = field(default=())

    @property
    def divergences(self) -> dict[Candidate, float]:
        """Divergences that the probe gave."""
        return {Candidate(sparsity, bits): value for sparsity, bits, value in self.probed}

    @property
    def measured(self) -> dict[Candidate, Quality]:
        """Quality of every measured candidate."""
        return {attempt.candidate: attempt.quality for attempt in self.attempts}

    def with_probe(self, divergences: Mapping[Candidate, float]) -> "Journal":
        """Return the state after a probe of more candidates."""
        found = {**self.divergences, **divergences}
        listed = tuple((candidate.sparsity, candidate.bits, value) for candidate, value in found.items())
        return replace(self, probed=listed)

    def with_attempt(self, attempt: Attempt) -> "Journal":
        """Return the state after another measurement."""
        return replace(self, attempts=(*self.attempts, attempt))


def load(directory: Path, recipe: Mapping[str, str | int | None]) -> Journal | None:
    """Load the search of a directory, or return None if there is none.

    Raises
    ------
    BesaError
        The file is damaged, or the search had other options.
    """
    file = directory / FILE
    if not file.exists():
        return None
    found = records.read(Journal, file, f"delete {file}; what the runs beside it hold is not measured again")
    names = [name for name in {**recipe, **found.recipe} if recipe.get(name) != found.recipe.get(name)]
    if names:
        name = names[0]
        raise BesaError(
            f"{directory} holds a search with {name} {found.recipe.get(name)}, not {recipe.get(name)}",
            "give another --run, or the same options",
        )
    return found


def save(journal: Journal, directory: Path) -> None:
    """Write the state of a search."""
    file = directory / FILE
    disk.sweep(file)
    disk.write_json(file, {"format": manifests.FORMAT, "kind": "fit", **asdict(journal)})
