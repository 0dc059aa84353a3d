"""Calibration sets for a model: its tokenizer and limits, and the checks before an existing set is reused."""

from array import array
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from besa_cli.calibration import calibration_set, drawing, own_text, sampling
from besa_cli.calibration.request import CalibrationRequest
from besa_cli.checkpoint import manifests
from besa_cli.decoder import architecture
from besa_cli.errors import BesaError
from besa_cli.models import Model
from besa_cli.models.tokenizer import tokenizer_digest, tokenizer_of
from besa_cli.system.disk import MANIFEST, JsonObject, sha256_file
from besa_cli.system.notes import Notify
from besa_cli.text import corpora, documents

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_ROW = 32  # tokens of the one sample with which a model is verified if a method needs no calibration set


def calibration_options(
    model: Model, request: CalibrationRequest, notify: Notify
) -> calibration_set.CalibrationOptions:
    """Return the options of a calibration set, with the defaults for arguments that are None.

    The default sequence length is lowered to the model's maximum, with a note; an explicit one is not.
    """
    arguments: JsonObject = {**request.given(), "seed": request.seed}
    if data := arguments.pop("data", None):
        arguments["data"] = tuple(data)
    options = calibration_set.CalibrationOptions(**arguments)
    longest = architecture.maximum_length(architecture.config_of(model.directory))
    if request.seqlen is None and longest is not None and longest < options.seqlen:
        notify(
            f"{model.name} supports at most {longest} tokens: samples have {longest} tokens instead of {options.seqlen}"
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
    machine: own_text.Machine | None = None,
) -> calibration_set.CalibrationSet:
    """Make the calibration set in `directory`, or reuse the existing one if it was made with the same options.

    Parameters
    ----------
    model : Model
        The model whose tokenizer and limits are used.
    options : CalibrationOptions
    directory : Path
        Directory of the set.
    data_dir : Path or None
        Directory with official files of named data sets.
    notify : callable
        Receives one-line notes.
    restart : bool, default=False
        Replace an existing set.
    keep : bool, default=True
        Write the set to `directory`; without it, stand-ins take the place of samples that the model would write.
    machine : Machine, optional
        Where the model computes if it writes samples itself.

    Raises
    ------
    BesaError
        The existing set was made with other options, or the new one cannot be made or written.
    """
    if (directory / MANIFEST).exists() and not restart:
        existing = reuse(model, directory)
        _refuse_difference(existing, model, options, directory)
        notify(f"the calibration set in {directory} was made with the same options: reused")
        return existing
    calibration_set.refuse_foreign(directory)
    config = architecture.config_of(model.directory)
    tokenizer = LazyTokenizer(model, notify)
    kinds = {documents.suffix(Path(source.name)) for source in options.sources}
    if not kinds <= {".jsonl", ".jsonl.gz"}:  # these may hold token ids, which need no tokenizer
        tokenizer.load()
    rows = directory.with_name(f".{directory.name}.self")
    writer = own_text.Writer(
        model=model, tokenizer=tokenizer, seqlen=options.seqlen, seed=options.seed, notify=notify,
        machine=machine or own_text.Machine(), directory=rows,
    )  # fmt: skip
    new = calibration_set.build(
        options,
        tokenizer,
        write=writer.write if keep else partial(_stand_ins, model, options.seqlen, notify),
        tokenizer_digest=tokenizer_digest(model.directory),
        max_length=architecture.maximum_length(config),
        vocab_size=config.get_text_config().vocab_size,
        data_dir=data_dir,
        notify=notify,
    )
    origin: manifests.CalibratedModel = {"name": model.name, "kind": model.kind, "revision": model.revision}
    new = replace(new, manifest={**new.manifest, "command": "calibrate", "model": origin})
    if keep:
        calibration_set.save(new, directory)
        new = replace(new, directory=directory)
        writer.clear()
    return new


def _stand_ins(model: Model, seqlen: int, notify: Notify, samples: int, held_out: int) -> drawing.Drawn:
    """Return rows in place of those that the model would write, with a note."""
    notify(f"{model.name} writes no samples for a forecast: stand-ins take their place, its time to write is not in it")
    vocabulary = architecture.config_of(model.directory).get_text_config().vocab_size
    row = array("q", [index % vocabulary for index in range(seqlen)])
    windows = sampling.Windows(tokens=[row] * samples, documents=samples, held_out=[row] * held_out)
    return windows, {"sources": [], "sampling": "stand-ins"}


