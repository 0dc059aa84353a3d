"""A Hugging Face tokenizer in the terms of llama.cpp: its tokens, their kinds, its merges, how it splits words."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from besa_cli import disk
from besa_cli.errors import BesaError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How words are split: tokenizer.json's words for it -> llama.cpp's name.
_BYTES = ("ByteLevel", False)
_SPLITS: dict[tuple[tuple[object, object], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LLAMA3), _BYTES): "llama-bpe",
}
_ELSEWISE = "export as hf, and convert that with llama.cpp's own script"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens of a model, as many as it has embeddings.

    Attributes
    ----------
    model : str
        ``gpt2``: pairs of bytes; ``llama``: pairs of characters, and bytes for what has no token.
    pre : str
        llama.cpp's name for the way words are split.
    tokens : list of str
    kinds : list of int
        A `TokenType` for each.
    scores : list of float
        Of ``llama``: the higher, the earlier a pair is merged to this token; empty for ``gpt2``.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]

    def add_to(self, writer: GGUFWriter, directory: Path) -> None:
        """Write it, with merges, special tokens and chat template as the gguf package reads them."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores:
            writer.add_token_scores(self.scores)
        special = SpecialVocab(directory, load_merges=self.model == "gpt2", n_vocab=len(self.tokens))
        for name in ("bos", "eos"):
            special.add_special_token.setdefault(name, False)
        special.add_to_gguf(writer, quiet=True)


def read(directory: Path, size: int) -> Vocabulary:
    """The tokenizer of a checkpoint directory, for a model with `size` embeddings.

    Raises
    ------
    BesaError
        There is none, or it is of a kind that this export does not know.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise BesaError(f"{directory} has no tokenizer.json, which a GGUF file needs", _ELSEWISE)
    facts = disk.read_json(path)
    model = facts["model"]
    if model.get("type") != "BPE":
        raise BesaError(f"{path} is a tokenizer of kind {model.get('type')}, not BPE", _ELSEWISE)
    added = {int(token["id"]): token for token in facts.get("added_tokens", [])}
    names = {int(number): token for token, number in model["vocab"].items()}
    names |= {number: str(token["content"]) for number, token in added.items()}
    if names and max(names) >= size:
        raise BesaError(f"{path} has the token id {max(names)}, the model has {size} embeddings", _ELSEWISE)
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    plain = bool(model.get("byte_fallback"))
    kinds = [_kind(number, names, added, model, plain) for number in range(size)]
    if plain:
        return Vocabulary(model="llama", pre="default", tokens=tokens, kinds=kinds, scores=_scores(tokens, model))
    return Vocabulary(model="gpt2", pre=_split(facts, path), tokens=tokens, kinds=kinds, scores=[])


def _kind(
    number: int, names: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any], plain: bool
) -> int:
    if number not in names:
        return int(TokenType.UNUSED)
    token = names[number]
    if plain and token == model.get("unk_token"):
        return int(TokenType.UNKNOWN)
    if number in added:
        return int(TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED)
    if plain and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int(TokenType.BYTE)
    return int(TokenType.NORMAL)


def _scores(tokens: list[str], model: Mapping[str, Any]) -> list[float]:
    """Of each token, minus the rank of the first pair that makes it; what no pair makes comes after all of them."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        parts = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault("".join(parts), rank)
    return [float(-ranks.get(token, len(ranks) + number)) for number, token in enumerate(tokens)]


def _split(facts: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits words."""
    stage = facts.get("pre_tokenizer") or {}
    steps = stage.get("pretokenizers", [stage]) if stage.get("type") == "Sequence" else [stage]
    found = _SPLITS.get(tuple(map(_step, steps)))
    if found is None or facts.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        told = json.dumps(stage)[:120]
        raise BesaError(f"{path} splits words in a way that has no name in llama.cpp known here: {told}", _ELSEWISE)
    return found


def _step(step: Mapping[str, Any]) -> tuple[object, object]:
    """The kind of a step and what tells it from others of its kind; a step with unusual settings matches nothing."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind, bool(step.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(step.get("individual_digits"))
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, step.get("pattern", {}).get("Regex")
    return kind, None
