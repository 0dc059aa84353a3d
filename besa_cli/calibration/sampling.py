"""Sampling of token windows from documents: drawn as in the authors' program, or packed for short documents.

Both methods are determined by the seed alone (`random.Random(seed)`, the Mersenne Twister of the standard library), and
both tokenize only the documents that they need.
"""

import random
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Protocol

from besa_cli.errors import BesaError
from besa_cli.text.chat import RenderedConversation
from besa_cli.text.spool import Numbers, Text

Encode = Callable[[Text], Iterable[int]]
HELD_OUT = 4  # windows of a calibration set beside its samples, on which results are checked
_ATTEMPTS = 100  # draws of one of them, from documents that no sample is from
_UNCHECKED = 1024  # windows to draw before the whole pool is checked to hold enough of them


class Documents(Protocol):
    """Protocol of a sequence of texts; a list satisfies it."""

    def __len__(self) -> int:
        """Return the number of texts."""

    def __getitem__(self, index: int, /) -> Text:
        """Read one text."""


class Joined:
    """Concatenation of several sequences of documents, without copying them."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        """Return the number of all documents."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int, /) -> Text:
        """Return the document of that index, counted over all parts."""
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Token windows, and the number of documents that they come from.

    Parameters
    ----------
    tokens : sequence of array("q")
        `samples` windows of `seqlen` token ids each.
    documents : int
        Number of documents with at least one token in a window.
    held_out : sequence of array("q")
        Windows of `seqlen` token ids beside these, of other text; fewer than wanted if the text is short.
    """

    tokens: Sequence["array[int]"]
    documents: int
    held_out: Sequence["array[int]"] = ()


def draw(documents: Documents, encode: Encode, *, samples: int, seqlen: int, seed: int, held_out: int = 0) -> Windows:
    """Draw each window from a random document that is longer than `seqlen` tokens, at a random start.

    The draws are exactly those of the authors' program: `randint` for the document until one is longer than `seqlen`,
    `randint` for the start in [0, length - seqlen - 1]; a pool of one document needs no draw for the document. As in
    the authors' program, the same document and start may be drawn twice. The long documents together must hold at least
    `samples` windows that do not overlap: with fewer, `samples` different windows would be impossible.

    Parameters
    ----------
    documents : Documents
        The pool; not empty.
    encode : callable
        Text to token ids.
    samples, seqlen : int
        Number of windows, and tokens per window.
    seed : int
        Seed of `random.Random`.
    held_out : int
        Windows to draw after these, from documents that no other window is from; fewer if none are found.

    Raises
    ------
    BesaError
        The long documents together hold fewer windows than `samples`.
    """
    pool = _Pool(documents, encode, seqlen)
    generator = random.Random(seed)
    windows = []
    drawn = set()
    for number in range(samples):
        index = pool.long_document(generator)
        if index is None or (number == _UNCHECKED and not pool.holds(samples)):
            raise pool.too_few(samples)
        windows.append(pool.window(index, pool.start(index, generator)))
        drawn.add(index)
    if not pool.holds(samples):
        raise pool.too_few(samples)
    return Windows(tokens=windows, documents=len(drawn), held_out=_other(pool, generator, drawn, held_out))


def _other(pool: "_Pool", generator: random.Random, drawn: Collection[int], count: int) -> list["array[int]"]:
    """Draw windows, after all samples, from documents that no sample and no other of these windows is from."""
    windows: list[array[int]] = []
    used = set(drawn)
    for _ in range(_ATTEMPTS):
        index = pool.long_document(generator) if len(windows) < count else None
        if index is None:
            break
        if index not in used:
            used.add(index)
            windows.append(pool.window(index, pool.start(index, generator)))
    return windows


class _Pool:
    """Documents that are tokenized when first drawn; only the length is kept of those not longer than `seqlen`."""

    def __init__(self, documents: Documents, encode: Encode, seqlen: int) -> None:
        self._documents = documents
        self._encode = encode
        self._seqlen = seqlen
        self._lengths: dict[int, int] = {}
        self._numbers = Numbers()
        self._long: dict[int, range] = {}  # document → positions of its tokens in `_numbers`, for long documents

    def start(self, index: int, generator: random.Random) -> int:
        """Draw the place where a window of a long document begins."""
        return generator.randint(0, self._lengths[index] - self._seqlen - 1)

    def window(self, index: int, start: int) -> "array[int]":
        """Return the window of a long document that begins at `start`."""
        return self._numbers.read(self._long[index][start : start + self._seqlen])

    def long_document(self, generator: random.Random) -> int | None:
        """Draw the index of a document longer than `seqlen`; None if there is none."""
        last = len(self._documents) - 1
        while self._long or len(self._lengths) <= last:
            index = generator.randint(0, last) if last else 0
            if self._is_long(index):
                return index
        return None

    def holds(self, samples: int) -> bool:
        """Check that the long documents hold `samples` windows without overlap, tokenizing only as many as needed."""
        windows = sum(self._windows(index) for index in self._long)
        for index in range(len(self._documents)):
            if windows >= samples:
                return True
            if index not in self._lengths and self._is_long(index):
                windows += self._windows(index)
        return windows >= samples

    def too_few(self, samples: int) -> BesaError:
        """Return the error for too few long documents; call it only after all documents were tokenized."""
        longest = max(self._lengths.values())
        windows = sum(self._windows(index) for index in self._long)
        return BesaError(
            f"too few long documents: {len(self._long)} of {len(self._documents)} documents are longer than --seqlen "
            f"{self._seqlen} tokens (the longest has {longest}) and hold {windows} whole windows, fewer than "
            f"--samples {samples}",
            "join short documents with --pack, or give a smaller --seqlen or --samples, or more text with --data",
        )

    def _is_long(self, index: int) -> bool:
        if index not in self._lengths:
            added = self._numbers.add(self._encode(self._documents[index]))
            self._lengths[index] = len(added)
            if len(added) > self._seqlen:
                self._long[index] = added
            else:
                self._numbers.drop_last(added)
        return index in self._long

    def _windows(self, index: int) -> int:
        return (self._lengths[index] - 1) // self._seqlen  # the authors' starts never reach the last token


def shuffled(documents: Documents, seed: int) -> Iterator[Text]:
    """Return the documents in a random order determined by the seed."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return (documents[index] for index in order)


