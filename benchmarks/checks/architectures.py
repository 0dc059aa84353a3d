"""Check `besa prune` on a tiny random checkpoint of every causal language model that the installed transformers has.

    python -m benchmarks.checks.architectures --work DIR               # every type, and types that read images
    python -m benchmarks.checks.architectures --work DIR mixtral gpt2  # these alone

A checkpoint of a type is made in the form in which the hub has it, from the type's default configuration with the
sizes of ``architectures.json``. It is pruned to one half by Wanda and by BESA, in a process of its own. A type prunes
if names and shapes are the source's, what is not zero has the source's bits, exactly half of what changed is zero, as
the manifest says, stock transformers loads the stage as it loads the source, and its logits are those of the block
stream. One line a type is added to ``benchmarks/results/architectures.jsonl``; docs/models.md has the table.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import re
import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.utils import logging

from benchmarks.results import recorded
from benchmarks.shared import besa_runs
from besa_cli.app import main as besa_main
from besa_cli.decoder.decoder import Decoder

LINES = besa_runs.RESULTS / "architectures.jsonl"
TABLES: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PLAIN = "plain decoders"
METHODS = ("wanda", "besa")
_BLOCKS, _SAMPLES, _SEQLEN = 3, 4, 48
_PER_BLOCK = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")  # lists with an entry for each
_ERROR = 1e-4  # relative error of logits
_SECONDS = 900


def configuration(kind: str) -> Any:
    """The configuration of a tiny model of a type."""
    given = dict(TABLES["images"].get(kind) or TABLES["own"].get(kind, {}))
    cls: Any = CONFIG_MAPPING[kind]
    if kind in TABLES["images"]:
        return cls(**given)
    values = _shrunk(cls)
    for name, part in (getattr(cls, "sub_configs", {}) or {}).items():
        own = given.pop(name, {} if name in ("text_config", "decoder") else None)
        if own is not None:
            known = not isinstance(part, str) and part.__name__ != "AutoConfig"
            values[name] = (_shrunk(part) if known else {}) | own
    return cls(**{name: value for name, value in (values | given).items() if value != "absent"})


def _shrunk(cls: Any) -> dict[str, Any]:
    """The small values of the fields that a configuration has, and its lists, cut to the blocks."""
    names = {field.name for field in dataclasses.fields(cls)}
    values = {name: value for name, value in TABLES["small"].items() if name in names}
    with contextlib.suppress(Exception):  # a configuration that has no defaults
        default = cls()
        for name in names.intersection(_PER_BLOCK):
            entries = getattr(default, name, None)
            if isinstance(entries, list) and entries:
                kinds = list(dict.fromkeys(entries))
                values[name] = [kinds[index % len(kinds)] for index in range(_BLOCKS)]
    return values


def model(kind: str) -> Any:
    """A model with random weights in fp32, whose norms and biases differ from one value to the next, too."""
    torch.manual_seed(0)
    whole = kind in TABLES["images"] or kind in TABLES["stored_whole"]
    auto: Any = AutoModelForImageTextToText if whole else AutoModelForCausalLM
    made = auto.from_config(configuration(kind))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
            else:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    return made.float().eval()


def checked(kind: str, place: Path) -> dict[str, Any]:
    """Make a checkpoint of a type in an empty directory, prune it, and say what became of it."""
    source, rows = saved(kind, place)
    line: dict[str, Any] = {"verdict": "prunes"}
    for method in METHODS:
        failed = failure(place, "--method", method, "--run", place / method)
        if failed:
            return failed
        line |= compared(kind, source, place / method / "pruned", rows)
        if line["verdict"] != "prunes":
            return {**line, "why": f"{method}: {line['why']}"}
    return line


def saved(kind: str, place: Path) -> tuple[Path, Tensor]:
    """Make a checkpoint of a type and its calibration samples; returns its directory and the samples."""
    source = place / "model"
    rows = torch.randint(16, 512, (_SAMPLES, _SEQLEN), generator=torch.Generator().manual_seed(1))
    model(kind).save_pretrained(source)
    _rows_file(place).write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()))
    return source, rows


def _rows_file(place: Path) -> Path:
    return place / "rows.jsonl"


def failure(place: Path, *words: object) -> dict[str, Any]:
    """Prune what `saved` made, with more options; returns the verdict if that fails, else nothing."""
    samples = ["--data", _rows_file(place), "--samples", _SAMPLES, "--seqlen", _SEQLEN]
    code, said = _besa("prune", "--model", place / "model", *samples, "--dtype", "float32", *words)
    if code == 0:
        return {}
    found = [text for text in said.splitlines() if text.startswith("error: ")]
    crashed = not found or "unexpected error" in found[0]
    return {"verdict": "crashes" if crashed else "refused", "why": (found or [said])[0].replace(str(place), "")}


def compared(kind: str, source: Path, stage: Path, rows: Tensor) -> dict[str, Any]:
    """Compare a stage with the source, tensor by tensor, and its logits with those of stock transformers."""
    before, after = tensors(source), tensors(stage)
    counts = json.loads((stage / "besa.json").read_text())["counts"]
    changed = [name for name in before if name in after and not torch.equal(before[name], after[name])]
    zeros, weights = (sum(count(after[name]) for name in changed) for count in (_zeros, Tensor.numel))
    (whole, reading), (pruned, reading_stage) = stock(kind, source), stock(kind, stage)
    with torch.no_grad():
        expected = pruned(input_ids=rows, use_cache=False).logits
    error = float((_streamed(stage, rows) - expected).norm() / expected.norm())
    wrong = {
        "names": before.keys() != after.keys(),
        "survivors": any(
            not torch.equal(after[name], before[name].masked_fill(after[name] == 0, 0)) for name in changed
        ),
        "counts": not zeros == round(weights / 2) == counts["pruned"] or weights != counts["weights"],
        "loading": reading != reading_stage or type(whole) is not type(pruned),
        f"logits ({error:.1g})": not error < _ERROR,
    }
    pruned_names = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in changed})
    verdict = "wrong" if any(wrong.values()) else "prunes"
    why = {"why": ", ".join(name for name, failed in wrong.items() if failed)} if verdict == "wrong" else {}
    return {"verdict": verdict, "class": type(whole).__name__, "pruned": pruned_names, **why}


def _besa(*words: object) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = besa_main([str(word) for word in words])
    return code, said.getvalue()


def tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


def stock(kind: str, directory: Path) -> tuple[Any, dict[str, list[str]]]:
    """The model that transformers alone loads, and what it says of the tensors."""
    auto: Any = AutoModelForImageTextToText if kind in TABLES["images"] else AutoModelForCausalLM
    loaded, said = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    return loaded.eval(), {name: sorted(map(str, values)) for name, values in said.items()}


def _streamed(directory: Path, rows: Tensor) -> Tensor:
    """The logits of a checkpoint, block by block."""
    decoder = Decoder(directory, torch.device("cpu"), torch.float32)
    hidden = decoder.embed(rows)
    with torch.no_grad():
        for index in range(len(decoder)):
            decoder.load(index)
            hidden = decoder.forward(index, hidden, rows)
        return decoder.finish(hidden, rows)


def _report(kind: str, place: Path, check: Callable[[str, Path], dict[str, Any]], results: Any) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        results.put(check(kind, place))
    except Exception as error:  # noqa: BLE001  # whatever a type's code raises while its checkpoint is made
        made = (place / "model" / "config.json").exists()
        why = f"{type(error).__name__}: {error}".replace("\n", " ")[:200] if not made else traceback.format_exc()[-800:]
        results.put({"verdict": "wrong" if made else "not made", "why": why})


def groups() -> dict[str, list[str]]:
    """Group → the types in it, of all that transformers has a causal language model for."""
    named: dict[str, list[str]] = TABLES["groups"]
    others = {kind for kinds in named.values() for kind in kinds}
    return {PLAIN: [kind for kind in CAUSAL if kind not in others], **named}


def table() -> str:
    """The types that prune, by group: at the first recorded commit and at the last."""
    lines = [line for line in besa_runs.read_lines(LINES) if line["type"] in CAUSAL]
    first = {line["type"]: line["verdict"] for line in reversed(lines)}
    last = {line["type"]: line["verdict"] for line in lines}
    rows = ["| what the blocks hold | types | prune: first recorded | now |", "|---|---|---|---|"]
    total = [0, 0, 0]
    for name, kinds in groups().items():
        counts = [len(kinds), *(sum(found.get(kind) == "prunes" for kind in kinds) for found in (first, last))]
        total = [one + other for one, other in zip(total, counts, strict=True)]
        rows.append(f"| {name} | {' | '.join(map(str, counts))} |")
    return "\n".join([*rows, f"| **all** | {' | '.join(f'**{count}**' for count in total)} |"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Check types one after the other, and add a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="all by default")
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints; each goes when it is done")
    given = parser.parse_args(arguments)
    record(given.types or [*CAUSAL, *TABLES["images"]], given.work, checked, LINES, METHODS)


def record(
    kinds: Sequence[str],
    work: Path,
    check: Callable[[str, Path], dict[str, Any]],
    lines: Path,
    methods: Sequence[str],
) -> None:
    """Check types one after the other, each in a process of its own, and add a line for each to a file."""
    context = multiprocessing.get_context("fork")
    for kind in kinds:
        place, results = work / kind, context.Queue()
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        worker = context.Process(target=_report, args=(kind, place, check, results))
        worker.start()
        try:
            found = results.get(timeout=_SECONDS)
        except Exception:  # noqa: BLE001  # the queue's own, which has no name here
            found = {"verdict": "wrong", "why": f"no answer in {_SECONDS} s"}
        worker.kill()
        shutil.rmtree(place, ignore_errors=True)
        line = {"type": kind, **found, "methods": recorded.methods(*methods), "commit": besa_runs.commit()}
        with lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(kind, found["verdict"], found.get("why", ""), flush=True)


if __name__ == "__main__":
    main()
