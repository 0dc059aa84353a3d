"""Interface to lm-eval: loading tasks with their data, its class for models in memory, and its evaluation."""

import contextlib
import difflib
import io
import json
import logging
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from besa_cli.checkpoint import sparse_index
from besa_cli.decoder import architecture
from besa_cli.errors import BesaError, UsageError, reading, unknown
from besa_cli.evaluation.zeroshot import definitions
from besa_cli.evaluation.zeroshot.definitions import LocalData
from besa_cli.evaluation.zeroshot.forms import FORMS
from besa_cli.inference import loading
from besa_cli.models import answers
from besa_cli.system import compute
from besa_cli.system.disk import JsonObject
from besa_cli.system.notes import Notify
from besa_cli.text import documents

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

PAPER = tuple(FORMS)
Loaded = Mapping[str, Any]  # what lm-eval loads: its tasks and groups, by name

_TEXT_ONLY = "besa measures log-likelihoods of text only and never runs code that a model writes; leave the task out"


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks that are ready to be evaluated.

    Attributes
    ----------
    names : tuple of str
        Requested tasks.
    local : mapping of str to LocalData
        Data of the tasks that use local files.
    manager : lm_eval.tasks.TaskManager
    """

    names: tuple[str, ...]
    local: Mapping[str, LocalData]
    manager: "TaskManager"


@contextlib.contextmanager
def prepare(
    names: Sequence[str],
    data_dir: Path | None,
    *,
    shots: int | None,
    keep: Path | None = None,
    notify: Notify,
) -> Iterator[Tasks]:
    """Find all tasks and their data; a context manager that deletes generated definitions at the end.

    Parameters
    ----------
    names : sequence of str
        Tasks of lm-eval.
    data_dir : Path or None
        Directory searched for local files.
    shots : int or None
        Examples in a prompt, which come from a training file.
    keep : Path, optional
        Directory in which to keep the generated definitions and data, e.g. for ``lm_eval --include_path``; by default a
        temporary one.

    Raises
    ------
    UsageError
        A task does not exist.
    BesaError
        A task has no data, a file is invalid, or a training file is missing.
    """
    documents.check_directory(data_dir)
    with contextlib.ExitStack() as stack:
        root = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="besa-tasks-")))
        directory = root.expanduser().resolve()
        local = _define(names, data_dir, directory, shots, notify)
        yield Tasks(names=tuple(names), local=local, manager=_manager(names, directory, notify))


def _define(
    names: Sequence[str], data_dir: Path | None, directory: Path, shots: int | None, notify: Notify
) -> dict[str, LocalData]:
    """Write the definitions of the paper's tasks, checking that each has data; return the local data."""
    entries = {name: _entry(name) for name in names if name in FORMS}
    splits = {name: definitions.known_splits(entry.cfg) for name, entry in entries.items()}
    located = {name: definitions.locate(name, list(splits[name].values()), data_dir) for name in entries}
    with_files = [name for name in entries if {"validation", "test"} & set(located[name])]
    local = {}
    for name, entry in entries.items():
        if name in with_files and data_dir is not None:
            definitions.require_training(name, located[name], data_dir, shots)
            local[name] = definitions.write(name, entry.yaml_path, splits[name], located[name], directory)
        else:
            definitions.require_hub(name, entry.cfg["dataset_path"], _prepared_data(), data_dir, with_files)
            notify(f"{name}: data from the hub ({entry.cfg['dataset_path']})")
            definitions.write_reference(name, entry.yaml_path, directory)
    return local


def _entry(name: str) -> Any:
    """Return lm-eval's definition of one of the paper's tasks, reading only its folder."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / FORMS[name].definition
    return lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).task_index[name]


def _manager(names: Sequence[str], directory: Path, notify: Notify) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    others = [name for name in names if name not in FORMS]
    if others:
        notify("reading all task definitions of lm-eval")
    manager = TaskManager(include_path=str(directory), include_defaults=bool(others))
    for name in others:
        require_known(name, manager.all_tasks)
        config = manager.task_index[name].cfg or {}
        definitions.require_hub(name, str(config.get("dataset_path", "")), _prepared_data(), None, ())
    return manager


def require_known(name: str, known: Sequence[str]) -> None:
    """Check that lm-eval has a task.

    Raises
    ------
    UsageError
        The task is unknown; the hint lists the nearest names and the paper's tasks.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise unknown("task", name, dict.fromkeys([*near, *PAPER, "any other task of lm-eval"]))


def _prepared_data() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)


