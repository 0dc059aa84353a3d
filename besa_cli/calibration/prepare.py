"""What lies between a model and its calibration set: tokenizer, limits, and whether a set that exists will do."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from besa_cli.calibration import calibration_set
from besa_cli.calibration.request import CalibrationRequest
from besa_cli.decoder import architecture
from besa_cli.errors import BesaError
from besa_cli.models import Model
from besa_cli.models.tokenizer import tokenizer_digest, tokenizer_of
from besa_cli.system.disk import MANIFEST, sha256_file
from besa_cli.text import corpora, documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Notify = Callable[[str], None]

_ROW = 32  # tokens that show whether a model gives the same block by block as whole


def calibration_options(
    model: Model, request: CalibrationRequest, notify: Notify
) -> calibration_set.CalibrationOptions:
    """The options of a calibration set, with the defaults where nothing was asked (None).

    The default sequence length is lowered, with a note, to the most that the model takes; one asked for is not.
    """
    given: dict[str, Any] = {**request.given(), "seed": request.seed}
    if data := given.pop("data", None):
        given["data"] = tuple(data)
    options = calibration_set.CalibrationOptions(**given)
    longest = architecture.maximum_length(architecture.config_of(model.directory))
    if request.seqlen is None and longest is not None and longest < options.seqlen:
        notify(
            f"{model.name} takes {longest} tokens at most: samples have {longest} tokens instead of {options.seqlen}"
        )
        options = replace(options, seqlen=longest)
    return options


def calibrate(
    model: Model,
    options: calibration_set.CalibrationOptions,
    directory: Path,
    data_dir: Path | None,
    notify: Notify,
    *,
    restart: bool = False,
    keep: bool = True,
) -> calibration_set.CalibrationSet:
    """Make the calibration set of `directory`, or take the one that is there if it was made with the same options.

    Parameters
    ----------
    model : Model
        Its tokenizer and limits are used.
    options : calibration.Options
    directory : Path
        Where the set is, or goes to.
    data_dir : Path or None
        Directory with official files of named data sets.
    notify : callable
        Takes one-line notes.
    restart : bool, default=False
        Replace a set that is there.
    keep : bool, default=True
        Write the set into `directory`.

    Raises
    ------
    BesaError
        A set made with other options is there, or the new one cannot be made or written.
    """
    if (directory / MANIFEST).exists() and not restart:
        found = reuse(model, directory)
        _refuse_difference(found, options, directory)
        notify(f"the calibration set in {directory} was made with the same options: reused")
        return found
    calibration_set.refuse_foreign(directory)
    config = architecture.config_of(model.directory)
    tokenizer = LazyTokenizer(model, notify)
    kinds = {documents.suffix(Path(name)) for name in options.data}
    if not kinds <= {".jsonl", ".jsonl.gz"}:  # those may hold token ids, which need none
        tokenizer.load()
    made = calibration_set.build(
        options,
        tokenizer,
        tokenizer_digest=tokenizer_digest(model.directory),
        max_length=architecture.maximum_length(config),
        vocab_size=config.get_text_config().vocab_size,
        data_dir=data_dir,
        notify=notify,
    )
    origin = {"name": model.name, "kind": model.kind, "revision": model.revision}
    made = replace(made, manifest={**made.manifest, "command": "calibrate", "model": origin})
    if keep:
        calibration_set.save(made, directory)
    return made


def unobserved(model: Model) -> calibration_set.CalibrationSet:
    """One short row of token ids, where a method decides from the weights alone; it needs no tokenizer and no text."""
    config = architecture.config_of(model.directory)
    length = min(_ROW, architecture.maximum_length(config) or _ROW)
    rows = torch.arange(length)[None] % config.get_text_config().vocab_size
    return calibration_set.CalibrationSet(tokens=rows, manifest={"options": {}, "sources": []})


def reuse(model: Model, directory: Path) -> calibration_set.CalibrationSet:
    """The finished calibration set in `directory`, checked to fit the model.

    Raises
    ------
    BesaError
        There is none, or it was made with another tokenizer, or is longer than the model takes.
    """
    found = calibration_set.load(directory)
    config = architecture.config_of(model.directory)
    remedy = f"make one with: besa calibrate --model {model.name} --run NAME"
    made_with, own = found.manifest["tokenizer_digest"], tokenizer_digest(model.directory)
    if made_with != own and found.manifest["sampling"] != "token rows":
        raise BesaError(
            f"the calibration set in {directory} was made with another tokenizer ({made_with[:12]}) "
            f"than that of {model.name} ({own[:12]})",
            remedy,
        )
    highest, vocabulary = int(found.tokens.max()), config.get_text_config().vocab_size
    if highest >= vocabulary:
        raise BesaError(
            f"the calibration set in {directory} has token id {highest}, {model.name} knows {vocabulary} tokens", remedy
        )
    seqlen, longest = found.tokens.shape[1], architecture.maximum_length(config)
    if longest is not None and seqlen > longest:
        raise BesaError(
            f"the calibration set in {directory} has samples of {seqlen} tokens, {model.name} takes {longest} at most",
            remedy,
        )
    return found


def _refuse_difference(
    found: calibration_set.CalibrationSet, options: calibration_set.CalibrationOptions, directory: Path
) -> None:
    there: Mapping[str, Any] = found.manifest["options"]
    asked = options.record()
    hint = "give --run NAME to keep both, or --restart to replace it"
    different = [
        f"{name} {_shown(there.get(name))} there, {_shown(value)} asked"
        for name, value in asked.items()
        if there.get(name) != value
    ]
    if different:
        raise BesaError(f"the calibration set in {directory} was made with other options: {'; '.join(different)}", hint)
    known = {source["sha256"] for source in found.manifest["sources"]}
    for name in options.data:
        path = documents.local_path(name)
        if name in corpora.SOURCES or not path.is_file():  # the tokens are there; the text is not needed any more
            continue
        documents.check_file(path)
        if (digest := sha256_file(path)) not in known:
            was = ", ".join(sorted(value[:12] for value in known))
            raise BesaError(
                f"{name} has changed since the calibration set in {directory} was made: SHA-256 {was} then, "
                f"{digest[:12]} now",
                hint,
            )


def _shown(value: object) -> str:
    if value is None:
        return "auto"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


class LazyTokenizer:
    """The model's tokenizer, read when first needed: token rows need none."""

    def __init__(self, model: Model, notify: Notify) -> None:
        self._model, self._notify = model, notify

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return tokenizer_of(self._model, self._notify)

    def load(self) -> None:
        """Read it now."""
        _ = self._tokenizer

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a document."""
        value: int | None = self._tokenizer.eos_token_id
        return value

    @property
    def is_fast(self) -> bool:
        """Whether it is one of the `tokenizers` library."""
        return bool(self._tokenizer.is_fast)

    @property
    def backend_tokenizer(self) -> Any:
        """The tokenizer of that library."""
        return self._tokenizer.backend_tokenizer

    def __call__(self, text: str, **options: Any) -> Any:
        """A mapping with the token ids of `text` under ``input_ids``."""
        return self._tokenizer(text, **options)
