"""Token windows out of documents: drawn as the paper's authors draw them, or packed where documents are short.

Both ways are fixed by the seed alone (`random.Random(seed)`, the Mersenne Twister of the standard library), and both
tokenize only the documents that they come to.
"""

import random
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Protocol

from besa_cli.errors import BesaError
from besa_cli.text.spool import Numbers, Text

Encode = Callable[[Text], Iterable[int]]
_UNCHECKED = 1024  # windows that are drawn before it is known whether there are as many


class Documents(Protocol):
    """Texts by number; a list is one."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Text:
        """One text, read when it is asked for."""


class Joined:
    """Several sequences of documents as one, none of them copied."""

    def __init__(self, parts: Sequence[Documents]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        """All documents."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int, /) -> Text:
        """The document of that number, counted through all parts."""
        which = bisect_right(self._ends, index)
        return self._parts[which][index - (self._ends[which - 1] if which else 0)]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Token windows, and how many documents they were taken from.

    Parameters
    ----------
    tokens : sequence of array("q"), one a window
        `samples` windows of `seqlen` token ids each.
    documents : int
        Documents that gave at least one token.
    """

    tokens: Sequence["array[int]"]
    documents: int


def draw(documents: Documents, encode: Encode, *, samples: int, seqlen: int, seed: int) -> Windows:
    """Draw each window from a random document that is longer than `seqlen` tokens, at a random start.

    These are the authors' draws to the letter: `randint` for the document until one is longer than `seqlen`, `randint`
    for the start in [0, length - seqlen - 1]; a pool of one document needs no draw of it. Documents and places may come
    twice, as with the authors. Therefore a pool must hold, in its long documents together, at least `samples` windows
    that do not overlap: with less, the samples could not be as many different ones as the option says, however drawn.

    Parameters
    ----------
    documents : Documents
        The pool; not empty.
    encode : callable
        Text to token ids.
    samples, seqlen : int
        Windows to draw, tokens of each.
    seed : int
        Of `random.Random`.

    Raises
    ------
    BesaError
        The long documents together hold fewer windows than `samples`; says how many there are, how long, and what to
        do.
    """
    pool = _Pool(documents, encode, seqlen)
    generator = random.Random(seed)
    windows = []
    drawn = set()
    for number in range(samples):
        index = pool.long_document(generator)
        if index is None or (number == _UNCHECKED and not pool.holds(samples)):
            raise pool.too_few(samples)
        start = generator.randint(0, pool.length(index) - seqlen - 1)
        windows.append(pool.window(index, start))
        drawn.add(index)
    if not pool.holds(samples):
        raise pool.too_few(samples)
    return Windows(tokens=windows, documents=len(drawn))


class _Pool:
    """Documents, tokenized when first drawn; of those not longer than `seqlen` tokens only the length is kept."""

    def __init__(self, documents: Documents, encode: Encode, seqlen: int) -> None:
        self._documents = documents
        self._encode = encode
        self._seqlen = seqlen
        self._lengths: dict[int, int] = {}
        self._numbers = Numbers()
        self._long: dict[int, range] = {}  # where the tokens of long documents are

    def length(self, index: int) -> int:
        """Tokens of a document that was looked at."""
        return self._lengths[index]

    def window(self, index: int, start: int) -> "array[int]":
        """A window of a long document."""
        return self._numbers.read(self._long[index][start : start + self._seqlen])

    def long_document(self, generator: random.Random) -> int | None:
        """The index of a random document longer than `seqlen`, or None where there is none."""
        last = len(self._documents) - 1
        while self._long or len(self._lengths) <= last:
            index = generator.randint(0, last) if last else 0
            if self._is_long(index):
                return index
        return None

    def holds(self, samples: int) -> bool:
        """Whether the long documents hold `samples` windows that do not overlap; looks only as far as needed."""
        found = sum(self._windows(index) for index in self._long)
        for index in range(len(self._documents)):
            if found >= samples:
                return True
            if index not in self._lengths and self._is_long(index):
                found += self._windows(index)
        return found >= samples

    def too_few(self, samples: int) -> BesaError:
        """What the pool holds and what to do; to be called when every document was looked at."""
        hint = "join short documents with --pack, or give a smaller --seqlen or --samples, or more text with --data"
        longest = max(self._lengths.values())
        of = f"of {len(self._documents)} documents {len(self._long)} are longer than --seqlen {self._seqlen} tokens"
        holds = sum(self._windows(index) for index in self._long)
        return BesaError(
            f"too few long documents: {of} (the longest has {longest}), holding {holds} whole windows, "
            f"fewer than --samples {samples}",
            hint,
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
    """The documents in an order fixed by the seed."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return (documents[index] for index in order)


def pack(documents: Iterable[Text], encode: Encode, *, samples: int, seqlen: int, separator: int | None) -> Windows:
    """Join documents in the order given and cut the stream into consecutive full windows; take the first `samples`.

    Parameters
    ----------
    documents : iterable of Text
        Read only as far as tokens are needed.
    encode : callable
        Text to token ids.
    samples, seqlen : int
        Windows to take, tokens of each.
    separator : int or None
        The token between two documents (the tokenizer's EOS); not doubled where the tokenizer itself ends them with it.

    Raises
    ------
    BesaError
        All documents together have fewer than samples · seqlen tokens.
    """
    stream: array[int] = array("q")
    needed = samples * seqlen
    count = 0
    for text in documents:
        if separator is not None and count and stream and stream[-1] != separator:
            stream.append(separator)
        stream.extend(islice(encode(text), min(max(needed - len(stream), 0), sys.maxsize)))
        count += 1
        if len(stream) >= needed:
            break
    if len(stream) < needed:
        raise BesaError(
            f"too little text: {count} documents of {len(stream)} tokens fill {len(stream) // seqlen} windows "
            f"of --seqlen {seqlen}, fewer than --samples {samples}",
            "give a smaller --seqlen or --samples, or more text with --data",
        )
    return Windows(tokens=[stream[start : start + seqlen] for start in range(0, needed, seqlen)], documents=count)
