"""`besa eval tasks`: the numbers of stock lm-eval, kept task by task, beside the dense model's."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from support import calls, task_files, tiny_models
from transformers import AutoModelForCausalLM

from besa_cli.errors import UsageError
from besa_cli.evaluation.zeroshot import harness, results, run
from besa_cli.evaluation.zeroshot.results import TaskResult, TaskSettings
from besa_cli.models.tokenizer import tokenizer_of
from besa_cli.text import hub_files

Besa = Callable[..., Any]  # conftest.Outcome
Json = dict[str, Any]

BOTH = "piqa,arc_easy"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_files.Hub(endpoint="http://127.0.0.1:9", offline=True)
    monkeypatch.setattr(hub_files, "from_environment", lambda: hub)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.add_tokenizer(tiny_models.checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = task_files.data_dir(tmp_path_factory.mktemp("data"), count=9)
    for task in task_files.MADE:
        task_files.json_lines(directory / task / "train.jsonl", task_files.rows(task, 8, seed=11))
    return directory


def stock(model: Path, definitions: Path, tasks: list[str], shots: int | None, limit: int | None = None) -> Json:
    """What lm-eval's own entry point gives for a checkpoint and the same definitions."""
    output = simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=tasks,
        num_fewshot=shots,
        limit=limit,
        batch_size=1,
        device="cpu",
        task_manager=TaskManager(include_path=str(definitions), include_defaults=False),
    )
    assert output is not None
    return dict(output["results"])


def numbers(outcome: Any) -> dict[tuple[str, str], tuple[float, float | None]]:
    assert outcome.code == 0, outcome.err
    return {
        (score["task"], score["metric"]): (score["value"], score["stderr"])
        for result in json.loads(outcome.out)["results"]
        for score in result["scores"]
    }


def expected(output: Json) -> dict[tuple[str, str], tuple[float, float | None]]:
    return {
        (task, metric): (values[f"{metric},none"], values[f"{metric}_stderr,none"])
        for task, values in output.items()
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in values
    }


@pytest.mark.parametrize(("shots", "limit"), [(None, None), (2, 5)])
def test_the_numbers_are_those_of_stock_lm_eval(
    shots: int | None, limit: int | None, besa: Besa, model: Path, data: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "definitions"
    options = [*(["--num-fewshot", shots] if shots else []), *(["--limit", limit] if limit else [])]
    common = ("--model", model, "--data-dir", data, "--dtype", "float32", "--json")
    outcome = besa("eval", "tasks", *common, "--definitions", kept, *options)
    reference = expected(stock(model, kept, list(harness.PAPER), shots, limit))
    assert numbers(outcome) == reference
    assert {task for task, _ in reference} == set(harness.PAPER)
    assert len(set(reference.values())) > 3
    shown = json.loads(outcome.out)
    assert shown["average"]["value"] == pytest.approx(sum(reference[task, "acc"][0] for task in harness.PAPER) / 6)
    assert {score["questions"] for result in shown["results"] for score in result["scores"]} == {limit or 9}
    streamed = besa("eval", "tasks", *common, "--streamed", *options)
    assert numbers(streamed) == reference
    assert "arc_easy, " in streamed.err
    assert "block 2/2" in streamed.err


@pytest.fixture
def pruned(besa: Besa, model: Path, workplace: Path) -> Path:
    """A run directory with a stage of which nearly all is pruned."""
    tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(2, 12))
    drawn = ("--data", "rows.jsonl", "--samples", 2, "--seqlen", 12)
    outcome = besa("prune", "--model", model, "--method", "wanda", "--sparsity", 0.95, "--dtype", "float32", *drawn)
    assert outcome.code == 0, outcome.err
    return workplace / "besa-run"


