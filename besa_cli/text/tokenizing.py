"""Token ids of texts of any length: long texts are tokenized in overlapping pieces, in bounded memory."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, Protocol

from besa_cli.errors import BesaError, reading
from besa_cli.system.disk import Json
from besa_cli.text.spool import Text, parts

PIECE = 1 << 18  # characters tokenized at a time; the library needs about 300 bytes for each
OVERLAP = 1 << 13  # characters that two pieces share
_MARGIN = 1 << 11  # characters of it at either end, where the cut may change the tokens
UNDIVIDED = 1 << 22  # characters tokenized at once if two pieces cannot be joined
_SLOW = 1 << 26  # most characters for a tokenizer written in Python
_GROWTH = 20  # most characters that a normalizer may make of one; Unicode's own reach 18
_SLICE = 256  # characters checked together for that
_AROUND = 1000  # most tokens that may be added around a text


class Tokenizer(Protocol):
    """Protocol of tokenizers, satisfied by those of transformers."""

    def __call__(self, text: str, *, verbose: bool) -> Json:
        """Return a mapping with the token ids of `text` under ``input_ids``."""


class Encoder:
    """Text to token ids, equal to tokenizing the whole text at once.

    A long text is cut into pieces of 262,144 characters that overlap by 8,192. Two pieces are joined if the tokens and
    positions in the overlap, without its ends, are the same in both: a tokenizer depends on words and their
    surroundings, so both pieces then continue identically. If they differ (a run of one letter, a word of megabytes),
    the piece is doubled, up to 4 Mi characters.

    Parameters
    ----------
    tokenizer : Tokenizer
        A tokenizer outside the `tokenizers` library (not ``is_fast``) gets the whole text, since it returns no
        positions.
    special : bool, default=True
        Add the tokens that the tokenizer adds around a text; False for texts that contain them, as conversations do.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = True) -> None:
        self._tokenizer: Any = tokenizer
        self._special = special
        self._added: int | None = None

    def __call__(self, text: Text) -> Iterator[int]:
        """Yield the token ids, including those that the tokenizer adds around a text.

        Raises
        ------
        BesaError
            The tokenizer fails, adds thousands of tokens, or the text cannot be tokenized in pieces.
        """
        source = _Source(parts(text))
        if not getattr(self._tokenizer, "is_fast", False):
            return iter(self._encode_whole(source, _SLOW))
        self._refuse_many_added()
        if source.ends_within(PIECE):
            return iter(self._encode_whole(source, PIECE))
        surrounding = self._surrounding_ids(source.text(0, _SLICE))
        if surrounding is None:
            return iter(self._encode_whole(source, UNDIVIDED))
        return chain(surrounding[0], chain.from_iterable(self._pieces(source)), surrounding[1])

    def _tokenize(self, text: str, **options: bool) -> Any:
        """Tokenize a text; any exception is a fault of the tokenizer's files."""
        if not self._special:
            options["add_special_tokens"] = False
        with reading("a text with the model's tokenizer", "the tokenizer's files are damaged: fetch the model again"):
            return self._tokenizer(text, **options)

    def _encode_whole(self, source: "_Source", limit: int) -> Sequence[int]:
        """Return the ids of a text that is tokenized at once."""
        if not source.ends_within(limit):
            raise _indivisible(limit)
        text = source.text(0, limit)
        self._refuse_growth(text)
        ids: Sequence[int] = self._tokenize(text, verbose=False)["input_ids"]  # verbose would warn about the length
        return ids

    def _pieces(self, source: "_Source") -> Iterator[Sequence[int]]:
        """Yield the ids of a long text, without those around it."""
        base, place, size = 0, 0, PIECE  # start of the piece, first character not yet yielded, length of the piece
        left = self._piece(source, base, size)
        while not source.ends_within(left.stop):
            start = left.last_end(left.stop - OVERLAP)
            right = self._piece(source, start, PIECE)
            left_tokens, right_tokens = (piece.within(start + _MARGIN, left.stop - _MARGIN) for piece in (left, right))
            pending = left.first_from(place)
            if (
                start > place
                and pending < left_tokens.start < left_tokens.stop
                and left.of(left_tokens) == right.of(right_tokens)
            ):
                yield left.ids[pending : left_tokens.start]
                base, place, size, left = start, start + _MARGIN, PIECE, right
                source.forget(start)
            else:
                if size == UNDIVIDED:
                    raise _indivisible(UNDIVIDED)
                size = min(2 * size, UNDIVIDED)
                left = self._piece(source, base, size)
        yield left.ids[left.first_from(place) :]

    def _piece(self, source: "_Source", start: int, size: int) -> "_Piece":
        text = source.text(start, start + size)
        self._refuse_growth(text)
        encoding = self._tokenize(
            text,
            verbose=False,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return _Piece(ids=encoding["input_ids"], places=encoding["offset_mapping"], start=start, stop=start + len(text))

    def _surrounding_ids(self, text: str) -> tuple[list[int], list[int]] | None:
        """Return the ids that are put before and after every text; None if they cannot be determined."""
        plain: list[int] = self._tokenize(text, verbose=False, add_special_tokens=False)["input_ids"]
        encoding = self._tokenize(text, verbose=False)
        ids: list[int] = encoding["input_ids"]
        inside = [number for number, sequence in enumerate(encoding.sequence_ids(0)) if sequence is not None]
        if not inside:
            return None
        before, after = ids[: inside[0]], ids[inside[-1] + 1 :]
        return (before, after) if [*before, *plain, *after] == ids else None

    def _refuse_many_added(self) -> None:
        """Refuse a tokenizer that adds thousands of tokens around a text."""
        if self._added is None:
            encoded = [
                self._tokenize("a", verbose=False, add_special_tokens=special)["input_ids"] for special in (True, False)
            ]
            self._added = len(encoded[0]) - len(encoded[1])
        if self._added > _AROUND:
            raise BesaError(f"the tokenizer adds {self._added} tokens around the letter 'a'", _USE_PUBLISHED)

    def _refuse_growth(self, text: str) -> None:
        """Refuse a normalizer that expands text so much that a whole text would not fit in memory."""
        normalizer = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "normalizer", None)
        if normalizer is None:
            return
        for start in range(0, len(text), _SLICE):
            excerpt = text[start : start + _SLICE]
            length = len(normalizer.normalize_str(excerpt))
            if length > _GROWTH * _SLICE:
                raise BesaError(
                    f"the tokenizer's normalizer makes {length} characters of {len(excerpt)}", _USE_PUBLISHED
                )