def unobserved(model: Model) -> calibration_set.CalibrationSet:
    """Return one short sample for methods that use the weights alone; it needs no tokenizer and no text."""
    config = architecture.config_of(model.directory)
    length = min(_ROW, architecture.maximum_length(config) or _ROW)
    rows = torch.arange(length)[None] % config.get_text_config().vocab_size
    manifest = cast("manifests.CalibrationManifest", {"options": {}, "sources": []})  # nothing else of it is read
    return calibration_set.CalibrationSet(tokens=rows, manifest=manifest)


def reuse(model: Model, directory: Path) -> calibration_set.CalibrationSet:
    """Load the calibration set in `directory` and check that it fits the model.

    Raises
    ------
    BesaError
        There is no set, or it was made with another tokenizer, or its samples are too long for the model.
    """
    existing = calibration_set.load(directory)
    config = architecture.config_of(model.directory)
    remedy = f"make one with: besa calibrate --model {model.name} --run NAME"
    used, expected = existing.manifest["tokenizer_digest"], tokenizer_digest(model.directory)
    if used != expected and existing.manifest["sampling"] != "token rows":
        raise BesaError(
            f"the calibration set in {directory} was made with another tokenizer ({used[:12]}) "
            f"than that of {model.name} ({expected[:12]})",
            remedy,
        )
    highest, vocabulary = int(existing.tokens.max()), config.get_text_config().vocab_size
    if highest >= vocabulary:
        raise BesaError(
            f"the calibration set in {directory} has token id {highest}, {model.name} has only {vocabulary} tokens",
            remedy,
        )
    seqlen, longest = existing.tokens.shape[1], architecture.maximum_length(config)
    if longest is not None and seqlen > longest:
        raise BesaError(
            f"the calibration set in {directory} has samples of {seqlen} tokens, {model.name} supports at most "
            f"{longest}",
            remedy,
        )
    return existing


def _refuse_difference(
    existing: calibration_set.CalibrationSet,
    model: Model,
    options: calibration_set.CalibrationOptions,
    directory: Path,
) -> None:
    """Refuse a calibration set made with other options, written by another model, or from files changed since."""
    used, wanted = existing.manifest["options"], options.record()
    hint = "give --run NAME to keep both, or --restart to replace it"
    different = [
        f"{name.replace('_', '-')} {_text(used.get(name))} instead of {_text(wanted.get(name))}"
        for name in {**wanted, **used}
        if used.get(name) != wanted.get(name)
    ]
    author = existing.manifest.get("model", {}).get("name", model.name)
    if author != model.name and any(source.name == corpora.SELF for source in options.sources):
        different.append(f"written by {author} instead of {model.name}")
    if different:
        raise BesaError(f"the calibration set in {directory} was made with other options: {'; '.join(different)}", hint)
    known = {source["sha256"] for source in existing.manifest["sources"]}
    for name in (source.name for source in options.sources):
        path = documents.local_path(name)
        if name in corpora.SOURCES or not path.is_file():  # the stored tokens make the text unnecessary
            continue
        documents.check_file(path)
        if (digest := sha256_file(path)) not in known:
            before = ", ".join(sorted(value[:12] for value in known))
            raise BesaError(
                f"{name} has changed since the calibration set in {directory} was made: SHA-256 {before} then, "
                f"{digest[:12]} now",
                hint,
            )


def _text(value: object) -> str:
    if value is None:
        return "auto"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


class LazyTokenizer:
    """The model's tokenizer, loaded on first use; token rows never use it."""

    def __init__(self, model: Model, notify: Notify) -> None:
        self._model, self._notify = model, notify

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        return tokenizer_of(self._model, self._notify)

    def load(self) -> None:
        """Load the tokenizer now."""
        _ = self._tokenizer

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a document."""
        value: int | None = self._tokenizer.eos_token_id
        return value

    @property
    def is_fast(self) -> bool:
        """True if the tokenizer is one of the `tokenizers` library."""
        return bool(self._tokenizer.is_fast)

    @property
    def backend_tokenizer(self) -> object:
        """The underlying tokenizer of the `tokenizers` library."""
        return self._tokenizer.backend_tokenizer

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        value: int | None = self._tokenizer.bos_token_id
        return value

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""
        return list(self._tokenizer.all_special_ids)

    @property
    def added_tokens_decoder(self) -> dict[int, object]:
        """Added tokens by their ids."""
        return dict(self._tokenizer.added_tokens_decoder)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """Template of conversations; None without one."""
        template: str | dict[str, str] | None = self._tokenizer.chat_template
        return template

    def apply_chat_template(self, conversation: list[JsonObject], **options: Any) -> Any:
        """Write out a conversation."""
        return self._tokenizer.apply_chat_template(conversation, **options)

    def __call__(self, text: str, **options: Any) -> "BatchEncoding":
        """Tokenize a text; returns a mapping with the token ids under ``input_ids``."""
        encoding: BatchEncoding = self._tokenizer(text, **options)
        return encoding
