"""Figures in the README and docs/, each part generated from recorded lines or computed by the program itself.

A page has a part NAME between `<!-- results:NAME -->` and `<!-- /results -->`; `results.py` writes all of them again.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checks import architectures, whole_experts
from benchmarks.exports import export_sizes
from benchmarks.quality import protocol_a, quant_protocol_a, simulate_table4
from benchmarks.quality.ablation_plan import Cell, Setting, experiments, measured
from benchmarks.quality.ablation_report import Found, perplexity
from benchmarks.quality.ablations import COMMITTED
from benchmarks.quality.ablations import LINES as ABLATIONS
from benchmarks.results import recorded
from benchmarks.shared.besa_runs import RESULTS, ROOT, read_lines
from benchmarks.speed import bench_generate, bench_matvec, bench_scale, larger_models, learning_cost
from besa_cli.ops import affine
from besa_cli.sim import accelerator
from besa_cli.sim.cost import SimulationSettings
from besa_cli.sim.workload import of_mask
from besa_cli.simulation.run import SimulationRequest, costs

TITLES = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "wanda-budget": "Wanda, `--budget model`",
    "wanda-global": "Wanda, `--global-epochs 1`",
    "besa-layer": "BESA, layer-wise",
    "besa-row": "BESA, row-wise",
    "besa-row-window-2": "BESA, row-wise, two blocks at a time",
    "besa-row-budget": "BESA, row-wise, `--budget model`",
    "besa-row-global": "BESA, row-wise, `--global-epochs 1`",
    "wanda-update": "Wanda, `--update tune`",
    "sparsegpt-update": "SparseGPT, `--update tune`",
    "besa-row-update": "BESA, row-wise, `--update tune`",
    "besa-row-global-update": "BESA, row-wise, `--global-epochs 1 --update tune`",
    "wanda-tuned": "Wanda, `besa tune`",
    "sparsegpt-tuned": "SparseGPT, `besa tune`",
    "besa-row-global-tuned": "BESA, row-wise, `--global-epochs 1`, `besa tune`",
    "besa-row-global-update-tuned": "BESA, row-wise, `--global-epochs 1 --update tune`, `besa tune`",
    "besa-row-window-2-global": "BESA, row-wise, two blocks at a time, `--global-epochs 1`",
    "besa-layer-token": "BESA, layer-wise, `--loss token`",
    "besa-row-token": "BESA, row-wise, `--loss token`",
    "besa-row-window-2-token": "BESA, row-wise, two blocks at a time, `--loss token`",
}
HEADLINE = (
    "magnitude",
    "wanda",
    "sparsegpt",
    "besa-row",
    "besa-row-token",
    "besa-row-global",
    "besa-row-global-update",
)
CHANGES = {"sparsegpt": "SparseGPT (changes the weights)"}
_PART = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def pages() -> list[Path]:
    """The pages that have such parts."""
    there = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path for path in there if _PART.search(path.read_text(encoding="utf-8"))]


def names(text: str) -> list[str]:
    """The parts of a page."""
    return [found[2] for found in _PART.finditer(text)]


def rewritten(text: str) -> str:
    """Return a page with all its parts made again.

    Raises
    ------
    KeyError
        It has a part that nothing here makes.
    """
    return _PART.sub(lambda found: f"{found[1]}{recorded.explained(PARTS[found[2]]())}\n{found[3]}", text)


def headline() -> str:
    """Protocol A's table, for the README."""
    titles = TITLES | CHANGES
    return protocol_a.table(protocol_a.found(), {name: titles[name] for name in HEADLINE})


def second_model() -> str:
    """Protocol A's table of the model of another family."""
    return protocol_a.table(protocol_a.found(protocol_a.SECOND), TITLES | CHANGES, protocol_a.SECOND_SAMPLES)


def other_texts() -> str:
    """Protocol A's table of texts that are not WikiText-2."""
    return protocol_a.other_texts(protocol_a.found(), TITLES | CHANGES, 0.6)


