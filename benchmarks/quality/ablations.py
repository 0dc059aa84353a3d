"""The paper's ablations on any model, by the real commands: Tables 5 and 6, Figs. 3 and 4, row- against layer-wise.

    python -m benchmarks.quality.ablations --work DIR                              # all of it, on the demo model
    python -m benchmarks.quality.ablations --work DIR --only window epochs         # these experiments, in this order
    python -m benchmarks.quality.ablations --list  # what is left, and about how long it takes
    python -m benchmarks.quality.ablations --report --samples 32 ...  # write the tables and plots of what is there

Typed again it goes on: a finished cell is a line of ablations.jsonl and is not measured again, an interrupted one goes
on where `besa prune` goes on. A cell that serves several experiments is measured once a seed. The seed draws the
calibration samples and leads the learning; a file of token ids is taken as it is, whatever the seed. A page is on one
model, data and windows, takes all seeds that are there, and names the words that write it anew; what is measured on
others needs a directory of its own, --out.
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import ablation_report
from benchmarks.quality.ablation_plan import DENSE, SEEDS, Cell, Line, Setup, experiments, label, left, measured, plan
from benchmarks.shared.besa_runs import RESULTS, append_line, besa, commit, machine, read_lines, spent
from besa_cli.system import compute

LINES, PAGE, FIGURES = "ablations.jsonl", "ABLATIONS.md", "figures"
COMMITTED = Setup(data=("c4_en_train_first1000.jsonl",), samples=32, dtype="bfloat16")  # what the committed page is on
_KEPT = ("besa.json", "timing.jsonl", "model-*.json")  # of a pruned model, once it is measured
_REFUSED = (1, 2)  # exit codes of `besa`: it could not, or was asked for nonsense; others mean that it was stopped


def place(setup: Setup, work: Path) -> Path:
    """The directory of one setup's runs."""
    about = setup.record()
    parts = [about["model"], *about["data"], setup.seqlen, f"{setup.windows or 'all'}x{setup.context}", setup.dtype]
    return work / "-".join(str(part).replace("/", "--") for part in parts)


def measure(cell: Cell, setup: Setup, sets: Sequence[str], work: Path) -> dict[str, Any]:
    """Calibrate, prune, tune where that is asked for, and evaluate one cell; returns its line."""
    if cell == DENSE:
        return {**_asked(cell, setup), **_evaluated(["--model", setup.model], setup, sets), **_made()}
    run, calibration = place(setup, work) / cell.name, _calibration(cell, setup, work)
    words = [*cell.setting.words(), "--seed", str(cell.seed), "--calibration", str(calibration), "--run", str(run)]
    where = ["--dtype", setup.dtype, "--device", setup.device]
    stage = besa("prune", "--model", setup.model, *where, *words)
    if cell.setting.tune_epochs:
        how = ["--epochs", str(cell.setting.tune_epochs), "--seed", str(cell.seed), "--calibration", str(calibration)]
        besa("tune", "--run", str(run), *where, *how)
    evaluated = _evaluated(["--no-baseline", "--run", str(run)], setup, sets)
    seconds, peak_memory = spent(run / "pruned")
    if cell.setting.tune_epochs:
        tuning, peak = spent(run / "tuned")
        seconds, peak_memory = seconds + tuning, max(peak_memory, peak)
    return {
        **_asked(cell, setup),
        **evaluated,
        "counts": {**stage["counts"], "blocks": stage["blocks"]},
        "seconds": round(seconds, 1),
        "peak_memory": peak_memory,
        "model_digest": stage["model"]["digest"],
        **{name: stage[name] for name in ("calibration", "compute", "versions")},
        **_made(),
    }


def _asked(cell: Cell, setup: Setup) -> dict[str, Any]:
    return {
        "setup": setup.record(),
        "setting": cell.setting.record(),
        "seed": cell.seed,
        "options": cell.setting.options(),
        "methods": cell.setting.methods(),
    }


