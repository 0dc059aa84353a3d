"""Conversion of a Hugging Face tokenizer to llama.cpp's terms: tokens, their kinds, merges, and word splitting.

The source is the tokenizer that stock transformers loads, serialized in the format of tokenizer.json.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGUFWriter, SpecialVocab, TokenType

from besa_cli.errors import BesaError
from besa_cli.exporters.gguf import pairs
from besa_cli.models import Model
from besa_cli.models.gguf.splits import WAYS, Step
from besa_cli.models.tokenizer import tokenizer_of
from besa_cli.system import disk
from besa_cli.system.disk import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WRITTEN = ("gpt-2", "smollm", "llama-bpe")
_REMEDY = "export as hf, and convert that with llama.cpp's own script"
_BLANK = "▁"  # represents a space
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
_NO_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens of a model, one for each row of the embedding, and the rules of its tokenizer.

    Attributes
    ----------
    model : str
        ``gpt2``: merges pairs of bytes; ``llama``: merges pairs of characters, with bytes for unknown characters.
    pre : str
        llama.cpp's name for the rule that splits words.
    tokens : list of str
    kinds : list of int
        The `TokenType` of each token.
    scores : list of float
        For ``llama``: pairs that form a token of a higher score are merged earlier; empty for ``gpt2``.
    prefixed : bool
        True if the tokenizer adds a space before a text.
    framed : dict
        ``bos``: True if that token is added before a text; ``eos``: True if that token is added after it.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    prefixed: bool
    framed: dict[str, bool]

    def add_to(self, writer: GGUFWriter, directory: Path) -> None:
        """Write the vocabulary, with merges, special tokens and chat template as read by the gguf package."""
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
    """Read the tokenizer of a checkpoint directory, for a model with `size` embeddings.

    Raises
    ------
    BesaError
        There is no tokenizer, or llama.cpp would tokenize some texts differently.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise BesaError(f"{directory} has no tokenizer.json, which a GGUF file needs", _REMEDY)
    stock = _stock(directory, path)
    content = disk.parse_json(stock.backend_tokenizer.to_str(), path)
    model = content["model"]
    if model.get("type") != "BPE":
        raise BesaError(f"{path} is a tokenizer of kind {model.get('type')}, not BPE", _REMEDY)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise BesaError(f"{path} has {key} {model[key]!r}, which llama.cpp does not support", _REMEDY)
    added = {int(token["id"]): token for token in content.get("added_tokens", [])}
    _require_plain(added, path)
    names = {int(number): token for token, number in model["vocab"].items()}
    names |= {number: str(token["content"]) for number, token in added.items()}
    if names and max(names) >= size:
        raise BesaError(f"{path} has the token id {max(names)}, the model has {size} embeddings", _REMEDY)
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    byte_fallback = bool(model.get("byte_fallback"))
    kinds = [_kind(number, names, added, model, byte_fallback) for number in range(size)]
    framed = _frame(stock, path)
    if byte_fallback:
        pairs.require_bytes({f"<0x{byte:02X}>" for byte in range(256)}, model["vocab"], path)
        scores, prefixed = pairs.scores(tokens, model, set(added), path), _prefixed(content, path)
        return Vocabulary(
            model="llama", pre="default", tokens=tokens, kinds=kinds, scores=scores, prefixed=prefixed, framed=framed
        )
    pre = _split(content, path)
    pairs.require_bytes(set(pairs.alphabet()), model["vocab"], path)
    if bool(model.get("ignore_merges")) != WAYS[pre].whole_words:
        pairs.require_reached(model, path)
    return Vocabulary(model="gpt2", pre=pre, tokens=tokens, kinds=kinds, scores=[], prefixed=False, framed=framed)


def _stock(directory: Path, path: Path) -> "PreTrainedTokenizerFast":
    import transformers

    tokenizer = tokenizer_of(Model(name=str(directory), kind="local", directory=directory, revision=None))
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        raise BesaError(
            f"{path} is read by {type(tokenizer).__name__}, which has no tokenizer.json of its own", _REMEDY
        )
    return tokenizer


