"""Everything that calls lm-eval: its tasks with the data they are to have, its model class, its evaluation."""

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

from besa_cli.decoder import architecture
from besa_cli.errors import BesaError, UsageError, reading, unknown
from besa_cli.evaluation.zeroshot import definitions
from besa_cli.evaluation.zeroshot.definitions import LocalData
from besa_cli.evaluation.zeroshot.forms import FORMS
from besa_cli.evaluation.zeroshot.watching import Notify
from besa_cli.models import answers
from besa_cli.text import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAPER = tuple(FORMS)
_NO_MODEL_CODE = "besa measures log-likelihoods of text, and runs no code that a model has written"


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks of the harness, ready to be measured.

    Attributes
    ----------
    names : tuple of str
        As asked for.
    local : mapping of str to LocalData
        Those of which local files take the place of the hub's data.
    manager : lm_eval.tasks.TaskManager
    """

    names: tuple[str, ...]
    local: Mapping[str, LocalData]
    manager: Any


@contextlib.contextmanager
def prepared(
    names: Sequence[str],
    data_dir: Path | None,
    *,
    shots: int | None,
    keep: Path | None = None,
    notify: Notify,
) -> Iterator[Tasks]:
    """Find every task and its data before anything is measured.

    Parameters
    ----------
    names : sequence of str
        Of the harness.
    data_dir : Path or None
        Where local files are looked for.
    shots : int or None
        Examples in a prompt; they come from a training file.
    keep : Path, optional
        Directory for the generated definitions and data, for the stock ``lm_eval --include_path``; by default they
        are gone at the end.

    Raises
    ------
    UsageError
        There is no task of that name.
    BesaError
        A task has no data, a file is broken, or there is no training file.
    """
    documents.check_directory(data_dir)
    with contextlib.ExitStack() as stack:
        place = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="besa-tasks-")))
        directory = place.expanduser().resolve()
        local = _define(names, data_dir, directory, shots, notify)
        yield Tasks(names=tuple(names), local=local, manager=_manager(names, directory, notify))


def _define(
    names: Sequence[str], data_dir: Path | None, directory: Path, shots: int | None, notify: Notify
) -> dict[str, LocalData]:
    """Write the definitions of the paper's tasks; require data for each."""
    entries = {name: _entry(name) for name in names if name in FORMS}
    splits = {name: definitions.known_splits(entry.cfg) for name, entry in entries.items()}
    found = {name: definitions.locate(name, list(splits[name].values()), data_dir) for name in entries}
    there = [name for name in entries if {"validation", "test"} & set(found[name])]
    local = {}
    for name, entry in entries.items():
        if name in there and data_dir is not None:
            definitions.require_training(name, found[name], data_dir, shots)
            local[name] = definitions.write(name, entry.yaml_path, splits[name], found[name], directory)
        else:
            definitions.require_hub(name, entry.cfg["dataset_path"], _prepared_data(), data_dir, there)
            notify(f"{name}: data from the hub ({entry.cfg['dataset_path']})")
            definitions.refer(name, entry.yaml_path, directory)
    return local


def _entry(name: str) -> Any:
    """The harness's definition of one of the paper's tasks; only its folder is looked at."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / FORMS[name].definition
    return lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).task_index[name]


def _manager(names: Sequence[str], directory: Path, notify: Notify) -> Any:
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
    """Refuse a task that the harness does not have; of its thousands of names, the nearest are shown.

    Raises
    ------
    UsageError
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise unknown("task", name, dict.fromkeys([*near, *PAPER, "any other task of lm-eval"]))


def _prepared_data() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)


def load(tasks: Tasks, name: str, notify: Notify) -> Any:
    """The harness's task (or group of tasks) of that name, with its data.

    Raises
    ------
    BesaError
        The harness cannot load it, or it is of a kind that is not measured here.
    """
    import datasets

    try:
        with _quiet(notify), answers.guarded():
            loaded = tasks.manager.load([name])
    except (OSError, ValueError, KeyError, ImportError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BesaError(
            f"lm-eval cannot load the task {name}: {reason}", "'besa --debug eval tasks …' shows where"
        ) from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise BesaError(f"{task.config.task} runs code that the model has written", _NO_MODEL_CODE)
        if getattr(task, "MULTIMODAL", False):
            raise BesaError(f"{task.config.task} asks about more than text", _NO_MODEL_CODE)
    return loaded


def in_memory(
    directory: Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    device: str,
    dtype: str,
    batch_size: str,
    notify: Notify,
) -> Any:
    """The harness's own model class over a checkpoint directory; no code from the checkpoint runs.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        As from `besa_cli.models.tokenizer.tokenizer_of`.
    batch_size : str
        Requests in a pass: a number or ``auto``.

    Raises
    ------
    BesaError
        The model cannot be handled, or transformers cannot load it.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers.utils import logging as progress

    from besa_cli.decoder.conduct import require_logits

    progress.disable_progress_bar()
    config = architecture.config_of(directory)
    with _quiet(notify), reading(directory):
        model = HFLM(
            pretrained=str(directory.resolve()),  # a relative path would be taken for a name on the hub
            config=config,
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            trust_remote_code=False,
        )
    model.model.register_forward_hook(lambda _, __, output: require_logits(output.logits, str(directory)))
    return model


def evaluate(model: Any, loaded: Any, *, shots: int | None, limit: int | None, notify: Notify) -> dict[str, Any]:
    """What lm-eval's `evaluate` returns, without the samples, as plain JSON values.

    Seeds and examples in the prompt are set as its `simple_evaluate` sets them; what that adds of host and date is
    left out.

    Parameters
    ----------
    model : lm_eval.api.model.LM
    loaded : as from `load`
    shots : int, optional
        Examples in a prompt, where the task leaves their number open.
    limit : int, optional
        Questions of each task.
    """
    import numpy
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate as run
    from lm_eval.utils import handle_non_serializable, set_torch_seed

    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and shots is not None):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with _quiet(notify):
        output = run(model, loaded, limit=limit, log_samples=False)
    plain: dict[str, Any] = json.loads(json.dumps(output, default=handle_non_serializable))
    return plain


_SOURCES = {
    "lm_eval": "lm_eval.models",
    "besa_cli.evaluation.zeroshot": "besa_cli.evaluation.zeroshot",
}  # loggers, and which part is heard


class _Warnings(logging.Handler):
    """Gathers what models warn of, each place of the program once, with how often."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._found: dict[tuple[str, int], list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(tuple(_SOURCES.values())):
            self._found.setdefault((record.pathname, record.lineno), []).append(record.getMessage())

    def lines(self) -> Iterator[str]:
        """One line for each place."""
        for messages in self._found.values():
            times = f" ({len(messages)} such warnings)" if len(messages) > 1 else ""
            yield f"{' '.join(messages[0].split())}{times}"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Nothing that is logged goes anywhere else."""
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
    """Nothing of the harness on stdout, its bars only at a terminal, the warnings of models as notes at the end."""
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
    """Task names as typed: several words, or one with commas; the paper's six where none was.

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
