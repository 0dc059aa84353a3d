"""`besa fit`: find the sparsity and the bits that meet a target."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from besa_cli import models
from besa_cli.commands.shared import fit_view, option_groups, options, panels, subcommand
from besa_cli.commands.shared.fit_view import UNQUANTIZED
from besa_cli.console import Console, human_bytes, human_divergence
from besa_cli.errors import BesaError, UsageError, unknown
from besa_cli.pruners import PRUNERS

if TYPE_CHECKING:
    from besa_cli.decoder.decoder import Decoder
    from besa_cli.fitting.journal import Attempt, Journal
    from besa_cli.fitting.recipe import Recipe
    from besa_cli.fitting.search import Aim, Search, Targets
    from besa_cli.fitting.space import Candidate, Space
    from besa_cli.models import Model
    from besa_cli.ops.affine import Grid

_CONTEXT = 2048  # tokens per window of the evaluation
_BITS = (UNQUANTIZED, "8", "4", "3")

DEFAULT_RUN = Path("besa-fit")

FitRunOption = Annotated[
    Path,
    panels.RUN(
        "--run",
        "Directory of the search, with a run directory for each candidate.",
        metavar="DIR",
        callback=options.expand_utf8,
    ),
]


@dataclass(frozen=True, kw_only=True)
class TargetGroup:
    """Targets, which are met all together."""

    max_ppl: Annotated[
        float | None,
        panels.TARGETS("--max-ppl", "Highest perplexity on the text of --eval-text.", min=0.0, metavar="PPL"),
    ] = None
    max_kl: Annotated[
        float | None,
        panels.TARGETS(
            "--max-kl", "Highest KL divergence from the dense model there, in nats per token.", min=0.0, metavar="KL"
        ),
    ] = None
    size: Annotated[
        str | None,
        panels.TARGETS("--size", "Most bytes of the packed model, e.g. 100MB; all tensors count.", metavar="SIZE"),
    ] = None
    bits_per_weight: Annotated[
        float | None,
        panels.TARGETS(
            "--bits-per-weight", "Most bits of a weight of the linears, with scales and masks.", min=0.0, metavar="BITS"
        ),
    ] = None
    find: Annotated[
        Literal["smallest", "sparsest", "best"] | None,
        panels.TARGETS(
            "--find", "What to find among the models that meet the targets.", "best with a size, else smallest"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SpaceGroup:
    """Candidates to choose from, and how they are made."""

    bits: Annotated[
        list[str] | None,
        panels.CANDIDATES(
            "--bits",
            f"Bits to try: 2, 3, 4, 8, or {UNQUANTIZED} for the model's own dtype. Repeatable.",
            ", ".join(_BITS),
            metavar="N",
        ),
    ] = None
    group_size: Annotated[
        str, panels.CANDIDATES("--group-size", "Columns that share a scale.", metavar="N|channel")
    ] = "128"
    step: Annotated[
        float, panels.CANDIDATES("--step", "Step between two sparsities, from 0 to 0.9.", metavar="SHARE")
    ] = 0.05
    method: Annotated[str, panels.CANDIDATES("--method", "Method of besa prune.", metavar="NAME")] = "besa"
    preset: Annotated[
        Literal["quick", "best"],
        panels.CANDIDATES(
            "--preset",
            "quick: besa prune, besa quantize --method gptq; best: besa prune --preset best, besa tune, then the same.",
        ),
    ] = "quick"


@dataclass(frozen=True, kw_only=True)
class EvaluationGroup:
    """Measurement of each candidate."""

    text: Annotated[
        str, panels.MEASUREMENT("--eval-text", "Text to measure on: wikitext2, ptb, c4 or a file.", metavar="DATASET")
    ] = "wikitext2"
    limit: Annotated[int | None, panels.MEASUREMENT("--eval-limit", "Windows to measure.", min=1, metavar="N")] = 16
    context: Annotated[
        int | None,
        panels.MEASUREMENT(
            "--eval-seqlen", "Tokens per window.", "2048, or the model's maximum if less", min=2, metavar="N"
        ),
    ] = None


@option_groups.expand
def fit(
    *,
    model: options.ModelOption = options.DEFAULT_MODEL,
    targets: TargetGroup,
    space: SpaceGroup,
    evaluation: EvaluationGroup,
    samples: option_groups.SampleGroup,
    compute: option_groups.ComputeGroup,
    run: FitRunOption = DEFAULT_RUN,
    dry_run: options.DryRunOption = False,
    config: options.ConfigOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Find the model that meets a target: the smallest, the sparsest or the best of many sparsities and bits.

    Each candidate that is tried is a run directory of its own, which the other commands take. Re-run to resume; with
    other targets the search goes on from what is measured.

    Examples:

        besa fit --max-ppl 25 --data bundled --samples 32 --seqlen 512
        besa fit --bits-per-weight 3.1 --preset best
        besa fit --size 100MB --max-kl 0.3 --bits 4 --bits 3
    """
    console = Console(json=as_json)
    from besa_cli.decoder import supported
    from besa_cli.fitting import probing
    from besa_cli.fitting import space as spaces
    from besa_cli.system import lock

    wanted = _targets(targets)
    sparsities, grids = spaces.sparsities(space.step), _grids(space)
    _require_method(space)
    source = models.resolve(model, notify=console.note, check_config=supported.require)
    decoder = _decoder(source, compute)
    candidates = spaces.Space(shapes=probing.shapes(decoder), sparsities=sparsities, grids=grids)
    _require_reachable(candidates, wanted)
    if dry_run:
        fit_view.show_space(candidates, wanted, console)
        return
    recipe = _recipe(model, source, space, evaluation, samples, compute, run)
    aim = targets.find or ("best" if wanted.limits_size else "smallest")
    with lock.hold(run, f"besa fit --run {run}"):
        begun = _begin(recipe, candidates, decoder, console)
        del decoder
        search, found = _search(begun, recipe, candidates, wanted, aim, console)
    fit_view.show(search, found, candidates, recipe, console)