def test_the_stage_is_shown_beside_its_parent(
    besa: Besa, model: Path, data: Path, pruned: Path, tmp_path: Path
) -> None:
    words = ("eval", "tasks", BOTH, "--data-dir", data, "--dtype", "float32")
    outcome = besa(*words, "--json", "--definitions", tmp_path / "definitions")
    reference = expected(stock(pruned / "pruned", tmp_path / "definitions", BOTH.split(","), None))
    assert numbers(outcome) == reference
    assert reference != expected(stock(model, tmp_path / "definitions", BOTH.split(","), None))
    shown = json.loads(outcome.out)
    files = sorted((pruned / "eval").iterdir())
    assert len(files) == 4
    records = [json.loads(file.read_text()) for file in files]
    by_model = {(record["model"]["name"], record["task"]): record for record in records}
    for result in shown["results"]:
        for score in result["scores"]:
            kept = by_model["wanda 95.00 %", result["task"]]["harness"]["results"][result["task"]]
            dense = by_model["dense", result["task"]]["harness"]["results"][result["task"]]
            metric = f"{score['metric']},none"
            assert score["value"] == kept[metric]
            assert score["dense"]["value"] == dense[metric]
            assert score["difference"] == pytest.approx(kept[metric] - dense[metric])
    average = shown["average"]
    assert average["difference"] == pytest.approx(average["value"] - average["dense"])
    table = besa(*words).out.splitlines()
    assert table[0].split()[:4] == ["task", "metric", "split", "questions"]
    assert [line.split()[:3] for line in table[2:6]] == [
        ["piqa", "acc", "validation"],
        ["piqa", "acc_norm", "validation"],
        ["arc_easy", "acc", "validation"],
        ["arc_easy", "acc_norm", "validation"],
    ]
    assert table[6].split()[:2] == ["average", "acc"]
    assert f"{average['difference']:+.4f}" in table[6]
    alone = json.loads(besa(*words, "--no-baseline", "--json").out)
    assert alone["results"][0]["scores"][0]["dense"] is None
    for record in records:
        assert record["versions"]["lm_eval"] == record["versions"]["lm_eval"].strip()
        assert record["harness"]["versions"] == {record["task"]: 1.0}
        assert "samples" not in record["harness"]
        assert record["harness"]["n-samples"][record["task"]] == {"original": 9, "effective": 9}


def test_a_changed_parent_is_not_compared_with(
    besa: Besa, model: Path, data: Path, workplace: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    own = tiny_models.add_tokenizer(tiny_models.checkpoint(tmp_path_factory.mktemp("own")))
    tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(2, 12))
    drawn = ("--data", "rows.jsonl", "--samples", 2, "--seqlen", 12)
    assert besa("prune", "--model", own, "--method", "magnitude", "--dtype", "float32", *drawn).code == 0
    tiny_models.checkpoint(own, seed=5)
    outcome = besa("eval", "tasks", "piqa", "--data-dir", data, "--dtype", "float32")
    assert outcome.code == 1
    assert "has changed since the stage was made from it" in outcome.err


