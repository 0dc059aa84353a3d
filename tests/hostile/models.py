"""Model directories: every field of every small file, the headers and contents of shards, and what files may be."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from hostile import safe, values
from hostile.base import DRAWN, FLOAT, PPL, PRUNE, stock
from hostile.frame import Case, Judged, accepted, either, line, refused

INDEX = "model.safetensors.index.json"
SAMPLE = ("eval", "sample", "w5 w6", "--model", "m", "--tokens", "6", *FLOAT, "--json")
_TEXT = ("--data", "text.txt", *DRAWN[2:])
PRUNE_TEXT = tuple(word for word in PRUNE if word not in DRAWN) + _TEXT
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
_PRUNED_TEXT = (line(*PRUNE_TEXT), line(*_MEASURED))


def cases(base: Path) -> Iterator[Case]:
    """All of them; `base` is the material that they begin from."""
    wrong = partial(values.cases, base)
    yield from wrong("m/config.json", "config.json: a field", as_stock, *_PRUNED)
    yield from wrong("m/generation_config.json", "generation_config.json: a field", as_sampled, line(*SAMPLE))
    for name in ("m/tokenizer.json", "m/tokenizer_config.json"):
        yield from wrong(name, "tokenizer files: a field", as_stock, *_PRUNED_TEXT)
    yield from wrong(f"m/{INDEX}", "index of shards: a field", as_stock, *_PRUNED)
    yield from _generations()
    yield from _indexes()
    yield from _headers()
    yield from _shards()
    yield from _files()


def _edited(name: str, **changes: object) -> Callable[[Path], None]:
    """Change fields of a JSON file."""

    def harm(place: Path) -> None:
        document = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps(document | changes))

    return harm


def _generations() -> Iterator[Case]:
    """Settings that stock's `generate` would follow, though a sample is greedy."""
    for name, value in {
        "num_beams": 4, "do_sample": True, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "max_length": 3,
        "max_new_tokens": 2, "min_length": 40, "temperature": 0.01, "top_k": 1, "forced_eos_token_id": 2,
        "suppress_tokens": [48], "bad_words_ids": [[48]], "stop_strings": ["w48"], "num_return_sequences": 3,
        "penalty_alpha": 0.6, "assistant_early_exit": 1, "cache_implementation": "quantized", "max_time": 0.0,
        "custom_generate": "mine", "return_dict_in_generate": True, "guidance_scale": 3.0,
    }.items():  # fmt: skip
        harm = _edited("m/generation_config.json", **{name: value})
        yield Case(
            kind="generation_config.json: a setting",
            name=f"{name} {value}",
            harm=harm,
            lines=(line(*SAMPLE),),
            expect=either(as_sampled),
        )


def _indexes() -> Iterator[Case]:
    """An index that names other files, other tensors, or both twice."""
    first = "model.embed_tokens.weight"
    for name, target in {
        "a file above": "../m2/model.safetensors", "an absolute path": "/etc/passwd", "no file": "", "a directory": ".",
        "a missing file": "model-00009-of-00009.safetensors", "the config": "config.json", "itself": INDEX,
        "a name of 5,000 letters": "a" * 5000, "a NUL": "a\0b", "a pipe": "pipe", "control characters": "\x1b[2Ja",
    }.items():  # fmt: skip

        def harm(place: Path, target: str = target) -> None:
            safe.write_index(place / "m", {**safe.index(place / "m"), first: target})
            os.mkfifo(place / "m" / "pipe")

        yield Case(kind="index of shards: a name", name=name, harm=harm, lines=_PRUNED, expect=refused())
    for name, change in {
        "a tensor that no shard holds": lambda table: {**table, "model.layers.0.mlp.extra.weight": table[first]},
        "a tensor in another shard": lambda table: {**table, first: table["lm_head.weight"]},
        "a tensor left out": lambda table: {key: value for key, value in table.items() if key != first},
        "nothing": lambda table: {},
        "10^5 tensors": lambda table: {**table, **{f"x.{number}": table[first] for number in range(10**5)}},
    }.items():

        def edit(place: Path, change: Callable[..., dict[str, str]] = change) -> None:
            safe.write_index(place / "m", change(safe.index(place / "m")))

        yield Case(kind="index of shards: a name", name=name, harm=edit, lines=_PRUNED, expect=either(as_stock))


def _headers() -> Iterator[Case]:
    """Headers of a safetensors file that do not describe what is in it."""
    for name, change in safe.HEADERS.items():

        def harm(place: Path, change: Callable[[bytes], bytes] = change) -> None:
            shard = safe.shard(place / "m")
            shard.write_bytes(change(shard.read_bytes()))

        expect = either(as_stock) if name in safe.HARMLESS else refused()
        yield Case(kind="safetensors header", name=name, harm=harm, lines=_PRUNED, expect=expect)


def _shards() -> Iterator[Case]:
    """Shards that are whole, with other tensors than the model needs."""
    for name, change in safe.TENSORS.items():

        def harm(place: Path, change: Callable[[Path], None] = change) -> None:
            change(safe.shard(place / "m"))

        expect = accepted(as_stock) if name in safe.UNUSED else either(as_stock)
        yield Case(kind="tensors of a shard", name=name, harm=harm, lines=_PRUNED, expect=expect)


def _files() -> Iterator[Case]:
    """Something else in the place of each file."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX, "a shard"):
        needed = name not in ("generation_config.json", "tokenizer_config.json")
        for kind, put in FILES.items():

            def harm(place: Path, name: str = name, put: Callable[[Path], None] = put) -> None:
                path = safe.shard(place / "m") if name == "a shard" else place / "m" / name
                put(path)

            yield Case(
                kind="what a file of a model is",
                name=f"{name}: {kind}",
                harm=harm,
                lines=(line(*PRUNE_TEXT), line(*_MEASURED), line(*SAMPLE)),
                expect=refused() if needed else either(),
            )


def _linked(target: str) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return put


def _piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 36)


FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": _piped,
    "a directory": _folder,
    "a link to a device without end": _linked("/dev/zero"),
    "a link to nothing": _linked("nowhere"),
    "a link to itself": lambda path: _linked(path.name)(path),
    "of 64 GB": _sparse,
    "empty": lambda path: path.write_bytes(b"") and None,
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe" + path.read_bytes()[2:]) and None,
    "another program's": lambda path: shutil.copy("/bin/true", path) and None,
    "missing": Path.unlink,
}
