"""Calibration sets: the token windows that a model is pruned on, stored with their sources and options."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from besa_cli import __version__
from besa_cli.calibration import drawing, sampling
from besa_cli.checkpoint import manifests, ownership, swap, weights
from besa_cli.errors import BesaError, UsageError, reason_of
from besa_cli.system.disk import MANIFEST, publish, save_tensors, write_json
from besa_cli.system.notes import Notify
from besa_cli.text import chat, corpora, documents, hub_files, mixture, token_rows

FORMAT = 1
SHORTEST = 2  # tokens of a window: at least one token and the next one, which it predicts
_TOKENS = "tokens.safetensors"
_FILES = (_TOKENS, MANIFEST)


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Options of a calibration set.

    Parameters
    ----------
    data : tuple of str, default=("c4",)
        Names (`corpora.SOURCES`) or files; the documents of all sources form one pool. With weights (``c4:0.7``) each
        source gives its share of the samples.
    text_column : str, optional
        Field or column of the files with the texts or the messages.
    samples : int, default=128
        Number of token windows.
    seqlen : int, default=2048
        Tokens per window.
    seed : int, default=0
        Seed of the sampling, not negative.
    pack : bool or None, default=None
        True: shuffle and join the documents and cut them into full windows. False: draw windows from documents longer
        than `seqlen`. None packs if bundled text or conversations are among the sources, since most of them are short.

    Raises
    ------
    UsageError
        A number is outside its range.
    """

    data: tuple[str, ...] = ("c4",)
    text_column: str | None = None
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    pack: bool | None = None

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples} is too few", "give 1 or more")
        if self.seqlen < SHORTEST:
            raise UsageError(f"--seqlen {self.seqlen} is too short", f"give {SHORTEST} or more")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative", "give 0 or more")

    @property
    def sources(self) -> tuple[mixture.WeightedSource, ...]:
        """The sources of `data`, with their weights."""
        return mixture.parse(self.data, corpora.SOURCES)

    def record(self) -> manifests.Options:
        """Return the options as JSON data; a column that is not named is left out."""
        record = {**asdict(self), "data": [documents.printable(name) for name in self.data]}
        if self.text_column is None:
            del record["text_column"]
        return record


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationSet:
    """Token windows and their manifest.

    Parameters
    ----------
    tokens : Tensor of shape (samples, seqlen), int64
        Token ids.
    manifest : dict
        JSON data: options, sources with their digests, sampling method, digests of tokenizer and tokens, versions.
    held_out : Tensor of shape (windows, seqlen), int64, optional
        Token ids of windows from other text, on which results are checked; None if there are none.
    directory : Path, optional
        Directory in which the set is stored.
    """

    tokens: Tensor
    manifest: manifests.CalibrationManifest
    held_out: Tensor | None = None
    directory: Path | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens as little-endian 64-bit integers, row after row."""
        return str(self.manifest["tokens_digest"])


def build(
    options: CalibrationOptions,
    tokenizer: drawing.SampleTokenizer,
    *,
    write: drawing.Write | None = None,
    tokenizer_digest: str,
    max_length: int | None,
    vocab_size: int,
    data_dir: Path | None,
    notify: Notify,
    hub: hub_files.Hub | None = None,
) -> CalibrationSet:
    """Make the calibration set that the options describe.

    Parameters
    ----------
    options : CalibrationOptions
    tokenizer : SampleTokenizer
        The model's tokenizer.
    write : callable, optional
        Lets the model write samples itself, for the source ``self``.
    tokenizer_digest : str
        Digest of the tokenizer, for the manifest.
    max_length : int or None
        The longest sequence that the model supports, in tokens.
    vocab_size : int
        Rows of the model's embedding; every id must be below it.
    data_dir : Path or None
        Directory with official files of named data sets.
    notify : callable
        Receives one-line notes.
    hub : hub_files.Hub or None, default=None
        None uses the hub that the environment names.

    Raises
    ------
    UsageError
        Options or names are invalid.
    BesaError
        A source cannot be read or reached, holds too little text, or does not fit the model.
    """
    _check_length(options.seqlen, max_length)
    sources = options.sources
    row_files = corpora.check_sources([source.name for source in sources], data_dir, options.text_column)
    _check_combination(options, sources, row_files)
    if row_files:
        sizes = {"samples": options.samples, "seqlen": options.seqlen, "vocab_size": vocab_size}
        from_files = token_rows.read_rows(row_files, **sizes, held_out=sampling.HELD_OUT, notify=notify)
        tokens, others = _tensor(from_files.rows, vocab_size), from_files.held_out
        records = cast("list[manifests.SourceRecord]", list(from_files.sources))
        origin: manifests.CalibrationOrigin = {"sources": records, "sampling": "token rows"}
    else:
        sampler = drawing.Sampler(
            tokenizer=tokenizer, seqlen=options.seqlen, seed=options.seed, pack=options.pack, notify=notify
        )
        open_source = partial(
            corpora.open_source,
            data_dir=data_dir,
            hub=hub or hub_files.from_environment(),
            notify=notify,
            column=options.text_column,
            template=cast("chat.Template", tokenizer),
        )

        def draw(sources: Sequence[mixture.WeightedSource], samples: int, held_out: int) -> drawing.Drawn:
            if write is not None and sources[0].name == corpora.SELF:
                return write(samples, held_out)
            return sampler.draw([open_source(source.name) for source in sources], samples, held_out)

        sizes = {"samples": options.samples, "held_out": sampling.HELD_OUT}
        if sources[0].weight is None:
            drawn, origin = draw(sources, **sizes)
        else:
            drawn, origin = drawing.draw_mixture(
                sources, lambda source, *counts: draw([source], *counts), **sizes, seed=options.seed, notify=notify
            )
        tokens = _tensor(drawn.tokens, vocab_size)
        others = drawn.held_out
    held_out = _tensor(others, vocab_size) if others else None
    if held_out is not None:
        origin["held_out_digest"] = tokens_digest(held_out)
    manifest = _manifest(options, origin, tokens, tokenizer_digest)
    return CalibrationSet(tokens=tokens, manifest=manifest, held_out=held_out)


def _check_length(seqlen: int, max_length: int | None) -> None:
    if max_length is not None and seqlen > max_length:
        raise UsageError(
            f"--seqlen {seqlen} exceeds the {max_length} tokens that the model supports",
            f"give --seqlen {max_length} or less",
        )


def _check_combination(
    options: CalibrationOptions, sources: Sequence[mixture.WeightedSource], row_files: Sequence[Path]
) -> None:
    """Refuse options that exclude each other."""
    if row_files and options.pack:
        raise UsageError(
            "--pack cannot be combined with token rows", "leave --pack out: the rows are the samples already"
        )
    if row_files and sources[0].weight is not None:
        raise UsageError(f"--data {sources[0].asked} holds token rows, which have no weights", "leave the weight out")
    own = any(source.name == corpora.SELF for source in sources)
    if own and len(sources) > 1 and sources[0].weight is None:
        others = next(source.asked for source in sources if source.name != corpora.SELF)
        raise UsageError(
            f"--data {corpora.SELF} and --data {others} need weights: the model writes samples, not documents",
            f"--data {corpora.SELF}:0.5 --data {others}:0.5 takes half of the samples from each",
        )
    if own and len(sources) == 1 and options.pack is not None:
        raise UsageError(
            f"--{'' if options.pack else 'no-'}pack has no effect with --data {corpora.SELF}",
            "leave it out: the model writes full samples",
        )


def _manifest(
    options: CalibrationOptions, origin: manifests.CalibrationOrigin, tokens: Tensor, tokenizer_digest: str
) -> manifests.CalibrationManifest:
    """Return the manifest; `origin` holds the sources and the sampling method."""
    return {
        "format": FORMAT,
        "stage": "calibration",
        "status": "complete",
        "options": options.record(),
        **origin,
        "tokenizer_digest": tokenizer_digest,
        "tokens_digest": tokens_digest(tokens),
        "samples": options.samples,
        "seqlen": options.seqlen,
        "seed": options.seed,
        "versions": _versions(),
    }


def tokens_digest(tokens: Tensor) -> str:
    """Return the SHA-256 of token ids as little-endian 64-bit integers, row after row."""
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _tensor(rows: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= vocab_size:
        raise BesaError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}: "
            "the tokenizer does not match the model",
            "use the model's own tokenizer",
        )
    return torch.tensor([list(row) for row in rows], dtype=torch.int64)


def _versions() -> dict[str, str]:
    others = {name: version(name) for name in ("datasets", "tokenizers", "transformers")}
    return {"besa": __version__, **others}


def refuse_foreign(directory: Path) -> None:
    """Refuse to write a calibration set to a directory that holds anything else.

    Raises
    ------
    BesaError
        The directory holds a file that besa did not write (named), or a stage or export of besa.
    """
    ownership.refuse_to_replace(directory)
    if (directory / MANIFEST).exists() and (stage := manifests.read(directory)["stage"]) != "calibration":
        raise BesaError(
            f"{directory} does not hold a calibration set but '{stage}'", "name another run directory with --run"
        )


def save(calibration_set: CalibrationSet, directory: Path) -> None:
    """Write ``tokens.safetensors`` and ``besa.json`` to a new directory, which then replaces `directory` as a whole.

    Raises
    ------
    BesaError
        The directory cannot be written, or holds something else than a calibration set.
    """
    refuse_foreign(directory)
    final = directory.resolve() if directory.is_symlink() else directory
    target = _next(final)
    tensors = {"tokens": calibration_set.tokens.to(torch.int64)}
    if calibration_set.held_out is not None:
        tensors["held_out"] = calibration_set.held_out.to(torch.int64)
    try:
        _clear(target)
        publish(target / _TOKENS, lambda path: save_tensors(path, tensors))
        write_json(target / MANIFEST, calibration_set.manifest)
        swap.replace_stage(final, target)
    except OSError as error:
        raise BesaError(f"cannot write {directory}: {reason_of(error)}", "name another directory with --run") from error


def _clear(directory: Path) -> None:
    """Remove an unfinished set that a killed process left."""
    if directory.is_dir() and not directory.is_symlink() and all(_is_own(path.name) for path in directory.iterdir()):
        shutil.rmtree(directory)
    ownership.refuse_to_replace(directory)


def _is_own(name: str) -> bool:
    """Return True for the name of a file of a calibration set, finished or partial."""
    return any(name == file or (name.startswith(f".{file}.") and name.endswith(".partial")) for file in _FILES)


def recover(directory: Path) -> None:
    """Finish a replacement of a calibration set that a crash interrupted; the caller holds the run's lock."""
    swap.recover(directory, _next(directory))


