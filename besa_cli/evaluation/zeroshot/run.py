"""Evaluation of one checkpoint on several tasks, one result file per task."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from besa_cli.evaluation.zeroshot import harness, results
from besa_cli.evaluation.zeroshot.harness import Tasks
from besa_cli.evaluation.zeroshot.results import TaskResult, TaskSettings
from besa_cli.evaluation.zeroshot.watching import Progress, no_progress
from besa_cli.system import compute
from besa_cli.system.disk import Json, JsonObject
from besa_cli.system.notes import Notify

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedTokenizerBase

_TRIALS = (2, 2, 8)  # questions of a task in each trial of a forecast; the first trial only warms up


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Forecast of a task's evaluation: its number of questions and its seconds."""

    task: str
    questions: int
    seconds: float


class TaskMeasurement:
    """Evaluation of one checkpoint, task by task.

    Parameters
    ----------
    directory : Path
        Directory of the checkpoint.
    digest : str
        Content digest of the checkpoint.
    tokenizer, tokenizer_digest
        Tokenizer of the model and its digest.
    tasks : Tasks
    settings : TaskSettings
    """

    def __init__(
        self,
        directory: Path,
        digest: str,
        tokenizer: "PreTrainedTokenizerBase",
        tokenizer_digest: str,
        tasks: Tasks,
        settings: TaskSettings,
    ) -> None:
        self._directory, self._tokenizer = directory, tokenizer
        self._tasks, self._settings = tasks, settings
        self._digests = {"model_digest": digest, "tokenizer_digest": tokenizer_digest}
        self._model: LM | None = None

    def facts(self, name: str) -> JsonObject:
        """Return the fields of the task's `TaskResult` except `harness`."""
        local = self._tasks.local.get(name)
        data = {"split": local.evaluated, "data": local.record()} if local else {"split": None, "data": None}
        settings = asdict(self._settings)
        if name in harness.PAPER and settings["num_fewshot"] is None:
            settings["num_fewshot"] = 0  # their definitions do not set it, which means 0
        return {"task": name, **data, **settings, **self._digests}

    def load(self, name: str, directory: Path) -> TaskResult | None:
        """Load the task's result from a directory of results, or return None if there is none."""
        return results.load(self._file(name, directory))

    def measure(
        self,
        name: str,
        kept: Path | None,
        model: Json,
        *,
        progress: Progress = no_progress,
        notify: Notify = lambda line: None,
    ) -> TaskResult:
        """Evaluate one task.

        Parameters
        ----------
        kept : Path or None
            Directory for the result's file; None to write none.
        model : mapping
            Description of the model in the file.
        progress : Progress
            Progress display of a streamed model.
        """
        settings = self._settings
        loaded = harness.load(self._tasks, name, notify)
        output = harness.evaluate(
            self._build_model(progress, notify),
            loaded,
            shots=settings.num_fewshot,
            limit=settings.limit,
            notify=notify,
        )
        result = TaskResult(**self.facts(name), harness=output)
        if kept is not None:
            results.save(result, self._file(name, kept), model)
        return result

    def forecast(self, name: str, *, notify: Notify = lambda line: None) -> Trial:
        """Forecast the duration of `measure` by extrapolating from trials on 2 and on 8 questions."""
        settings, began = self._settings, time.perf_counter()
        model = self._build_model(no_progress, notify)
        building = time.perf_counter() - began
        durations: list[float] = []
        questions: list[int] = []
        total = 0
        for trial_limit in _TRIALS:
            began = time.perf_counter()
            loaded = harness.load(self._tasks, name, notify)
            limit = min(trial_limit, settings.limit or trial_limit)
            output = harness.evaluate(model, loaded, shots=settings.num_fewshot, limit=limit, notify=notify)
            durations.append(time.perf_counter() - began)
            counts = [count["original"] for count in output["n-samples"].values()]
            questions.append(sum(min(count, limit) for count in counts))
            total = sum(min(count, settings.limit or count) for count in counts)
        slope = (durations[2] - durations[1]) / max(questions[2] - questions[1], 1)
        # on a busy machine the smaller trial may take as long as the larger one
        per_question = slope if slope > 0 else durations[2] / questions[2]
        seconds = building + durations[2] + per_question * (total - questions[2])
        return Trial(task=name, questions=total, seconds=seconds)

    def _file(self, name: str, directory: Path) -> Path:
        return directory / results.file_name(self.facts(name))

    def _build_model(self, progress: Progress, notify: Notify) -> "LM":
        """Return the model for lm-eval: streamed, or in memory, which is loaded once and kept for all tasks."""
        settings = self._settings
        if settings.streamed:
            from besa_cli.evaluation.zeroshot.streamed import StreamedLM

            device = compute.device(settings.device)
            dtype = compute.dtype(settings.dtype, device)
            rows = None if settings.batch_size == "auto" else int(settings.batch_size)
            return StreamedLM(self._directory, self._tokenizer, device, dtype, batch_size=rows, progress=progress)
        if self._model is None:
            self._model = harness.in_memory(
                self._directory,
                self._tokenizer,
                device=settings.device,
                dtype=settings.dtype,
                batch_size=settings.batch_size,
                notify=notify,
            )
        return self._model
