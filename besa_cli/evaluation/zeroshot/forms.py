"""File names and row formats of the paper's six tasks, for reading them from local files."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from besa_cli.errors import BesaError, reason_of
from besa_cli.system.disk import Json, JsonObject
from besa_cli.text import documents, row_files

if TYPE_CHECKING:
    import pyarrow

Row = Json

STEMS = {  # possible names of a split's file; the first existing one is used
    "train": ("train", "train_xl", "Train"),
    "validation": ("validation", "valid", "val", "dev", "Dev"),
    "test": ("test", "Test"),
}
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", "-00000-of-00001.parquet")


@dataclass(frozen=True, kw_only=True)
class Form:
    """Files and rows of one task.

    Attributes
    ----------
    definition : str
        Folder below `lm_eval/tasks` with lm-eval's definition of the task.
    folders : tuple of str
        Folders of ``--data-dir`` that are searched for its files.
    prefix : str
        Optional prefix of a file's name, before the split; required for files outside of `folders`.
    columns : mapping of str to str
        Columns that lm-eval's definition reads, with their types: ``text``, ``texts``, ``number``, ``choices``.
    row : function
        Converts a published row to the columns; raises ValueError with the reason if the row is invalid.
    label_file : str, optional
        Ending of a separate file of labels, after the split's name: ``-labels.lst``.
    """

    definition: str
    folders: tuple[str, ...]
    prefix: str
    columns: Mapping[str, str]
    row: Callable[[Row], JsonObject]
    label_file: str | None = None

    def schema(self) -> "pyarrow.Schema":
        """Return the pyarrow schema of the columns."""
        import pyarrow

        text, texts = pyarrow.string(), pyarrow.list_(pyarrow.string())
        kinds = {
            "text": text,
            "texts": texts,
            "number": pyarrow.int64(),
            "choices": pyarrow.struct({"text": texts, "label": texts}),
        }
        return pyarrow.schema({name: kinds[kind] for name, kind in self.columns.items()})

    def candidates(self, split: str) -> Iterator[Path]:
        """Yield the possible paths of a split's file below ``--data-dir``, in order of precedence."""
        starts = [f"{folder}/{prefix}" for folder in self.folders for prefix in ("", self.prefix)]
        for start in (*starts, self.prefix):
            yield from (Path(f"{start}{stem}{ending}") for stem in STEMS[split] for ending in ENDINGS)


def read(form: Form, path: Path) -> list[JsonObject]:
    """Read all rows of a file, converted to the columns that lm-eval's definition reads.

    Raises
    ------
    BesaError
        The file cannot be read, or a row is not in a published format; the message names the line or row.
    """
    labels = _labels(form, path)
    rows = []
    for number, (place, row) in enumerate(_published_rows(path)):
        try:
            if labels is not None and "label" not in row:
                row = {**row, "label": labels[number] if number < len(labels) else None}
            rows.append(form.row(row))
        except ValueError as error:
            raise BesaError(
                f"{path}, {place}: {reason_of(error)}", "docs/tasks.md shows the row format of every task"
            ) from error
    if not rows:
        raise BesaError(f"{path} contains no questions", "fetch the file again")
    if labels is not None and len(labels) != len(rows):
        raise BesaError(
            f"{path} has {len(rows)} questions, {label_path(form, path)} has {len(labels)} labels",
            "fetch both files again: they belong together line by line",
        )
    return rows


def label_path(form: Form, path: Path) -> Path | None:
    """Return the file of labels next to `path`, or None if the task has none or it does not exist."""
    if form.label_file is None:
        return None
    return documents.first_file(path.parent, [path.name.partition(".")[0] + form.label_file])


def _labels(form: Form, path: Path) -> list[int] | None:
    beside = label_path(form, path)
    if beside is None:
        return None
    lines = documents.read_text(beside).splitlines()
    for number, line in enumerate(lines, start=1):
        if line.strip() not in ("0", "1"):
            raise BesaError(f"{beside}, line {number}: '{line[:40]}' is not a label (0 or 1)", "fetch the file again")
    return [int(line) for line in lines]


