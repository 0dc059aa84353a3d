"""The tokenizer of a GGUF file as tokenizer.json: byte-level BPE, or sentencepiece BPE with byte fallback."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from besa_cli.errors import reading
from besa_cli.models.gguf.file_header import Header, refuse
from besa_cli.models.gguf.splits import DEFAULT, WAYS, Step, Way
from besa_cli.system.disk import read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

Entry = TypeVar("Entry", str, int, float)

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_BLANK = "▁"  # stands for a space
_USED = {
    *("model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_eos_token", "add_space_prefix"),
    *(f"{name}_token_id" for name in _NAMED.values()),
}
# Tokens for chat and fill-in-the-middle, and a cleanup of spaces in decoding: no effect on encoding a text.
_NO_EFFECT = {
    *(f"{name}_token_id" for name in ("eot", "eom", "seperator", "sep", "cls", "mask", "prefix", "suffix", "middle")),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *("clean_spaces", "token_type_count", "suppress_tokens"),
}
_DISABLED = {"add_sep_token": False, "remove_extra_whitespaces": False}
_TEMPLATES = "tokenizer.chat_template"


def is_present(header: Header) -> bool:
    """Check that the file holds a tokenizer."""
    return f"{_PREFIX}tokens" in header.fields


def has_unnamed_splitting(header: Header) -> bool:
    """Check for a byte-level tokenizer whose file does not name its word splitting."""
    return header.fields.get(f"{_PREFIX}model") == "gpt2" and f"{_PREFIX}pre" not in header.fields


def save(header: Header, target: Path, *, vocab_size: int, longest: int | None) -> None:
    """Write the tokenizer files into the directory `target`.

    Parameters
    ----------
    header : Header
    target : Path
    vocab_size : int
        Rows of the embedding.
    longest : int or None
        Longest input that the tokenizer states, in tokens.

    Raises
    ------
    BesaError
        The tokenizer's type, its word splitting or one of its keys is unknown, or it is damaged.
    """
    import transformers

    _require_known(header)
    with reading(header.path):
        tokenizer = _tokenizer(header, vocab_size)
        special_tokens = {
            name: tokenizer.id_to_token(number) for name, number in _special_ids(header, vocab_size).items()
        }
        fast_tokenizer: PreTrainedTokenizerFast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, **special_tokens
        )
        template = header.fields.get(_TEMPLATES)
        if template is not None:
            fast_tokenizer.chat_template = (
                template if isinstance(template, str) else refuse(header, _TEMPLATES, "is not a string")
            )
        fast_tokenizer.save_pretrained(target)
    path = target / "tokenizer_config.json"
    config = read_json(path)
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    if longest is not None:
        config["model_max_length"] = longest
    write_json(path, config)


def _require_known(header: Header) -> None:
    for name, value in header.fields.items():
        if not name.startswith("tokenizer.") or name == _TEMPLATES or name.startswith(f"{_TEMPLATES}."):
            continue
        key = name.removeprefix(_PREFIX)
        if name == "tokenizer.chat_templates" or (name.startswith(_PREFIX) and key in _USED | _NO_EFFECT):
            continue
        if not name.startswith(_PREFIX) or key not in _DISABLED or value != _DISABLED[key]:
            refuse(header, name, f"is {value!r:.40}, which is unknown to besa")


def _special_ids(header: Header, vocab_size: int) -> dict[str, int]:
    """Read the ids of the special tokens that the file names."""
    ids = {}
    for name, key in _NAMED.items():
        value = header.fields.get(f"{_PREFIX}{key}_token_id")
        if value is not None:
            if not isinstance(value, int) or not 0 <= value < vocab_size:
                refuse(header, f"{_PREFIX}{key}_token_id", f"is {value!r:.80}, not one of {vocab_size} tokens")
            ids[name] = value
    return ids


def _tokenizer(header: Header, vocab_size: int) -> "Tokenizer":
    tokens = _entries(header, "tokens", str)
    if len(tokens) != vocab_size or len(set(tokens)) != vocab_size:
        refuse(
            header, f"{_PREFIX}tokens", f"has {len(set(tokens))} different tokens, but the embedding has {vocab_size}"
        )
    kind = _text(header, "model", "")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(header, tokens)
    elif kind == "llama":
        tokenizer, add_bos = _sentencepiece(header, tokens), True
    else:
        refuse(header, f"{_PREFIX}model", f"is '{kind:.40}'; besa reads gpt2 and llama")
    _add_special(header, tokenizer, tokens)
    _add_frame(header, tokenizer, add_bos)
    return tokenizer


def _entries(header: Header, key: str, kind: type[Entry], *, count: int | None = None) -> list[Entry]:
    """Read an array of the tokenizer; empty if it is missing."""
    value = header.fields.get(f"{_PREFIX}{key}", [])
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    entries = list(value) if isinstance(value, Sequence) else []
    if (
        not is_list
        or not all(isinstance(entry, kind) for entry in entries)
        or (entries and count not in (None, len(entries)))
    ):
        refuse(header, f"{_PREFIX}{key}", f"is not a list of {count or 'any number of'} values of type {kind.__name__}")
    return [entry for entry in entries if isinstance(entry, kind)]


def _text(header: Header, key: str, default: str) -> str:
    value = header.fields.get(f"{_PREFIX}{key}", default)
    return value if isinstance(value, str) else refuse(header, f"{_PREFIX}{key}", f"is {value!r:.80}, not a string")


def _flag(header: Header, key: str, default: bool) -> bool:
    value = header.fields.get(f"{_PREFIX}{key}", default)
    if not isinstance(value, bool):
        refuse(header, f"{_PREFIX}{key}", f"is {value!r:.80}, not true or false")
    return value


def _byte_level(header: Header, tokens: list[str]) -> "tuple[Tokenizer, bool]":
    from tokenizers import Tokenizer, decoders, models, normalizers

    name = _text(header, "pre", DEFAULT)
    if name not in WAYS:
        refuse(header, f"{_PREFIX}pre", f"is '{name:.40}', a word splitting that besa does not know")
    if _flag(header, "add_space_prefix", False):
        refuse(header, f"{_PREFIX}add_space_prefix", "is true for a byte-level tokenizer, which besa does not support")
    way = WAYS[name]
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(ids, _merges(header, ids), ignore_merges=way.whole_words))
    tokenizer.pre_tokenizer = _pre_tokenizer(way)
    if way.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, way.begins


def _pre_tokenizer(way: Way) -> "PreTokenizer":
    from tokenizers import pre_tokenizers

    steps = [_step(step) for step in way.steps]
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _step(step: Step) -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    kind, detail = step
    if kind == "ByteLevel":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(detail))
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=bool(detail))
    if kind == "Punctuation":
        return pre_tokenizers.Punctuation(str(detail))
    return pre_tokenizers.Split(Regex(str(detail)), behavior="isolated")


def _merges(header: Header, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Read the merged pairs in order."""
    pairs = []
    for position, line in enumerate(_entries(header, "merges", str)):
        first, blank, second = line[:1], "", ""
        head, blank, second = line[1:].partition(" ")
        pair = (first + head, second)
        if not blank or not set(pair) <= ids.keys() or "".join(pair) not in ids:
            refuse(
                header,
                f"{_PREFIX}merges",
                f"has at {position} '{line:.40}', which does not merge two tokens into a third",
            )
        pairs.append(pair)
    return pairs


