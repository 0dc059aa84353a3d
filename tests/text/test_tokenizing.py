"""In pieces a text gives the ids that it gives as a whole, whatever the kind of tokenizer; and memory has a bound."""

import random
import resource
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from besa_cli.errors import BesaError
from besa_cli.text import corpora, spool, tokenizing
from besa_cli.text.tokenizing import Encoder

BOOK = corpora.bundled_bytes("adventures_of_sherlock_holmes.txt").decode()
SPECIAL = ["<unk>", "<s>", "</s>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
STARTED = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
ENCLOSED = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])


def trained(made: Tokenizer, trainer: type, **more: Any) -> Tokenizer:
    made.train_from_iterator([BOOK[:60_000]], trainer(special_tokens=SPECIAL, show_progress=False, **more))
    return made


def byte_level(first: Any = None, *, use_regex: bool = True) -> Tokenizer:
    made = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made.pre_tokenizer = last if first is None else pre_tokenizers.Sequence([first, last])
    return trained(made, trainers.BpeTrainer, vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def gpt2() -> Tokenizer:
    made = byte_level()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def llama3() -> Tokenizer:
    """Digits in threes from the left: where a run is cut decides what follows."""
    made = byte_level(pre_tokenizers.Split(Regex(LLAMA3), "isolated"), use_regex=False)
    made.post_processor = STARTED
    return made


def llama2() -> Tokenizer:
    """No words at all: merges could reach across the whole text."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made = trained(made, trainers.BpeTrainer, vocab_size=700)
    made.pre_tokenizer = pre_tokenizers.Sequence([])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.post_processor = STARTED
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return trained(made, trainers.UnigramTrainer, vocab_size=500, unk_token="<unk>")


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made = trained(made, trainers.WordPieceTrainer, vocab_size=600)
    made.post_processor = ENCLOSED
    return made


def words() -> Tokenizer:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3, "of": 4}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


KINDS: tuple[Callable[[], Tokenizer], ...] = (gpt2, llama3, llama2, unigram, word_piece, words)


def fast(made: Tokenizer) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request: pytest.FixtureRequest) -> transformers.PreTrainedTokenizerFast:
    return fast(request.param())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few hundred characters, so that short texts have many joints."""
    for name, size in (("PIECE", 600), ("OVERLAP", 250), ("_MARGIN", 60), ("UNDIVIDED", 1 << 16)):
        monkeypatch.setattr(tokenizing, name, size)


WORDS = [
    "日本",
    "e\u0301",
    "한국",
    "🙂",
    "👩‍👩‍👧",
    "\u200b",
    "ﷺ",
    "\n\n",
    "  ",
    "\t",
    " ",
    "the",
    "1234567",
    "<s>",
    "</s> ",
    "'s",
    "\r\n",
]
RUNS = ["7" * 900, " " * 900, "\n" * 900, "ab" * 500, "x" * 900, "é" * 400]


def mixed(generator: random.Random, count: int) -> str:
    start = generator.randrange(len(BOOK) - 4000)
    odd = "".join(generator.choice(WORDS) for _ in range(count))
    return f"{odd}{BOOK[start : start + 3000]}{generator.choice(RUNS)} {odd[::-1]}{BOOK[start : start + 1000]}"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(8))
def test_pieces_give_the_ids_of_the_whole(tokenizer: transformers.PreTrainedTokenizerFast, seed: int) -> None:
    text = mixed(random.Random(seed), 600)
    assert len(text) > 5 * tokenizing.PIECE
    assert list(Encoder(tokenizer)(text)) == tokenizer(text)["input_ids"]


@settings(deadline=None, max_examples=20)
@given(text=st.lists(st.sampled_from([*WORDS, "Holmes ", "and ", ". ", "a", "%"]), min_size=900, max_size=1800))
def test_odd_texts_give_the_ids_of_the_whole(text: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("PIECE", 600), ("OVERLAP", 250), ("_MARGIN", 60)):
            patch.setattr(tokenizing, name, size)
        for made in MADE:
            assert list(Encoder(made)("".join(text))) == made("".join(text))["input_ids"]


MADE = [fast(kind()) for kind in (llama3, llama2)]