def _published_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the position of each row, as ``row N`` or ``line N``, and the row."""
    if documents.suffix(path) == ".parquet":
        yield from ((f"row {number}", row) for number, row in row_files.parquet_rows(path))
        return
    yield from ((f"line {number}", row) for number, row in row_files.json_lines(path))


def _text(row: Row, name: str, *, blank: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        problem = f"'{name}' is not a string" if name in row else f"no '{name}'"
        raise ValueError(f"{problem} (fields: {row_files.names(row)})")
    if not row_files.is_unicode(value):
        raise ValueError(f"'{name}' is not Unicode text")
    if not blank and not value.strip():
        raise ValueError(f"'{name}' is blank")
    return value


def _texts(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"'{name}' is not a list of two or more texts")
    if not all(map(row_files.is_unicode, value)):
        raise ValueError(f"'{name}' contains text that is not Unicode")
    return value


def _index(row: Row, name: str, below: int) -> int:
    value = row.get(name)
    index = int(value) if isinstance(value, bool) else value
    if not isinstance(index, int | str) or str(index) not in map(str, range(below)):
        raise ValueError(f"'{name}' is {value!r}, not a number from 0 to {below - 1}")
    return int(index)


def _piqa(row: Row) -> JsonObject:
    return {**{name: _text(row, name) for name in ("goal", "sol1", "sol2")}, "label": _index(row, "label", 2)}


def _arc(row: Row) -> JsonObject:
    """Convert a row of the hub's format (`choices` with `text` and `label`) or the original one (`question.stem`)."""
    inner = row.get("question")
    if isinstance(inner, Mapping):
        row = {**row, "question": inner.get("stem"), "choices": inner.get("choices")}
    choices = row.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if not isinstance(choices, Mapping):
        raise ValueError(f"no 'choices' with 'text' and 'label' (fields: {row_files.names(row)})")
    texts, labels = (_texts(choices.get(name), f"choices.{name}") for name in ("text", "label"))
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} choices have {len(labels)} labels")
    answer = _text(row, "answerKey")
    if answer not in labels:
        raise ValueError(f"'answerKey' is '{answer}', the choices are {', '.join(labels)}")
    return {"question": _text(row, "question"), "choices": {"text": texts, "label": labels}, "answerKey": answer}


def _hellaswag(row: Row) -> JsonObject:
    endings = _texts(row.get("endings"), "endings")
    texts = {name: _text(row, name, blank=name == "ctx_b") for name in ("activity_label", "ctx_a", "ctx_b")}
    return {**texts, "endings": endings, "label": str(_index(row, "label", len(endings)))}


def _winogrande(row: Row) -> JsonObject:
    texts = {name: _text(row, name) for name in ("sentence", "option1", "option2", "answer")}
    if "_" not in texts["sentence"]:
        raise ValueError("'sentence' has no blank (_)")
    if texts["answer"] not in ("1", "2"):
        raise ValueError(f"'answer' is '{texts['answer']}', not 1 or 2")
    return texts


def _boolq(row: Row) -> JsonObject:
    """Convert a row of SuperGLUE's format or the original one, with `answer` and a separate `title` of the passage."""
    passage = _text(row, "passage")
    if "label" not in row and "answer" in row:
        if not isinstance(row["answer"], bool):
            raise ValueError(f"'answer' is {row['answer']!r}, not true or false")
        title = row.get("title")
        row = {**row, "label": row["answer"]}
        passage = f"{title} -- {passage}" if isinstance(title, str) and title else passage
    return {"passage": passage, "question": _text(row, "question"), "label": _index(row, "label", 2)}


_ARC = {"question": "text", "choices": "choices", "answerKey": "text"}

FORMS = {  # in the paper's order
    "piqa": Form(
        definition="piqa",
        folders=("piqa",),
        prefix="piqa_",
        columns={"goal": "text", "sol1": "text", "sol2": "text", "label": "number"},
        row=_piqa,
        label_file="-labels.lst",
    ),
    "boolq": Form(
        definition="super_glue/boolq",
        folders=("boolq", "BoolQ"),
        prefix="boolq_",
        columns={"passage": "text", "question": "text", "label": "number"},
        row=_boolq,
    ),
    "hellaswag": Form(
        definition="hellaswag",
        folders=("hellaswag",),
        prefix="hellaswag_",
        columns={"activity_label": "text", "ctx_a": "text", "ctx_b": "text", "endings": "texts", "label": "text"},
        row=_hellaswag,
    ),
    "winogrande": Form(
        definition="winogrande",
        folders=("winogrande", "winogrande_xl", "winogrande_1.1"),
        prefix="winogrande_",
        columns={"sentence": "text", "option1": "text", "option2": "text", "answer": "text"},
        row=_winogrande,
    ),
    "arc_easy": Form(definition="arc", folders=("arc_easy", "ARC-Easy"), prefix="ARC-Easy-", columns=_ARC, row=_arc),
    "arc_challenge": Form(
        definition="arc",
        folders=("arc_challenge", "ARC-Challenge"),
        prefix="ARC-Challenge-",
        columns=_ARC,
        row=_arc,
    ),
}
