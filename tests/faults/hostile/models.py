"""Model directories: every field of every small file, the headers and contents of shards, and what files may be."""

import json
import operator
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from faults.hostile import safe, values
from faults.hostile.base import PPL, PRUNE, PRUNE_TEXT, SAMPLE, stock
from faults.hostile.frame import Case, Harm, Judged, accepted, either, line, refused, several
from faults.hostile.harms import FILES, edited, in_place_of

INDEX = "model.safetensors.index.json"
_MEASURED = (*PPL, "--model", "m")
_NEAR = 1e-3  # relative; float32 in another order of additions


def as_stock(judged: Judged) -> str:
    """A perplexity that was measured is stock transformers' own, or that of the model without harm."""
    found = json.loads(judged.seen[-1].out)["results"][0]["perplexity"]
    right = [stock(judged.place), judged.whole.perplexity]
    if any(each is not None and abs(found - each) <= _NEAR * each for each in right):
        return ""
    return f"perplexity {found}, by stock {right[0]}, without harm {right[1]}"


def as_sampled(judged: Judged) -> str:
    """The sample is the greedy one."""
    return "" if judged.seen[-1].out == judged.whole.sample else f"another sample: {judged.seen[-1].out}"


_PRUNED = (line(*PRUNE), line(*_MEASURED))
_OF_TEXT = "tokenizer|documents"  # what a refusal is about
_PRUNED_TEXT = (line(*PRUNE_TEXT), line(*_MEASURED))


def cases(base: Path) -> Iterator[Case]:
    """All of them; `base` is the material that they begin from."""
    wrong = partial(values.cases, base)
    yield from wrong("m/config.json", "config.json: a field", as_stock, *_PRUNED, said="/m")
    yield from wrong("m/generation_config.json", "generation_config.json: a field", as_sampled, line(*SAMPLE))
    for name in ("m/tokenizer.json", "m/tokenizer_config.json"):
        yield from wrong(name, "tokenizer files: a field", as_stock, *_PRUNED_TEXT, said=_OF_TEXT)
    yield from wrong(f"m/{INDEX}", "index of shards: a field", as_stock, *_PRUNED)
    yield from _tokenizers()
    yield from _generations()
    yield from _indexes()
    yield from _headers()
    yield from _shards()
    yield from _files()


def _tokenized(change: Callable[[dict[str, Any]], object]) -> Harm:
    """Another tokenizer.json."""

    def harm(place: Path) -> None:
        path = place / "m" / "tokenizer.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return harm


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _tokenizers() -> Iterator[Case]:
    """A tokenizer that can be read, and does what no other does."""
    replace = {"type": "Replace", "pattern": {"String": "w"}, "content": "w " * 10_000}
    around = {"Sequence": {"id": "A", "type_id": 0}}
    padding = {
        "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    token = {"id": 200, "content": "w5", "single_word": False, "lstrip": False, "rstrip": False}
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "a letter becomes 10,000": lambda told: told.update(normalizer=replace),
        "each of 20 letters becomes 20": lambda told: told.update(
            normalizer={"type": "Sequence", "normalizers": [{**replace, "content": "w" * 20}] * 6}
        ),
        "the text 5,000 times": lambda told: told["post_processor"].update(single=[around] * 5000),
        "a text of nothing": lambda told: told["post_processor"].update(single=[]),
        "cut after 3 tokens": lambda told: told.update(
            truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        ),
        "padded to 10^9": lambda told: told.update(padding=padding),
        "no words": lambda told: told["model"].update(vocab={"<unk>": 0}),
        "ids beyond the vocabulary": lambda told: told["model"]["vocab"].update(w5=200, w10=10**6),
        "a token more, beyond the vocabulary": lambda told: told["added_tokens"].append(
            {**token, "normalized": False, "special": True}
        ),
        "two words of one id": lambda told: told["model"]["vocab"].update(w5=10),
        "no unknown word": lambda told: told["model"].update(unk_token="none"),
        "a pattern that takes for ever": lambda told: told.update(pre_tokenizer=_split("(w+w+)+x")),
        "a pattern that is broken": lambda told: told.update(pre_tokenizer=_split("((")),
    }
    harms = {name: _tokenized(change) for name, change in changes.items()}
    yield from several("tokenizer files: a behaviour", harms, *_PRUNED_TEXT, expect=either(as_stock, _OF_TEXT))


