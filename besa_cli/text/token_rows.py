"""Token rows: JSON lines with token ids under ``input_ids``, used as samples without tokenizing."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from besa_cli.errors import BesaError
from besa_cli.system.disk import Json, JsonObject, sha256_file
from besa_cli.system.notes import Notify
from besa_cli.text import documents, row_files

_FIELD = "input_ids"
_MASK = "attention_mask"
_HINT = "each line must hold the token ids of one row"


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of one or more files.

    Parameters
    ----------
    rows : sequence of array("q")
        Token ids, `seqlen` each.
    sources : sequence of dict
        For the manifest: name and SHA-256 of each file, the number of rows taken, and the number of rows that lost
        padding, if any.
    """

    rows: Sequence["array[int]"]
    held_out: Sequence["array[int]"]
    sources: Sequence[JsonObject]


def holds_rows(path: Path) -> bool:
    """Check that the file's first JSON object has ``input_ids``."""
    if documents.suffix(path) not in (".jsonl", ".jsonl.gz"):
        return False
    first = next(row_files.json_lines(path), None)
    return first is not None and _FIELD in first[1]


def read_rows(
    paths: Sequence[Path], *, samples: int, seqlen: int, vocab_size: int, notify: Notify, held_out: int = 0
) -> TokenRows:
    """Read the first `samples` rows of the files in order, each cut to its first `seqlen` ids, and some held out.

    If a row has an ``attention_mask``, the ids that it masks at the ends of the row are removed as padding.

    Parameters
    ----------
    paths : sequence of Path
        Files for which `holds_rows` is True.
    samples, seqlen : int
        Number of rows, and of ids in each.
    vocab_size : int
        Upper bound (exclusive) of all ids.
    held_out : int
        Rows to take after these from the file of the last one; fewer where it ends or a row is not valid.
    notify : callable
        Called with a one-line note if padding is removed.

    Raises
    ------
    BesaError
        A row is not a list of ids, its mask does not fit or masks ids inside the row, it is shorter than `seqlen` or
        has an id outside the vocabulary (the line is named), or there are fewer than `samples` rows.
    """
    rows: list[array[int]] = []
    others: list[array[int]] = []
    sources = []
    for path in paths:
        first_row, padded = len(rows), 0
        for number, value in row_files.json_lines(path):
            place = f"{path}, line {number}"
            if len(rows) == samples:
                if len(others) == held_out:
                    break
                try:
                    others.append(_taken(value, place, seqlen, vocab_size)[0])
                except BesaError:  # nobody asked for this row
                    break
                continue
            row, was_padded = _taken(value, place, seqlen, vocab_size)
            padded += was_padded
            rows.append(row)
        taken = len(rows) - first_row
        name = documents.printable(path.name)
        source = {"asked": name, "source": "file", "file": name, "sha256": sha256_file(path), "rows": taken}
        if padded:
            notify(f"{path}: removed padding ({_MASK} 0) from {padded} of {taken} rows")
            source["padded"] = padded
        sources.append(source)
    if len(rows) < samples:
        raise BesaError(
            f"{', '.join(map(str, paths))}: {len(rows)} rows of token ids, fewer than --samples {samples}",
            f"give --samples {len(rows)} or less, or more rows" if rows else "give files with token rows",
        )
    return TokenRows(rows=rows, held_out=others, sources=sources)


def _taken(value: Json, place: str, seqlen: int, vocab_size: int) -> tuple["array[int]", bool]:
    """Return the first `seqlen` ids of a row without its padding, and whether it has some."""
    ids = _unpadded(_ids(value.get(_FIELD), place), value.get(_MASK), place)
    padded = len(ids) < len(value[_FIELD])
    if len(ids) < seqlen:
        raise _short(place, f"{len(ids)} token ids{' without the padding' if padded else ''}", seqlen)
    return _row(ids[:seqlen], vocab_size, place), padded


def _ids(value: object, place: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise BesaError(f"{place}: '{_FIELD}' is not a list of integers", _HINT)
    return value


def _unpadded(ids: list[int], mask: object, place: str) -> list[int]:
    """Return the ids from the first to the last unmasked one."""
    if mask is None:
        return ids
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(type(value) in (int, bool) for value in mask):
        raise BesaError(f"{place}: '{_MASK}' is not a list of one 0 or 1 per token id", _HINT)
    if not set(mask) <= {0, 1}:
        raise BesaError(f"{place}: '{_MASK}' holds numbers other than 0 and 1", _HINT)
    if 1 not in mask:
        raise BesaError(f"{place}: the row is all padding ('{_MASK}' is 0 everywhere)", "remove the row")
    first, last = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[first:last]:
        raise BesaError(
            f"{place}: '{_MASK}' masks tokens inside the row (token {first + mask[first:last].index(0)})",
            "samples have no mask: only padding at the ends of a row can be removed",
        )
    return ids[first:last]


def _short(place: str, length: str, seqlen: int) -> BesaError:
    return BesaError(f"{place}: {length}, fewer than --seqlen {seqlen}", "give a smaller --seqlen, or longer rows")


def _row(row: list[int], vocab_size: int, place: str) -> "array[int]":
    outside = next((token for token in row if not 0 <= token < vocab_size), None)
    if outside is not None:
        shown = outside if abs(outside) < 10**20 else f"of {len(str(abs(outside)))} digits"
        raise BesaError(
            f"{place}: token id {shown} is outside the model's vocabulary of {vocab_size}",
            "give rows made with the model's own tokenizer",
        )
    return array("q", row)
