"""Word splitting before byte-pair merges: llama.cpp's names, and the pre-tokenizers of tokenizer.json.

The expressions are those of the models' own tokenizer.json, which llama.cpp follows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Step = tuple[str, str | bool]  # the type of a pre-tokenizer, and its parameter

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_REST}"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ONE, _TWO = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = rf"{_ONE}|{_TWO}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"
_GPT4O = rf"{_ONE}{_CONTRACTION}?|{_TWO}{_CONTRACTION}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_REST}"
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_BYTES: Step = ("ByteLevel", False)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of splitting words, as llama.cpp names it.

    Attributes
    ----------
    steps : tuple of Step
        The pre-tokenizers in order. The parameter of ``ByteLevel`` is whether it splits words as GPT-2 does; of
        ``Digits``, whether each digit is separate; of ``Split`` and ``Punctuation``, the expression or behavior.
    whole_words : bool
        A word that is a token is not split by the merges (``ignore_merges``).
    begins : bool
        Texts begin with the BOS token, unless the file says otherwise.
    composed : bool
        Text is first brought into Unicode normal form C.
    """

    steps: tuple[Step, ...]
    whole_words: bool = False
    begins: bool = False
    composed: bool = False


def _split(expression: str, **more: bool) -> Way:
    return Way(steps=(("Split", expression), _BYTES), **more)


_GPT2 = Way(steps=(("ByteLevel", True),))
_DIGITS = Way(steps=(("Digits", True), ("ByteLevel", True)))
_FALCON = Way(steps=(("Punctuation", "contiguous"), ("ByteLevel", True), ("Split", "[0-9][0-9][0-9]")))
_NAMES: Mapping[str, Way] = {
    "gpt-2 phi-2 mpt olmo jais exaone4 mellum modern-bert gigachat a.x-4.0 trillion": _GPT2,
    "smollm starcoder refact codeshell minerva-7b": _DIGITS,
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": _split(LLAMA3, whole_words=True, begins=True),
    "dbrx smaug-bpe": _split(LLAMA3),
    "qwen2": _split(_QWEN2, composed=True),
    "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open": _split(_QWEN2),
    "qwen35": _split(_QWEN35, composed=True),
    "tekken": _split(_TEKKEN, whole_words=True, begins=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _split(_GPT4O),
    "bloom gpt3-finnish": _split(_BLOOM),
    "falcon": _FALCON,
}
WAYS: Mapping[str, Way] = {name: way for names, way in _NAMES.items() for name in names.split()}
DEFAULT = "gpt-2"  # used for old files, which name none
