"""`besa eval compare`: every figure in its row and column, none mixed with another."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_models
from support.written import digest_of, stage_manifest

from besa_cli.errors import BesaError
from besa_cli.evaluation import comparison

Besa = Callable[..., Any]  # conftest.Outcome


def manifest(digest: str, parent: str = "origin", **options: Any) -> dict[str, Any]:
    given = {"model": "org/m", "method": "besa", "sparsity": 0.5, "granularity": "row", "seed": 0, **options}
    origin = {**stage_manifest()["model"], "name": "org/m", "digest": digest_of(parent)}
    return stage_manifest(status="complete", digest=digest_of(digest), options=given, model=origin)


def result(digest: str, perplexity: float, **facts: Any) -> dict[str, Any]:
    """A result file as `besa eval ppl` writes it."""
    return {
        "format": 1,
        "kind": "perplexity",
        "model": {"name": "some", "directory": "somewhere"},
        "dataset": "wikitext2",
        "split": "test",
        "text_digest": "t",
        "tokenizer_digest": "k",
        "model_digest": digest_of(digest),
        "windows": 148,
        "windows_in_text": 148,
        "seqlen": 2048,
        "stride": None,
        "device": "cpu",
        "dtype": "float32",
        "perplexity": perplexity,
        **facts,
    }


def run(path: Path, made: dict[str, Any] | None, *records: dict[str, Any]) -> Path:
    """A run directory with the manifest of a stage and results."""
    if made is not None:
        write(path / "pruned" / "besa.json", made)
    for number, record in enumerate(records):
        write(path / "eval" / f"{number}.json", record)
    return path


def write(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))


def table(found: comparison.Comparison) -> dict[str, dict[str, float]]:
    return {
        row.title: {
            title: row.figures[column] for title, column in found.columns.items() if column in row.figures
        }
        for row in found.rows
    }  # fmt: skip


WIKI = "wikitext2 test, 148 × 2048"


def test_methods_by_data_sets_with_the_dense_model_once(tmp_path: Path) -> None:
    ptb = {"dataset": "ptb", "windows": 50, "windows_in_text": 50, "text_digest": "p"}
    first = run(
        tmp_path / "a",
        manifest("A"),
        result("A", 20.0),
        result("origin", 10.0),
        result("A", 200.0, **ptb),
        result("origin", 100.0, **ptb),
    )
    second = run(
        tmp_path / "b", manifest("B", method="wanda", granularity=None), result("B", 30.0), result("origin", 10.0)
    )
    found = comparison.compare([first, second, first])
    assert table(found) == {
        "dense": {WIKI: 10.0, "ptb test, 50 × 2048": 100.0},
        "besa 50 %": {WIKI: 20.0, "ptb test, 50 × 2048": 200.0},
        "wanda 50 %": {WIKI: 30.0},
    }
    assert found.notes == []


def test_titles_say_what_distinguishes_runs_of_one_method(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / "a", manifest("A"), result("A", 1.0)),
        run(tmp_path / "b", manifest("B", granularity="layer"), result("B", 2.0)),
        run(tmp_path / "c", manifest("C", sparsity=0.625), result("C", 3.0)),
        run(tmp_path / "d", manifest("D", method="wanda", nm="2:4", seed=1), result("D", 4.0)),
        run(tmp_path / "e", manifest("E"), result("E", 5.0)),
    ]
    titles = [row.title for row in comparison.compare(runs).rows]
    assert titles == [
        f"besa 50 %, granularity row ({runs[0]})",
        "besa 50 %, granularity layer",
        "besa 62.5 %, granularity row",
        "wanda 2:4",
        f"besa 50 %, granularity row ({runs[4]})",
    ]


def test_a_tuned_stage_is_called_so(tmp_path: Path) -> None:
    tuned = manifest("T", parent="A")
    del tuned["options"]["method"], tuned["options"]["sparsity"]
    path = run(tmp_path / "a", manifest("A"), result("A", 2.0), result("T", 1.0))
    write(path / "tuned" / "besa.json", {**tuned, "stage": "tuned", "command": "tune"})
    assert table(comparison.compare([path])) == {"besa 50 %": {WIKI: 2.0}, "tuned": {WIKI: 1.0}}


def test_models_are_told_apart(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / name, manifest(name, parent=f"{name}-0", model=f"org/{name}"), result(name, 2.0))
        for name in "ab"
    ]
    write(tmp_path / "b" / "eval" / "dense.json", result("b-0", 1.0))
    assert [row.title for row in comparison.compare(runs).rows] == ["dense", "besa 50 %, a", "besa 50 %, b"]


@pytest.mark.parametrize(
    ("facts", "title"),
    [
        ({"seqlen": 1024, "windows": 297, "windows_in_text": 297}, "wikitext2 test, 297 × 1024"),
        ({"windows": 16}, "wikitext2 test, 16 of 148 × 2048"),
        ({"stride": 512, "windows": 589, "windows_in_text": 589}, "wikitext2 test, 589 × 2048, stride 512"),
        ({"split": None, "dataset": "my.txt"}, "my.txt, 148 × 2048"),
        ({"official": False}, "wikitext2 test, 148 × 2048, not the official text"),
    ],
)
def test_what_was_measured_otherwise_has_a_column_of_its_own(facts: dict[str, Any], title: str, tmp_path: Path) -> None:
    path = run(tmp_path / "a", manifest("A"), result("A", 20.0), result("A", 21.0, **facts))
    assert table(comparison.compare([path]))["besa 50 %"] == {WIKI: 20.0, title: 21.0}


@pytest.mark.parametrize(
    ("facts", "titles"),
    [
        ({"dtype": "bfloat16"}, ["dtype float32", "dtype bfloat16"]),
        ({"text_digest": "u"}, ["text t", "text u"]),
        ({"tokenizer_digest": "l"}, ["tokenizer k", "tokenizer l"]),
        ({"device": "cuda", "dtype": "bfloat16"}, ["dtype float32, device cpu", "dtype bfloat16, device cuda"]),
    ],
)
def test_columns_that_would_look_alike_say_how_they_differ(
    facts: dict[str, Any], titles: list[str], tmp_path: Path
) -> None:
    path = run(tmp_path / "a", manifest("A"), result("A", 20.0), result("A", 21.0, **facts))
    found = table(comparison.compare([path]))["besa 50 %"]
    assert found == {f"{WIKI}, {titles[0]}": 20.0, f"{WIKI}, {titles[1]}": 21.0}


def test_results_of_other_models_have_rows_and_those_of_replaced_stages_a_note(tmp_path: Path) -> None:
    other = {"model": {"name": "org/other", "directory": "cache/other"}}
    old = {"model": {"name": "besa 50.00 %", "directory": "a/pruned"}}
    path = run(tmp_path / "a", manifest("A"), result("A", 2.0), result("X", 3.0, **other), result("Y", 4.0, **old))
    found = comparison.compare([path])
    assert table(found) == {"besa 50 %": {WIKI: 2.0}, "org/other": {WIKI: 3.0}}
    assert found.notes == [f"{path / 'eval' / '2.json'} belongs to a model that is no longer in the run: skipped"]


def test_two_figures_for_one_cell_are_told(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, manifest(name), result("origin", value)) for name, value in (("a", 1.0), ("b", 1.5))]
    found = comparison.compare(runs)
    assert table(found) == {"dense": {WIKI: 1.0}}
    assert found.notes == [f"dense, {WIKI}: 1.5 in {runs[1]}, 1.0 before: the first is shown"]


def test_a_file_that_says_no_kind_is_a_perplexity_and_others_are_none(tmp_path: Path) -> None:
    plain = result("A", 20.0)
    del plain["kind"]
    path = run(tmp_path / "a", manifest("A"), plain, result("A", 1.0, kind="other"), {"kind": "perplexity"})
    assert table(comparison.compare([path]))["besa 50 %"] == {WIKI: 20.0}


def test_named_data_sets_come_first_in_their_order(tmp_path: Path) -> None:
    names = ("a.txt", "c4", "arc.txt", "ptb", "wikitext2")
    path = run(tmp_path / "a", manifest("A"), *(result("A", 1.0, dataset=name, split=None) for name in names))
    found = [title.partition(",")[0] for title in comparison.compare([path]).columns]
    assert found == ["wikitext2", "ptb", "c4", "a.txt", "arc.txt"]


@pytest.mark.parametrize("nested", [True, False])
def test_accuracies_of_tasks_stand_beside_perplexities(nested: bool, tmp_path: Path) -> None:
    harness: dict[str, object] = {
        "results": {
            "piqa": {"alias": "piqa", "acc,none": 0.66, "acc_stderr,none": 0.01, "acc_norm,none": 0.67},
            "arc_easy": {"acc,none": 0.5},
        },
        "higher_is_better": {"piqa": {"acc": True}},
        "n-shot": {"piqa": 0},
    }
    tasks: dict[str, object] = {
        "kind": "tasks",
        "model_digest": digest_of("A"),
        "model": {"name": "besa"},
        "dense": {"piqa": {"acc": 0.9}},
    }
    tasks |= {"harness": harness} if nested else harness
    path = run(tmp_path / "a", manifest("A"), tasks, result("A", 20.0))
    assert table(comparison.compare([path]))["besa 50 %"] == {
        WIKI: 20.0,
        "piqa acc": 0.66,
        "piqa acc_norm": 0.67,
        "arc_easy acc": 0.5,
    }
    assert next(iter(comparison.compare([path]).columns)) == WIKI  # perplexities first


def test_shots_and_limits_are_columns_of_their_own(tmp_path: Path) -> None:
    def tasks(value: float, **settings: Any) -> dict[str, Any]:
        return {
            "kind": "tasks",
            "model_digest": digest_of("A"),
            "settings": settings,
            "results": {"piqa": {"acc": value}},
        }

    path = run(tmp_path / "a", manifest("A"), tasks(0.5), tasks(0.6, num_fewshot=5), tasks(0.7, limit=10))
    found = table(comparison.compare([path]))["besa 50 %"]
    assert found == {"piqa acc": 0.5, "piqa acc, 5 shots": 0.6, "piqa acc, limit 10": 0.7}
    files = [{"test": {"name": "piqa.jsonl", "sha256": digest}} for digest in "ab"]
    path = run(tmp_path / "b", manifest("A"), *(tasks(0.5 + each / 4, data=file) for each, file in enumerate(files)))
    assert sorted(table(comparison.compare([path]))["besa 50 %"].values()) == [0.5, 0.75]


def test_the_comparison_with_the_dense_model_has_columns_beside_the_perplexity(tmp_path: Path) -> None:
    compared = {"kl": 0.25, "same_token": 0.75, "baseline_digest": digest_of("origin")}
    missing = {"kl": None, "same_token": None, "baseline_digest": None}
    ptb = {"dataset": "ptb", "windows": 50, "windows_in_text": 50, "text_digest": "p"}
    first = run(
        tmp_path / "a",
        manifest("A"),
        result("A", 20.0, **compared),
        result("origin", 10.0, **missing),
        result("A", 200.0, **ptb, **compared),
    )
    second = run(tmp_path / "b", manifest("B", method="wanda"), result("B", 30.0))  # of an older version
    found = comparison.compare([first, second])
    kl, same = "wikitext2 test KL, 148 × 2048", "wikitext2 test same token, 148 × 2048"
    assert list(found.columns) == [
        WIKI,
        kl,
        same,
        "ptb test, 50 × 2048",
        "ptb test KL, 50 × 2048",
        "ptb test same token, 50 × 2048",
    ]
    rows = table(found)
    assert rows["dense"] == {WIKI: 10.0}
    assert {title: rows["besa 50 %"][title] for title in (WIKI, kl, same)} == {WIKI: 20.0, kl: 0.25, same: 0.75}
    assert rows["wanda 50 %"] == {WIKI: 30.0}


def test_divergences_from_different_models_do_not_share_a_column(tmp_path: Path) -> None:
    runs = [
        run(
            tmp_path / name,
            manifest(name, parent=f"{name}-0", model=f"org/{name}"),
            result(name, 2.0, kl=value, same_token=None, baseline_digest=digest_of(f"{name}-0")),
        )
        for name, value in (("a", 0.5), ("b", 0.25))
    ]
    found = comparison.compare(runs)
    kl = [column for column in found.columns.values() if column.metric == "kl"]
    assert [[row.figures.get(column) for column in kl] for row in found.rows] == [[0.5, None], [None, 0.25]]
    assert all(", baseline " in title for title, column in found.columns.items() if column.metric == "kl")


@pytest.mark.parametrize(("field", "value"), [("kl", -0.5), ("same_token", 1.5), ("kl", "0.5")])
def test_an_impossible_comparison_is_refused(field: str, value: object, tmp_path: Path) -> None:
    path = run(tmp_path / "a", manifest("A"), result("A", 20.0, **{field: value}))
    with pytest.raises(BesaError, match=field):
        comparison.compare([path])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from("ABC"), st.sampled_from([512, 2048]), st.sampled_from(["x", "y"])),
        min_size=1,
        unique=True,
    )
)
def test_no_figure_is_lost_or_mixed(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, int, str]]
) -> None:
    place = tmp_path_factory.mktemp("runs")
    runs = []
    for name in "ABC":
        records = [
            result(name, float(number), seqlen=seqlen, text_digest=text)
            for number, (model, seqlen, text) in enumerate(cells, 1)
            if model == name
        ]
        if records:
            runs.append(run(place / name, manifest(name, seed=name), *records))
    found = comparison.compare(runs)
    assert sorted(value for row in found.rows for value in row.figures.values()) == list(
        map(float, range(1, len(cells) + 1))
    )
    for row in found.rows:
        for column, value in row.figures.items():
            model, seqlen, text = cells[int(value) - 1]
            facts = dict(column.hidden)
            assert row.run is not None
            assert (row.run.name, facts["seqlen"], facts["text_digest"]) == (model, seqlen, text)


# --- the command


@pytest.fixture
def two(workplace: Path) -> Path:
    run(workplace / "a", manifest("A", granularity="row|1"), result("A", 20.03125), result("origin", 10.0))
    run(workplace / "b", manifest("B", granularity="layer"), result("B", 30.0))
    write(
        workplace / "b" / "eval" / "tasks.json",
        {"kind": "tasks", "model_digest": digest_of("B"), "results": {"piqa": {"acc": 0.6625}}},
    )
    return workplace


def test_a_table(besa: Besa, two: Path) -> None:
    outcome = besa("eval", "compare", "a", "b")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.split("  ") for line in outcome.out.splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines if not line[0].startswith("-")] == [
        ["method", WIKI, "piqa acc"],
        ["dense", "10.0000", "-"],
        ["besa 50 %, granularity row|1", "20.0312", "-"],
        ["besa 50 %, granularity layer", "30.0000", "66.25 %"],
    ]


def test_markdown(besa: Besa, two: Path) -> None:
    assert besa("eval", "compare", "a", "b", "--format", "markdown").out.splitlines() == [
        f"| method | {WIKI} | piqa acc |",
        "| --- | ---: | ---: |",
        "| dense | 10.0000 | - |",
        r"| besa 50 %, granularity row\|1 | 20.0312 | - |",
        "| besa 50 %, granularity layer | 30.0000 | 66.25 % |",
    ]


def test_csv_holds_every_digit(besa: Besa, two: Path) -> None:
    rows = list(csv.reader(io.StringIO(besa("eval", "compare", "a", "b", "--format", "csv").out)))
    assert rows == [
        ["method", WIKI, "piqa acc"],
        ["dense", "10.0", ""],
        ["besa 50 %, granularity row|1", "20.03125", ""],
        ["besa 50 %, granularity layer", "30.0", "0.6625"],
    ]


def test_json(besa: Besa, two: Path) -> None:
    found = json.loads(besa("eval", "compare", "a", "b", "--format", "json").out)
    first, second = found["columns"]
    assert (first["title"], first["metric"], first["seqlen"], first["windows"]) == (WIKI, "perplexity", 2048, 148)
    assert (second["name"], second["metric"]) == ("piqa", "acc")
    assert [(row["method"], row["run"], row["figures"]) for row in found["rows"]] == [
        ("dense", None, {WIKI: 10.0}),
        ("besa 50 %, granularity row|1", "a", {WIKI: 20.03125}),
        ("besa 50 %, granularity layer", "b", {WIKI: 30.0, "piqa acc": 0.6625}),
    ]


def test_the_figures_of_a_comparison_as_text(besa: Besa, workplace: Path) -> None:
    figures = {"kl": 0.0003125, "same_token": 0.96875, "baseline_digest": digest_of("origin")}
    run(workplace / "c", manifest("A"), result("A", 20.0, **figures), result("origin", 10.0))
    assert besa("eval", "compare", "c", "--format", "markdown").out.splitlines() == [
        f"| method | {WIKI} | wikitext2 test KL, 148 × 2048 | wikitext2 test same token, 148 × 2048 |",
        "| --- | ---: | ---: | ---: |",
        "| dense | 10.0000 | - | - |",
        "| besa 50 % | 20.0000 | 3.13e-04 | 96.88 % |",
    ]
    found = json.loads(besa("eval", "compare", "c", "--format", "json").out)
    assert [column["metric"] for column in found["columns"]] == ["perplexity", "kl", "same_token"]
    assert found["columns"][1]["baseline_digest"] == digest_of("origin")


@pytest.mark.parametrize(
    ("name", "said", "hint"),
    [("gone", "no run directory gone", "besa prune --run"), ("empty", "empty has no results", "besa eval ppl")],
)
def test_a_run_that_is_missing_or_not_measured_is_one_line(
    name: str, said: str, hint: str, besa: Besa, two: Path
) -> None:
    run(two / "empty", manifest("E"))
    outcome = besa("eval", "compare", "a", name)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.splitlines()[0] == f"error: {said}"
    assert hint in outcome.err.splitlines()[1]
    assert len(outcome.err.splitlines()) == 2


def test_what_the_other_commands_write_is_read(besa: Besa, workplace: Path) -> None:
    model = tiny_models.add_tokenizer(tiny_models.checkpoint(workplace / "m"))
    tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(2, 12))
    (workplace / "words.txt").write_text(" ".join(f"w{number}" for number in tiny_models.tokens(1, 50)[0].tolist()))
    drawn = ("--data", "rows.jsonl", "--samples", 2, "--seqlen", 12, "--dtype", "float32")
    measured = {}
    for method in ("wanda", "magnitude"):
        assert besa("prune", "--model", model, "--method", method, "--run", method, *drawn).code == 0
        outcome = besa("eval", "ppl", "words.txt", "--seqlen", 16, "--dtype", "float32", "--run", method, "--json")
        (measured[method],) = json.loads(outcome.out)["results"]
    shutil.rmtree("m")  # what is compared is what is on the disk
    found = json.loads(besa("eval", "compare", "wanda", "magnitude", "--format", "json").out)
    column, kl, same = found["columns"]
    assert column["title"] == "words.txt, 3 × 16"
    assert {row["method"]: row["figures"][column["title"]] for row in found["rows"]} == {
        "dense": measured["wanda"]["dense"]["perplexity"],
        "wanda 50 %": measured["wanda"]["perplexity"],
        "magnitude 50 %": measured["magnitude"]["perplexity"],
    }
    for method, figures in ((row["method"].split()[0], row["figures"]) for row in found["rows"]):
        if method != "dense":
            own = measured[method]
            assert (figures[kl["title"]], figures[same["title"]]) == (own["kl"], own["same_token"])