_USE_PUBLISHED = "use the tokenizer that was published with the model"


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Token ids of a piece of a text, and the character range (start, stop) of each token in the piece."""

    ids: Sequence[int]
    places: Sequence[tuple[int, int]]  # ascending
    start: int  # character range of the piece in the text
    stop: int

    def first_from(self, place: int) -> int:
        """Return the first token that begins at or after a character of the text; 0 for the text's first character."""
        return bisect_left(self.places, place - self.start, key=_begin) if place else 0

    def within(self, start: int, stop: int) -> range:
        """Return the tokens that lie between two characters of the text."""
        first = self.first_from(start)
        return range(first, max(first, bisect_right(self.places, stop - self.start, key=_end)))

    def of(self, tokens: range) -> tuple[Sequence[int], list[tuple[int, int]]]:
        """Return the ids of some tokens, and their character ranges in the text."""
        places = self.places[tokens.start : tokens.stop]
        return self.ids[tokens.start : tokens.stop], [(self.start + first, self.start + last) for first, last in places]

    def last_end(self, before: int) -> int:
        """Return the last end of a token at or before a character of the text; the piece's start if there is none."""
        count = bisect_right(self.places, before - self.start, key=_end)
        return self.start + self.places[count - 1][1] if count else self.start


_begin, _end = itemgetter(0), itemgetter(1)


class _Source:
    """Buffered text: only the characters in use are in memory."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts, self._buffer, self._base = parts, "", 0

    def ends_within(self, stop: int) -> bool:
        """Check that the text has no character at `stop` or after."""
        self._fill(stop + 1)
        return self._base + len(self._buffer) <= stop

    def text(self, start: int, stop: int) -> str:
        """Return the characters from `start` up to `stop`, or to the end."""
        self._fill(stop)
        return self._buffer[start - self._base : stop - self._base]

    def forget(self, before: int) -> None:
        """Discard the characters before a position."""
        self._buffer, self._base = self._buffer[before - self._base :], before

    def _fill(self, stop: int) -> None:
        buffered = [self._buffer]
        length = self._base + len(self._buffer)
        while length < stop and (part := next(self._parts, None)) is not None:
            buffered.append(part)
            length += len(part)
        if len(buffered) > 1:
            self._buffer = "".join(buffered)


def _indivisible(limit: int) -> BesaError:
    return BesaError(
        f"the text has more than {limit} characters and cannot be tokenized in pieces: it has no word boundaries, or "
        "the tokenizer returns no positions",
        "give it as shorter documents, one per line of a .jsonl file",
    )
