"""The harness's task definitions with local files in place of the hub's: generated YAMLs that include the original."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from besa_cli.errors import BesaError
from besa_cli.evaluation.zeroshot import forms
from besa_cli.evaluation.zeroshot.forms import FORMS, STEMS
from besa_cli.system import disk
from besa_cli.text import documents, hub_files


@dataclass(frozen=True, kw_only=True)
class LocalData:
    """What a task is measured on instead of the hub's data.

    Attributes
    ----------
    evaluated : str
        The split that is measured on: ``test`` where the harness prefers it and it is there, else ``validation``.
    files : mapping of split to Path
        Every file used, the labels' files among them (as ``validation labels``).
    """

    evaluated: str
    files: Mapping[str, Path]

    def record(self) -> dict[str, dict[str, str]]:
        """For a result: each file's name and SHA-256."""
        return {use: {"file": path.name, "sha256": disk.sha256_file(path)} for use, path in self.files.items()}


def locate(task: str, splits: Sequence[str], data_dir: Path | None) -> dict[str, Path]:
    """The files of a task's splits below `data_dir`, those that are there."""
    form = FORMS.get(task)
    if form is None or data_dir is None:
        return {}
    found = {}
    for split in splits:
        there = documents.first_file(data_dir, form.candidates(split))
        if there is not None:
            found[split] = there
    return found


def write(
    task: str, original: Path, splits: Mapping[str, str], found: Mapping[str, Path], directory: Path
) -> LocalData:
    """Write a definition of `task` that takes its data from local files.

    Parameters
    ----------
    original : Path
        The harness's YAML; everything but the data-set fields stays as it is there.
    splits : mapping of str to str
        Field of the definition (``training_split``, …) → the split's name.
    found : mapping of split to Path
        As `locate` found them; splits that are not there are set to null.
    directory : Path
        Gets ``TASK.yaml`` and, beside it, the rows in the form that the definition reads.

    Raises
    ------
    BesaError
        A file is broken; the line is named.
    """
    form = FORMS[task]
    rows, files = {}, dict(found)
    for split, path in found.items():
        rows[split] = directory / task / f"{split}.parquet"
        _write_rows(form, path, rows[split])
        labels = forms.label_path(form, path)
        if labels is not None:
            files[f"{split} labels"] = labels
    data = {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: _literally(path) for split, path in rows.items()},
            "cache_dir": str(directory / ".cache"),
        },
    }
    kept = {field: split if split in found else None for field, split in splits.items()}
    _write_yaml(directory / f"{task}.yaml", {"include": str(original), "task": task, **data, **kept})
    used = [kept.get(field) for field in ("test_split", "validation_split")]
    return LocalData(evaluated=next(split for split in used if split), files=files)


def _literally(path: Path) -> str:
    """A path as `datasets` must be given it, which takes it for a pattern."""
    if "::" in str(path):
        raise BesaError(
            f"{path}: '::' in a path means something else to the library that reads the task's data",
            "name another directory with --definitions, or with the environment variable TMPDIR",
        )
    return glob.escape(str(path))


def refer(task: str, original: Path, directory: Path) -> None:
    """Write a definition that is the harness's own, the hub's data included."""
    _write_yaml(directory / f"{task}.yaml", {"include": str(original), "task": task})


def _write_rows(form: forms.Form, source: Path, target: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(forms.read(form, source), schema=form.schema())
    disk.publish(target, partial(pyarrow.parquet.write_table, table))


def _write_yaml(path: Path, content: Mapping[str, object]) -> None:
    import yaml

    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    disk.publish(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def require_training(task: str, found: Mapping[str, Path], data_dir: Path, shots: int | None) -> None:
    """Refuse examples in the prompt where there is no training file to take them from.

    Raises
    ------
    BesaError
    """
    if shots and "train" not in found:
        wanted = data_dir / next(FORMS[task].candidates("train"))
        raise BesaError(
            f"{task}: --num-fewshot {shots} needs a training file, and there is no {wanted}",
            "put the file there (docs/tasks.md lists its names), or leave --num-fewshot out",
        )


def require_hub(task: str, repository: str, prepared: Path, data_dir: Path | None, others: Sequence[str]) -> None:
    """Find out within seconds whether a task's data can be had from the hub.

    Parameters
    ----------
    repository : str
        The data set's name on the hub; one that cannot be such a name is left to the harness.
    prepared : Path
        The cache of `datasets`: what is in there needs no hub.
    others : sequence of str
        Tasks of the same command whose files are there.

    Raises
    ------
    BesaError
        It cannot; the error names the file that was looked for and the command that would work.
    """
    if repository.count("/") != 1 or (prepared / repository.replace("/", "___")).is_dir():
        return
    try:  # a file that every repository of the hub has
        hub_files.fetch(
            hub_files.RemoteFile(repository=repository, path=".gitattributes"),
            hub_files.from_environment(),
            notify=lambda _: None,
        )
    except BesaError as error:
        reason = getattr(error, "reason", error.message)
        looked = f"no {_wanted(task, data_dir)}, and " if task in FORMS else ""
        raise BesaError(
            f"{task} has no data: {looked}{repository} cannot be had: {reason}", _remedy(task, data_dir, others)
        ) from error


def _wanted(task: str, data_dir: Path | None) -> Path:
    return (data_dir or Path("DIR")) / next(FORMS[task].candidates("validation"))


def _remedy(task: str, data_dir: Path | None, others: Sequence[str]) -> str:
    if others:
        return f"with the files that are there: besa eval tasks {','.join(others)} --data-dir {data_dir}"
    if task in FORMS:
        return f"with that file in place (docs/tasks.md): besa eval tasks {task} --data-dir {data_dir or 'DIR'}"
    return "where the hub can be reached, the same command works; offline: besa eval tasks piqa --data-dir DIR"


def known_splits(config: Mapping[str, object]) -> dict[str, str]:
    """The splits that a definition names and local files may stand for: field → split."""
    fields = ("training_split", "validation_split", "test_split")
    return {field: str(config[field]) for field in fields if config.get(field) in STEMS}
