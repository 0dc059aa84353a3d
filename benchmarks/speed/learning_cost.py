"""Tables of what learning costs, and of how good the model is after how much work.

From the lines of `bench_prune.py` and `time_to_quality.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quality.ablation_report import ALIKE
from benchmarks.results import recorded
from benchmarks.shared.besa_runs import RESULTS

SPEED = RESULTS / "bench_prune.jsonl"
QUALITY = RESULTS / "time_to_quality.jsonl"
PARTS = {
    ("step", 1): "one learning step of one sample ÷ a plain forward and backward pass of the block",
    ("step", 4): "the same, four samples a step",
    ("whole", "block"): "all of `prune --target block` ÷ a plain pass without gradients of all blocks over the samples",
    ("whole", "stream"): "all of `prune --target stream` ÷ the same",
    ("state", None): "ranks, mixtures, gradients and moments, bytes a weight",
}

STEPS = 128  # of the run whose perplexity is to be reached

Line = Mapping[str, Any]


def speed(lines: Sequence[Line]) -> str:
    """What learning costs, the newest line of every part in every dtype at every hidden size."""
    found = newest(lines)
    sizes = sorted({hidden for *_, hidden in found})
    rows = [f"| | | {' | '.join(f'hidden {size:,}' for size in sizes)} |", "|---|---|" + "---|" * len(sizes)]
    for part, title in PARTS.items():
        for dtype in sorted({dtype for known, dtype, _ in found if known == part}):
            cells = [_cell(found.get((part, dtype, size))) for size in sizes]
            rows.append(f"| {title} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(rows)


def newest(lines: Sequence[Line]) -> dict[tuple[tuple[str, Any], str, int], Line]:
    """The lines that count, by part, dtype and hidden size."""
    return {
        ((line["what"], line.get("batch", line.get("target"))), line["dtype"], line["hidden"]): line for line in lines
    }


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    if line["what"] == "state":
        return recorded.marked(f"{line['bytes_per_weight']:.2f}", line)
    spread = f"{line['lowest']:.2f} to {line['highest']:.2f}" if "lowest" in line else "one turn"
    return recorded.marked(f"{line['ratio']:.2f} ({spread}; {line['cpu_ratio']:.2f})", line)


def quality(lines: Sequence[Line]) -> str:
    """How good the pruned model is after how much work, and what the least work is that is good enough."""
    alike = [line for line in lines if _how(line) == _how(lines[-1]) and not recorded.is_old(line)]
    newest = {(line["options"]["window"], line["samples"]): line for line in alike}
    rows = ["| `--window` | samples, a step each | perplexity | passes | GB |", "|---|---|---|---|---|"]
    for (window, samples), line in sorted(newest.items(), reverse=True):
        spent = f"{line['units']:.2f} | {line['peak_memory'] / 1e9:.2f}"
        rows.append(f"| {window} | {samples} | {line['perplexity']:.2f} | {spent} |")
    losses = sorted({str(line["options"].get("loss", "token")) for line in newest.values()})
    how = ["", f"All with {', '.join(f'`--loss {loss}`' for loss in losses)}."] if losses else []
    return "\n".join([*rows, *how, *_reached(newest)])


def _how(line: Line) -> tuple[str, Line]:
    """What cells of one table have in common: the dtype, and all options but the window."""
    return line["dtype"], {**line["options"], "window": None}


def _reached(cells: Mapping[tuple[str, int], Line]) -> list[str]:
    """The cell with least work that reaches the perplexity of 128 steps a block, or as good as reaches it."""
    if ("block", STEPS) not in cells:
        return []
    goal = cells["block", STEPS]["perplexity"]
    said = []
    for limit, words in ((1.0, "reaches"), (1 + ALIKE, f"comes within {ALIKE:.0%} of")):
        least = min((line for line in cells.values() if line["perplexity"] <= goal * limit), key=lambda x: x["units"])
        what = f"`--window {least['options']['window']}`, {least['samples']} samples, {least['perplexity']:.2f}"
        said.append(f"the least that {words} it takes {least['units']:.2f} passes ({what})")
    return ["", f"{STEPS} steps a block end at {goal:.2f}; {'; '.join(said)}."]


def made(lines: list[Line]) -> str:
    made: dict[tuple[str, int, str], set[str]] = {}
    for (part, _, hidden), line in newest(lines).items():
        name = " ".join(str(word) for word in (*part, hidden) if word is not None)
        made.setdefault((line["commit"], line["threads"], line["machine"]), set()).add(name)
    return "".join(
        f"- commit {commit}, {threads} threads, {machine}: {', '.join(sorted(names))}\n"
        for (commit, threads, machine), names in sorted(made.items())
    )
