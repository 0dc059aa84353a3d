"""The scripts that measure speed: what they write, and what they take as measured. No figure of theirs is tested."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import calls

from benchmarks.quality import time_to_quality
from benchmarks.results import recorded
from benchmarks.shared import random_checkpoint
from benchmarks.speed import bench_generate, bench_matvec, bench_prune
from benchmarks.speed import learning_cost as results
from besa_cli.pruners.besa import learning as besa_learning

HIDDEN, INTERMEDIATE, HEADS, GROUPS = 32, 48, 4, 2


def test_every_part_of_a_small_shape_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_prune.SHAPES, HIDDEN, (INTERMEDIATE, HEADS, GROUPS))
    monkeypatch.setattr(bench_prune, "LINES", tmp_path / "lines.jsonl")
    sizes = {"hidden": HIDDEN, "samples": 4, "step-samples": 2, "seqlen": 8, "blocks": 2}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    bench_prune.main([*words, "--turns", "3", "--whole-turns", "1"])
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [(line["what"], line.get("batch", line.get("target"))) for line in lines] == list(results.PARTS)
    *timed, state = lines
    for line in timed:
        assert 0 < line["lowest"] <= line["ratio"] <= line["highest"]
        assert (line["turns"], line["samples"]) == ((3, 2) if line["what"] == "step" else (1, 4))
        assert (line["dtype"], line["blocks"], line["seqlen"]) == ("bfloat16", 2, 8)
    narrow = HIDDEN // HEADS * GROUPS
    rows = [HIDDEN, narrow, narrow, HIDDEN, INTERMEDIATE, INTERMEDIATE, HIDDEN]  # q, k, v, o, gate, up, down
    weights = sum(rows[:6]) * HIDDEN + HIDDEN * INTERMEDIATE
    numbers = 4 * 101 * sum(rows) + 1  # logits, gradients and two moments; AdamW's count of steps
    assert state["weights"] == weights
    assert state["bytes_per_weight"] == pytest.approx(2 + 4 * numbers / weights)


def test_a_learning_step_is_held_against_stock_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(bench_prune.SHAPES, HIDDEN, (INTERMEDIATE, HEADS, GROUPS))
    made: list[str] = []
    plain, learn = bench_prune.plain_steps, besa_learning.learn

    def attention(block: Any) -> str:
        return str(block._window._decoder.model.config._attn_implementation)

    noted = calls.noting(plain, lambda block, *words: made.append(attention(block)))
    monkeypatch.setattr(bench_prune, "plain_steps", noted)
    noted_too = calls.noting(learn, lambda window: made.append(attention(window.block)))
    monkeypatch.setattr(bench_prune, "learn", noted_too)
    directory = bench_prune.checkpoint(tmp_path / "model", HIDDEN, 1)
    bench_prune.step_ratio(directory, torch.float32, 1, torch.zeros(2, 8, dtype=torch.long), 1)
    assert made == ["sdpa", "besa_chunks"] * 2


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What time_to_quality asks `besa` for, with no `besa` behind it."""
    asked: list[tuple[str, ...]] = []

    def besa(*words: str) -> dict[str, Any]:
        asked.append(words)
        return {"results": [{"perplexity": 40.0}], "counts": {}, "compute": {}}

    monkeypatch.setattr(time_to_quality, "LINES", tmp_path / "lines.jsonl")
    monkeypatch.setattr(time_to_quality, "besa", besa)
    monkeypatch.setattr(time_to_quality, "unit", lambda tokens, dtype: 2.0)
    return asked


def test_a_cell_is_measured_again_only_where_something_else_is_asked(
    tmp_path: Path, measured: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(tmp_path / "tokens.jsonl"), "--work", str(tmp_path), "--samples", "16", "--dtype", "float32"]
    time_to_quality.main(words)
    assert [each[0] for each in measured] == ["calibrate", "prune", "eval"]
    time_to_quality.main(words)
    assert len(measured) == 3
    time_to_quality.main([*words[:-1], "bfloat16"])
    assert len(measured) == 6
    own = time_to_quality.BesaOptions
    monkeypatch.setattr(time_to_quality, "BesaOptions", lambda window: own(window=window, candidates=7))
    time_to_quality.main(words)  # as if the default had changed
    assert len(measured) == 9


def test_the_least_work_that_reaches_the_perplexity_of_128_steps() -> None:
    def line(window: str, samples: int, perplexity: float, units: float) -> dict[str, Any]:
        options = {"window": window, "lr": 1.0}
        return {
            "methods": recorded.methods("besa"),
            "dtype": "float32", "options": options, "samples": samples,
            "perplexity": perplexity, "units": units, "peak_memory": 10**9,
        }  # fmt: skip

    lines = [line("block", 128, 36.0, 5.0), line("block", 64, 36.3, 3.0), line("block", 16, 40.0, 1.5)]
    assert "reaches it takes 5.00 passes (`--window block`, 128" in results.quality(lines)
    assert "within 1% of it takes 3.00 passes (`--window block`, 64 samples, 36.30)" in results.quality(lines)
    lines.append(line("2", 32, 35.9, 2.5))
    assert "reaches it takes 2.50 passes (`--window 2`, 32 samples, 35.90)" in results.quality(lines)
    assert "128 steps" not in results.quality(lines[1:])
    stale = {**line("block", 8, 30.0, 0.5), "options": {"window": "block", "lr": 0.1}}
    other = {**line("block", 8, 30.0, 0.5), "dtype": "bfloat16"}
    old = {**line("block", 8, 30.0, 0.5), "methods": {"besa": 1}}
    assert results.quality([stale, other, old, *lines]) == results.quality(lines)