def test_at_the_real_size_of_pieces() -> None:
    tokenizer = MADE[0]
    text = BOOK[: tokenizing.PIECE + 40_000]
    assert list(Encoder(tokenizer)(text)) == tokenizer(text)["input_ids"]
    parts = spool.LongText(lambda: (text[start : start + 7777] for start in range(0, len(text), 7777)))
    assert list(Encoder(tokenizer)(parts)) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("text", ["", "a", "the of"])
def test_short_texts_are_given_to_the_tokenizer_as_they_are(
    tokenizer: transformers.PreTrainedTokenizerFast, text: str
) -> None:
    assert list(Encoder(tokenizer)(text)) == tokenizer(text)["input_ids"]


@pytest.mark.usefixtures("small")
def test_one_word_that_is_longer_than_can_be_held_is_refused() -> None:
    with pytest.raises(BesaError, match="cannot be tokenized in pieces") as caught:
        list(Encoder(fast(words()))("x" * 100_000))
    assert "shorter documents" in caught.value.hint
    assert list(Encoder(fast(words()))("x" * 50_000 + " the")) == [0, 3]


def test_tokens_are_made_only_as_far_as_they_are_asked_for() -> None:
    """A text without an end has a first token."""

    def endless() -> Any:
        while True:
            yield "the of " * 1000

    ids = Encoder(fast(words()))(spool.LongText(endless))
    assert [next(ids) for _ in range(4)] == [3, 4, 3, 4]


def test_a_long_text_takes_no_more_memory_than_a_piece() -> None:
    encoder = Encoder(fast(gpt2()))
    text = spool.LongText(lambda: iter([BOOK] * 4))  # 2.3 million characters: about 700 MB at once
    list(encoder(BOOK[:200_000]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(1 for _ in encoder(text))
    assert count > 500_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # kB


class Slow:
    """A tokenizer written in Python: it tells no places."""

    is_fast = False

    def __call__(self, text: str, *, verbose: bool) -> Mapping[str, Any]:
        assert not verbose
        return {"input_ids": list(text.encode())}


def test_a_tokenizer_that_tells_no_places_is_given_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(Encoder(Slow())("ab" * 1_000_000)) == list(b"ab" * 1_000_000)
    monkeypatch.setattr(tokenizing, "_SLOW", 10)
    with pytest.raises(BesaError, match="has more than 10 characters"):
        Encoder(Slow())("x" * 11)


@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Replace(Regex("."), "a" * 10_000), normalizers.Replace("e", "ab" * 9000)],
    ids=["every letter", "one letter"],
)
def test_a_tokenizer_that_makes_thousands_of_a_letter_is_refused(normalizer: Any) -> None:
    made = words()
    made.normalizer = normalizer
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BesaError, match=r"normalizer makes \d+ characters of"):
        list(Encoder(fast(made))(BOOK))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB


def test_a_tokenizer_that_puts_thousands_of_tokens_around_a_text_is_refused() -> None:
    made = words()
    made.post_processor = processors.TemplateProcessing(single="<s> " * 5000 + "$A", special_tokens=[("<s>", 1)])
    with pytest.raises(BesaError, match="adds 5000 tokens around"):
        Encoder(fast(made))("the")


def test_letters_that_honestly_become_many_are_let_through() -> None:
    made = fast(unigram())
    assert list(Encoder(made)("ﷺ" * 300)) == made("ﷺ" * 300)["input_ids"]  # NFKC makes 18 letters of each


def test_a_tokenizer_whose_pattern_never_ends_is_one_line() -> None:
    made = byte_level(pre_tokenizers.Split(Regex("(a+a+a+)+b"), "isolated"))
    with pytest.raises(BesaError, match=r"cannot read a text with the model's tokenizer: .*Regex search error"):
        list(Encoder(transformers.PreTrainedTokenizerFast(tokenizer_object=made))("a" * 20_000 + " c"))


def test_a_word_that_the_tokenizer_cannot_take_is_one_line() -> None:
    made = Tokenizer(models.WordLevel({"the": 0}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(BesaError, match=r"cannot read a text with the model's tokenizer: .*Missing \[UNK\] token"):
        list(Encoder(fast(made))("the word"))