def pack(
    documents: Iterable[Text],
    encode: Encode,
    *,
    samples: int,
    seqlen: int,
    separator: int | None,
    held_out: int = 0,
) -> Windows:
    """Join documents in order and cut the tokens into consecutive full windows: the samples, and some held out.

    Parameters
    ----------
    documents : iterable of Text
        Read only until there are enough tokens.
    encode : callable
        Text to token ids.
    samples, seqlen : int
        Number of windows, and tokens per window.
    separator : int or None
        The token between two documents (the tokenizer's EOS); not added if the tokenizer already appends it, nor after
        a conversation, whose own last token its template has written.
    held_out : int
        Windows to cut after these; fewer if the text ends.

    Raises
    ------
    BesaError
        All documents together have fewer than samples · seqlen tokens.
    """
    stream: array[int] = array("q")
    needed, wanted = samples * seqlen, (samples + held_out) * seqlen
    count, previous = 0, None
    for text in documents:
        ended = previous is None or isinstance(previous, RenderedConversation)
        if separator is not None and not ended and stream and stream[-1] != separator:
            stream.append(separator)
        previous = text
        count += len(stream) < needed
        stream.extend(islice(encode(text), min(max(wanted - len(stream), 0), sys.maxsize)))
        if len(stream) >= wanted:
            break
    if len(stream) < needed:
        raise BesaError(
            f"too little text: {count} documents of {len(stream)} tokens fill {len(stream) // seqlen} windows "
            f"of --seqlen {seqlen}, fewer than --samples {samples}",
            "give a smaller --seqlen or --samples, or more text with --data",
        )
    windows = [stream[start : start + seqlen] for start in range(0, len(stream) - seqlen + 1, seqlen)]
    return Windows(tokens=windows[:samples], documents=count, held_out=windows[samples:])
