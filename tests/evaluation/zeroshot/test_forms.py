"""Local files of the six tasks: every published form is read as the harness's definition expects it, or refused."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support import task_files

from besa_cli.errors import BesaError
from besa_cli.evaluation.zeroshot import forms
from besa_cli.evaluation.zeroshot.forms import FORMS


def only(row: dict[str, Any], task: str) -> dict[str, Any]:
    return {name: row[name] for name in FORMS[task].columns}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("task", FORMS)
def test_rows_as_the_hub_has_them(task: str, ending: str, tmp_path: Path) -> None:
    made = task_files.rows(task)
    path = tmp_path / f"validation{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)
    else:
        task_files.json_lines(path, made)
    found = forms.read(FORMS[task], path)
    assert found == [only(row, task) for row in made]
    assert pyarrow.Table.from_pylist(found, schema=FORMS[task].schema()).to_pylist() == found


def test_arc_as_first_released(tmp_path: Path) -> None:
    made = task_files.rows("arc_easy")
    released = [
        {
            "id": row["id"],
            "question": {
                "stem": row["question"],
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
                ],
            },
            "answerKey": row["answerKey"],
        }
        for row in made
    ]
    found = forms.read(FORMS["arc_easy"], task_files.json_lines(tmp_path / "ARC-Easy-Dev.jsonl", released))
    assert found == [only(row, "arc_easy") for row in made]


def test_boolq_as_first_released_is_what_superglue_made_of_it(tmp_path: Path) -> None:
    made = task_files.rows("boolq")
    released = [
        {"question": row["question"], "title": "w3", "answer": bool(row["label"]), "passage": row["passage"]}
        for row in made
    ]
    found = forms.read(FORMS["boolq"], task_files.json_lines(tmp_path / "dev.jsonl", released))
    assert found == [{**only(row, "boolq"), "passage": f"w3 -- {row['passage']}"} for row in made]
    untitled = [{name: value for name, value in row.items() if name != "title"} for row in released]
    assert forms.read(FORMS["boolq"], task_files.json_lines(tmp_path / "dev.jsonl", untitled)) == [
        only(row, "boolq") for row in made
    ]


def test_labels_may_be_numbers_texts_or_booleans(tmp_path: Path) -> None:
    path = tmp_path / "val.jsonl"
    superglue = [{**row, "label": bool(row["label"])} for row in task_files.rows("boolq")]
    found = forms.read(FORMS["boolq"], task_files.json_lines(path, superglue))
    assert [row["label"] for row in found] == [int(row["label"]) for row in superglue]
    assert all(type(row["label"]) is int for row in found)
    numbers = [{**row, "label": int(row["label"])} for row in task_files.rows("hellaswag")]
    found = forms.read(FORMS["hellaswag"], task_files.json_lines(path, numbers))
    assert [row["label"] for row in found] == [str(row["label"]) for row in numbers]


def test_the_labels_of_piqa_lie_beside_it(tmp_path: Path) -> None:
    made = task_files.rows("piqa")
    task_files.data_dir(tmp_path, tasks=["piqa"])
    path = tmp_path / "piqa" / "valid.jsonl"
    assert "label" not in json.loads(path.read_text().splitlines()[0])
    assert forms.read(FORMS["piqa"], path) == [only(row, "piqa") for row in made]
    labels = tmp_path / "piqa" / "valid-labels.lst"
    labels.write_text("0\n1\n2\n0\n0\n0\n0\n")
    with pytest.raises(BesaError, match=r"valid-labels\.lst, line 3: '2' is not a label"):
        forms.read(FORMS["piqa"], path)
    labels.write_text("0\n" * 9)
    with pytest.raises(BesaError, match=r"valid\.jsonl has 7 questions, .*valid-labels\.lst has 9 labels"):
        forms.read(FORMS["piqa"], path)
    labels.write_text("0\n" * 5)
    with pytest.raises(BesaError, match=r"valid\.jsonl, line 6: 'label' is None"):
        forms.read(FORMS["piqa"], path)
    labels.unlink()
    with pytest.raises(BesaError, match=r"valid\.jsonl, line 1: 'label' is None"):
        forms.read(FORMS["piqa"], path)


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("piqa", {"goal": None}, "'goal' is not a string"),
        ("piqa", {"sol2": " "}, "'sol2' is blank"),
        ("piqa", {"goal": "\ud800"}, "'goal' is not Unicode text"),
        ("hellaswag", {"endings": ["one", "\udfff"]}, "'endings' contains text that is not Unicode"),
        ("piqa", {"label": 1.0}, "'label' is 1.0, not a number from 0 to 1"),
        ("piqa", {"label": [1]}, "'label' is [1], not a number from 0 to 1"),
        ("arc_easy", {"answerKey": "E" * 9000}, "'answerKey' is 'EEEEE"),
        ("piqa", {"label": 2}, "'label' is 2, not a number from 0 to 1"),
        ("boolq", {"label": "yes"}, "'label' is 'yes'"),
        ("boolq", {"passage": 3}, "'passage' is not a string"),
        ("hellaswag", {"endings": ["one"]}, "'endings' is not a list of two or more texts"),
        ("hellaswag", {"label": "4"}, "'label' is '4', not a number from 0 to 3"),
        ("hellaswag", {"label": -1}, "'label' is -1"),
        ("winogrande", {"sentence": "no gap"}, "'sentence' has no blank"),
        ("winogrande", {"answer": ""}, "'answer' is blank"),
        ("winogrande", {"answer": "3"}, "'answer' is '3', not 1 or 2"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "'choices.label' is not a list of two"),
        ("arc_easy", {"choices": {"text": ["a", "b", "c"], "label": ["A", "B"]}}, "3 choices have 2 labels"),
        ("arc_easy", {"choices": "a"}, "no 'choices' with 'text' and 'label'"),
        ("arc_challenge", {"answerKey": "E"}, "'answerKey' is 'E', the choices are "),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(task: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = task_files.rows(task)
    made[4].update(change)
    path = task_files.json_lines(tmp_path / "validation.jsonl", made)
    with pytest.raises(BesaError) as caught:
        forms.read(FORMS[task], path)
    assert f"{path}, line 5: {said}" in caught.value.message
    assert len(caught.value.message) < 700


def test_a_missing_field_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    made = task_files.rows("winogrande")
    del made[1]["option2"]
    path = task_files.json_lines(tmp_path / "validation.jsonl", made)
    with pytest.raises(BesaError, match=r"line 2: no 'option2' \(fields: sentence, option1, answer\)"):
        forms.read(FORMS["winogrande"], path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = task_files.json_lines(tmp_path / "validation.jsonl", task_files.rows("piqa"))
    path.write_text(path.read_text() + '{"goal": \n')
    with pytest.raises(BesaError, match=r"validation\.jsonl, line 8: broken JSON"):
        forms.read(FORMS["piqa"], path)


def test_a_broken_parquet_file_and_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "validation.parquet"
    path.write_bytes(b"PAR1 cut short")
    with pytest.raises(BesaError, match="is not a whole parquet file"):
        forms.read(FORMS["piqa"], path)
    empty = tmp_path / "validation.jsonl"
    empty.write_text("\n")
    with pytest.raises(BesaError, match="contains no questions"):
        forms.read(FORMS["piqa"], empty)
    made = task_files.rows("boolq")
    made[2]["label"] = 5
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)
    with pytest.raises(BesaError, match="row 3: 'label' is 5"):
        forms.read(FORMS["boolq"], path)


def test_the_folder_of_a_parquet_file_says_nothing_of_its_rows(tmp_path: Path) -> None:
    """A folder called ``label=1`` would be a column to the library."""
    made = task_files.rows("boolq")
    for row in made:
        del row["label"]
    path = tmp_path / "label=1" / "validation.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), path)
    with pytest.raises(BesaError, match="row 1: 'label' is None"):
        forms.read(FORMS["boolq"], path)