def load(tasks: Tasks, name: str, notify: Notify) -> Loaded:
    """Load a task or group of tasks with its data; returns lm-eval's dict of loaded tasks.

    Raises
    ------
    BesaError
        lm-eval cannot load the task, or the task runs generated code or needs more than text.
    """
    import datasets

    try:
        with _quiet(notify), answers.guarded():
            loaded: Loaded = tasks.manager.load([name])
    except (OSError, ValueError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BesaError(
            f"lm-eval cannot load the task {name}: {reason}", "'besa --debug eval tasks …' shows the traceback"
        ) from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise BesaError(f"{task.config.task} runs code that the model writes", _TEXT_ONLY)
        if getattr(task, "MULTIMODAL", False):
            raise BesaError(f"{task.config.task} requires more than text", _TEXT_ONLY)
    return loaded


def in_memory(
    directory: Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    device: str,
    dtype: str,
    batch_size: str,
    notify: Notify,
) -> "LM":
    """Load a checkpoint into lm-eval's own model class, without running code of the checkpoint.

    A sparse export keeps its packed weights.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Tokenizer from `besa_cli.models.tokenizer.tokenizer_of`.
    batch_size : str
        Requests in a pass: a number or ``auto``.

    Raises
    ------
    BesaError
        The model is not supported, or transformers cannot load it.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers.utils import logging as progress

    from besa_cli.decoder.conduct import require_logits

    progress.disable_progress_bar()
    if sparse_index.is_sparse(directory):
        whole = loading.load(directory, compute.DTYPES[dtype])
        with _quiet(lambda _: None):  # it warns that arguments may be ignored, which a loaded model does not need
            model = HFLM(pretrained=whole, tokenizer=tokenizer, batch_size=batch_size)
    else:
        config = architecture.config_of(directory)
        with _quiet(notify), reading(directory):
            model = HFLM(
                pretrained=str(directory.resolve()),  # a relative path could be interpreted as a name on the hub
                config=config,
                tokenizer=tokenizer,
                device=device,
                dtype=dtype,
                batch_size=batch_size,
                trust_remote_code=False,
            )
    model.model.register_forward_hook(lambda _, __, output: require_logits(output.logits, str(directory)))
    return model


def evaluate(model: "LM", loaded: Loaded, *, shots: int | None, limit: int | None, notify: Notify) -> JsonObject:
    """Evaluate loaded tasks and return the output of lm-eval's `evaluate`, without samples, as plain JSON values.

    Seeds and the number of examples in the prompt are set as in lm-eval's `simple_evaluate`; its fields for host and
    date are omitted.

    Parameters
    ----------
    model : lm_eval.api.model.LM
    loaded : dict from `load`
    shots : int, optional
        Examples in a prompt, for tasks that do not set their number to 0.
    limit : int, optional
        Maximum number of questions of each task.
    """
    import numpy
    from lm_eval import evaluator
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import handle_non_serializable, set_torch_seed

    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if default is None or (default != 0 and shots is not None):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with _quiet(notify):
        output = evaluator.evaluate(model, loaded, limit=limit, log_samples=False)
    plain: JsonObject = json.loads(json.dumps(output, default=handle_non_serializable))
    return plain


_SOURCES = {  # loggers, and the part of each whose warnings are shown
    "lm_eval": "lm_eval.models",
    "besa_cli.evaluation.zeroshot": "besa_cli.evaluation.zeroshot",
}


class _Warnings(logging.Handler):
    """Collector of warnings by models, grouped by the line of code that logs them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: dict[tuple[str, int], list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(tuple(_SOURCES.values())):
            self._messages.setdefault((record.pathname, record.lineno), []).append(record.getMessage())

    def lines(self) -> Iterator[str]:
        """Yield one line for each group: its first message and the number of messages."""
        for messages in self._messages.values():
            times = f" ({len(messages)} such warnings)" if len(messages) > 1 else ""
            yield f"{' '.join(messages[0].split())}{times}"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Collect all log records of the sources, and keep them from other handlers."""
        loggers = [logging.getLogger(name) for name in _SOURCES]
        before = [logger.propagate for logger in loggers]
        for logger in loggers:
            logger.propagate = False
            logger.addHandler(self)
        try:
            yield
        finally:
            for logger, propagate in zip(loggers, before, strict=True):
                logger.removeHandler(self)
                logger.propagate = propagate


@contextlib.contextmanager
def _quiet(notify: Notify) -> Iterator[None]:
    """Keep lm-eval off stdout, show its progress bars at a terminal only, and pass warnings of models to `notify`."""
    warnings = _Warnings()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.listening())
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield
    for line in warnings.lines():
        notify(line)


def split_names(text: Sequence[str]) -> tuple[str, ...]:
    """Split task names separated by spaces or commas; without any, return the paper's six.

    Raises
    ------
    UsageError
        A name is empty or given twice.
    """
    names = [name.strip() for word in text for name in word.split(",")] or list(PAPER)
    for name in names:
        if not name:
            raise UsageError("an empty task name", f"known: {', '.join(PAPER)}, or any other task of lm-eval")
        if names.count(name) > 1:
            raise UsageError(f"the task {name} is given twice", "keep one of them")
    return tuple(names)