def perplexities() -> str:
    """Protocol A's table, its conditions, and what other programs reach on the same rows."""
    found = protocol_a.found()
    made = [line for cell, line in found.items() if cell.setting.samples == protocol_a.BASE.samples]
    method = next((name for name in ("besa-row", "besa-row-token") if protocol_a.of(name, 0.5, found)), "besa-row")
    kept = sum(line["counts"]["blocks_kept_uniform"] for line in protocol_a.of(method, 0.5, found))
    exact = all(abs(line["counts"]["sparsity"] - line["setting"]["sparsity"]) < 1e-6 for line in made)
    assert exact, "a cell has another sparsity than was asked for"
    return (
        f"{protocol_a.table(found, TITLES | CHANGES)}\n\n"
        f"All in {protocol_a.SETUP.dtype}; mean ± sample standard deviation over n seeds, each of which draws other "
        f"rows. Sparsity is exact in every cell; row-wise at 50 % {kept or 'no'} block kept the uniform mask. Other "
        f"programs on the rows of seed 0, not in the same dtype: {_others()}."
    )


def _others() -> str:
    """Perplexities of other programs on the rows of seed 0."""
    found: dict[str, list[str]] = {}
    for line in read_lines(RESULTS / "other_programs.jsonl"):
        program = f"{line['program']} ({line['dtype'] or 'dtype not recorded'})"
        found.setdefault(program, []).append(f"{line['perplexity']:,} at {line['sparsity'] * 100:.2f} %")
    return "; ".join(f"{program}, {', '.join(cells)}" for program, cells in found.items())


def curve() -> str:
    """Protocol A's table with fewer samples, and the sparsities at which BESA is ahead."""
    found = measured(read_lines(RESULTS / ABLATIONS), COMMITTED)
    known = experiments(COMMITTED.samples)
    halves = perplexity(known["window"].settings["BESA", "attn-mlp"], found, "wikitext2")
    return (
        f"{protocol_a.table(found, TITLES | CHANGES, COMMITTED.samples)}\n\n"
        f"Half a block at a time, `--loss token`: {halves or '-'} at 50 %. "
        f"{_compared(known['sparsity'].settings, found)}"
    )


def _compared(settings: Mapping[tuple[str, str], Setting], found: Found) -> str:
    """Number of sparsities at which row-wise BESA is below each other series, seed 0."""
    values: dict[str, dict[str, float]] = {}
    for (series, point), setting in settings.items():
        if line := found.get(Cell(setting=setting, seed=0)):
            values.setdefault(series, {})[point] = line["perplexity"]["wikitext2"]
    own = values.pop("BESA row", {})
    parts = []
    for series, theirs in values.items():
        both = sorted(own.keys() & theirs.keys())
        below = [point for point in both if own[point] < theirs[point]]
        parts.append(f"{series} at {len(below)} of {len(both)}" + _but(both, below))
    if not own:
        return "-"
    highest = max(own)
    ends = ", ".join(f"{series} {theirs[highest]:,.1f}" for series, theirs in values.items() if highest in theirs)
    return (
        f"From {min(own)} to {highest}, row-wise BESA (seed 0, `--loss token`) has a lower perplexity than "
        f"{'; '.join(parts)}. At {highest}: {own[highest]:,.1f}; {ends}."
    )


def _but(both: list[str], below: list[str]) -> str:
    rest = [point for point in both if point not in below]
    return f" (not at {', '.join(rest)})" if rest else ""


def cells() -> str:
    """Protocol A in every dtype: perplexities by the names of the methods, and what each cell took."""
    names = {method: method for method in protocol_a.METHODS}
    parts = []
    for dtype in protocol_a.dtypes():
        found = protocol_a.found(replace(protocol_a.SETUP, dtype=dtype))
        parts.append(f"**In {dtype}**\n\n{protocol_a.table(found, names)}\n\n{protocol_a.cost(found)}")
    return "\n\n".join(parts)


def learning() -> str:
    """Cost of learning by hidden size and dtype, and the commits that measured it."""
    lines: list[recorded.Line] = [*read_lines(learning_cost.SPEED)]
    return f"{learning_cost.speed(lines)}\n\n{learning_cost.made(lines)}".rstrip()


