"""The runner of the paper's ablations: what it plans, what it skips, what it writes. No model is run."""

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from benchmarks.quality import ablation_plan as plans
from benchmarks.quality import ablation_report as report
from benchmarks.quality import ablations, protocol_a
from benchmarks.results import recorded
from benchmarks.shared import besa_runs
from besa_cli import pruners
from besa_cli.app import app
from besa_cli.jobs import prune
from besa_cli.pruners import besa

BENCHMARKS = besa_runs.RESULTS
PAPER = json.loads((BENCHMARKS / "paper.json").read_text())

SETUP = plans.Setup()
EXPERIMENTS = plans.experiments(SETUP.samples)
CELLS = plans.plan(EXPERIMENTS.values(), plans.SEEDS)
BASE = plans.base_of(SETUP.samples)


def line(cell: Any, perplexity: float, setup: Any = SETUP) -> dict[str, Any]:
    """What would be written of a cell."""
    return {
        "setup": setup.record(),
        "setting": cell.setting.record(),
        "seed": cell.seed,
        "options": cell.setting.options(),
        "methods": recorded.methods(*([] if cell == plans.DENSE else [cell.setting.method])),
        "perplexity": {"wikitext2": perplexity},
        "evaluation_seconds": 10.0,
        "counts": {"sparsity": cell.setting.sparsity, "blocks_kept_uniform": 1, "blocks": 30},
        "seconds": 64.0,
        "peak_memory": 1_500_000_000,
        "calibration": {"sources": [{"file": "c4.jsonl"}]},
        "compute": {"device": "cpu", "dtype": "float32"},
        "versions": {"besa": "0.1.0"},
        "machine": "a machine",
        "commit": "abc",
    }


