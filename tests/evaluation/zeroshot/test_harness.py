"""Generated definitions differ from the harness's own in their data alone; what has no data is refused in a line."""

import gzip
import re
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from support import task_files

from besa_cli.errors import BesaError, UsageError
from besa_cli.evaluation.zeroshot import harness
from besa_cli.evaluation.zeroshot.forms import ENDINGS, FORMS, STEMS
from besa_cli.evaluation.zeroshot.results import TaskResult
from besa_cli.text import hub_files

DATA = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_files.Hub(endpoint="http://127.0.0.1:9", offline=True)
    monkeypatch.setattr(hub_files, "from_environment", lambda: hub)


def prepared(names: list[str], data_dir: Path | None, **options: Any) -> Any:
    given = {"shots": None, "notify": lambda line: None, **options}
    return harness.prepare(names, data_dir, **given)


def own(task: str) -> dict[str, Any]:
    """The harness's definition, its functions by their names."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / FORMS[task].definition
    found: dict[str, Any] = TaskManager(include_path=str(folder), include_defaults=False).task_index[task].cfg
    return found


@pytest.mark.parametrize("task", FORMS)
def test_a_generated_definition_changes_the_data_alone(task: str, tmp_path: Path) -> None:
    data = task_files.data_dir(tmp_path / "data")
    with prepared([task], data, keep=tmp_path / "kept") as tasks:
        made, before = tasks.manager.task_index[task].cfg, own(task)
        different = {name for name in {**made, **before} if made.get(name) != before.get(name)}
        assert different <= DATA
        assert {"dataset_path", "training_split"} <= different
        local = tasks.local[task]
        assert local.evaluated == "validation"
        task_object = harness.load(tasks, task, lambda line: None)["tasks"][task]
        documents = list(task_object.eval_docs)
    columns = FORMS[task].columns
    expected = [{name: row[name] for name in columns} for row in task_files.rows(task)]
    assert [{name: document[name] for name in columns} for document in documents] == expected
    assert (tmp_path / "kept" / f"{task}.yaml").is_file()
    assert not list(tmp_path.glob("kept/*.partial"))


@pytest.mark.parametrize("name", ["d[1]", "d*", "d?", "d #%20"])
def test_the_files_of_a_directory_of_any_name_are_read(name: str, tmp_path: Path) -> None:
    """Also where a pattern of that name would find others."""
    other = task_files.data_dir(tmp_path / "d1", tasks=["arc_easy"], count=3)
    data = task_files.data_dir(tmp_path / name, tasks=["arc_easy"])
    with prepared(["arc_easy"], other, keep=tmp_path / "d1" / "kept"):
        pass
    with prepared(["arc_easy"], data, keep=tmp_path / name / "kept") as tasks:
        task = harness.load(tasks, "arc_easy", lambda line: None)["tasks"]["arc_easy"]
        asked = [row["question"] for row in task.eval_docs]
    assert asked == [row["question"] for row in task_files.rows("arc_easy")]


def test_a_directory_that_the_data_reader_would_misread_is_refused(tmp_path: Path) -> None:
    data = task_files.data_dir(tmp_path / "data", tasks=["arc_easy"])
    with pytest.raises(BesaError, match="contains '::'"), prepared(["arc_easy"], data, keep=tmp_path / "a::b"):
        pass


def test_what_lies_in_a_files_place_is_not_passed_over(tmp_path: Path) -> None:
    data = task_files.data_dir(tmp_path / "data", tasks=["piqa"])
    (data / "piqa" / "validation.jsonl").mkdir()
    with pytest.raises(BesaError, match=r"validation\.jsonl is not a file"), prepared(["piqa"], data):
        pass


def test_the_record_names_every_file(tmp_path: Path) -> None:
    with prepared(["piqa"], task_files.data_dir(tmp_path)) as tasks:
        record = tasks.local["piqa"].record()
    assert {use: each["file"] for use, each in record.items()} == {
        "validation": "valid.jsonl",
        "validation labels": "valid-labels.lst",
    }
    assert all(len(each["sha256"]) == 64 for each in record.values())


def test_the_harness_prefers_a_test_split_where_it_is_there(tmp_path: Path) -> None:
    data = task_files.data_dir(tmp_path, tasks=["arc_easy"])
    task_files.json_lines(data / "arc_easy" / "test.jsonl", task_files.rows("arc_easy", 5, seed=4))
    with prepared(["arc_easy"], data) as tasks:
        task = harness.load(tasks, "arc_easy", lambda line: None)["tasks"]["arc_easy"]
        assert tasks.local["arc_easy"].evaluated == "test"
        assert [row["question"] for row in task.eval_docs] == [
            row["question"] for row in task_files.rows("arc_easy", 5, seed=4)
        ]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("piqa", "piqa/validation.parquet"),
        ("arc_easy", "ARC-Easy/validation-00000-of-00001.parquet"),
        ("boolq", "boolq/val.jsonl"),
        ("hellaswag", "hellaswag_val.jsonl"),
        ("arc_challenge", "ARC-Challenge/ARC-Challenge-Dev.jsonl"),
        ("hellaswag", "hellaswag/validation.jsonl.gz"),
        ("winogrande", "winogrande_1.1/dev.jsonl"),
    ],
)
def test_files_are_found_under_their_published_names(task: str, name: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / name
    if name.endswith(".parquet"):
        path.parent.mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(task_files.rows(task)), path)
    else:
        task_files.json_lines(path, task_files.rows(task))
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    with prepared([task], tmp_path) as tasks:
        assert tasks.local[task].files == {"validation": path}


def test_examples_come_from_a_training_file_or_not_at_all(tmp_path: Path) -> None:
    data = task_files.data_dir(tmp_path, tasks=["boolq"])
    with (
        pytest.raises(BesaError, match=r"boolq: --num-fewshot 2 requires a training file, and \S+train.jsonl does not"),
        prepared(["boolq"], data, shots=2),
    ):
        pass
    with prepared(["boolq"], data, shots=0) as tasks:
        assert list(tasks.local["boolq"].files) == ["validation"]
    task_files.json_lines(data / "boolq" / "train.jsonl", task_files.rows("boolq", 9, seed=8))
    with prepared(["boolq"], data, shots=2) as tasks:
        task = harness.load(tasks, "boolq", lambda line: None)["tasks"]["boolq"]
        assert [row["passage"] for row in task.fewshot_docs()] == [
            row["passage"] for row in task_files.rows("boolq", 9, seed=8)
        ]


NO_HUB = "and aps/super_glue is not available: HF_HUB_OFFLINE"


@pytest.mark.parametrize(
    ("names", "there", "said", "hint"),
    [
        (
            ["boolq"],
            None,
            rf"boolq has no data: DIR/boolq/validation\.jsonl does not exist, {NO_HUB}",
            "tasks boolq --data-dir DIR",
        ),
        (["boolq"], [], r"\S+/boolq/validation\.jsonl does not exist", "besa eval tasks boolq --data-dir /"),
        (
            ["piqa", "hellaswag", "arc_easy"],
            ["piqa", "arc_easy"],
            r"hellaswag has no data: \S+/hellaswag/validation\.jsonl does not exist",
            "besa eval tasks piqa,arc_easy --data-dir",
        ),
    ],
)
def test_a_task_without_data_names_what_would_work(
    names: list[str], there: list[str] | None, said: str, hint: str, tmp_path: Path
) -> None:
    data = None if there is None else task_files.data_dir(tmp_path, tasks=there)
    with pytest.raises(BesaError, match=said) as caught, prepared(names, data):
        pass
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


def test_what_the_cache_of_datasets_holds_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_prepared_data", lambda: tmp_path)
    (tmp_path / "aps___super_glue").mkdir()
    notes: list[str] = []
    with prepared(["boolq"], None, notify=notes.append) as tasks:
        assert tasks.manager.task_index["boolq"].cfg == own("boolq")
        assert not tasks.local
    assert notes == ["boolq: data from the hub (aps/super_glue)"]


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown task 'mmluu'") as caught:
        harness.require_known("mmluu", ["mmlu", "gsm8k", *harness.PAPER])
    assert "did you mean 'mmlu'?" in caught.value.hint
    assert "gsm8k" not in caught.value.hint
    harness.require_known("mmlu", ["mmlu"])


def test_names_as_typed() -> None:
    assert harness.split_names([]) == harness.PAPER
    assert harness.split_names(["piqa,boolq", "arc_easy"]) == ("piqa", "boolq", "arc_easy")
    with pytest.raises(UsageError, match="piqa is given twice"):
        harness.split_names(["piqa,boolq", "piqa"])
    with pytest.raises(UsageError, match="an empty task name"):
        harness.split_names(["piqa,"])


def test_a_file_that_does_not_say_of_which_task_it_is_stands_for_none(tmp_path: Path) -> None:
    task_files.json_lines(tmp_path / "validation.jsonl", task_files.rows("piqa"))
    with pytest.raises(BesaError, match="piqa has no data"), prepared(["piqa"], tmp_path):
        pass


def test_the_page_of_the_tasks_lists_every_name() -> None:
    page = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
    lines = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    quoted = {line[1].strip().strip("`"): re.findall("`([^`]+)`", line[2]) for line in lines}
    assert {task: tuple(quoted[task]) for task in FORMS} == {task: form.folders for task, form in FORMS.items()}
    assert {split: tuple(quoted[split]) for split in STEMS} == STEMS
    (endings,) = [line[3] for line in lines if line[1].strip() == "validation"]
    assert tuple(re.findall("`([^`]+)`", endings)) == ENDINGS
    rows = {line[1].strip().strip("`"): line[-2] for line in lines}
    for task in ("piqa", "boolq", "hellaswag", "winogrande", "arc_easy"):
        assert all(f"`{column}`" in rows[task] for column in FORMS[task].columns), task
    fields = {name for line in lines for name in re.findall("`([^`]+)`", line[1])}
    assert set(signature(TaskResult).parameters) <= fields


def test_a_data_dir_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a directory"), prepared(["piqa"], tmp_path / "nothing"):
        pass