def _targets(given: TargetGroup) -> "Targets":
    """Check the targets.

    Raises
    ------
    UsageError
        There is none, or a value is out of range.
    """
    from besa_cli.fitting.search import Targets

    limits = {"max_ppl": given.max_ppl, "max_kl": given.max_kl, "bits_per_weight": given.bits_per_weight}
    for name, value in limits.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(
                f"--{name.replace('_', '-')} {value} is not a positive number", "give one, or leave it out"
            )
    found = Targets(**limits, size=options.size_of(given.size, "--size"))
    if found == Targets():
        raise UsageError(
            "no target is given", "give --max-ppl, --max-kl, --size or --bits-per-weight, or several of them"
        )
    return found


def _grids(given: SpaceGroup) -> "dict[int | None, Grid | None]":
    """Return the grid of each number of bits.

    Raises
    ------
    UsageError
        A value is not a number of bits, or is given twice.
    """
    from besa_cli.ops import affine

    found: dict[int | None, Grid | None] = {}
    for text in given.bits or _BITS:
        if text != UNQUANTIZED and not text.isdecimal():
            raise UsageError(f"--bits '{text}' is neither a number of bits nor {UNQUANTIZED}", "4 is the usual choice")
        bits = None if text == UNQUANTIZED else int(text)
        if bits in found:
            raise UsageError(f"--bits {text} is given twice", "leave one of the two out")
        found[bits] = None if bits is None else affine.grid(bits, given.group_size, symmetric=True)
    return found


def _require_method(given: SpaceGroup) -> None:
    """Check the method of pruning.

    Raises
    ------
    UsageError
        It is unknown, or has no such preset.
    """
    if given.method not in PRUNERS:
        raise unknown("method", given.method, PRUNERS)
    if given.preset == "best" and given.method != "besa":
        raise UsageError(
            f"--preset best and --method {given.method} exclude each other: the preset is one of besa's",
            "leave one of the two out",
        )


def _decoder(source: "Model", compute: option_groups.ComputeGroup) -> "Decoder":
    from besa_cli.decoder.decoder import Decoder
    from besa_cli.system import compute as machine

    device = machine.device(compute.device)
    return Decoder(source.directory, device, machine.dtype(compute.dtype, device), quick=True)


def _require_reachable(space: "Space", targets: "Targets") -> None:
    """Check that some candidate is small enough.

    Raises
    ------
    BesaError
        None is; names the smallest.
    """
    if any(targets.fit_in(space, candidate) for candidate in space.candidates):
        return
    smallest = min(space.candidates, key=space.bytes)
    asked = [f"--size {human_bytes(targets.size)}"] if targets.size is not None else []
    asked += [f"--bits-per-weight {targets.bits_per_weight:g}"] if targets.bits_per_weight is not None else []
    raise BesaError(
        f"{' and '.join(asked)} cannot be met: the smallest candidate, {fit_view.in_words(smallest)}, takes "
        f"{human_bytes(space.bytes(smallest))}, {space.bits_per_weight(smallest):.2f} bits per weight",
        "give a larger one, or fewer --bits",
    )