def main(words: Sequence[str]) -> int:
    """The runner, in the dtype of `SETUP` on every machine."""
    return int(ablations.main(["--dtype", SETUP.dtype, *words]))


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The report on lines, as they come back from a file."""
    stored = [json.loads(json.dumps(each)) for each in lines]
    return str(report.markdown(SETUP, plans.measured(stored, SETUP), PAPER))


def row(text: str, title: str, point: str) -> list[str]:
    """The cells of one row of the table under a title."""
    table = text.split(f"## {title} (")[1].split("\n## ")[0]
    found = next(each for each in table.splitlines() if each.startswith(f"| {point} |"))
    return [cell.strip() for cell in found.split("|")[1:-1]]


def test_the_base_is_what_besa_does_by_default() -> None:
    default = besa.Options().record()
    own = {name: value for name, value in plans.Setting(samples=SETUP.samples).record().items() if name in default}
    assert len(own) == 11
    assert own == {name: default[name] for name in own}
    assert replace(BASE, loss=str(default["loss"])) == plans.Setting(samples=SETUP.samples)
    assert BASE.sparsity == prune.request().target_sparsity


@pytest.mark.parametrize("name", PAPER["experiments"])
def test_every_figure_of_the_paper_has_a_place_in_the_plan(name: str) -> None:
    printed = PAPER["experiments"][name]["perplexity"]
    assert "wikitext2" in printed
    for series in printed.values():
        for points in series.values():
            assert set(points) <= set(EXPERIMENTS[name].points)


def test_the_paper_has_all_experiments_and_no_other() -> None:
    assert set(PAPER["experiments"]) | {"choices"} == set(EXPERIMENTS)


def test_every_cell_is_planned_once_however_many_experiments_it_serves() -> None:
    assert len(CELLS) == len(set(CELLS)) == 3 * 82
    serving = [name for name, each in EXPERIMENTS.items() if BASE in each.settings.values()]
    assert serving == list(EXPERIMENTS)
    wanted = {setting for each in EXPERIMENTS.values() for setting in each.settings.values()}
    assert {(cell.setting, cell.seed) for cell in CELLS} == {(each, seed) for each in wanted for seed in plans.SEEDS}
    assert len({cell.name for cell in CELLS}) == len(CELLS)


def test_one_thing_differs_between_row_and_layer() -> None:
    row_wise, layer_wise = EXPERIMENTS["granularity"].settings.values()
    assert replace(row_wise, granularity="layer") == layer_wise != row_wise


def test_the_steps_are_held_while_the_samples_grow() -> None:
    held = [
        setting for (series, _), setting in EXPERIMENTS["samples"].settings.items() if series == "BESA at 128 steps"
    ]
    assert [each.samples for each in held] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert {each.samples * each.epochs for each in held} == {128}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_besa_takes_the_options_of_every_setting(name: str) -> None:
    command = get_command(app).commands["prune"]  # type: ignore[attr-defined]
    for setting in EXPERIMENTS[name].settings.values():
        wanted = {**setting.record(), "samples": None}  # the calibration set has them already
        del wanted["tune_epochs"]  # of `besa tune`
        parsed = command.make_context("prune", setting.words()).params
        assert {field: parsed[field] for field in wanted} == wanted
        own = {field: wanted[field] for field in wanted if field not in plans._SHARED}
        assert prune.request(method=setting.method, sparsity=setting.sparsity, options=own).method.options


def test_what_is_there_is_not_measured_again() -> None:
    there, rest = CELLS[::2], CELLS[1::2]
    found = plans.measured([json.loads(json.dumps(line(cell, 1.0))) for cell in there], SETUP)
    assert plans.left(CELLS, found, ["wikitext2"]) == rest
    assert plans.left(CELLS, found, ["wikitext2", "c4"]) == CELLS


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"data": ("ptb",)},
        {"seqlen": 64},
        {"context": 64},
        {"windows": None},
        {"dtype": "bfloat16"},
        {"device": "cuda"},
    ],
)
def test_a_line_of_another_setup_counts_for_nothing(change: dict[str, Any]) -> None:
    lines = [line(cell, 1.0, replace(SETUP, **change)) for cell in CELLS]
    assert plans.measured(lines, SETUP) == {}


def test_a_line_of_an_older_method_or_of_other_defaults_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(cell, 1.0) for cell in CELLS]
    found = plans.measured(lines, SETUP)
    assert set(found) == set(CELLS)
    monkeypatch.setitem(pruners.VERSIONS, "wanda", 2)
    assert {cell.setting.method for cell in set(CELLS) - set(plans.measured(lines, SETUP))} == {"wanda"}
    monkeypatch.undo()
    for each in lines:
        if each["setting"]["method"] == "besa":
            each["options"] = {**each["options"], "d_coef": 2.0}  # which no setting names
    assert {cell.setting.method for cell in plans.measured(lines, SETUP)} == {"wanda", "sparsegpt"}


def test_a_page_of_old_lines_alone_is_measured_again(tmp_path: Path, fake: "Besa") -> None:
    assert main(options(tmp_path, "--seeds", "0")) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pruners.VERSIONS, "besa", pruners.VERSIONS["besa"] + 1)
        fake.calls.clear()
        for place in (tmp_path / "work").rglob("report"):  # the weights are gone
            assert place.is_dir()
        assert main(options(tmp_path, "--seeds", "0")) == 0
        assert [words[0] for words in fake.calls].count("prune") == 2


def test_protocol_a_computes_all_of_a_cell_in_the_dtype_and_on_the_device_that_are_asked_for(
    tmp_path: Path, fake: "Besa", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol_a, "LINES", tmp_path / "lines.jsonl")
    words = ["text.jsonl", "--work", str(tmp_path), "--seed", "0", "1", "--dtype", "float16", "--device", "cpu"]
    protocol_a.main([*words, "--only", "dense", "magnitude-60", "besa-layer-70"])
    kinds = [call[0] for call in fake.calls]
    assert (kinds.count("calibrate"), kinds.count("prune"), kinds.count("eval")) == (2, 3, 4)  # one of magnitude
    for call in fake.calls:
        if call[0] != "calibrate":
            assert (call[call.index("--dtype") + 1], call[call.index("--device") + 1]) == ("float16", "cpu")
    lines = besa_runs.read_lines(tmp_path / "lines.jsonl")
    assert [each["setup"]["dtype"] for each in lines] == ["float16"] * 4
    assert [(each["seed"], each["setting"]["sparsity"]) for each in lines[1:]] == [(0, 0.6), (0, 0.7), (1, 0.7)]
    assert all(each["commit"] and "methods" in each and "options" in each for each in lines)
    fake.calls.clear()
    protocol_a.main([*words, "--only", "dense", "magnitude-60", "besa-layer-70"])
    assert fake.calls == []


def test_the_newest_line_of_a_cell_counts() -> None:
    found = plans.measured([line(CELLS[0], 1.0), line(CELLS[0], 2.0)], SETUP)
    assert found[CELLS[0]]["perplexity"] == {"wikitext2": 2.0}
    other = {**line(CELLS[0], 1.0), "perplexity": {"c4": 3.0}}
    found = plans.measured([line(CELLS[0], 2.0), other], SETUP)
    assert found[CELLS[0]]["perplexity"] == {"wikitext2": 2.0, "c4": 3.0}


def test_a_line_names_no_directory_of_this_machine(tmp_path: Path) -> None:
    setup = plans.Setup(model=str(tmp_path / "model"), data=(str(tmp_path / "text.txt"), "c4"))
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").touch()
    assert str(tmp_path) not in json.dumps(setup.record())
    assert plans.label("org/model") == "org/model"


@pytest.mark.parametrize("values", [[36.4, 36.9], [36.4, 36.9, 35.2], [1001.6, 3.0, 3.0, 77.25]])
def test_mean_and_deviation_over_the_seeds(values: list[float]) -> None:
    found = report.summary(values)
    assert found is not None
    assert (found.mean, found.deviation) == (statistics.mean(values), statistics.stdev(values))
    text = page([line(plans.Cell(setting=BASE, seed=seed), value) for seed, value in enumerate(values)])
    shown = f"{statistics.mean(values):,.2f} ± {statistics.stdev(values):,.2f} (n={len(values)})"
    assert row(text, "Epochs", "1")[1] == shown
    assert row(text, "What is reconstructed together", "block")[1] == shown


def test_one_seed_has_no_deviation() -> None:
    assert row(page([line(plans.Cell(setting=BASE, seed=0), 36.449)]), "Epochs", "1")[1] == "36.45 (n=1)"


def test_what_is_missing_is_a_dash() -> None:
    text = page([line(plans.Cell(setting=BASE, seed=0), 36.45)])
    assert row(text, "Epochs", "3")[1:] == ["-", "6.85", "8.95", "67.37"]
    assert row(text, "Sparsity", "0.8") == ["0.8", *["-"] * 7]
    assert row(text, "Calibration samples", "256") == ["256", *["-"] * 4, "6.84", "7.24", "7.16"]
    assert "36.45" not in page([])


def test_every_evaluation_set_has_its_columns_before_those_of_the_paper() -> None:
    one = line(plans.Cell(setting=BASE, seed=0), 36.45)
    both = {**one, "perplexity": {"notes.txt": 4.0, "wikitext2": 36.45}}
    text = page([both])
    assert row(text, "Epochs", "1") == ["1", "36.45 (n=1)", "4.00 (n=1)", "6.86", "8.96", "66.96"]
    assert row(text, "Epochs", "epochs")[1:3] == ["BESA, wikitext2", "BESA, notes.txt"]


def test_every_perplexity_of_the_paper_is_on_the_page() -> None:
    text = page([])
    for name, each in PAPER["experiments"].items():
        title = EXPERIMENTS[name].title
        for series in each["perplexity"].values():
            for points in series.values():
                for point, value in points.items():
                    assert f"{value:.2f}" in row(text, title, point)


def test_the_page_says_what_made_its_figures() -> None:
    text = page([line(plans.DENSE, 20.72), line(CELLS[0], 36.0)])
    for word in ("smollm2-135m", "wikitext2 20.72", "128 × 512 tokens of c4", "windows of 2048", "the first 16", "abc"):
        assert word in text.split("\n## ")[0]


def test_the_same_lines_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [line(cell, 20.0 + number / 7) for number, cell in enumerate(CELLS)]
    shuffled = random.Random(0).sample(lines, len(lines))
    assert page(lines) == page(shuffled)
    for name, these in (("a", lines), ("b", shuffled)):
        report.draw(SETUP, plans.measured(these, SETUP), PAPER, tmp_path / name)
    drawn = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert drawn == ["samples.svg", "sparsity.svg"]
    for name in drawn:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert b"LLaMA-7B" in content
        assert f"figures/{name}" in page(lines)


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert report.draw(SETUP, {}, PAPER, tmp_path) == []
    assert "figures/" not in page([])


def test_without_matplotlib_the_page_is_written_and_the_rest_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "ABLATIONS.md").read_text() == page([])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_time_left_follows_from_the_finished_cells() -> None:
    small, large = (plans.Cell(setting=replace(BASE, samples=count), seed=0) for count in (2, 6))
    found = {cell: line(cell, 1.0) for cell in (small, large, plans.DENSE)}  # (2 + 6) × 5 passes in 2 × 64 s
    next_one = plans.Cell(setting=replace(BASE, samples=1, epochs=2), seed=0)  # 3 × 2 + 2 passes
    other = plans.Cell(setting=replace(BASE, method="wanda"), seed=0)
    seconds, unknown = ablations.estimate([next_one, other], found)
    assert seconds == pytest.approx(8 * 128 / 40 + 10)
    assert unknown == [other]


def claimed(*values: tuple[Any, int, float]) -> list[str]:
    """The page's sentences on lines of (setting, seed, perplexity)."""
    text = page([line(plans.Cell(setting=setting, seed=seed), value) for setting, seed, value in values])
    if "## What holds" not in text:
        return []
    return text.split("## What holds")[1].split("\n## ")[0].strip().splitlines()[2:]