def test_what_was_measured_is_not_measured_again(
    besa: Besa, model: Path, data: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("eval", "tasks", BOTH, "--model", model, "--data-dir", data, "--dtype", "float32", "--run", "r", "--json")
    measured: list[str] = []
    evaluate = harness.evaluate

    def interrupted(lm: Any, loaded: Any, **options: Any) -> Any:
        (name,) = loaded["tasks"]
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(name)
        return evaluate(lm, loaded, **options)

    monkeypatch.setattr(harness, "evaluate", interrupted)
    outcome = besa(*words)
    assert outcome.code == 130
    assert "1 tasks of this model are measured and kept; run the same command again" in outcome.err
    assert measured == ["piqa"]
    noted = calls.noting(evaluate, lambda lm, loaded, **o: measured.extend(loaded["tasks"]))
    monkeypatch.setattr(harness, "evaluate", noted)
    resumed = besa(*words)
    assert measured == ["piqa", "arc_easy"]
    assert "piqa, " in resumed.err
    assert "measured already" in resumed.err
    once = besa(*words[:-3], "--run", "other", "--json")
    assert numbers(resumed) == numbers(once)
    assert measured == ["piqa", "arc_easy"] * 2
    assert besa(*words, "--streamed", "--batch-size", 2).out == resumed.out  # neither changes what is asked for
    assert len(measured) == 4
    assert numbers(besa(*words, "--restart")) == numbers(once)
    assert len(measured) == 6
    assert besa(*words, "--limit", 3).code == 0
    assert len(measured) == 8


def test_an_interruption_says_when_nothing_was_kept(
    besa: Besa, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "evaluate", interrupted)
    outcome = besa("eval", "tasks", "piqa", "--model", model, "--data-dir", data, "--dtype", "float32")
    assert outcome.code == 130
    assert "nothing was kept; with --run DIR" in outcome.err


def test_a_model_that_would_not_fit_is_streamed(
    besa: Besa, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from besa_cli.evaluation.zeroshot import fit

    monkeypatch.setattr(fit, "fits", lambda *_: False)

    def refused(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("the whole model is loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refused)
    words = ("eval", "tasks", "winogrande", "--model", model, "--data-dir", data, "--dtype", "float32", "--json")
    outcome = besa(*words)
    assert outcome.code == 0, outcome.err
    assert "would not fit in memory: it is measured block by block" in outcome.err
    assert json.loads(outcome.out)["results"][0]["streamed"] is True
    outcome = besa(*words, "--in-memory")
    assert outcome.code == 1
    assert f"error: cannot read {model}: the whole model is loaded" in outcome.err


def test_a_task_without_data_and_a_broken_line_are_one_line_each(besa: Besa, model: Path, tmp_path: Path) -> None:
    directory = task_files.data_dir(tmp_path / "data", tasks=["arc_easy"])
    outcome = besa("eval", "tasks", "boolq", "--model", model, "--data-dir", directory)
    assert outcome.code == 1
    assert f"boolq has no data: {directory}/boolq/validation.jsonl does not exist" in outcome.err
    assert "hint: " in outcome.err
    file = directory / "arc_easy" / "validation.jsonl"
    file.write_text(file.read_text().replace('"choices"', '"options"', 3))
    outcome = besa("eval", "tasks", "arc_easy", "--model", model, "--data-dir", directory)
    assert outcome.code == 1
    assert f"error: {file}, line 1: no 'choices'" in outcome.err


def test_questions_that_are_cut_are_counted_in_a_note(besa: Besa, model: Path, tmp_path: Path) -> None:
    made = task_files.rows("boolq")
    for row in made[:3]:
        row["passage"] += " w5" * tiny_models.LONGEST
    task_files.json_lines(tmp_path / "boolq" / "validation.jsonl", made)
    words = ("eval", "tasks", "boolq", "--model", model, "--data-dir", tmp_path, "--dtype", "float32")
    for mode in ("--in-memory", "--streamed"):
        outcome = besa(*words, mode)
        assert outcome.code == 0
        (note,) = [line for line in outcome.err.splitlines() if "maximum length (64)" in line]
        assert "(3 such warnings)" in note or note.startswith("3 questions exceed")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_fewshot": -1}, "--num-fewshot -1 "),
        ({"limit": 1}, "--limit 1 is less than 2"),
        ({"batch_size": "0"}, "--batch-size '0'"),
        ({"batch_size": "many"}, "--batch-size 'many'"),
    ],
)
def test_settings_that_cannot_be_meant(options: Json, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        TaskSettings(**options)


def result(task: str = "piqa", acc: float | None = 0.5, **changes: Any) -> TaskResult:
    values: Json = {"alias": task, "sample_len": 4, "acc_norm,none": 0.25, "acc_norm_stderr,none": "N/A"}
    if acc is not None:
        values |= {"acc,none": acc, "acc_stderr,none": 0.1}
    output = {"results": {task: values}, "versions": {task: 1.0}, "n-samples": {task: {"original": 8, "effective": 4}}}
    facts = {
        "task": task, "split": "validation", "data": None, "num_fewshot": 0, "limit": 4, "batch_size": "1",
        "device": "cpu", "dtype": "float32", "streamed": False, "model_digest": "a" * 64, "tokenizer_digest": "b",
    }  # fmt: skip
    return TaskResult(**{**facts, **changes}, harness=output)


def facts(each: TaskResult) -> Json:
    return {name: value for name, value in vars(each).items() if name != "harness"}


def test_scores_are_the_harnesss() -> None:
    norm, plain = result().scores()
    assert (norm.metric, norm.value, norm.stderr, norm.questions, norm.questions_in_split) == (
        "acc_norm",
        0.25,
        None,
        4,
        8,
    )
    assert (plain.metric, plain.value, plain.stderr, plain.version) == ("acc", 0.5, 0.1, 1.0)


def test_the_average_counts_every_task_once() -> None:
    assert results.average([result(acc=0.5), result("boolq", 0.7)]) == pytest.approx(0.6)
    assert results.average([result(acc=0.5)]) is None
    assert results.average([result(acc=0.5), result("boolq", None)]) is None


def test_a_file_is_named_for_what_made_it(tmp_path: Path) -> None:
    plain = results.file_name(facts(result()))
    assert plain.startswith("tasks-piqa-0shot-first4-aaaaaaaa-")
    different: list[dict[str, Any]] = [
        {"task": "boolq"}, {"limit": None}, {"num_fewshot": 5}, {"model_digest": "c"}, {"dtype": "bfloat16"},
        {"device": "cuda"}, {"tokenizer_digest": "d"}, {"split": "test"}, {"data": {"test": {"sha256": "e"}}},
    ]  # fmt: skip
    names = {results.file_name(facts(result(**change))) for change in different}
    assert len({plain, *names}) == len(different) + 1
    assert results.file_name(facts(result(batch_size="auto", streamed=True))) == plain
    results.save(result(), tmp_path / plain, {"name": "dense"})
    assert results.load(tmp_path / plain) == result()
    record = json.loads((tmp_path / plain).read_text())
    record["versions"]["lm_eval"] = "0.4.0"
    (tmp_path / plain).write_text(json.dumps(record))
    assert results.load(tmp_path / plain) is None


def test_a_measurement_without_a_directory_keeps_nothing(model: Path, data: Path, workplace: Path) -> None:

    tokenizer = tokenizer_of(tiny_models.local(model))
    with harness.prepare(["piqa"], data, shots=None, notify=lambda line: None) as tasks:
        job = run.TaskMeasurement(model, "digest", tokenizer, "made of", tasks, TaskSettings())
        found = job.measure("piqa", None, {})
    assert found.main_value() == found.harness["results"]["piqa"]["acc,none"]
    assert not list(workplace.iterdir())
    assert torch.is_grad_enabled()


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    besa: Besa, data: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_TRIALS", (2, 2, 4))
    words = ("eval", "tasks", BOTH, "--data-dir", data, "--dtype", "float32", "--json")
    before = tiny_models.files(pruned, without=())
    found = besa(*words, "--limit", 6, "--definitions", pruned / "definitions", "--dry-run")
    assert found.code == 0, found.err
    said = json.loads(found.out)
    assert [(trial["model"], trial["task"], trial["questions"]) for trial in said["tasks"]] == [
        (model, task, 6) for model in ("wanda 95.00 %", "dense") for task in BOTH.split(",")
    ]
    assert said["seconds"] > sum(trial["seconds"] for trial in said["tasks"]) > 0  # and what it took to get there
    assert said["memory"] > 50_000_000
    assert tiny_models.files(pruned, without=()) == before
    whole = json.loads(besa(*words, "--no-baseline", "--dry-run").out)
    assert [trial["questions"] for trial in whole["tasks"]] == [9, 9]
    assert besa(*words, "--limit", 6).code == 0
    assert json.loads(besa(*words, "--limit", 6, "--dry-run").out) == {"done": True}


def test_a_forecast_grows_with_the_questions(model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials by a clock that takes 3 s, 0.5 s a question and 7 s the first time: 3 + 0.5·9 of all nine."""
    clock, first = [0.0], [7.0]
    evaluate = harness.evaluate

    def slow(*words: Any, limit: int, **named: Any) -> Json:
        clock[0] += 3 + 0.5 * limit + (first.pop() if first else 0)
        return evaluate(*words, limit=limit, **named)

    monkeypatch.setattr(harness, "evaluate", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    settings = TaskSettings(dtype="float32")
    with harness.prepare(("piqa",), data, shots=None, keep=None, notify=print) as ready:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        found = run.TaskMeasurement(model, "digest", tokenizer, "tokenizer", ready, settings).forecast("piqa")
    assert (found.task, found.questions) == ("piqa", 9)
    assert found.seconds == pytest.approx(3 + 0.5 * 9)


def test_a_dry_run_refuses_what_the_command_refuses(besa: Besa, data: Path, pruned: Path, model: Path) -> None:
    words = ("eval", "tasks", "piqa", "--data-dir", data, "--dtype", "float32")
    shard = next(model.glob("*.safetensors"))
    before = shard.read_bytes()
    try:
        shard.write_bytes(before[:-4] + bytes(4))
        real, dry = besa(*words), besa(*words, "--dry-run")
    finally:
        shard.write_bytes(before)
    assert (dry.code, dry.out) == (1, "")
    assert dry.err.splitlines()[-2:] == real.err.splitlines()[-2:]