def _generations() -> Iterator[Case]:
    """Settings that stock's `generate` would follow, though a sample is greedy."""
    settings = {
        "num_beams": 4, "do_sample": True, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "max_length": 3,
        "max_new_tokens": 2, "min_length": 40, "temperature": 0.01, "top_k": 1, "forced_eos_token_id": 2,
        "suppress_tokens": [48], "bad_words_ids": [[48]], "stop_strings": ["w48"], "num_return_sequences": 3,
        "penalty_alpha": 0.6, "assistant_early_exit": 1, "cache_implementation": "quantized", "max_time": 0.0,
        "custom_generate": "mine", "return_dict_in_generate": True, "guidance_scale": 3.0,
    }  # fmt: skip
    harms = {f"{name} {value}": edited("m/generation_config.json", **{name: value}) for name, value in settings.items()}
    yield from several("generation_config.json: a setting", harms, line(*SAMPLE), expect=either(as_sampled))


def _indexed(change: Callable[[dict[str, str]], dict[str, str]]) -> Harm:
    """Another table of the index; a pipe lies beside it."""

    def harm(place: Path) -> None:
        safe.write_index(place / "m", change(safe.index(place / "m")))
        os.mkfifo(place / "m" / "pipe")

    return harm


def _indexes() -> Iterator[Case]:
    """An index that names other files, other tensors, or both twice."""
    first = "model.embed_tokens.weight"
    files = {
        "a file above": "../m2/model.safetensors", "an absolute path": "/etc/passwd", "no file": "", "a directory": ".",
        "a missing file": "model-00009-of-00009.safetensors", "the config": "config.json", "itself": INDEX,
        "a name of 5,000 letters": "a" * 5000, "a NUL": "a\0b", "a pipe": "pipe", "control characters": "\x1b[2Ja",
    }  # fmt: skip
    named = {name: _indexed(operator.methodcaller("__or__", {first: target})) for name, target in files.items()}
    yield from several("index of shards: a name", named, *_PRUNED, expect=refused())
    tables: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
        "a tensor that no shard holds": lambda table: {**table, "model.layers.0.mlp.extra.weight": table[first]},
        "a tensor in another shard": lambda table: {**table, first: table["lm_head.weight"]},
        "a tensor left out": lambda table: {key: value for key, value in table.items() if key != first},
        "nothing": lambda table: {},
        "10^5 tensors": lambda table: {**table, **{f"x.{number}": table[first] for number in range(10**5)}},
    }
    other = {name: _indexed(change) for name, change in tables.items()}
    yield from several("index of shards: a name", other, *_PRUNED, expect=either(as_stock))


def _on_shard(change: Callable[[Path], object]) -> Harm:
    return lambda place: change(safe.shard(place / "m"))


def _headers() -> Iterator[Case]:
    """Headers of a safetensors file that do not describe what is in it."""
    for name, change in safe.HEADERS.items():
        harm = _on_shard(lambda path, change=change: path.write_bytes(change(path.read_bytes())))  # type: ignore[misc]
        expect = either(as_stock) if name in safe.HARMLESS else refused()
        yield from several("safetensors header", {name: harm}, *_PRUNED, expect=expect)


def _shards() -> Iterator[Case]:
    """Shards that are whole, with other tensors than the model needs."""
    for name, change in safe.TENSORS.items():
        expect = accepted(as_stock) if name in safe.UNUSED else either(as_stock)
        yield from several("tensors of a shard", {name: _on_shard(change)}, *_PRUNED, expect=expect)


def _files() -> Iterator[Case]:
    """Something else in the place of each file."""
    lines = (line(*PRUNE_TEXT), line(*_MEASURED), line(*SAMPLE))
    for name in ("config.json", "tokenizer.json", INDEX):
        yield from several("what a file of a model is", in_place_of(f"m/{name}"), *lines, expect=refused())
    for name in ("generation_config.json", "tokenizer_config.json"):
        yield from several("what a file of a model is", in_place_of(f"m/{name}"), *lines, expect=either())
    shards = {f"a shard: {name}": _on_shard(put) for name, put in FILES.items()}
    yield from several("what a file of a model is", shards, *lines, expect=refused())