def time_to_quality() -> str:
    """Perplexity by the work spent."""
    return learning_cost.quality([*read_lines(learning_cost.QUALITY)]).rstrip()


def speedups() -> str:
    """Speed-up of the pruned demo model under each dataflow."""
    return simulate_table4.speedups(TITLES)


def table_4() -> str:
    """The paper's Table 4 for the demo model."""
    return simulate_table4.table(TITLES)


def random_gates() -> str:
    """Cycles of LLaMA-7B's gate with random masks."""
    rows, cols, sparsity = simulate_table4.LLAMA_7B["gate"]
    least = rows * cols * (1 - sparsity / 100) / _pes()
    flows = [flow for flow, *_ in simulate_table4.VARIANTS[:3]]
    lines = [
        f"| standard deviation of a column's share | {' | '.join(f'`{flow}`' for flow in flows)} |",
        "|---" * (len(flows) + 1) + "|",
    ]
    for spread, line in sorted(simulate_table4.random_masks().items()):
        cells = [f"{line['cycles'][flow]['gate']:,}" for flow in flows]
        lines.append(f"| {spread:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Its kept weights need {least:,.0f} at least."])


def _pes() -> int:
    return int(accelerator.load("besa").pes)


def impossible() -> str:
    """Number of linears of the demo model that the released formula counts below the possible minimum."""
    stages = simulate_table4.stages()
    counted = [f"{sum(line['impossible'])} with {TITLES[name]}" for name, line in stages.items()]
    blocks = protocol_a.found()
    number = max(line["counts"].get("blocks", 30) for line in blocks.values() if "counts" in line)
    dead = {name: line["dead_neurons"] for name, line in stages.items()}
    free = "none has a dead neuron" if not any(dead.values()) else f"dead neurons: {dead}"
    if not stages:
        return "Not measured yet."
    return (
        f"Of the demo model's {2 * number} gate and up linears at 50 % lie below their limit: "
        f"{', '.join(counted)}. Of these stages {free}."
    )


def memory_bound() -> str:
    """Cycles of a 4096 × 4096 linear, half of it kept, in the array and in the memory."""
    mask = np.random.default_rng(0).random((4096, 4096)) < 0.5
    rows = ["| `--word-bits` | `--batch` | cycles of the array | of the memory | of the dense linear | times faster |"]
    rows.append("|---|---|---|---|---|---|")
    for bits, batch in ((16, 1), (8, 1), (4, 1), (8, 128)):
        request = SimulationRequest(
            func="model",
            dataflows=("roofline",),
            accelerator=accelerator.load("besa"),
            settings=SimulationSettings(batch=batch, weight_bits=bits),
        )
        cost = costs(of_mask(mask, "q"), request)["roofline"]
        assert cost.roof
        about = f"{cost.roof.compute_cycles:,} | {cost.roof.memory_cycles:,} | {cost.dense_cycles:,}"
        rows.append(f"| {bits} | {batch} | {about} | {cost.speedup:.2f} |")
    return "\n".join(rows)


def few_bits() -> str:
    """Protocol A with few bits."""
    found = quant_protocol_a.known()
    show = quant_protocol_a.shown
    rows = ["| | groups of 128 | per channel |", "|---|---|---|"]
    rows.append(f"| dense: {show(found, 'dense')}; half pruned by BESA: {show(found, 'besa')} | | |")
    for kind, title in quant_protocol_a.ROWS.items():
        cells = [show(found, f"{kind}-{grid}") for grid in quant_protocol_a.GRIDS]
        rows.append(f"| {title} | {' | '.join(cells)} |")
    for low, bits in quant_protocol_a.LOWER:
        cells = [f"{method} {show(found, f'{method}-{low}-g128')}" for method in quant_protocol_a.METHODS]
        rows.append(f"| dense, {bits} bits: {', '.join(cells)} | | |")
    plain, other = (show(found, cell) for cell in ("gptq-plain-g64", "reference-natural-g64"))
    return (
        "\n".join(rows)
        + "\n\nSingle runs, in fp32 (dense: bf16). GPTQ from extreme to extreme on the same tokens, in groups of 64: "
        f"{plain}; llm-compressor's: {other}."
    )


