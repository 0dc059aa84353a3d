"""Token ids of a text of any length: long texts are tokenized in pieces that fit together, in bounded memory."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, Protocol

from besa_cli.errors import BesaError, reading
from besa_cli.text.spool import Text, parts

PIECE = 1 << 18  # characters tokenized at a time; the library takes about 300 bytes for each
OVERLAP = 1 << 13  # characters that two pieces share
_MARGIN = 1 << 11  # of these, at either end, where it may show that a piece was cut
UNDIVIDED = 1 << 22  # characters tokenized at once where no two pieces fit
_SLOW = 1 << 26  # characters that a tokenizer written in Python is given at once
_GROWTH = 20  # characters that a normalizer may make of one; Unicode's own make up to 18
_SLICE = 256  # characters looked at together for that
_AROUND = 1000  # tokens that may be added around a text


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    def __call__(self, text: str, *, verbose: bool) -> Mapping[str, Any]:
        """A mapping with the token ids of `text` under ``input_ids``."""


class Encoder:
    """Text to token ids, the same as if the tokenizer were given the text at once.

    A long text is cut into pieces of 262,144 characters that overlap by 8,192. Two pieces are joined where the tokens
    of the overlap, its ends left out, are the same in both, with their places: a tokenizer looks at words and at what
    is near, so that from such a place on it gives what it would have given anyway. Where they are not the same (a run
    of one letter, a word of megabytes) the piece is made longer, up to 4 Mi characters.

    Parameters
    ----------
    tokenizer : Tokenizer
        One that is not of the `tokenizers` library (``is_fast``) is given the whole text, since it tells no places.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Any = tokenizer
        self._added: int | None = None

    def __call__(self, text: Text) -> Iterator[int]:
        """The token ids one by one, with those that the tokenizer itself adds around a text.

        Raises
        ------
        BesaError
            The tokenizer fails, makes thousands of tokens of one letter, or the text cannot be taken in pieces.
        """
        source = _Source(parts(text))
        if not getattr(self._tokenizer, "is_fast", False):
            return iter(self._whole(source, _SLOW))
        self._refuse_crowd()
        if source.ends_within(PIECE):
            return iter(self._whole(source, PIECE))
        around = self._found_around(source.text(0, _SLICE))
        if around is None:
            return iter(self._whole(source, UNDIVIDED))
        return chain(around[0], chain.from_iterable(self._pieces(source)), around[1])

    def _split(self, text: str, **options: Any) -> Any:
        """What the tokenizer makes of a text; whatever stops it is a fault of its files."""
        with reading("a text with the model's tokenizer", "the tokenizer's files are damaged: fetch the model again"):
            return self._tokenizer(text, **options)

    def _whole(self, source: "_Source", most: int) -> Sequence[int]:
        """The ids of a text that is tokenized at once."""
        if not source.ends_within(most):
            raise _indivisible(most)
        text = source.text(0, most)
        self._refuse_growth(text)
        ids: Sequence[int] = self._split(text, verbose=False)["input_ids"]  # not verbose: no warning of its length
        return ids

    def _pieces(self, source: "_Source") -> Iterator[Sequence[int]]:
        """The ids of a long text, without those around it."""
        base, place, size = 0, 0, PIECE  # where the piece begins, from where on its tokens are due, its length
        left = self._piece(source, base, size)
        while not source.ends_within(left.stop):
            start = left.last_end(left.stop - OVERLAP)
            right = self._piece(source, start, PIECE)
            here, there = (piece.within(start + _MARGIN, left.stop - _MARGIN) for piece in (left, right))
            due = left.due(place)
            if start > place and due < here.start < here.stop and left.of(here) == right.of(there):
                yield left.ids[due : here.start]
                base, place, size, left = start, start + _MARGIN, PIECE, right
                source.forget(start)
            else:
                if size == UNDIVIDED:
                    raise _indivisible(UNDIVIDED)
                size = min(2 * size, UNDIVIDED)
                left = self._piece(source, base, size)
        yield left.ids[left.due(place) :]

    def _piece(self, source: "_Source", start: int, size: int) -> "_Piece":
        text = source.text(start, start + size)
        self._refuse_growth(text)
        found = self._split(
            text,
            verbose=False,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return _Piece(ids=found["input_ids"], places=found["offset_mapping"], start=start, stop=start + len(text))

    def _found_around(self, text: str) -> tuple[list[int], list[int]] | None:
        """The ids that are put before and after every text, or None where it does not come to that."""
        plain: list[int] = self._split(text, verbose=False, add_special_tokens=False)["input_ids"]
        found = self._split(text, verbose=False)
        ids: list[int] = found["input_ids"]
        own = [number for number, sequence in enumerate(found.sequence_ids(0)) if sequence is not None]
        if not own:
            return None
        before, after = ids[: own[0]], ids[own[-1] + 1 :]
        return (before, after) if [*before, *plain, *after] == ids else None

    def _refuse_crowd(self) -> None:
        """Refuse a tokenizer that puts thousands of tokens around a text, or repeats it."""
        if self._added is None:
            one = [self._split("a", verbose=False, add_special_tokens=own)["input_ids"] for own in (True, False)]
            self._added = len(one[0]) - len(one[1])
        if self._added > _AROUND:
            raise BesaError(f"the tokenizer adds {self._added} tokens around the letter 'a'", _OTHER)

    def _refuse_growth(self, text: str) -> None:
        """Refuse a normalizer that makes many letters of one: what it would make of a whole text is not to be held."""
        normalizer = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "normalizer", None)
        if normalizer is None:
            return
        for start in range(0, len(text), _SLICE):
            some = text[start : start + _SLICE]
            made = len(normalizer.normalize_str(some))
            if made > _GROWTH * _SLICE:
                raise BesaError(f"the tokenizer's normalizer makes {made} characters of {len(some)}", _OTHER)