def _made() -> dict[str, str]:
    return {"machine": machine(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}


def _calibration(cell: Cell, setup: Setup, work: Path) -> Path:
    """The samples of one seed, the same for all methods."""
    run = place(setup, work) / f"calibration-{cell.setting.samples}-seed-{cell.seed}"
    if not (run / "calibration" / "besa.json").exists():
        data = [word for name in setup.data for word in ("--data", name)]
        sizes = ["--samples", str(cell.setting.samples), "--seqlen", str(setup.seqlen)]
        besa("calibrate", "--model", setup.model, *data, *sizes, "--seed", str(cell.seed), "--run", str(run))
    return run / "calibration"


def _evaluated(subject: Sequence[str], setup: Setup, sets: Sequence[str]) -> dict[str, Any]:
    """Perplexity on every evaluation set, and the seconds it took."""
    start = time.perf_counter()
    limit = [] if setup.windows is None else ["--limit", str(setup.windows)]
    how = ["--seqlen", str(setup.context), "--dtype", setup.dtype, "--device", setup.device]
    results = besa("eval", "ppl", *sets, *limit, *how, *subject)["results"]
    perplexity = {label(name): result["perplexity"] for name, result in zip(sets, results, strict=True)}
    return {"perplexity": perplexity, "evaluation_seconds": round(time.perf_counter() - start, 1)}


def drop_weights(run: Path) -> None:
    """Leave only the small files of a measured model, under a name that `besa prune` takes for no model."""
    stage, report = run / "pruned", run / "report"
    shutil.rmtree(run / "tuned", ignore_errors=True)
    if stage.exists():
        shutil.rmtree(report, ignore_errors=True)
        stage.rename(report)
    for file in report.glob("*"):
        if not any(file.match(pattern) for pattern in _KEPT):
            file.unlink()


def passes(cell: Cell) -> int:
    """About how many samples go forward through the model: an epoch of learning costs as much as three dense passes."""
    epochs = cell.setting.epochs if cell.setting.method == "besa" else 0
    return cell.setting.samples * (3 * epochs + 2)


def estimate(cells: Sequence[Cell], found: Mapping[Cell, Line]) -> tuple[float, list[Cell]]:
    """Seconds that cells will take, from the finished ones of the same method; and the cells that none speaks for."""
    seconds: defaultdict[str, float] = defaultdict(float)
    work: defaultdict[str, int] = defaultdict(int)
    for cell, line in found.items():
        if cell != DENSE:
            seconds[cell.setting.method] += line["seconds"]
            work[cell.setting.method] += passes(cell)
    evaluation = statistics.mean([line["evaluation_seconds"] for line in found.values()] or [0.0])
    total = 0.0
    for cell in cells:
        if known := work[cell.setting.method]:
            total += seconds[cell.setting.method] / known * passes(cell) + evaluation
    return total, [cell for cell in cells if not work[cell.setting.method]]


def listing(
    setup: Setup, chosen: Sequence[str], seeds: Sequence[int], sets: Sequence[str], found: Mapping[Cell, Line]
) -> str:
    """What is done and left of every experiment (shared cells count once in the last row), and the time it takes."""
    known = experiments(setup.samples)
    wanted = {"dense": [DENSE]} | {name: plan([known[name]], seeds) for name in chosen}
    wanted["together"] = [DENSE, *plan([known[name] for name in chosen], seeds)]
    rows = [f"{'experiment':12} {'cells':>6} {'done':>6} {'left':>6}"]
    for name, cells in wanted.items():
        todo = len(left(cells, found, sets))
        rows.append(f"{name:12} {len(cells):6} {len(cells) - todo:6} {todo:6}")
    seconds, unknown = estimate(left(wanted["together"][1:], found, sets), found)
    methods = " and ".join(sorted({cell.setting.method for cell in unknown}))
    rest = f", without {len(unknown)} cells of {methods}: none of these is finished yet" if unknown else ""
    return "\n".join([*rows, f"about {seconds / 3600:.2f} hours left{rest}"])


def measure_all(cells: Sequence[Cell], setup: Setup, sets: Sequence[str], work: Path, lines: Path) -> int:
    """Measure cell after cell, each kept as soon as it is finished; returns how many `besa` refused."""
    refused = 0
    for number, cell in enumerate(cells, start=1):
        print(f"[{number} of {len(cells)}] {cell.name}", flush=True)
        try:
            line = measure(cell, setup, sets, work)
        except subprocess.CalledProcessError as error:
            if error.returncode not in _REFUSED:
                raise
            refused += 1
            continue
        append_line(lines, line)
        drop_weights(place(setup, work) / cell.name)
        print(json.dumps(line["perplexity"]), flush=True)
    return refused


def refusal(lines: Sequence[Line], setup: Setup, *, report: bool) -> str | None:
    """Why a page on this setup would take the place of one on another; None where it does not."""
    same = [line for line in lines if line["setup"] == setup.record()]
    pruned = [line for line in same if line["setting"]["method"] != DENSE.setting.method]
    based = not report or not pruned or any(line["setting"]["samples"] == setup.samples for line in pruned)
    if not lines or (same and based):
        return None
    there = sorted({json.dumps(line["setup"]) for line in lines})
    counts = sorted({line["setting"]["samples"] for line in lines} - {DENSE.setting.samples})
    return (
        f"{LINES} has {', '.join(there)} with {', '.join(map(str, counts))} samples, "
        f"and not {json.dumps(setup.record())} with {setup.samples}: name the same words, or another --out"
    )


def write_report(setup: Setup, out: Path) -> None:
    """Write the page, and the plots where matplotlib is there."""
    found = measured(read_lines(out / LINES), setup)
    paper = json.loads((RESULTS / "paper.json").read_text())
    (out / PAGE).write_text(ablation_report.markdown(setup, found, paper))
    try:
        ablation_report.draw(setup, found, paper, out / FIGURES)
    except ImportError as error:
        print(f"no plots were drawn: {error}; pip install matplotlib, then --report", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default, names = Setup(), list(experiments(1))
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=default.model)
    made.add_argument("--data", nargs="+", default=list(default.data), help="calibration text, as for besa calibrate")
    made.add_argument("--samples", type=int, default=default.samples, help="where they are not what is varied")
    made.add_argument("--seqlen", type=int, default=default.seqlen, help="tokens of a calibration sample")
    made.add_argument("--windows", type=_count, default=default.windows, metavar="N|all", help="windows to evaluate")
    made.add_argument("--context", type=int, default=default.context, help="tokens of such a window")
    made.add_argument("--dtype", choices=("auto", *compute.DTYPES), default="auto", help="in which all is computed")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where all is computed")
    made.add_argument("--sets", nargs="+", default=["wikitext2"], help="what to evaluate on, as for besa eval ppl")
    made.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    made.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    made.add_argument("--work", type=Path, metavar="DIR", help="for the runs; a pruned model at a time")
    made.add_argument("--out", type=Path, metavar="DIR", default=RESULTS, help=f"for {LINES}, {PAGE} and {FIGURES}/")
    made.add_argument("--list", action="store_true", help="only show what is left")
    made.add_argument("--report", action="store_true", help="only write the report")
    return made


def _count(text: str) -> int | None:
    return None if text == "all" else int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, then write the report; returns the exit code."""
    made = parser()
    asked = made.parse_args(arguments)
    fields = {name: getattr(asked, name) for name in ("model", "samples", "seqlen", "context", "windows")}
    device = compute.device(asked.device)
    dtype = compute.name_of(compute.dtype(asked.dtype, device))
    setup = Setup(data=tuple(asked.data), dtype=dtype, device=device.type, **fields)
    lines = read_lines(asked.out / LINES)
    found = measured(lines, setup)
    if not asked.list and (why := refusal(lines, setup, report=asked.report)):
        made.error(why)
    if asked.list:
        print(listing(setup, asked.only, asked.seeds, asked.sets, found))
        return 0
    refused = 0
    if not asked.report:
        if asked.work is None:
            made.error("--work DIR is needed to measure")
        cells = [DENSE, *plan([experiments(setup.samples)[name] for name in asked.only], asked.seeds)]
        todo = left(cells, found, asked.sets)
        for cell in set(cells) - set(todo):  # one whose weights a kill has left
            drop_weights(place(setup, asked.work) / cell.name)
        refused = measure_all(todo, setup, asked.sets, asked.work, asked.out / LINES)
    write_report(setup, asked.out)
    if refused:
        print(f"{refused} cells could not be measured; besa said why above", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the command under way is ended, too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