def bits() -> str:
    """Bits per weight in groups of 128."""
    rows = ["| | bits per weight |", "|---|---|"]
    for title, width, share in (
        ("dense, 4 bits", 4, 1.0),
        ("50 % pruned, 4 bits", 4, 0.5),
        ("dense, 3 bits", 3, 1.0),
        ("dense, 2 bits", 2, 1.0),
    ):
        size, grid = 1024 * 1024, affine.grid(width, affine.GROUP, symmetric=True)
        needed = affine.bits_needed(1024, 1024, round(share * size), grid)
        rows.append(f"| {title} | {needed / size:.3f} |")
    return "\n".join(rows)


def scale() -> str:
    """Forecasts of `--dry-run` beside measurements."""
    return bench_scale.table()


def larger() -> str:
    """Memory of larger models, by the formulas."""
    return larger_models.table()


def time_and_memory() -> str:
    """Cost of learning, and memory of a run."""
    lines = learning_cost.newest([*read_lines(learning_cost.SPEED)])
    size, dtype = 576, "bfloat16"
    parts = {
        "a learning step": ("step", 1),
        "all of `besa prune`": ("whole", "block"),
        "with `--target stream`": ("whole", "stream"),
    }
    rows = ["| ÷ plain passes, bf16 | hidden size 576 | 2,048 |", "|---|---|---|"]
    for title, part in parts.items():
        rows.append(f"| {title} | {' | '.join(_ratio(lines.get((part, dtype, hidden))) for hidden in (size, 2048))} |")
    state = lines.get((("state", None), dtype, 4096))
    held = recorded.marked(f"{state['bytes_per_weight']:.2f}", state) if state else "-"
    peaks = [line["peak_memory"] / 1e9 for line in protocol_a.found().values() if "peak_memory" in line]
    return (
        "\n".join(rows) + "\n\nA step is measured in plain forward and backward passes, the whole in passes without "
        f"gradients over all samples. What is learned and the ranks take {held} bytes per weight at hidden size 4,096 "
        "(`benchmarks/speed/bench_prune.py`). No run of the perplexity table needed more than "
        f"{max(peaks):.1f} GB of resident memory, the imported libraries included.{_depth()}"
    )


def _ratio(line: Mapping[str, Any] | None) -> str:
    return "-" if line is None else recorded.marked(f"{line['ratio']:.2f}", line)


def _depth() -> str:
    found = {line["case"]: line for line in read_lines(RESULTS / "bench_memory.jsonl") if line["method"] == "wanda"}
    if "prune" not in found:
        return ""
    line = found["prune"]
    least, most = (round(each / 1e6) for each in line["above_imports"])
    fewer, more = line["blocks"]
    return (
        f" LLaMA-shaped random models with blocks of {line['block'] / 1e6:.0f} MB, Wanda: {least} MB above the imports "
        f"with {fewer} blocks, {most} MB with {more} (`benchmarks/speed/bench_memory.py`)."
    )


PARTS: dict[str, Callable[[], str]] = {
    "architectures": architectures.table,
    "whole_experts": whole_experts.table,
    "headline": headline,
    "protocol-a": perplexities,
    "second-model": second_model,
    "other-texts": other_texts,
    "cells": cells,
    "learning-cost": learning,
    "time-to-quality": time_to_quality,
    "ablations": curve,
    "simulate": speedups,
    "time-and-memory": time_and_memory,
    "few-bits": few_bits,
    "bits": bits,
    "table-4": table_4,
    "random-masks": random_gates,
    "impossible": impossible,
    "memory-bound": memory_bound,
    "scale": scale,
    "larger-models": larger,
    "export-sizes": export_sizes.table,
    "generate": bench_generate.table,
    "matvec": bench_matvec.table,
}
