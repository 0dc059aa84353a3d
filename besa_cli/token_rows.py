"""Token rows: a JSON-lines file whose objects hold token ids under ``input_ids`` is the samples themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa_cli import documents, row_files
from besa_cli.disk import sha256_file
from besa_cli.errors import BesaError

_FIELD = "input_ids"


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of one or more files.

    Parameters
    ----------
    rows : sequence of list of int
        Token ids, `seqlen` each.
    sources : sequence of dict
        For the manifest: each file's name, SHA-256 and how many of its rows were taken.
    """

    rows: Sequence[list[int]]
    sources: Sequence[dict[str, Any]]


def holds_rows(path: Path) -> bool:
    """Whether the file's first JSON object has ``input_ids``."""
    if documents.suffix(path) not in (".jsonl", ".jsonl.gz"):
        return False
    first = next(row_files.json_lines(path), None)
    return first is not None and _FIELD in first[1]


def read_rows(paths: Sequence[Path], *, samples: int, seqlen: int, vocab_size: int) -> TokenRows:
    """The first `samples` rows of the files in order, each cut to its first `seqlen` ids.

    Parameters
    ----------
    paths : sequence of Path
        Files that `holds_rows` says yes to.
    samples, seqlen : int
        Rows to take, ids of each.
    vocab_size : int
        Every id must be below it.

    Raises
    ------
    BesaError
        A row is no list of ids, is shorter than `seqlen` or has an id outside the vocabulary (with its line), or there
        are fewer than `samples` rows.
    """
    rows: list[list[int]] = []
    sources = []
    for path in paths:
        before = len(rows)
        for number, value in row_files.json_lines(path):
            if len(rows) == samples:
                break
            rows.append(_row(value.get(_FIELD), seqlen, vocab_size, f"{path}, line {number}"))
        taken = len(rows) - before
        sources.append(
            {"asked": path.name, "source": "file", "file": path.name, "sha256": sha256_file(path), "rows": taken}
        )
    if len(rows) < samples:
        raise BesaError(
            f"{', '.join(map(str, paths))}: {len(rows)} rows of token ids, fewer than --samples {samples}",
            f"give --samples {len(rows)} or less, or more rows",
        )
    return TokenRows(rows=rows, sources=sources)


def _row(value: object, seqlen: int, vocab_size: int, place: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise BesaError(
            f"{place}: no list of whole numbers under '{_FIELD}'", "each line must hold the token ids of one row"
        )
    if len(value) < seqlen:
        raise BesaError(
            f"{place}: {len(value)} token ids, fewer than --seqlen {seqlen}", "give a smaller --seqlen, or longer rows"
        )
    row = value[:seqlen]
    outside = next((token for token in row if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise BesaError(
            f"{place}: token id {outside} is outside the model's vocabulary of {vocab_size}",
            "give rows made with the model's own tokenizer",
        )
    return row