def test_a_claim_of_the_paper_is_judged_on_the_seeds_that_both_have() -> None:
    two = replace(BASE, window="2")
    assert claimed((BASE, 0, 40.0)) == claimed((two, 0, 40.0), (BASE, 1, 30.0)) == []
    held = claimed((BASE, 0, 40.0), (BASE, 1, 38.0), (BASE, 2, 9.0), (two, 0, 37.0), (two, 1, 36.0))
    assert held == [
        "- **Two blocks are better than one: holds** (one block 39.00 against 36.50, worse with 2 of 2 seeds)."
    ]
    (lost,) = claimed((BASE, 0, 40.0), (BASE, 1, 36.0), (two, 0, 37.0), (two, 1, 36.0))
    assert "does not hold" in lost
    assert "worse with 1 of 2 seeds" in lost


@pytest.mark.parametrize(("three", "verdict"), [(39.7, "holds"), (41.0, "holds"), (39.5, "does not hold")])
def test_one_epoch_is_enough_where_more_gain_less_than_a_hundredth(three: float, verdict: str) -> None:
    others = [(replace(BASE, epochs=n), 0, 40.0) for n in (10, 30)]
    (said,) = claimed((BASE, 0, 40.0), (replace(BASE, epochs=3), 0, three), *others)
    assert said.startswith(f"- **One epoch is enough: {verdict}** (3 epochs {three:.2f} against 40.00")


