"""Drawn windows are slices of long documents, packed windows are the joined stream, and both hang on the seed alone."""

import random
from collections.abc import Iterator, Sequence
from itertools import chain, count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.joined_text import joined

from besa_cli.calibration import sampling
from besa_cli.errors import BesaError
from besa_cli.text.spool import Text

EOS = 7


def encode(text: Text) -> list[int]:
    return list(joined(text).encode("utf-8"))


def decode(tokens: Sequence[int]) -> str:
    return bytes(list(tokens)).decode("utf-8")


documents = st.lists(st.text(alphabet="abcdefghij", max_size=40), min_size=1, max_size=12)
sizes = {"samples": st.integers(1, 6), "seqlen": st.integers(2, 12), "seed": st.integers(0, 2**40)}


def disjoint_windows(texts: list[str], seqlen: int) -> int:
    return sum((len(encode(text)) - 1) // seqlen for text in texts if len(encode(text)) > seqlen)


@given(texts=documents, **sizes)
def test_a_drawn_window_is_a_slice_of_a_document_longer_than_it(
    texts: list[str], samples: int, seqlen: int, seed: int
) -> None:
    if disjoint_windows(texts, seqlen) < samples:
        with pytest.raises(BesaError, match="too few long documents"):
            sampling.draw(texts, encode, samples=samples, seqlen=seqlen, seed=seed)
        return
    windows = sampling.draw(texts, encode, samples=samples, seqlen=seqlen, seed=seed)
    assert len(windows.tokens) == samples
    for window in windows.tokens:
        text = decode(window)
        assert len(window) == seqlen
        assert any(text in each[:-1] for each in texts if len(each) > seqlen)
    assert 1 <= windows.documents <= samples
    assert sampling.draw(texts, encode, samples=samples, seqlen=seqlen, seed=seed) == windows


@given(texts=documents, held_out=st.integers(1, 5), **sizes)
def test_held_out_windows_come_from_other_documents_and_change_no_sample(
    texts: list[str], held_out: int, samples: int, seqlen: int, seed: int
) -> None:
    if disjoint_windows(texts, seqlen) < samples:
        return
    asked = {"samples": samples, "seqlen": seqlen, "seed": seed}
    windows = sampling.draw(texts, encode, **asked, held_out=held_out)
    assert windows.tokens == sampling.draw(texts, encode, **asked).tokens
    assert windows.documents == sampling.draw(texts, encode, **asked).documents
    others = [text for text in texts if len(encode(text)) > seqlen]
    assert len(windows.held_out) <= min(held_out, len(others) - windows.documents)
    for window in windows.held_out:
        assert len(window) == seqlen


def authors_draw(texts: list[str], samples: int, seqlen: int, seed: int) -> list[list[int]]:
    """The loop of the authors' released program, written down plainly: an oracle for the very rows."""
    generator = random.Random(seed)
    rows = []
    for _ in range(samples):
        while True:
            tokens = encode(texts[generator.randint(0, len(texts) - 1)])
            if len(tokens) > seqlen:
                break
        start = generator.randint(0, len(tokens) - seqlen - 1)
        rows.append(tokens[start : start + seqlen])
    return rows


@given(texts=st.lists(st.text(alphabet="abcdefghij", max_size=60), min_size=2, max_size=12), **sizes)
def test_the_rows_are_the_authors_rows(texts: list[str], samples: int, seqlen: int, seed: int) -> None:
    if disjoint_windows(texts, seqlen) >= samples:
        windows = sampling.draw(texts, encode, samples=samples, seqlen=seqlen, seed=seed)
        assert [list(window) for window in windows.tokens] == authors_draw(texts, samples, seqlen, seed)


def test_one_document_takes_no_draw_of_the_document_as_with_the_authors() -> None:
    text = "".join(random.Random(3).choices("abcdefghij", k=500))
    generator = random.Random(11)
    starts = [generator.randint(0, 500 - 20 - 1) for _ in range(8)]
    windows = sampling.draw([text], encode, samples=8, seqlen=20, seed=11)
    assert [decode(window) for window in windows.tokens] == [text[start : start + 20] for start in starts]
    assert windows.documents == 1


def test_only_what_is_drawn_is_tokenized_and_only_once() -> None:
    seen: list[Text] = []

    def noting(text: Text) -> list[int]:
        seen.append(text)
        return encode(text)

    texts = [f"{number:03}" * 20 for number in range(1000)]
    sampling.draw(texts, noting, samples=5, seqlen=8, seed=0)
    assert len(seen) == len(set(seen)) <= 5


def test_a_pool_without_a_long_document_ends_with_what_it_holds() -> None:
    with pytest.raises(BesaError) as caught:
        sampling.draw(["abc", "abcde", ""], encode, samples=2, seqlen=5, seed=0)
    assert "0 of 3 documents are longer than --seqlen 5 tokens (the longest has 5)" in caught.value.message
    assert "fewer than --samples 2" in caught.value.message
    for remedy in ("--pack", "--seqlen", "--samples", "--data"):
        assert remedy in caught.value.hint


def test_a_document_of_exactly_the_window_is_too_short() -> None:
    with pytest.raises(BesaError, match="0 of 1 documents are longer"):
        sampling.draw(["abcde"], encode, samples=1, seqlen=5, seed=0)
    assert sampling.draw(["abcdef"], encode, samples=1, seqlen=5, seed=0).tokens[0].tolist() == encode("abcde")


@given(texts=documents, separator=st.sampled_from([None, EOS]), seqlen=st.integers(2, 12))
def test_packed_windows_are_the_joined_stream(texts: list[str], separator: int | None, seqlen: int) -> None:
    stream: list[int] = []
    for text in texts:
        if stream and separator is not None and stream[-1] != separator:
            stream.append(separator)
        stream += encode(text)
    samples = len(stream) // seqlen
    if samples:
        windows = sampling.pack(texts, encode, samples=samples, seqlen=seqlen, separator=separator)
        assert list(chain.from_iterable(windows.tokens)) == stream[: samples * seqlen]
        assert windows.documents <= len(texts)
    with pytest.raises(BesaError, match=f"too little text.* fill {samples} windows"):
        sampling.pack(texts, encode, samples=samples + 1, seqlen=seqlen, separator=separator)


def test_held_out_windows_follow_the_packed_ones() -> None:
    windows = sampling.pack(["abcdefgh", "ijkl"], encode, samples=1, seqlen=4, separator=None, held_out=4)
    assert [decode(window) for window in windows.tokens] == ["abcd"]
    assert [decode(window) for window in windows.held_out] == ["efgh", "ijkl"]
    assert windows.documents == 1


def test_packing_reads_only_as_many_documents_as_it_needs() -> None:
    def texts() -> Iterator[str]:
        yield from ("abcd", "efgh")
        pytest.fail("a document was read that is not needed")

    windows = sampling.pack(texts(), encode, samples=2, seqlen=4, separator=None)
    assert [decode(window) for window in windows.tokens] == ["abcd", "efgh"]
    assert windows.documents == 2


def test_an_end_token_of_the_tokenizers_own_is_not_doubled() -> None:
    windows = sampling.pack(["ab", "cd"], lambda text: [*encode(text), EOS], samples=1, seqlen=6, separator=EOS)
    assert list(windows.tokens[0]) == [*encode("ab"), EOS, *encode("cd"), EOS]


@given(texts=documents, seed=st.integers(0, 2**40))
def test_shuffling_keeps_every_document_and_hangs_on_the_seed(texts: list[str], seed: int) -> None:
    assert sorted(sampling.shuffled(texts, seed), key=str) == sorted(texts)
    assert list(sampling.shuffled(texts, seed)) == list(sampling.shuffled(texts, seed))


def test_another_seed_is_another_order() -> None:
    texts = [str(number) for number in range(50)]
    assert list(sampling.shuffled(texts, 0)) != list(sampling.shuffled(texts, 1))


@given(parts=st.lists(st.lists(st.text(max_size=3), max_size=4), max_size=5))
def test_joined_parts_read_like_one_list(parts: list[list[str]]) -> None:
    joined = sampling.Joined(parts)
    flat = list(chain.from_iterable(parts))
    assert [joined[index] for index in range(len(joined))] == flat


def test_more_samples_than_any_text_holds_are_refused_soon() -> None:
    texts = ["abcdefghij" * 20_000]
    for samples in (10**5, 10**18, 10**30):
        with pytest.raises(BesaError, match="hold 10526 whole windows"):
            sampling.draw(texts, encode, samples=samples, seqlen=19, seed=0)
        with pytest.raises(BesaError, match="fill 10526 windows"):
            sampling.pack(texts, encode, samples=samples, seqlen=19, separator=None)


def test_packing_asks_for_no_more_tokens_than_it_needs() -> None:
    taken = []

    def endless(_: object) -> Iterator[int]:
        for token in count():
            taken.append(token)
            yield token

    windows = sampling.pack(["first", "second"], endless, samples=3, seqlen=5, separator=EOS)
    assert [list(window) for window in windows.tokens] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert len(taken) == 15
    assert windows.documents == 1
