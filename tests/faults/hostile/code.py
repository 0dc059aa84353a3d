"""Code that a stranger hands over: in a checkpoint, and as a module of the current directory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.hostile.base import FLOAT, PPL, PRUNE_TEXT, SAMPLE
from faults.hostile.frame import RAN, Case, Harm, accepted, either, fine, line, refused, several
from faults.hostile.harms import edited, written
from faults.hostile.models import as_stock

_YES = "y\n" * 9
_COMMANDS = (
    line(*PRUNE_TEXT, answers=_YES),
    line(*PPL, "--model", "m", answers=_YES),
    line(*SAMPLE, answers=_YES),
    line("simulate", "--model", "m", answers=_YES),
    line("quantize", "--model", "m", "--run", "r", *FLOAT, answers=_YES),
    line("show", "m", answers=_YES),
)


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    yield from _checkpoints()
    yield from _modules()


def _source(place: Path) -> str:
    """Python that leaves a mark, and defines what may be asked of it."""
    return f"open({str(place / RAN)!r}, 'w').close()\nclass Mine:\n    pass\ndef generate(*a, **k):\n    pass\n"


def _with_code(changes: dict[str, dict[str, Any]]) -> Harm:
    """Modules in the checkpoint, and files that name them."""

    def harm(place: Path) -> None:
        for name in (
            "modeling_mine.py",
            "configuration_mine.py",
            "tokenization_mine.py",
            "custom_generate/generate.py",
        ):
            written(f"m/{name}", _source(place))(place)
        for name, change in changes.items():
            edited(f"m/{name}", **change)(place)

    return harm


_MODEL = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
_TOKENIZER = {"AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.Mine"]}
_UNKNOWN = {"model_type": "mine", "auto_map": _MODEL}
_CHECKPOINTS: dict[str, tuple[bool, dict[str, dict[str, Any]]]] = {  # whether it has to be refused
    "an unknown type": (True, {"config.json": _UNKNOWN}),
    "an unknown type that trusts itself": (True, {"config.json": _UNKNOWN | {"trust_remote_code": True}}),
    "an unknown type of another repository": (
        True,
        {"config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "org/other--configuration_mine.Mine"}}},
    ),
    "a known type": (False, {"config.json": {"auto_map": _MODEL}}),
    "a known type that trusts itself": (False, {"config.json": {"auto_map": _MODEL, "trust_remote_code": True}}),
    "no type": (True, {"config.json": {"model_type": None, "auto_map": _MODEL}}),
    "a tokenizer": (False, {"tokenizer_config.json": {"auto_map": _TOKENIZER}}),
    "a tokenizer of a class of its own": (
        False,
        {"tokenizer_config.json": {"auto_map": _TOKENIZER, "tokenizer_class": "Mine", "trust_remote_code": True}},
    ),
    "a tokenizer that config.json names": (False, {"config.json": {"auto_map": _TOKENIZER}}),
    "generation": (False, {"generation_config.json": {"custom_generate": "m", "trust_remote_code": True}}),
    "a processor": (False, {"processor_config.json": {"auto_map": {"AutoProcessor": "modeling_mine.Mine"}}}),
    "a quantizer": (True, {"config.json": {"quantization_config": {"quant_method": "mine", "auto_map": _MODEL}}}),
    "attention from the hub": (False, {"config.json": {"_attn_implementation": "org/mine", "use_kernels": True}}),
}


def _checkpoints() -> Iterator[Case]:
    for name, (refuses, changes) in _CHECKPOINTS.items():
        for each in _COMMANDS if refuses else _COMMANDS[:3]:
            command = " ".join(each.words[:2])
            expect = either(as_stock if command == "eval ppl" else fine)
            if refuses and each.words[0] not in ("show", "simulate"):  # which count zeros, whatever the model is
                expect = refused()
            harm = {f"{name}: {command}": _with_code(changes)}
            yield from several("code in a checkpoint", harm, each, expect=expect)


def _module(name: str) -> Harm:
    """A module in the current directory, and an experiment."""
    experiment = "run: r\nprune:\n  model: m\n  method: magnitude\n  data: rows.jsonl\n  samples: 2\n  seqlen: 16\n"

    def harm(place: Path) -> None:
        (place / f"{name}.py").write_text(_source(place))
        (place / "e.yaml").write_text(experiment)

    return harm


def _modules() -> Iterator[Case]:
    """Modules of the current directory that are named as those of libraries, beside commands that start processes."""
    kind = "modules of the current directory"
    names = ("pip", "yaml", "torch", "random", "numpy", "besa_cli", "sitecustomize", "typer", "encodings")
    ran = {f"{name}: run": _module(name) for name in names}
    yield from several(kind, ran, line("run", "e.yaml"), expect=accepted())
    fetched = {f"{name}: the demo model's first fetch": _module(name) for name in ("pip", "random")}
    yield from several(kind, fetched, line("prune", "--method", "magnitude", "--run", "r"), expect=refused())
