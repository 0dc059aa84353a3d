"""GGUF files: counts, every metadata key, tensors, cuts, and keys that change what is computed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from faults.hostile import gguf_file
from faults.hostile.base import GGUF, PPL, put_gguf
from faults.hostile.frame import Case, Expectation, Judged, accepted, either, line, refused
from faults.hostile.gguf_file import ARRAY, FLOAT32, INT32, TEXT, UINT32, Gguf, Tensor, Value

_MEASURED = line(*PPL, "--model", GGUF)
_NEAR = 1e-4
# What another value of these changes by right, where it is a value at all.
_FREE = ("rope.freq_base", "rms_epsilon", "tokenizer.", "context_length")

Change = Callable[[Gguf], bytes]


def cases(base: Path) -> Iterator[Case]:
    """All of them; `base` is the material that they begin from."""
    whole = gguf_file.read(base.parent / GGUF)
    yield _case("GGUF: as it is", "unharmed", Gguf.bytes, accepted(as_whole))
    for key, value in whole.values.items():
        for name, other in gguf_file.wrong_values(value):
            check = _finite if any(part in key for part in _FREE) else as_whole
            yield _case("GGUF: a metadata key", f"{key} {name}", _with({key: other}), either(check, GGUF))
    for name, keys in _TOLD.items():
        yield _case("GGUF: a key that changes the result", name, _with(keys), either(_used, GGUF, next(iter(keys))))
    for name, keys in _HARMLESS.items():
        yield _case("GGUF: a key that changes nothing", name, _with(keys), accepted(as_whole))
    for name, change in {**_COUNTS, **_CUTS}.items():
        yield _case("GGUF: header and length", name, change, refused(GGUF))
    for name, change in _tensors().items():
        yield _case("GGUF: a tensor", name, change, refused(GGUF))
    yield _case("GGUF: a tensor", "rotary factors of one", _more("rope_freqs.weight", 6), either(as_whole, GGUF))
    renamed = _with({"general.architecture": (TEXT, "wondrous")})
    yield _case("GGUF: a key that changes the result", "another architecture", renamed, refused(GGUF, "wondrous"))


def _case(kind: str, name: str, change: Change, expect: Expectation) -> Case:
    def harm(place: Path) -> None:
        path = put_gguf(place)
        path.write_bytes(change(gguf_file.read(path)))

    return Case(kind=kind, name=name, harm=harm, lines=(_MEASURED,), expect=expect)


def _perplexity(judged: Judged) -> float:
    found = json.loads(judged.seen[-1].out)["results"][0]["perplexity"]
    return float("nan") if found is None else float(found)


def as_whole(judged: Judged) -> str:
    """The perplexity is that of the file without harm."""
    found, whole = _perplexity(judged), judged.whole.gguf
    return "" if abs(found - whole) <= _NEAR * whole else f"perplexity {found}, without harm {whole}"


def _used(judged: Judged) -> str:
    """What the key says was used: the perplexity is another."""
    return "" if as_whole(judged) and not _finite(judged) else "the key was not used"


def _finite(judged: Judged) -> str:
    found = _perplexity(judged)
    return "" if 0 < found < 1e30 else f"perplexity {found}"


def _with(changes: dict[str, Value | None]) -> Change:
    """Other values under some keys."""

    def change(whole: Gguf) -> bytes:
        values = {**whole.values, **changes}
        return replace(whole, values={key: value for key, value in values.items() if value is not None}).bytes()

    return change


_TOLD: dict[str, dict[str, Value | None]] = {
    "linear rotary scaling": {"llama.rope.scaling.type": (TEXT, "linear"), "llama.rope.scaling.factor": (FLOAT32, 4.0)},
    "linear rotary scaling, as it was written first": {"llama.rope.scale_linear": (FLOAT32, 4.0)},
    "yarn": {
        "llama.rope.scaling.type": (TEXT, "yarn"),
        "llama.rope.scaling.factor": (FLOAT32, 4.0),
        "llama.rope.scaling.original_context_length": (UINT32, 16),
    },
    "longrope": {"llama.rope.scaling.type": (TEXT, "longrope"), "llama.rope.scaling.factor": (FLOAT32, 4.0)},
    "an attention factor": {"llama.rope.scaling.attn_factor": (FLOAT32, 2.0)},
    "a rotary base of 500": {"llama.rope.freq_base": (FLOAT32, 500.0)},
    "half of a head turned": {"llama.rope.dimension_count": (UINT32, 6)},
    "a sliding window": {"llama.attention.sliding_window": (UINT32, 4)},
    "a soft cap of attention": {"llama.attn_logit_softcapping": (FLOAT32, 0.5)},
    "a soft cap of the logits": {"llama.final_logit_softcapping": (FLOAT32, 0.5)},
    "an attention scale": {"llama.attention.scale": (FLOAT32, 0.01)},
    "a logit scale": {"llama.logit_scale": (FLOAT32, 0.5)},
    "an embedding scale": {"llama.embedding_scale": (FLOAT32, 3.0)},
    "a residual scale": {"llama.residual_scale": (FLOAT32, 0.3)},
    "a parallel residual": {"llama.use_parallel_residual": (gguf_file.BOOL, True)},
    "experts": {"llama.expert_count": (UINT32, 8), "llama.expert_used_count": (UINT32, 2)},
    "attention that is not causal": {"llama.attention.causal": (gguf_file.BOOL, False)},
    "clamped queries": {"llama.attention.clamp_kqv": (FLOAT32, 0.01)},
    "an ALiBi bias": {"llama.attention.max_alibi_bias": (FLOAT32, 8.0)},
    "a norm by mean and variance": {"llama.attention.layer_norm_epsilon": (FLOAT32, 1e-5)},
    "values of another length": {"llama.attention.value_length": (UINT32, 8)},
    "a key that nobody knows": {"llama.secret.scale": (FLOAT32, 2.0)},
    "the first of two parts": {"split.count": (INT32, 2), "split.no": (INT32, 0)},
    "an adapter": {"adapter.type": (TEXT, "lora")},
    "a word splitting that nobody knows": {"tokenizer.ggml.pre": (TEXT, "wondrous")},
    "a tokenizer model that nobody knows": {"tokenizer.ggml.model": (TEXT, "wondrous")},
    "a kind of file that is no model": {"general.type": (TEXT, "mmproj")},
}
_HARMLESS: dict[str, dict[str, Value | None]] = {
    "a name": {"general.name": (TEXT, "\x1b[2J")},
    "an author and a licence": {"general.author": (TEXT, "A."), "general.license": (TEXT, "mit")},
    "tags": {"general.tags": (ARRAY, (TEXT, ["a", "b"]))},
    "no scaling": {"llama.rope.scaling.type": (TEXT, "none")},
    "a version of the quantization": {"general.quantization_version": (UINT32, 2)},
    "one part of one": {"split.count": (INT32, 1), "split.no": (INT32, 0)},
}


def _version(number: int) -> Change:
    return lambda whole: replace(whole, version=number).bytes()


def _cut(length: int) -> Change:
    return lambda whole: whole.bytes()[:length]


_COUNTS: dict[str, Change] = {
    **{f"version {number}": _version(number) for number in (0, 1, 4, 2**31, 0x03000000)},
    **{
        f"{number} keys": lambda whole, number=number: whole.bytes(values=number)  # type: ignore[misc]
        for number in (0, 1, 40, 10**6, 2**63, 2**64 - 1)
    },
    **{
        f"{number} tensors": lambda whole, number=number: whole.bytes(tensors=number)  # type: ignore[misc]
        for number in (0, 1, 40, 10**6, 2**63, 2**64 - 1)
    },
    "the other byte order": lambda whole: whole.bytes()[:4] + whole.bytes()[4:8][::-1] + whole.bytes()[8:],
    "another magic": lambda whole: b"GGML" + whole.bytes()[4:],
    **{
        f"an alignment of {number}": _with({"general.alignment": (UINT32, number)}) for number in (0, 1, 7, 4096, 2**31)
    },
    "an alignment that is a text": _with({"general.alignment": (TEXT, "32")}),
}
_CUTS = {
    **{f"cut after {length} bytes": _cut(length) for length in (0, 3, 4, 8, 20, 24, 100, 3000, 9000, -1, -4096)},
    "all zeros behind the header": lambda whole: whole.bytes()[:24] + b"\0" * 9000,
}
_Q = "blk.0.attn_q.weight"
_NORM = "blk.0.attn_norm.weight"


def _edit(name: str, **changes: object) -> Change:
    def change(whole: Gguf) -> bytes:
        entry = replace(whole.tensors[name], **changes)  # type: ignore[arg-type]
        return replace(whole, tensors={**whole.tensors, name: entry}).bytes()

    return change


def _named(change: Callable[[str], str | None]) -> Change:
    """Other names; None leaves a tensor out."""

    def renamed(whole: Gguf) -> bytes:
        found = {change(name): tensor for name, tensor in whole.tensors.items()}
        return replace(whole, tensors={name: tensor for name, tensor in found.items() if name is not None}).bytes()

    return renamed


def _more(name: str, size: int) -> Change:
    """A tensor of ones more."""

    def change(whole: Gguf) -> bytes:
        start = -(-len(whole.data) // 32) * 32
        data = whole.data.ljust(start, b"\0") + b"\0\0\x80\x3f" * size
        return replace(
            whole, tensors={**whole.tensors, name: Tensor(dims=[size], kind=0, offset=start)}, data=data
        ).bytes()

    return change


def _tensors() -> dict[str, Change]:
    return {
        **{f"of type {kind}": _edit(_Q, kind=kind) for kind in (0, 3, 4, 5, 36, 99, 2**31)},
        **{
            f"of the shape {dims}": _edit(_Q, dims=dims)
            for dims in ([], [0], [64], [48, 64, 1], [64, 47], [2**63, 2], [2**32, 2**32], [1] * 9, [2**64 - 1])
        },
        **{f"at {offset}": _edit(_Q, offset=offset) for offset in (1, 2**40, 2**63, 2**64 - 64)},
        "left out": _named(lambda name: None if name == _Q else name),
        "a norm left out": _named(lambda name: None if name == _NORM else name),
        "of a third block": _named(lambda name: name.replace("blk.1.", "blk.2.")),
        "with control characters in its name": _named(lambda name: "\x1b[2J" if name == _Q else name),
        "with an empty name": _named(lambda name: "" if name == _Q else name),
        "with a name of 10^6 letters": _named(lambda name: "a" * 10**6 if name == _Q else name),
        "NaN": lambda whole: replace(whole, data=b"\xff\x7f" * (len(whole.data) // 2)).bytes(),
        "a bias that the model lacks": _more("blk.0.attn_q.bias", 48),
        "an MLP's bias": _more("blk.0.ffn_up.bias", 54),
        "a head's bias": _more("output.bias", 272),
        "a norm of queries": _more("blk.0.attn_q_norm.weight", 12),
        "unknown": _more("blk.0.secret.weight", 8),
    }
