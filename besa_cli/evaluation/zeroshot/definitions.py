"""Task definitions for local data: generated YAML files that include lm-eval's definition and replace its data set."""

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
    """Local data of a task, used instead of the hub's.

    Attributes
    ----------
    evaluated : str
        Split to evaluate: ``test`` if lm-eval's definition uses it and its file exists, else ``validation``.
    files : mapping of split to Path
        All files used, including files of labels (as ``validation labels``).
    """

    evaluated: str
    files: Mapping[str, Path]

    def record(self) -> dict[str, dict[str, str]]:
        """Return each file's name and SHA-256, for a result."""
        return {use: {"file": path.name, "sha256": disk.sha256_file(path)} for use, path in self.files.items()}


def locate(task: str, splits: Sequence[str], data_dir: Path | None) -> dict[str, Path]:
    """Return the existing files of a task's splits below `data_dir`, by split."""
    form = FORMS.get(task)
    if form is None or data_dir is None:
        return {}
    files = {}
    for split in splits:
        file = documents.first_file(data_dir, form.candidates(split))
        if file is not None:
            files[split] = file
    return files


def write(
    task: str, original: Path, splits: Mapping[str, str], located: Mapping[str, Path], directory: Path
) -> LocalData:
    """Write a definition of `task` that reads its data from local files.

    Parameters
    ----------
    original : Path
        YAML file of lm-eval, of which only the data-set fields are replaced.
    splits : mapping of str to str
        Split names by field of the definition (``training_split``, …).
    located : mapping of split to Path
        Files from `locate`; splits without a file are set to null.
    directory : Path
        Directory in which ``TASK.yaml`` and the rows, in the format that the definition reads, are written.

    Raises
    ------
    BesaError
        A file is invalid; the message names the line.
    """
    form = FORMS[task]
    rows, files = {}, dict(located)
    for split, path in located.items():
        rows[split] = directory / task / f"{split}.parquet"
        _write_rows(form, path, rows[split])
        labels = forms.label_path(form, path)
        if labels is not None:
            files[f"{split} labels"] = labels
    data = {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: _escaped(path) for split, path in rows.items()},
            "cache_dir": str(directory / ".cache"),
        },
    }
    kept = {field: split if split in located else None for field, split in splits.items()}
    _write_yaml(directory / f"{task}.yaml", {"include": str(original), "task": task, **data, **kept})
    used = [kept.get(field) for field in ("test_split", "validation_split")]
    return LocalData(evaluated=next(split for split in used if split), files=files)


def _escaped(path: Path) -> str:
    """Escape a path for `datasets`, which interprets paths as glob patterns."""
    if "::" in str(path):
        raise BesaError(
            f"{path} contains '::', which the library that reads the task's data takes for a chained URL",
            "give another directory with --definitions, or with the environment variable TMPDIR",
        )
    return glob.escape(str(path))


def write_reference(task: str, original: Path, directory: Path) -> None:
    """Write a definition that only includes lm-eval's own, which reads the hub's data."""
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


def require_training(task: str, located: Mapping[str, Path], data_dir: Path, shots: int | None) -> None:
    """Check that a training file exists if the prompt needs examples.

    Raises
    ------
    BesaError
        The training file is missing.
    """
    if shots and "train" not in located:
        expected = data_dir / next(FORMS[task].candidates("train"))
        raise BesaError(
            f"{task}: --num-fewshot {shots} requires a training file, and {expected} does not exist",
            "put the file there (docs/tasks.md lists the possible names), or leave --num-fewshot out",
        )


def require_hub(task: str, repository: str, prepared: Path, data_dir: Path | None, others: Sequence[str]) -> None:
    """Check, within seconds, that a task's data can be fetched from the hub.

    Parameters
    ----------
    repository : str
        Name of the data set on the hub; anything else is left to lm-eval to load.
    prepared : Path
        Cache of `datasets`; data sets in it need no hub.
    others : sequence of str
        Tasks of the same command whose local files exist.

    Raises
    ------
    BesaError
        The data is not available; the error names the missing local file and a command that would work.
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
        local = f"{_expected_file(task, data_dir)} does not exist, and " if task in FORMS else ""
        raise BesaError(
            f"{task} has no data: {local}{repository} is not available: {reason}", _remedy(task, data_dir, others)
        ) from error


def _expected_file(task: str, data_dir: Path | None) -> Path:
    return (data_dir or Path("DIR")) / next(FORMS[task].candidates("validation"))


def _remedy(task: str, data_dir: Path | None, others: Sequence[str]) -> str:
    if others:
        return f"run only the tasks whose files exist: besa eval tasks {','.join(others)} --data-dir {data_dir}"
    if task in FORMS:
        return f"put that file there (docs/tasks.md) and run: besa eval tasks {task} --data-dir {data_dir or 'DIR'}"
    return "run the same command where the hub can be reached; offline: besa eval tasks piqa --data-dir DIR"


def known_splits(config: Mapping[str, object]) -> dict[str, str]:
    """Return the splits of a definition that local files can replace, by field."""
    fields = ("training_split", "validation_split", "test_split")
    return {field: str(config[field]) for field in fields if config.get(field) in STEMS}
