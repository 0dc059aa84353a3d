"""A Hugging Face tokenizer in the terms of llama.cpp: its tokens, their kinds, its merges, how it splits words.

What is read is the tokenizer that everything else here is measured with, in the words of tokenizer.json.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from besa_cli.errors import BesaError
from besa_cli.exporters.gguf import pairs
from besa_cli.models import Model
from besa_cli.models.gguf.splits import WAYS, Step
from besa_cli.models.tokenizer import tokenizer_of
from besa_cli.system import disk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WRITTEN = ("gpt-2", "smollm", "llama-bpe")
_ELSEWISE = "export as hf, and convert that with llama.cpp's own script"
_BLANK = "▁"  # stands for a space
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
_NO_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


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
    prefixed : bool
        A text is read as if a space stood before it.
    framed : dict
        Whether a text gets the token ``bos`` before it, and ``eos`` after it.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    prefixed: bool
    framed: dict[str, bool]

    def add_to(self, writer: GGUFWriter, directory: Path) -> None:
        """Write it, with merges, special tokens and chat template as the gguf package reads them."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_add_space_prefix(self.prefixed)
        special = SpecialVocab(directory, load_merges=self.model == "gpt2", n_vocab=len(self.tokens))
        special.add_special_token.update(self.framed)
        special.add_to_gguf(writer, quiet=True)


def read(directory: Path, size: int) -> Vocabulary:
    """The tokenizer of a checkpoint directory, for a model with `size` embeddings.

    Raises
    ------
    BesaError
        There is none, or llama.cpp would read texts otherwise than it.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise BesaError(f"{directory} has no tokenizer.json, which a GGUF file needs", _ELSEWISE)
    stock = _stock(directory, path)
    facts = disk.parse_json(stock.backend_tokenizer.to_str(), path)
    model = facts["model"]
    if model.get("type") != "BPE":
        raise BesaError(f"{path} is a tokenizer of kind {model.get('type')}, not BPE", _ELSEWISE)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise BesaError(f"{path} has {key} {model[key]!r}, which llama.cpp has not", _ELSEWISE)
    added = {int(token["id"]): token for token in facts.get("added_tokens", [])}
    _require_bare(added, path)
    names = {int(number): token for token, number in model["vocab"].items()}
    names |= {number: str(token["content"]) for number, token in added.items()}
    if names and max(names) >= size:
        raise BesaError(f"{path} has the token id {max(names)}, the model has {size} embeddings", _ELSEWISE)
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    plain = bool(model.get("byte_fallback"))
    kinds = [_kind(number, names, added, model, plain) for number in range(size)]
    framed = _frame(stock, path)
    if plain:
        pairs.require_bytes({f"<0x{byte:02X}>" for byte in range(256)}, model["vocab"], path)
        scores, prefixed = pairs.scores(tokens, model, set(added), path), _prefixed(facts, path)
        return Vocabulary(
            model="llama", pre="default", tokens=tokens, kinds=kinds, scores=scores, prefixed=prefixed, framed=framed
        )
    pre = _split(facts, path)
    pairs.require_bytes(set(pairs.alphabet()), model["vocab"], path)
    if bool(model.get("ignore_merges")) != WAYS[pre].whole_words:
        pairs.require_reached(model, path)
    return Vocabulary(model="gpt2", pre=pre, tokens=tokens, kinds=kinds, scores=[], prefixed=False, framed=framed)


def _stock(directory: Path, path: Path) -> "PreTrainedTokenizerFast":
    import transformers

    found = tokenizer_of(Model(name=str(directory), kind="local", directory=directory, revision=None))
    if not isinstance(found, transformers.PreTrainedTokenizerFast):
        raise BesaError(f"{path} is read by {type(found).__name__}, which has no tokenizer.json of its own", _ELSEWISE)
    return found


def _require_bare(added: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    for token in added.values():
        for key in ("lstrip", "rstrip", "single_word"):
            if token.get(key):
                raise BesaError(f"{path} has {token['content']!r} with {key}, which llama.cpp has not", _ELSEWISE)


def _frame(stock: "PreTrainedTokenizerFast", path: Path) -> dict[str, bool]:
    """Which of the two tokens stock transformers puts around a text."""
    plain, framed = (list(stock("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for before in ([], [stock.bos_token_id]):
        for after in ([], [stock.eos_token_id]):
            if framed == [*before, *plain, *after]:
                return {"bos": bool(before), "eos": bool(after)}
    raise BesaError(f"{path} puts other tokens around a text than the first and the last", _ELSEWISE)


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


def _steps(stage: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences resolved."""
    if not stage:
        return []
    if stage.get("type") != "Sequence":
        return [stage]
    return [step for part in stage.get(inner, []) for step in _steps(part, inner)]


def _prefixed(facts: Mapping[str, Any], path: Path) -> bool:
    """Whether a space is put before a text, by a tokenizer that changes and splits nothing else."""
    normalizers = _steps(facts.get("normalizer"), "normalizers")
    splits = [step for step in _steps(facts.get("pre_tokenizer"), "pretokenizers") if step != _NO_SPACES]
    prepend = {"type": "Prepend", "prepend": _BLANK}
    if normalizers in ([_SPACES], [prepend, _SPACES]) and not splits:
        return prepend in normalizers
    if not normalizers and len(splits) == 1:
        step = splits[0]
        within = any(_BLANK in "".join(pairs.parts(pair))[1:] for pair in facts["model"]["merges"])
        if step.get("type") == "Metaspace" and step.get("replacement") == _BLANK and not (step.get("split") and within):
            return step.get("prepend_scheme") in ("always", "first")
    told = json.dumps([*normalizers, *splits])[:160]
    raise BesaError(
        f"{path} changes or splits texts in a way that llama.cpp has not for such tokens: {told}", _ELSEWISE
    )


def _split(facts: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits words."""
    steps = tuple(_named(facts))
    found = next((name for name in _WRITTEN if WAYS[name].steps == steps), None)
    if found is None or _steps(facts.get("normalizer"), "normalizers"):
        told = json.dumps(facts.get("pre_tokenizer"))[:120]
        raise BesaError(f"{path} splits words in a way that has no name in llama.cpp known here: {told}", _ELSEWISE)
    return found


def _named(facts: Mapping[str, Any]) -> Iterator[Step | tuple[str, None]]:
    """The kind of each step and what tells it from others of its kind; with unusual settings it matches nothing."""
    for step in _steps(facts.get("pre_tokenizer"), "pretokenizers"):
        kind = str(step.get("type"))
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            yield kind, bool(step.get("use_regex", True))
        elif kind == "Digits":
            yield kind, bool(step.get("individual_digits"))
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            yield kind, str(step.get("pattern", {}).get("Regex"))
        else:
            yield kind, None
