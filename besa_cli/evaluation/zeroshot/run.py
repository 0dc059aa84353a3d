"""One checkpoint on several tasks: what was measured is taken from its file, the rest is measured and kept."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_cli.evaluation.zeroshot import harness, results
from besa_cli.evaluation.zeroshot.harness import Tasks
from besa_cli.evaluation.zeroshot.results import TaskResult, TaskSettings
from besa_cli.evaluation.zeroshot.watching import Notify, Progress, unwatched
from besa_cli.system import compute

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRIED = (2, 2, 8)  # questions of each task in the trials of a forecast, of which the first only warms up


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What measuring a task would take: its questions, and seconds."""

    task: str
    questions: int
    seconds: float


class TaskMeasurement:
    """One checkpoint, measured task by task.

    Parameters
    ----------
    directory : Path
        The checkpoint.
    digest : str
        Its content digest.
    tokenizer, tokenizer_digest
        Those of the model.
    tasks : Tasks
    settings : Settings
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
        self._model: Any = None

    def facts(self, name: str) -> dict[str, Any]:
        """The fields of the task's `Result`, but for what the harness gives."""
        local = self._tasks.local.get(name)
        data = {"split": local.evaluated, "data": local.record()} if local else {"split": None, "data": None}
        settings = asdict(self._settings)
        if name in harness.PAPER and settings["num_fewshot"] is None:
            settings["num_fewshot"] = 0  # what their definitions mean by saying nothing
        return {"task": name, **data, **settings, **self._digests}

    def stored(self, name: str, kept: Path) -> TaskResult | None:
        """The task's result that is in the directory `kept`, or None."""
        return results.load(self._file(name, kept))

    def measure(
        self,
        name: str,
        kept: Path | None,
        model: Mapping[str, Any],
        *,
        progress: Progress = unwatched,
        notify: Notify = lambda line: None,
    ) -> TaskResult:
        """Measure one task.

        Parameters
        ----------
        kept : Path or None
            Where the result's file goes; None keeps nothing.
        model : mapping
            What the file says of the model.
        progress : callable
            Given a number of steps, a context that is told each; of a streamed model.
        """
        settings = self._settings
        loaded = harness.load(self._tasks, name, notify)
        output = harness.evaluate(
            self._built(progress, notify),
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
        """What `measure` would take, from its first questions, few and some more: what grows with them is scaled."""
        settings, began = self._settings, time.perf_counter()
        model = self._built(unwatched, notify)
        building = time.perf_counter() - began
        taken: list[float] = []
        tried: list[int] = []
        whole = 0
        for limit in _TRIED:
            began = time.perf_counter()
            loaded = harness.load(self._tasks, name, notify)
            asked = min(limit, settings.limit or limit)
            output = harness.evaluate(model, loaded, shots=settings.num_fewshot, limit=asked, notify=notify)
            taken.append(time.perf_counter() - began)
            counts = [count["original"] for count in output["n-samples"].values()]
            tried.append(sum(min(count, asked) for count in counts))
            whole = sum(min(count, settings.limit or count) for count in counts)
        more = (taken[2] - taken[1]) / max(tried[2] - tried[1], 1)
        each = more if more > 0 else taken[2] / tried[2]  # on a busy machine few questions may take as long as more
        seconds = building + taken[2] + each * (whole - tried[2])
        return Trial(task=name, questions=whole, seconds=seconds)

    def _file(self, name: str, kept: Path) -> Path:
        return kept / results.file_name(self.facts(name))

    def _built(self, progress: Progress, notify: Notify) -> Any:
        """The harness's view of the model: in memory, loaded for the first task; or streamed, which holds nothing."""
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