def _recipe(
    model: str,
    source: "Model",
    space: SpaceGroup,
    evaluation: EvaluationGroup,
    samples: option_groups.SampleGroup,
    compute: option_groups.ComputeGroup,
    run: Path,
) -> "Recipe":
    from besa_cli.checkpoint import inspection, weights
    from besa_cli.decoder import architecture
    from besa_cli.fitting.recipe import Recipe

    longest = architecture.maximum_length(architecture.config_of(source.directory)) or _CONTEXT
    options.size_of(compute.max_memory)
    memory = [] if compute.max_memory is None else ["--max-memory", compute.max_memory]
    return Recipe(
        model=model,
        digest=weights.check_source(weights.Weights(source.directory)),
        directory=run,
        method=space.method,
        best=space.preset == "best",
        group_size=space.group_size,
        text=evaluation.text,
        windows=evaluation.limit,
        context=evaluation.context or min(_CONTEXT, longest),
        samples=inspection.option_words(samples.given()),
        seed=samples.seed,
        data_dir=None if samples.data_dir is None else str(samples.data_dir),
        compute=["--device", compute.device, "--dtype", compute.dtype],
        memory=memory,
    )


def _begin(recipe: "Recipe", space: "Space", decoder: "Decoder", console: Console) -> "Journal":
    """Return the search of the directory; begin it with the dense model's perplexity and the probe if it is new."""
    from besa_cli.calibration import calibration_set
    from besa_cli.checkpoint import manifests
    from besa_cli.fitting import journal as journals
    from besa_cli.fitting import probing
    from besa_cli.fitting.space import Candidate

    found = journals.load(recipe.directory, recipe.facts)
    if found is None:
        subcommand.call(recipe.calibrate(), output="discarded")
        result = _evaluate(recipe, Candidate(0.0))
        found = journals.Journal(recipe=recipe.facts, versions=manifests.versions(), dense=result["perplexity"])
        journals.save(found, recipe.directory)
    missing = [candidate for candidate in probing.probed(space) if candidate not in found.divergences]
    if missing:
        tokens = calibration_set.load(recipe.dense_run / "calibration").tokens
        with console.blocks(f"probe of {len(missing)} candidates", len(decoder)) as progress:
            began = time.perf_counter()

            def advance(done: int, total: int, phase: str) -> None:
                progress.advance(done - 1, (time.perf_counter() - began) / done)

            probed = probing.divergences(decoder, tokens, space, missing, on_step=advance)
        found = found.with_probe(probed)
        journals.save(found, recipe.directory)
    return found


def _search(
    journal: "Journal", recipe: "Recipe", space: "Space", targets: "Targets", aim: "Aim", console: Console
) -> "tuple[Search, Journal]":
    """Measure candidates until the search has ended."""
    from besa_cli.fitting import journal as journals
    from besa_cli.fitting.search import Search

    while True:
        search = Search(space, targets, aim, probed=journal.divergences, dense=journal.dense, measured=journal.measured)
        candidate = search.next()
        if candidate is None:
            return search, journal
        console.note(
            f"trying {fit_view.in_words(candidate)}: {human_bytes(space.bytes(candidate))}, predicted KL "
            f"{human_divergence(search.predicted(candidate))}"
        )
        journal = journal.with_attempt(_measure(candidate, recipe, space))
        journals.save(journal, recipe.directory)


def _measure(candidate: "Candidate", recipe: "Recipe", space: "Space") -> "Attempt":
    """Make a candidate and measure it."""
    from besa_cli.fitting.journal import Attempt

    began = time.perf_counter()
    for words in recipe.make(candidate):
        subcommand.call(words, output="discarded")
    result = _evaluate(recipe, candidate)
    return Attempt(
        sparsity=candidate.sparsity,
        bits=candidate.bits,
        bytes=space.bytes(candidate),
        bits_per_weight=space.bits_per_weight(candidate),
        perplexity=result["perplexity"],
        kl=result["kl"],
        same_token=result["same_token"],
        seconds=time.perf_counter() - began,
        run=candidate.name,
    )


def _evaluate(recipe: "Recipe", candidate: "Candidate") -> dict[str, Any]:
    """Return the result of `besa eval ppl` for a candidate."""
    printed = json.loads(subcommand.call(recipe.evaluate(candidate), output="returned"))
    result: dict[str, Any] = printed["results"][0]
    return result
