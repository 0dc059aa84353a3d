"""Calibration sets: the token windows that a model is pruned on, stored with all that made them."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from besa_cli import __version__
from besa_cli.calibration import sampling
from besa_cli.checkpoint import manifests, ownership, swap, weights
from besa_cli.errors import BesaError, UsageError, reason_of
from besa_cli.system.disk import MANIFEST, publish, save_tensors, write_json
from besa_cli.text import corpora, documents, hub_files, token_rows, tokenizing
from besa_cli.text.spool import Text

FORMAT = 1
SHORTEST = 2  # tokens: a window must hold at least one token and the one that it predicts
_TOKENS = "tokens.safetensors"
_FILES = (_TOKENS, MANIFEST)

Notify = Callable[[str], None]


class SampleTokenizer(tokenizing.Tokenizer, Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    @property
    def eos_token_id(self) -> int | None:
        """The token between packed documents."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What a calibration set is made of.

    Parameters
    ----------
    data : tuple of str, default=("c4",)
        Names (`corpora.SOURCES`) or files; the documents of all of them are one pool.
    samples : int, default=128
        Token windows.
    seqlen : int, default=2048
        Tokens of each.
    seed : int, default=0
        Not negative.
    pack : bool or None, default=None
        Whether documents are shuffled, joined and cut into full windows, instead of drawing windows from documents
        longer than `seqlen`. None packs where bundled text is among the sources, since most of its documents are short.

    Raises
    ------
    UsageError
        A number outside its range.
    """

    data: tuple[str, ...] = ("c4",)
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    pack: bool | None = None

    def __post_init__(self) -> None:
        """Refuse numbers outside their ranges."""
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples} is too few", "give 1 or more")
        if self.seqlen < SHORTEST:
            raise UsageError(f"--seqlen {self.seqlen} is too short", f"give {SHORTEST} or more")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative", "give 0 or more")

    def record(self) -> dict[str, Any]:
        """The options as plain JSON."""
        return {**asdict(self), "data": [documents.printable(name) for name in self.data]}


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationSet:
    """Token windows and their manifest.

    Parameters
    ----------
    tokens : Tensor of shape (samples, seqlen), int64
        Token ids.
    manifest : dict
        Plain JSON: options, sources with their digests, way of sampling, digests of tokenizer and tokens, versions.
    """

    tokens: Tensor
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens as little-endian 64-bit integers, row after row."""
        return str(self.manifest["tokens_digest"])


def build(
    options: CalibrationOptions,
    tokenizer: SampleTokenizer,
    *,
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
    tokenizer : Tokenizer
        The model's.
    tokenizer_digest : str
        For the manifest.
    max_length : int or None
        Tokens that the model takes at most.
    vocab_size : int
        Rows of the model's embedding; every id is below it.
    data_dir : Path or None
        Directory with official files of named data sets.
    notify : callable
        Takes one-line notes.
    hub : datahub.Hub or None, default=None
        None for the one that the environment names.

    Raises
    ------
    UsageError
        Options or names that cannot be meant.
    BesaError
        A source cannot be read or reached, holds too little, or does not fit the model.
    """
    _check_length(options.seqlen, max_length)
    row_files = corpora.check_sources(options.data, data_dir)
    if row_files:
        if options.pack:
            raise UsageError("--pack does not go with token rows", "leave it out: the rows are the samples already")
        sizes = {"samples": options.samples, "seqlen": options.seqlen, "vocab_size": vocab_size}
        taken = token_rows.read_rows(row_files, **sizes, notify=notify)
        tokens, account = _tensor(taken.rows, vocab_size), {"sources": list(taken.sources), "sampling": "token rows"}
    else:
        hub = hub or hub_files.from_environment()
        opened = [corpora.open_source(name, data_dir=data_dir, hub=hub, notify=notify) for name in options.data]
        rows, account = _sample(options, tokenizer, opened, notify)
        tokens = _tensor(rows, vocab_size)
    return CalibrationSet(tokens=tokens, manifest=_manifest(options, account, tokens, tokenizer_digest))


def _check_length(seqlen: int, max_length: int | None) -> None:
    if max_length is not None and seqlen > max_length:
        raise UsageError(
            f"--seqlen {seqlen} is over the {max_length} tokens that the model takes at most",
            f"give --seqlen {max_length} or less",
        )


def _manifest(
    options: CalibrationOptions, account: dict[str, Any], tokens: Tensor, tokenizer_digest: str
) -> dict[str, Any]:
    """All that made the set; `account` holds its sources and how they were sampled."""
    return {
        "format": FORMAT,
        "stage": "calibration",
        "status": "complete",
        "options": options.record(),
        **account,
        "tokenizer_digest": tokenizer_digest,
        "tokens_digest": tokens_digest(tokens),
        "samples": options.samples,
        "seqlen": options.seqlen,
        "seed": options.seed,
        "versions": _versions(),
    }


def tokens_digest(tokens: Tensor) -> str:
    """SHA-256 of token ids as little-endian 64-bit integers, row after row."""
    return hashlib.sha256(tokens.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _sample(
    options: CalibrationOptions, tokenizer: SampleTokenizer, opened: Sequence[corpora.Corpus], notify: Notify
) -> tuple[Sequence[Sequence[int]], dict[str, Any]]:
    """Windows, and the manifest's account of where they are from and how they were taken."""
    encode = tokenizing.Encoder(tokenizer)
    with_bundled = any(corpus.source == "bundled" for corpus in opened)
    packed = with_bundled if options.pack is None else options.pack
    for corpus in opened:
        if corpus.note:
            notify(corpus.note + (", packed to full windows" if packed else ""))
    pool = sampling.Joined([corpus.documents for corpus in opened])
    sizes = {"samples": options.samples, "seqlen": options.seqlen}
    if not packed:
        drawn = sampling.draw(pool, encode, seed=options.seed, **sizes)
        sources = [_source(each) for each in opened]
        return drawn.tokens, {"sources": sources, "sampling": "documents", "documents": drawn.documents}
    books: list[corpora.Corpus] = []
    texts = chain(sampling.shuffled(pool, options.seed), _books(opened, books) if with_bundled else ())
    separator = tokenizer.eos_token_id
    joined = sampling.pack(texts, encode, separator=separator, **sizes)
    sources = [_source(each) for each in (*opened, *books)]
    how = {"sampling": "packed", "documents": joined.documents, "separator": separator}
    return joined.tokens, {"sources": sources, **how}


def _books(opened: Sequence[corpora.Corpus], used: list[corpora.Corpus]) -> Iterator[Text]:
    """The bundled books, each read when its turn comes and then noted in `used`."""
    asked = next(corpus.asked for corpus in opened if corpus.source == "bundled")
    for name in corpora.BOOKS:
        used.append(corpora.book(name, asked))
        yield from used[-1].documents


def _source(corpus: corpora.Corpus) -> dict[str, Any]:
    source = {"asked": corpus.asked, "source": corpus.source, "file": corpus.file, "sha256": corpus.digest}
    if corpus.source == "file":
        source["asked"] = corpus.file  # never a path of this machine
    if corpus.revision is not None:
        source["revision"] = corpus.revision
    return {**source, "documents": len(corpus.documents)}


def _tensor(rows: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    low, high = min(map(min, rows)), max(map(max, rows))
    if low < 0 or high >= vocab_size:
        raise BesaError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocab_size}: "
            "the tokenizer does not fit the model",
            "use the tokenizer that belongs to the model",
        )
    return torch.tensor([list(row) for row in rows], dtype=torch.int64)