def _next(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.next")


def load(directory: Path) -> CalibrationSet:
    """Read a calibration set and check it against its manifest.

    Raises
    ------
    BesaError
        The directory holds no calibration set, or one of another format, or its tokens differ from the manifest.
    """
    path = directory / MANIFEST
    remedy = "make it again with: besa calibrate"
    if not path.is_file():
        raise BesaError(f"no calibration set in {directory}", remedy)
    try:
        manifest = manifests.read(directory)
        if manifest["stage"] != "calibration":
            raise BesaError(f"{directory} does not hold a calibration set but '{manifest['stage']}'")
        stored = weights.read_file(directory / _TOKENS)
    except BesaError as error:
        raise BesaError(error.message, remedy) from error
    tokens, held_out = stored.get("tokens", torch.empty(0)), stored.get("held_out")
    if list(tokens.shape) != [manifest.get("samples"), manifest.get("seqlen")] or tokens.dtype != torch.int64:
        raise BesaError(f"{directory / _TOKENS} does not have the shape that {MANIFEST} states", remedy)
    held_digest = None if held_out is None else tokens_digest(held_out)
    if tokens_digest(tokens) != manifest.get("tokens_digest") or held_digest != manifest.get("held_out_digest"):
        raise BesaError(f"{directory / _TOKENS} was changed: its digest is not the one in {MANIFEST}", remedy)
    return CalibrationSet(tokens=tokens, manifest=manifest, held_out=held_out, directory=directory)