@pytest.mark.parametrize("bits", [8, 4])
def test_products_of_codes_are_compared_with_those_of_all_codes(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_matvec, "_TURNED", 20_000)
    monkeypatch.setattr(bench_matvec, "FILE", tmp_path / "lines.jsonl")
    bench_matvec.main(["--turns", "2", "--bits", str(bits), "--shape", "32", "256", "--record"])
    line = json.loads((tmp_path / "lines.jsonl").read_text())
    assert line["bits"] == bits
    assert list(line["microseconds"]) == ["read", "torch", "dense", "sparse 0.5", "sparse 0.6", "sparse 0.7"]
    half, whole = line["microseconds"]["sparse 0.5"], line["microseconds"]["dense"]
    assert line["times_as_fast"]["sparse 0.5 as dense"] == pytest.approx(whole / half, rel=0.1, abs=0.02)
    shown = bench_matvec.table().splitlines()[2]
    assert shown.startswith(
        f"| codes of {bits} bits | 32 × 256 | × {line['times_as_fast']['sparse 0.5 as dense']:.2f} |"
    )


@pytest.mark.parametrize("vectors", [1, 3])
def test_products_are_compared_with_each_dense_one(
    vectors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_matvec, "SHAPES", ((32, 128),))
    monkeypatch.setattr(bench_matvec, "_TURNED", 20_000)
    monkeypatch.setattr(bench_matvec, "FILE", tmp_path / "lines.jsonl")
    bench_matvec.main(["--turns", "2", "--vectors", str(vectors), "--record"])
    (line,) = [json.loads(text) for text in (tmp_path / "lines.jsonl").read_text().splitlines()]
    dense = ["torch", "dense"] if vectors == 1 else ["torch"]
    sparse = [f"sparse {sparsity}" for sparsity in bench_matvec.SPARSITIES]
    assert list(line["microseconds"]) == ["read", *dense, *sparse]
    times = line["times_as_fast"]
    assert list(times) == [f"{name} as {other}" for name in sparse for other in dense]
    half, whole = line["microseconds"]["sparse 0.5"], line["microseconds"]["torch"]
    assert times["sparse 0.5 as torch"] == pytest.approx(whole / half, rel=0.1, abs=0.02)


def test_a_model_is_pruned_exported_and_measured_once_a_sparsity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    load = {"prompt": 8, "new": 4, "batch": 1}
    printed = {
        "directory": "not kept",
        "machine": {"processor": "fast", "threads": 2},
        "bandwidth": 2e9,
        "rounds": 5,
        "results": [
            {"name": name, "workload": load, "prefill": 100.0, "decode": rate, "resident": 10**9}
            for name, rate in (("dense bfloat16", 10.0), ("sparse", 25.0))
        ],
        "comparisons": [
            {
                "name": "sparse",
                "other": "dense bfloat16",
                "workload": load,
                "prefill": 1.0,
                "decode": 2.5,
                "resident": 1,
            }
        ],
    }

    def besa(*words: str) -> dict[str, Any]:
        asked.append(words)
        return printed

    monkeypatch.setattr(bench_generate, "FILE", tmp_path / "lines.jsonl")
    monkeypatch.setattr(bench_generate, "besa", besa)
    words = ["--work", str(tmp_path), "--model", "some/model", "--sparsity", "0.5", "0.7"]
    bench_generate.main([*words, "--bits", "4"])
    assert [each[0] for each in asked] == ["prune", "quantize", "export", "export", "bench"] * 2
    bench_generate.main(words)
    assert [each[0] for each in asked[10:]] == ["prune", "export", "export", "bench"] * 2
    gguf = [each[each.index("--type") + 1] for each in asked if "gguf" in each]
    assert gguf == ["Q4_0", "Q4_0", "BF16", "BF16"]
    lines = [json.loads(text) for text in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [(line["model"], line["bits"], line["sparsity"]) for line in lines] == [
        ("model", bits, sparsity) for bits in (4, None) for sparsity in (0.5, 0.7)
    ]
    assert not any("directory" in line for line in lines)
    shown = bench_generate.table().splitlines()
    assert shown[2] == "| model, 4 bits | 50 % | 8 | dense bfloat16 | 100 | 10.0 | 1.00 GB | × 1.00 | × 2.50 |"
    assert shown[3] == "| model, 4 bits | 50 % | 8 | sparse | 100 | 25.0 | 1.00 GB |  |  |"
    assert len(shown) == 2 + 8 + 4
    assert shown[-3] == "Sparse is not faster: prefill beside dense bfloat16 (in 4 of 4)."


@pytest.mark.parametrize(
    "shape",
    [
        random_checkpoint.Shape(hidden=32, intermediate=48, heads=4, key_heads=2, blocks=2, vocabulary=40),
        random_checkpoint.Shape(
            hidden=32, intermediate=24, heads=4, key_heads=2, blocks=2, vocabulary=40, experts=3, routed=2, head=16
        ),
    ],
    ids=["llama", "experts"],
)
def test_a_random_checkpoint_fills_the_stock_model(shape: random_checkpoint.Shape, tmp_path: Path) -> None:
    random_checkpoint.checkpoint(tmp_path, shape, torch.float32)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    model, found = loaded
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    linears = sum(rows * cols for rows, cols in shape.linears().values())
    layers = sum(value.numel() for name, value in model.named_parameters() if "layers" in name and value.ndim > 1)
    assert layers == shape.blocks * (linears + shape.experts * shape.hidden)
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()
