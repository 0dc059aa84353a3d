"""What was measured on one task, and the file that keeps it."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from besa_cli.checkpoint import manifests
from besa_cli.errors import UsageError
from besa_cli.evaluation import result_files
from besa_cli.system import disk, lock, records

AVERAGED = "acc"  # the metric of the average: the paper names none, its figures are those of this one


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """How tasks are measured.

    Attributes
    ----------
    num_fewshot : int, optional
        Examples in a prompt; by default the task's own number, which is 0 for the paper's six.
    limit : int, optional
        Questions of each task, from the first on.
    batch_size : str
        Requests in a pass of the in-memory model: a number or ``auto``.
    device, dtype : str
        Resolved: not ``auto``.
    streamed : bool
        Block by block, instead of the whole model in memory.
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
            raise UsageError(f"--batch-size '{self.batch_size}' is no number of requests", "give 1 or more, or auto")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task, as the harness gives it."""

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
    """One task's result with all that made it.

    Attributes
    ----------
    task : str
        As asked for; a group's result holds its tasks' as well.
    split : str or None
        The split measured on; None where the harness decides (no local files).
    data : mapping or None
        Name and SHA-256 of each local file; None for the hub's data.
    harness : mapping
        The harness's own output, whole but for the samples.
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
    harness: Mapping[str, Any]

    def scores(self) -> list[Score]:
        """Every metric of the task, or of the group and its tasks, in the harness's order."""
        return [score for name in self.harness["results"] for score in self._scores(name)]

    def _scores(self, name: str) -> list[Score]:
        values: Mapping[str, Any] = self.harness["results"][name]
        counts = self.harness.get("n-samples", {}).get(name, {})
        found = []
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            found.append(
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
        return found

    def averaged(self) -> float | None:
        """The value that goes into the average, or None where the task has none."""
        return next((s.value for s in self.scores() if s.task == self.task and s.metric == AVERAGED), None)


def average(results: Sequence[TaskResult]) -> float | None:
    """Mean over the tasks, each counted once; None with one task alone, or where a task has no such metric."""
    values = [result.averaged() for result in results]
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) > 1 else None


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {**manifests.versions(), **{name: version(name) for name in ("datasets", "lm_eval")}}


def file_name(facts: Mapping[str, Any]) -> str:
    """A name that says what was measured, and differs wherever anything that changes the result does.

    Batches and the way of computing (streamed or in memory) do not count.

    Parameters
    ----------
    facts : mapping
        The fields of a `Result`, but for `harness`.
    """
    counted = {name: value for name, value in facts.items() if name not in ("batch_size", "streamed")}
    key = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:8]
    shots = "own" if facts["num_fewshot"] is None else facts["num_fewshot"]
    part = "all" if facts["limit"] is None else f"first{facts['limit']}"
    return f"tasks-{disk.safe_name(facts['task'])}-{shots}shot-{part}-{facts['model_digest'][:8]}-{key}.json"


def save(result: TaskResult, file: Path, model: Mapping[str, Any]) -> None:
    """Write one result with what it belongs to, while nobody else writes results of the run."""
    with lock.hold_results(file.parent.parent):
        result_files.save(result, file, "tasks", model, versions())


def load(file: Path) -> TaskResult | None:
    """A result that was saved, or None where there is none, or other versions made it."""
    return result_files.load(TaskResult, file, versions())
