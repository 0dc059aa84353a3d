"""One checkpoint on several tasks: what was measured is taken from its file, the rest is measured and kept."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_cli import compute
from besa_cli.zeroshot import harness, results
from besa_cli.zeroshot.harness import Tasks
from besa_cli.zeroshot.results import Result, Settings
from besa_cli.zeroshot.watching import Notify, Progress, unwatched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Measurement:
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
        settings: Settings,
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

    def stored(self, name: str, kept: Path) -> Result | None:
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
    ) -> Result:
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
        result = Result(**self.facts(name), harness=output)
        if kept is not None:
            results.save(result, self._file(name, kept), model)
        return result

    def _file(self, name: str, kept: Path) -> Path:
        return kept / results.file_name(self.facts(name))

    def _built(self, progress: Progress, notify: Notify) -> Any:
        """The harness's view of the model: in memory, loaded for the first task; or streamed, which holds nothing."""
        settings = self._settings
        if settings.streamed:
            from besa_cli.zeroshot.streamed import StreamedLM

            device = compute.device(settings.device)
            dtype = compute.dtype(settings.dtype, device)
            rows = None if settings.batch_size == "auto" else int(settings.batch_size)
            return StreamedLM(self._directory, self._tokenizer, device, dtype, batch_size=rows, progress=progress)
        if self._model is None:
            self._model = harness.in_memory(
                self._directory,
                device=settings.device,
                dtype=settings.dtype,
                batch_size=settings.batch_size,
                notify=notify,
            )
        return self._model
