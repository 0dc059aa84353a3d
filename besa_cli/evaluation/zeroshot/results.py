"""Result of one task, and the file that stores it."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from besa_cli.checkpoint import manifests
from besa_cli.errors import UsageError
from besa_cli.evaluation import result_files
from besa_cli.system import disk, lock, records
from besa_cli.system.disk import Json

AVERAGED = "acc"  # metric of the average: the paper does not name it, but its values are those of this metric


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Settings of task evaluation.

    Attributes
    ----------
    num_fewshot : int, optional
        Examples in a prompt; by default the task's own number, which is 0 for the paper's six.
    limit : int, optional
        Number of questions of each task, from the first.
    batch_size : str
        Requests in a pass: a number or ``auto``.
    device, dtype : str
        Resolved device and dtype, never ``auto``.
    streamed : bool
        True to run the model block by block instead of loading it whole.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: str = "1"
    device: str = "cpu"
    dtype: str = "float32"
    streamed: bool = False

    def __post_init__(self) -> None:
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"--num-fewshot {self.num_fewshot} is less than 0", "give 0 or more")
        if self.limit is not None and self.limit < 2:
            raise UsageError(f"--limit {self.limit} is less than 2", "a standard error needs 2 questions or more")
        if self.batch_size != "auto" and (not self.batch_size.isdecimal() or int(self.batch_size) < 1):
            raise UsageError(f"--batch-size '{self.batch_size}' is not a number of requests", "give 1 or more, or auto")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Value of one metric on one task, as returned by lm-eval."""

    task: str
    metric: str
    value: float
    stderr: float | None
    questions: int | None
    questions_in_split: int | None
    version: float | str | None


@records.strict
@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Result of one task or group, with everything that determines it.

    Attributes
    ----------
    task : str
        Requested name; the result of a group contains those of its tasks.
    split : str or None
        Split of the local files that was evaluated; None for the hub's data, whose split lm-eval chooses.
    data : mapping or None
        Name and SHA-256 of each local file; None for the hub's data.
    harness : mapping
        Complete output of lm-eval except the samples.
    """

    task: str
    split: str | None
    data: Mapping[str, Mapping[str, str]] | None
    num_fewshot: int | None
    limit: int | None
    batch_size: str
    device: str
    dtype: str
    streamed: bool
    model_digest: str
    tokenizer_digest: str
    harness: Json

    def scores(self) -> list[Score]:
        """Return every metric of the task, or of the group and its tasks, in lm-eval's order."""
        return [score for name in self.harness["results"] for score in self._scores(name)]

    def _scores(self, name: str) -> list[Score]:
        values: Json = self.harness["results"][name]
        counts = self.harness.get("n-samples", {}).get(name, {})
        scores = []
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            scores.append(
                Score(
                    task=name,
                    metric=metric if kind == "none" else key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    questions=counts.get("effective"),
                    questions_in_split=counts.get("original"),
                    version=self.harness.get("versions", {}).get(name),
                )
            )
        return scores

    def main_value(self) -> float | None:
        """Return the accuracy that enters the average, or None if the task has none."""
        scores = (score for score in self.scores() if score.task == self.task and score.metric == AVERAGED)
        return next((score.value for score in scores), None)


def average(results: Sequence[TaskResult]) -> float | None:
    """Return the mean accuracy over tasks, or None if there is only one task or a task has no accuracy."""
    values = [result.main_value() for result in results]
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) > 1 else None


def versions() -> dict[str, str]:
    """Return the versions of all programs on which results depend."""
    return {**manifests.versions(), **{name: version(name) for name in ("datasets", "lm_eval")}}


def file_name(facts: Json) -> str:
    """Return the file name of a result, with a digest of everything that determines its values.

    The batch size and the choice between streamed and in-memory evaluation are not part of it.

    Parameters
    ----------
    facts : mapping
        Fields of a `TaskResult` except `harness`.
    """
    counted = {name: value for name, value in facts.items() if name not in ("batch_size", "streamed")}
    key = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:8]
    shots = "own" if facts["num_fewshot"] is None else facts["num_fewshot"]
    part = "all" if facts["limit"] is None else f"first{facts['limit']}"
    return f"tasks-{disk.safe_name(facts['task'])}-{shots}shot-{part}-{facts['model_digest'][:8]}-{key}.json"


def save(result: TaskResult, file: Path, model: Json) -> None:
    """Write a result with its model, holding the lock of the run."""
    with lock.hold_results(file.parent.parent):
        result_files.save(result, file, "tasks", model, versions())


def load(file: Path) -> TaskResult | None:
    """Load a result, or return None if there is none or other versions made it."""
    return result_files.load(TaskResult, file, versions())