_OTHER = "use the tokenizer that was published with the model"


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """The token ids of a piece of a text, and where in it each has its characters: from … to before …"""

    ids: Sequence[int]
    places: Sequence[tuple[int, int]]  # in order
    start: int  # the piece's own characters in the text
    stop: int

    def due(self, place: int) -> int:
        """The first token that begins at a character of the text or after it; all, where that is the text's first."""
        return bisect_left(self.places, place - self.start, key=_begin) if place else 0

    def within(self, start: int, stop: int) -> range:
        """The tokens between two characters of the text."""
        first = self.due(start)
        return range(first, max(first, bisect_right(self.places, stop - self.start, key=_end)))

    def of(self, tokens: range) -> tuple[Sequence[int], list[tuple[int, int]]]:
        """Ids of some tokens, and their places in the text."""
        places = self.places[tokens.start : tokens.stop]
        return self.ids[tokens.start : tokens.stop], [(self.start + first, self.start + last) for first, last in places]

    def last_end(self, before: int) -> int:
        """The last character of the text up to `before` at which a token ends; the piece's first where none does."""
        count = bisect_right(self.places, before - self.start, key=_end)
        return self.start + self.places[count - 1][1] if count else self.start


_begin, _end = itemgetter(0), itemgetter(1)


class _Source:
    """A text of which only what is in work is held."""

    def __init__(self, coming: Iterator[str]) -> None:
        self._coming, self._held, self._base = coming, "", 0

    def ends_within(self, stop: int) -> bool:
        """Whether the text has no character at `stop` or after it."""
        self._fill(stop + 1)
        return self._base + len(self._held) <= stop

    def text(self, start: int, stop: int) -> str:
        """The characters from `start` to before `stop`, or to the end."""
        self._fill(stop)
        return self._held[start - self._base : stop - self._base]

    def forget(self, before: int) -> None:
        """Let go of the characters before one."""
        self._held, self._base = self._held[before - self._base :], before

    def _fill(self, stop: int) -> None:
        some = [self._held]
        length = self._base + len(self._held)
        while length < stop and (part := next(self._coming, None)) is not None:
            some.append(part)
            length += len(part)
        if len(some) > 1:
            self._held = "".join(some)


def _indivisible(most: int) -> BesaError:
    return BesaError(
        f"the text has more than {most} characters and cannot be tokenized in pieces: it does not fall into words, or "
        "the tokenizer tells no places",
        "give it as shorter documents, one a line of a .jsonl file",
    )