def _versions() -> dict[str, str]:
    others = {name: version(name) for name in ("datasets", "tokenizers", "transformers")}
    return {"besa": __version__, **others}


def refuse_foreign(directory: Path) -> None:
    """Refuse a directory in which no set may be written: what is not a calibration set may be the user's.

    Raises
    ------
    BesaError
        Something that besa did not write is there (the file is named), or something of besa's that is not a set.
    """
    ownership.refuse_to_replace(directory)
    if (directory / MANIFEST).exists() and (stage := manifests.read(directory)["stage"]) != "calibration":
        raise BesaError(
            f"{directory} does not hold a calibration set but '{stage}'", "name another run directory with --run"
        )


def save(calibration_set: CalibrationSet, directory: Path) -> None:
    """Write ``tokens.safetensors`` and ``besa.json`` beside the directory, which the new one then replaces as a whole.

    Raises
    ------
    BesaError
        The directory cannot be written, or holds what is not a calibration set.
    """
    refuse_foreign(directory)
    place = directory.resolve() if directory.is_symlink() else directory
    target = _beside(place)
    tensors = {"tokens": calibration_set.tokens.to(torch.int64)}
    try:
        _clear(target)
        publish(target / _TOKENS, lambda path: save_tensors(path, tensors))
        write_json(target / MANIFEST, calibration_set.manifest)
        swap.replace_stage(place, target)
    except OSError as error:
        raise BesaError(f"cannot write {directory}: {reason_of(error)}", "name another directory with --run") from error


def _clear(remains: Path) -> None:
    """Remove what a process that was killed left of a set that was to be the next."""
    if remains.is_dir() and not remains.is_symlink() and all(_is_ours(path.name) for path in remains.iterdir()):
        shutil.rmtree(remains)
    ownership.refuse_to_replace(remains)


def _is_ours(name: str) -> bool:
    """Whether a set has a file of that name, whole or not."""
    return any(name == each or (name.startswith(f".{each}.") and name.endswith(".partial")) for each in _FILES)


def recover(directory: Path) -> None:
    """Finish an exchange of calibration sets that a crash interrupted; the caller holds the run's lock."""
    swap.recover(directory, _beside(directory))


def _beside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.next")


def load(directory: Path) -> CalibrationSet:
    """Read a calibration set and check it against its manifest.

    Raises
    ------
    BesaError
        There is none, it is of a newer besa, it is something else, or its tokens are not the ones the manifest names.
    """
    path = directory / MANIFEST
    anew = "make it anew with: besa calibrate"
    if not path.is_file():
        raise BesaError(f"no calibration set in {directory}", anew)
    try:
        manifest = manifests.read(directory)
        if manifest["stage"] != "calibration":
            raise BesaError(f"{directory} does not hold a calibration set but '{manifest['stage']}'")
        tokens = weights.read_file(directory / _TOKENS).get("tokens", torch.empty(0))
    except BesaError as error:
        raise BesaError(error.message, anew) from error
    if list(tokens.shape) != [manifest.get("samples"), manifest.get("seqlen")] or tokens.dtype != torch.int64:
        raise BesaError(f"{directory / _TOKENS} does not have the shape that {MANIFEST} states", anew)
    if tokens_digest(tokens) != manifest.get("tokens_digest"):
        raise BesaError(f"{directory / _TOKENS} was changed: its digest is not the one in {MANIFEST}", anew)
    return CalibrationSet(tokens=tokens, manifest=manifest)