def _sentencepiece(header: Header, tokens: list[str]) -> "Tokenizer":
    """Build a BPE with merges in the order of the scores of their results, and bytes for unknown characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    scores = _entries(header, "scores", float, count=len(tokens))
    if header.architecture.startswith("gemma"):  # merges follow the order of the tokens
        tokens = [_BLANK * len(token) if token and not token.strip(" ") else token for token in tokens]
        scores = [float(-number) for number in range(len(tokens))]
    ids = {token: number for number, token in enumerate(tokens)}
    if f"{_PREFIX}merges" in header.fields:
        merges = _merges(header, ids)
    elif scores:
        merges = generate_merges(ids, dict(zip(tokens, scores, strict=True)))
    else:
        refuse(header, f"{_PREFIX}scores", "is missing, and so are the merges")
    unknown = _special_ids(header, len(tokens)).get("unk_token")
    name = None if unknown is None else tokens[unknown]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=name, fuse_unk=True, byte_fallback=True))
    add_prefix = _flag(header, "add_space_prefix", True)
    prefix = [normalizers.Prepend(_BLANK)] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _BLANK)])
    strip = [decoders.Strip(" ", 1, 0)] if add_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _add_special(header: Header, tokenizer: "Tokenizer", tokens: list[str]) -> None:
    """Register the tokens that are never split."""
    from tokenizers import AddedToken

    kinds = _entries(header, "token_type", int, count=len(tokens))
    special_ids = set(_special_ids(header, len(tokens)).values())
    for token_id, token in enumerate(tokens):
        kind = kinds[token_id] if kinds else 0
        if not token or tokenizer.token_to_id(token) != token_id:  # runs of spaces, which have another spelling
            continue
        if kind == _CONTROL or token_id in special_ids:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _add_frame(header: Header, tokenizer: "Tokenizer", add_bos: bool) -> None:
    """Add the special tokens before and after each text."""
    from tokenizers import processors

    ids = _special_ids(header, tokenizer.get_vocab_size())
    has_bos = "bos_token" in ids and _flag(header, "add_bos_token", add_bos)
    has_eos = "eos_token" in ids and _flag(header, "add_eos_token", False)
    if not has_bos and not has_eos:
        return
    tokens = {
        name: tokenizer.id_to_token(ids[name])
        for name, present in (("bos_token", has_bos), ("eos_token", has_eos))
        if present
    }
    prefix = [tokens["bos_token"]] if has_bos else []
    suffix = [tokens["eos_token"]] if has_eos else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*prefix, "$A", *suffix],
        pair=[*prefix, "$A", *suffix, *(f"{token}:1" for token in prefix), "$B:1", *(f"{token}:1" for token in suffix)],
        special_tokens=[(token, ids[name]) for name, token in tokens.items()],
    )
