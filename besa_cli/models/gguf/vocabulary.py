"""The tokenizer of a GGUF file as tokenizer.json: pairs of bytes, or pairs of characters with bytes for the rest."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from besa_cli.errors import reading
from besa_cli.models.gguf.file_header import Header, refuse
from besa_cli.models.gguf.splits import UNSAID, WAYS, Step, Way
from besa_cli.system.disk import read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast

Entry = TypeVar("Entry", str, int, float)

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4  # of `tokenizer.ggml.token_type`
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_BLANK = "▁"  # stands for a space
_USED = {
    *("model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_eos_token", "add_space_prefix"),
    *(f"{name}_token_id" for name in _NAMED.values()),
}
# Tokens for chats and for filling gaps, and spaces that only decoding leaves out: a text is read as without them.
_HARMLESS = {
    *(f"{name}_token_id" for name in ("eot", "eom", "seperator", "sep", "cls", "mask", "prefix", "suffix", "middle")),
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *("clean_spaces", "token_type_count", "suppress_tokens"),
}
_WITHOUT = {"add_sep_token": False, "remove_extra_whitespaces": False}
_TEMPLATES = "tokenizer.chat_template"


def has_one(header: Header) -> bool:
    """Whether the file holds a tokenizer."""
    return f"{_PREFIX}tokens" in header.fields


def splits_unsaid(header: Header) -> bool:
    """Whether the tokenizer splits words in a way that the file does not name."""
    return header.fields.get(f"{_PREFIX}model") == "gpt2" and f"{_PREFIX}pre" not in header.fields


def save(header: Header, target: Path, *, words: int, longest: int | None) -> None:
    """Write the tokenizer's files into the directory `target`.

    Parameters
    ----------
    header : Header
    target : Path
    words : int
        Rows of the embedding.
    longest : int or None
        What the tokenizer states as the longest input.

    Raises
    ------
    BesaError
        It is of a kind, splits words in a way, or has a key, that has no counterpart here; or it is damaged.
    """
    import transformers

    _require_known(header)
    with reading(header.path):
        made = _tokenizer(header, words)
        named = {name: made.id_to_token(number) for name, number in _ids(header, words).items()}
        whole: PreTrainedTokenizerFast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named)
        template = header.fields.get(_TEMPLATES)
        if template is not None:
            whole.chat_template = template if isinstance(template, str) else refuse(header, _TEMPLATES, "is not a text")
        whole.save_pretrained(target)
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
        if name == "tokenizer.chat_templates" or (name.startswith(_PREFIX) and key in _USED | _HARMLESS):
            continue
        if not name.startswith(_PREFIX) or key not in _WITHOUT or value != _WITHOUT[key]:
            refuse(header, name, f"is {value!r:.40}, a part of the tokenizer that besa does not know")


def _ids(header: Header, words: int) -> dict[str, int]:
    """The tokens with a role that the file names."""
    found = {}
    for name, key in _NAMED.items():
        value = header.fields.get(f"{_PREFIX}{key}_token_id")
        if value is not None:
            if not isinstance(value, int) or not 0 <= value < words:
                refuse(header, f"{_PREFIX}{key}_token_id", f"is {value!r:.80}, not one of {words} tokens")
            found[name] = value
    return found


def _tokenizer(header: Header, words: int) -> "Tokenizer":
    tokens = _entries(header, "tokens", str)
    if len(tokens) != words or len(set(tokens)) != words:
        refuse(header, f"{_PREFIX}tokens", f"names {len(set(tokens))} tokens, the embedding has {words}")
    kind = _text(header, "model", "")
    if kind == "gpt2":
        made, begins = _byte_level(header, tokens)
    elif kind == "llama":
        made, begins = _characters(header, tokens), True
    else:
        refuse(header, f"{_PREFIX}model", f"is '{kind:.40}'; besa reads gpt2 and llama")
    _add_special(header, made, tokens)
    _frame(header, made, begins)
    return made


def _entries(header: Header, key: str, kind: type[Entry], *, count: int | None = None) -> list[Entry]:
    """An array of the tokenizer; empty if there is none."""
    value = header.fields.get(f"{_PREFIX}{key}", [])
    fits = isinstance(value, Sequence) and not isinstance(value, str)
    found = list(value) if isinstance(value, Sequence) else []
    if not fits or not all(isinstance(entry, kind) for entry in found) or (found and count not in (None, len(found))):
        refuse(header, f"{_PREFIX}{key}", f"is not a list of {count or 'any number of'} values of kind {kind.__name__}")
    return [entry for entry in found if isinstance(entry, kind)]


def _text(header: Header, key: str, default: str) -> str:
    value = header.fields.get(f"{_PREFIX}{key}", default)
    return value if isinstance(value, str) else refuse(header, f"{_PREFIX}{key}", f"is {value!r:.80}, not a text")


def _flag(header: Header, key: str, default: bool) -> bool:
    value = header.fields.get(f"{_PREFIX}{key}", default)
    if not isinstance(value, bool):
        refuse(header, f"{_PREFIX}{key}", f"is {value!r:.80}, not true or false")
    return value


def _byte_level(header: Header, tokens: list[str]) -> "tuple[Tokenizer, bool]":
    from tokenizers import Tokenizer, decoders, models, normalizers

    name = _text(header, "pre", UNSAID)
    if name not in WAYS:
        refuse(header, f"{_PREFIX}pre", f"is '{name:.40}', a way to split words that besa does not know")
    if _flag(header, "add_space_prefix", False):
        refuse(header, f"{_PREFIX}add_space_prefix", "is true for a tokenizer of bytes, which besa does not know")
    way = WAYS[name]
    ids = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(ids, _merges(header, ids), ignore_merges=way.whole_words))
    made.pre_tokenizer = _splitting(way)
    if way.composed:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return made, way.begins


def _splitting(way: Way) -> "PreTokenizer":
    from tokenizers import pre_tokenizers

    made = [_step(step) for step in way.steps]
    return made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)


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
    """The pairs that are joined, in their order."""
    found = []
    for number, line in enumerate(_entries(header, "merges", str)):
        first, blank, second = line[:1], "", ""
        head, blank, second = line[1:].partition(" ")
        pair = (first + head, second)
        if not blank or not set(pair) <= ids.keys() or "".join(pair) not in ids:
            refuse(header, f"{_PREFIX}merges", f"names at {number} '{line:.40}', which joins no two tokens to a third")
        found.append(pair)
    return found


def _characters(header: Header, tokens: list[str]) -> "Tokenizer":
    """As sentencepiece does: pairs in the order of the scores of what they make, and bytes for what has no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    scores = _entries(header, "scores", float, count=len(tokens))
    if header.architecture.startswith("gemma"):  # its scores are not the order of its merges, the tokens' own order is
        tokens = [_BLANK * len(token) if token and not token.strip(" ") else token for token in tokens]
        scores = [float(-number) for number in range(len(tokens))]
    ids = {token: number for number, token in enumerate(tokens)}
    if f"{_PREFIX}merges" in header.fields:
        merges = _merges(header, ids)
    elif scores:
        merges = generate_merges(ids, dict(zip(tokens, scores, strict=True)))
    else:
        refuse(header, f"{_PREFIX}scores", "is missing, and so are merges")
    unknown = _ids(header, len(tokens)).get("unk_token")
    name = None if unknown is None else tokens[unknown]
    made = Tokenizer(models.BPE(ids, merges, unk_token=name, fuse_unk=True, byte_fallback=True))
    prefixed = _flag(header, "add_space_prefix", True)
    prefix = [normalizers.Prepend(_BLANK)] if prefixed else []
    made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _BLANK)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    made.decoder = decoders.Sequence([decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def _add_special(header: Header, made: "Tokenizer", tokens: list[str]) -> None:
    """Tokens that stay whole wherever they stand in a text."""
    from tokenizers import AddedToken

    kinds = _entries(header, "token_type", int, count=len(tokens))
    named = set(_ids(header, len(tokens)).values())
    for number, token in enumerate(tokens):
        kind = kinds[number] if kinds else 0
        if not token or made.token_to_id(token) != number:  # spaces, which are spelled otherwise
            continue
        if kind == _CONTROL or number in named:
            made.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            made.add_tokens([AddedToken(token, normalized=False, special=False)])


def _frame(header: Header, made: "Tokenizer", begins: bool) -> None:
    """What stands before and after each text."""
    from tokenizers import processors

    ids = _ids(header, made.get_vocab_size())
    before = "bos_token" in ids and _flag(header, "add_bos_token", begins)
    after = "eos_token" in ids and _flag(header, "add_eos_token", False)
    if not before and not after:
        return
    used = {
        name: made.id_to_token(ids[name]) for name, wanted in (("bos_token", before), ("eos_token", after)) if wanted
    }
    parts = [used["bos_token"]] if before else []
    ends = [used["eos_token"]] if after else []
    made.post_processor = processors.TemplateProcessing(
        single=[*parts, "$A", *ends],
        pair=[*parts, "$A", *ends, *(f"{part}:1" for part in parts), "$B:1", *(f"{part}:1" for part in ends)],
        special_tokens=[(token, ids[name]) for name, token in used.items()],
    )