def _require_plain(added: Mapping[int, Json], path: Path) -> None:
    """Refuse added tokens that strip spaces or match only whole words."""
    for token in added.values():
        for key in ("lstrip", "rstrip", "single_word"):
            if token.get(key):
                raise BesaError(
                    f"{path} has {token['content']!r} with {key}, which llama.cpp does not support", _REMEDY
                )


def _frame(stock: "PreTrainedTokenizerFast", path: Path) -> dict[str, bool]:
    """Return which of ``bos`` and ``eos`` stock transformers adds to a text."""
    plain, framed = (list(stock("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    for before in ([], [stock.bos_token_id]):
        for after in ([], [stock.eos_token_id]):
            if framed == [*before, *plain, *after]:
                return {"bos": bool(before), "eos": bool(after)}
    raise BesaError(f"{path} adds other tokens to a text than bos before it and eos after it", _REMEDY)


def _kind(
    number: int,
    names: Mapping[int, str],
    added: Mapping[int, Json],
    model: Json,
    byte_fallback: bool,
) -> int:
    if number not in names:
        return int(TokenType.UNUSED)
    token = names[number]
    if byte_fallback and token == model.get("unk_token"):
        return int(TokenType.UNKNOWN)
    if number in added:
        return int(TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED)
    if byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int(TokenType.BYTE)
    return int(TokenType.NORMAL)


def _steps(stage: Json | None, inner: str) -> list[Json]:
    """List the steps of a normalizer or pre-tokenizer, with sequences flattened."""
    if not stage:
        return []
    if stage.get("type") != "Sequence":
        return [stage]
    return [step for part in stage.get(inner, []) for step in _steps(part, inner)]


def _prefixed(content: Json, path: Path) -> bool:
    """Return True if the tokenizer adds a space before a text; refuse any other normalization or splitting."""
    normalizers = _steps(content.get("normalizer"), "normalizers")
    splits = [step for step in _steps(content.get("pre_tokenizer"), "pretokenizers") if step != _NO_SPACES]
    prepend = {"type": "Prepend", "prepend": _BLANK}
    if normalizers in ([_SPACES], [prepend, _SPACES]) and not splits:
        return prepend in normalizers
    if not normalizers and len(splits) == 1:
        step = splits[0]
        within = any(_BLANK in "".join(pairs.parts(pair))[1:] for pair in content["model"]["merges"])
        if step.get("type") == "Metaspace" and step.get("replacement") == _BLANK and not (step.get("split") and within):
            return step.get("prepend_scheme") in ("always", "first")
    steps = json.dumps([*normalizers, *splits])[:160]
    raise BesaError(
        f"{path} normalizes or splits texts in a way that llama.cpp does not support for such tokens: {steps}",
        _REMEDY,
    )


def _split(content: Json, path: Path) -> str:
    """Return llama.cpp's name for the rule by which a byte-level tokenizer splits words."""
    steps = tuple(_named_steps(content))
    pre = next((name for name in _WRITTEN if WAYS[name].steps == steps), None)
    if pre is None or _steps(content.get("normalizer"), "normalizers"):
        text = json.dumps(content.get("pre_tokenizer"))[:120]
        raise BesaError(f"{path} splits words by a rule without a known name in llama.cpp: {text}", _REMEDY)
    return pre


def _named_steps(content: Json) -> Iterator[Step | tuple[str, None]]:
    """Yield the type and the distinguishing setting of each step; None, which matches nothing, for unusual ones."""
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        kind = str(step.get("type"))
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            yield kind, bool(step.get("use_regex", True))
        elif kind == "Digits":
            yield kind, bool(step.get("individual_digits"))
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            yield kind, str(step.get("pattern", {}).get("Regex"))
        else:
            yield kind, None