@pytest.mark.parametrize(("three", "verdict"), [(40.0, "not settled"), (39.5, "does not hold")])
def test_a_claim_holds_only_where_all_its_rivals_are_measured(three: float, verdict: str) -> None:
    (said,) = claimed((BASE, 0, 40.0), (replace(BASE, epochs=3), 0, three))
    assert said.startswith(f"- **One epoch is enough: {verdict}** (3 epochs")
    assert said.endswith("; not measured: 10 epochs, 30 epochs).")


def test_every_claim_is_on_what_is_planned() -> None:
    planned = {cell.setting for cell in CELLS}
    for claim in plans.claims(SETUP.samples):
        assert {claim.chosen, *claim.others.values()} <= planned


def test_a_page_is_never_written_over_with_another_setup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = plans.Cell(setting=BASE, seed=0)
    besa_runs.append_line(tmp_path / "ablations.jsonl", line(cell, 36.45))
    for words in (
        ["--report", "--data", "ptb"],
        ["--work", str(tmp_path), "--seqlen", "9"],
        ["--report", "--samples", "9"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(["--out", str(tmp_path), *words])
        assert caught.value.code == 2
        assert "128 samples" in capsys.readouterr().err
        assert not (tmp_path / "ABLATIONS.md").exists()


def test_the_words_on_the_page_write_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: [])
    setup = plans.Setup(data=("a.jsonl", "b.txt"), samples=7, seqlen=9, context=11, windows=None)
    base = plans.Cell(setting=replace(BASE, samples=7), seed=0)
    besa_runs.append_line(tmp_path / "ablations.jsonl", line(base, 36.45, setup))
    ablations.write_report(setup, tmp_path)
    written = (tmp_path / "ABLATIONS.md").read_text()
    words = next(each for each in written.splitlines() if each.startswith("    python -m ")).split()[3:]
    (tmp_path / "ABLATIONS.md").unlink()
    assert main(["--out", str(tmp_path), *words]) == 0
    assert (tmp_path / "ABLATIONS.md").read_text() == written


def test_the_committed_page_is_that_of_its_lines() -> None:
    """Of the words on it: no line was added without it."""
    written = (BENCHMARKS / "ABLATIONS.md").read_text()
    words = next(each for each in written.splitlines() if each.startswith("    python -m ")).split()[3:]
    asked = ablations.parser().parse_args(words)
    names = ("model", "samples", "seqlen", "context", "windows", "dtype", "device")
    setup = plans.Setup(data=tuple(asked.data), **{name: getattr(asked, name) for name in names})
    assert setup == ablations.COMMITTED
    found = plans.measured(besa_runs.read_lines(BENCHMARKS / "ablations.jsonl"), setup)
    assert written == report.markdown(setup, found, PAPER)


SHARD = "model-00002-of-00002.safetensors"


class Besa:
    """Takes the place of `besa`: writes what it would write, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.refuses: Callable[[tuple[str, ...]], int] = lambda words: 0

    def __call__(self, *words: str) -> dict[str, Any]:
        self.calls.append(words)
        if code := self.refuses(words):
            raise subprocess.CalledProcessError(code, words)
        if words[0] == "eval":
            return {"results": [{"perplexity": 30.0}, {"perplexity": 40.0}][: len(words[2 : words.index("--limit")])]}
        run = Path(words[words.index("--run") + 1])
        if words[0] == "calibrate":
            (run / "calibration").mkdir(parents=True)
            (run / "calibration" / "besa.json").touch()
            return {}
        return self._made(run / ("tuned" if words[0] == "tune" else "pruned"))

    def _made(self, stage: Path) -> dict[str, Any]:
        stage.mkdir(parents=True)
        (stage / "timing.jsonl").write_text(
            '{"resumed": false, "seconds": 2.0, "peak_memory": 5}\n'
            '{"resumed": true, "seconds": 1.0, "peak_memory": 9}\n'
        )
        for name in ("besa.json", SHARD, "model-00002-of-00002.json", "tokenizer.json"):
            (stage / name).touch()
        counts = {"sparsity": 0.5, "blocks_kept_uniform": 0}
        rest = {"calibration": {"sources": []}, "compute": {"device": "cpu", "dtype": "float32"}, "versions": {}}
        return {"counts": counts, "blocks": 1, "model": {"digest": "d"}, **rest}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Besa:
    made = Besa()
    monkeypatch.setattr(ablations, "besa", made)
    monkeypatch.setattr(report, "draw", lambda *_: [])
    return made


def test_a_cell_that_ends_with_besa_tune_is_measured_after_it(tmp_path: Path, fake: Besa) -> None:
    cell = plans.Cell(setting=plans.Setting(samples=SETUP.samples, method="wanda", tune_epochs=2), seed=1)
    made = ablations.measure(cell, SETUP, ["wikitext2"], tmp_path)
    assert [call[0] for call in fake.calls] == ["calibrate", "prune", "tune", "eval"]
    assert fake.calls[2][fake.calls[2].index("--epochs") + 1] == "2"
    assert made["seconds"] == 4.0  # of both stages
    assert made["methods"].keys() == {"wanda", "tune"}
    assert made["options"]["tune_lr"] > 0


def options(place: Path, *more: str) -> list[str]:
    return ["--work", str(place / "work"), "--out", str(place / "out"), "--only", "granularity", *more]


def test_a_second_run_measures_nothing(tmp_path: Path, fake: Besa) -> None:
    assert main(options(tmp_path)) == 0
    kinds = [words[0] for words in fake.calls]
    assert (kinds.count("calibrate"), kinds.count("prune"), kinds.count("eval")) == (3, 6, 7)  # the dense model, too
    stored = besa_runs.read_lines(tmp_path / "out" / "ablations.jsonl")
    assert [each["seconds"] for each in stored[1:]] == [2.0] * 6
    assert [each["peak_memory"] for each in stored[1:]] == [5] * 6
    assert "30.00 ± 0.00 (n=3)" in (tmp_path / "out" / "ABLATIONS.md").read_text()
    fake.calls.clear()
    assert main(options(tmp_path)) == 0
    assert fake.calls == []
    assert main(options(tmp_path, "--sets", "wikitext2", "notes.txt")) == 0
    assert [words[0] for words in fake.calls].count("prune") == 6


def test_only_the_weights_go(tmp_path: Path, fake: Besa) -> None:
    main(options(tmp_path, "--seeds", "0"))
    kept = {path.name for path in (tmp_path / "work").rglob("report/*")}
    assert kept == {"besa.json", "timing.jsonl", "model-00002-of-00002.json"}
    assert not list((tmp_path / "work").rglob("pruned"))


def test_weights_that_a_kill_has_left_go_the_next_time(tmp_path: Path, fake: Besa) -> None:
    main(options(tmp_path, "--seeds", "0"))
    kept = next((tmp_path / "work").rglob("report"))
    (kept.rename(kept.with_name("pruned")) / SHARD).touch()
    main(options(tmp_path, "--seeds", "0"))
    assert not list((tmp_path / "work").rglob(SHARD))
    assert kept.exists()


def test_a_cell_that_besa_refuses_does_not_stop_the_others(tmp_path: Path, fake: Besa) -> None:
    fake.refuses = lambda words: int(words[0] == "prune" and "layer" in words)
    assert main(options(tmp_path, "--seeds", "0")) == 1
    assert len(besa_runs.read_lines(tmp_path / "out" / "ablations.jsonl")) == 2  # the dense model and the row-wise one


def test_a_besa_that_was_stopped_stops_the_runner(tmp_path: Path, fake: Besa) -> None:
    fake.refuses = lambda words: 130 * (words[0] == "prune")
    with pytest.raises(subprocess.CalledProcessError):
        main(options(tmp_path))
    assert [words[0] for words in fake.calls].count("prune") == 1


def test_the_list_counts_shared_cells_once_and_runs_nothing(
    tmp_path: Path, fake: Besa, capsys: pytest.CaptureFixture[str]
) -> None:
    besa_runs.append_line(tmp_path / "ablations.jsonl", line(plans.Cell(setting=BASE, seed=0), 1.0))
    chosen = ["--only", "epochs", "granularity", "--seeds", "0"]
    assert main(["--list", "--out", str(tmp_path), *chosen]) == 0
    rows = {words[0]: words[1:4] for words in map(str.split, capsys.readouterr().out.splitlines())}
    assert (rows["epochs"], rows["granularity"]) == (["4", "1", "3"], ["2", "1", "1"])
    assert (rows["dense"], rows["together"]) == (["1", "0", "1"], ["6", "1", "5"])
    assert fake.calls == []


def test_measuring_needs_a_place_to_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "--work" in capsys.readouterr().err
