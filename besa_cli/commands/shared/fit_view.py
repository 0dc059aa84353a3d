"""Output of `besa fit`: the candidates, what was tried, and the answer."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from besa_cli.console import Console, human_bytes, human_divergence, human_perplexity, human_seconds, human_share
from besa_cli.errors import BesaError

if TYPE_CHECKING:
    from besa_cli.fitting.journal import Journal
    from besa_cli.fitting.recipe import Recipe
    from besa_cli.fitting.search import Search, Targets
    from besa_cli.fitting.space import Candidate, Space

UNQUANTIZED = "none"  # bits of a candidate in the model's own dtype


def in_words(candidate: "Candidate") -> str:
    """Name a candidate by its sparsity and bits."""
    bits = "" if candidate.bits is None else f", {candidate.bits} bits"
    return f"sparsity {human_share(candidate.sparsity)}{bits}"


def show_space(space: "Space", targets: "Targets", console: Console) -> None:
    """Show the candidates of each line that are small enough."""
    listed = [
        {**asdict(candidate), "bytes": space.bytes(candidate), "bits_per_weight": space.bits_per_weight(candidate)}
        for candidate in space.candidates
        if targets.fit_in(space, candidate)
    ]
    rows = [
        (
            UNQUANTIZED if each["bits"] is None else each["bits"],
            human_share(each["sparsity"]),
            human_bytes(each["bytes"]),
            f"{each['bits_per_weight']:.3f}",
        )
        for each in listed
    ]
    console.table("", ("bits", "sparsity", "size", "bits per weight"), rows)
    console.line(f"{len(rows)} of {len(space.candidates)} candidates are small enough; as few as needed are made")
    console.emit_json({"candidates": listed})


def show(search: "Search", journal: "Journal", space: "Space", recipe: "Recipe", console: Console) -> None:
    """Show all that was tried, and the answer.

    Raises
    ------
    BesaError
        No candidate meets the targets; names the nearest.
    """
    from besa_cli.fitting.space import Candidate

    answer = search.answer
    rows = [
        (
            f"{'> ' if attempt.candidate == answer else ''}{human_share(attempt.sparsity)}",
            UNQUANTIZED if attempt.bits is None else attempt.bits,
            human_bytes(attempt.bytes),
            f"{attempt.bits_per_weight:.3f}",
            human_perplexity(attempt.perplexity),
            human_divergence(attempt.kl),
            "met" if search.meets(attempt.candidate) else "missed",
            human_seconds(attempt.seconds),
            attempt.run,
        )
        for attempt in sorted(journal.attempts, key=lambda attempt: -attempt.bytes)
    ]
    header = ("sparsity", "bits", "size", "bits per weight", "perplexity", "KL to dense", "targets", "time", "run")
    console.table("", header, rows)
    for bits, candidate in search.left_out.items():
        line = "no quantization" if bits is None else f"{bits} bits"
        console.line(
            f"{line}: not tried; a better answer would have a sparsity of {human_share(candidate.sparsity)} or more, "
            f"with a predicted KL of {human_divergence(search.predicted(candidate))}"
        )
    attempts = [{**asdict(attempt), "meets": search.meets(attempt.candidate)} for attempt in journal.attempts]
    facts = {"directory": str(recipe.directory), "dense": journal.dense, "attempts": attempts, "cost": _cost(journal)}
    if answer is None:
        nearest = search.nearest
        console.emit_json({**facts, "answer": None})
        raise BesaError(
            "the targets cannot be met by any candidate" + _nearest_in_words(nearest, search),
            "relax one of them, or give --preset best",
        )
    run = recipe.run(answer)
    quality = search.measured[answer]
    console.line(
        f"{in_words(answer)}: {human_bytes(space.bytes(answer))}, {space.bits_per_weight(answer):.3f} bits per "
        f"weight, perplexity {human_perplexity(quality.perplexity)} (dense {human_perplexity(journal.dense)})"
    )
    if answer == Candidate(0.0):
        console.line("no smaller candidate meets the targets: that is the dense model itself")
    else:
        console.line(f"it is in {run}: besa export --run {run} --format sparse")
        console.line(_cost_in_words(journal, answer))
    console.emit_json({**facts, "answer": {**asdict(answer), "run": str(run), **quality._asdict()}})


def _cost(journal: "Journal") -> dict[str, float]:
    """Return the number of models of all searches in the directory, and the seconds to make and measure them."""
    return {"models": len(journal.attempts), "seconds": sum(attempt.seconds for attempt in journal.attempts)}


def _cost_in_words(journal: "Journal", answer: "Candidate") -> str:
    """Return one line on the cost of all searches in the directory, beside that of the answer alone."""
    cost = _cost(journal)
    own = sum(attempt.seconds for attempt in journal.attempts if attempt.candidate == answer)
    times = f", {cost['seconds'] / own:.1f} times the answer's own {human_seconds(own)}" if own else ""
    return f"models made and measured so far: {cost['models']:.0f}, in {human_seconds(cost['seconds'])}{times}"


def _nearest_in_words(nearest: "Candidate | None", search: "Search") -> str:
    if nearest is None:
        return ""
    quality = search.measured[nearest]
    return (
        f"; the nearest, {in_words(nearest)}, has perplexity {human_perplexity(quality.perplexity)}, "
        f"KL {human_divergence(quality.kl)}"
    )
