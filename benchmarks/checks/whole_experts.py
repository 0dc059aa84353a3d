"""Check `besa prune --experts` on a tiny random checkpoint of every type of transformers that has experts.

    python -m benchmarks.checks.whole_experts --work DIR          # every type
    python -m benchmarks.checks.whole_experts --work DIR mixtral  # these alone

A quarter of the experts of each block is removed from the checkpoints of `architectures`, and then half of the weights
of the others by Wanda. A type is right if the stage of the experts alone has, in stock transformers, the logits of the
source whose routers give the removed experts −∞; if that stage has nothing but bits of the source, under the source's
names; and if exactly half of the weights of the other stage's linears is zero. One line a type is added to
``benchmarks/results/whole_experts.jsonl``; docs/models.md has the table.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.checks import architectures
from benchmarks.shared import besa_runs

LINES = besa_runs.RESULTS / "whole_experts.jsonl"
GROUPS = ("experts", "experts and other mixers")  # of `architectures`
_SHARE = 0.25
_ERROR = 1e-5  # relative error of logits


@contextlib.contextmanager
def masked(model: nn.Module, blocks: nn.ModuleList, kept: Sequence[Sequence[int]], experts: int) -> Iterator[None]:
    """Let the routers of a stock model give −∞ to the experts of each block that are not kept, of so many.

    The logits get −∞, and the biases by which some types choose do, for good.
    """
    plain, gone = functional.linear, list[list[int]]()
    routers = [
        (name.rpartition(".")[2], module, [number for number in range(experts) if number not in stay])
        for block, stay in zip(blocks, kept, strict=True)
        if stay
        for name, module in block.named_modules()
        if name.rpartition(".")[2] in ("gate", "router", "moe_statics", "feed_forward")
    ]

    def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = plain(inputs, weight, bias)
        if gone and output.shape[-1] >= experts:
            output[..., gone[-1]] = -torch.inf
        return output

    def begin(removed: list[int]) -> None:
        gone.append(removed)

    def end() -> None:
        gone.pop()

    handles = []
    for kind, module, removed in routers:
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name.endswith("bias") and tensor.numel() >= experts:
                tensor.data.view(-1)[removed] = -torch.inf
        if kind in ("gate", "router"):
            handles.append(module.register_forward_pre_hook(lambda *_, removed=removed: begin(removed)))
            handles.append(module.register_forward_hook(lambda *_: end()))
    functional.linear = linear  # type: ignore[assignment]  # what every router calls
    try:
        yield
    finally:
        functional.linear = plain
        for handle in handles:
            handle.remove()


def checked(kind: str, place: Path) -> dict[str, Any]:
    """Make a checkpoint of a type in an empty directory, remove experts, and say what became of it."""
    source, rows = architectures.saved(kind, place)
    for run, sparsity in (("whole", 0), ("half", 0.5)):
        words = ("--method", "wanda", "--sparsity", sparsity, "--experts", _SHARE, "--run", place / run)
        failed = architectures.failure(place, *words)
        if failed:
            return failed
    stage, half = place / "whole" / "pruned", place / "half" / "pruned"
    kept = json.loads((stage / "besa.json").read_text())["experts"]["kept"]
    (whole, reading), (fewer, reading_stage) = (architectures.stock(kind, each) for each in (source, stage))
    with torch.no_grad():
        logits = fewer(input_ids=rows, use_cache=False).logits
        with masked(whole, _blocks(whole, len(kept)), kept, experts_of(stage)):
            expected = whole(input_ids=rows, use_cache=False).logits
    error = float((logits - expected).norm() / expected.norm())
    before, after = architectures.tensors(source), architectures.tensors(stage)
    counts = json.loads((half / "besa.json").read_text())["counts"]
    wrong = {
        f"logits ({error:.1g})": not error < _ERROR,
        "names": not after.keys() <= before.keys(),
        "loading": reading != reading_stage or type(whole) is not type(fewer),
        "counts": not counts["pruned"] == counts["zeros"] == round(counts["weights"] / 2),
    }
    why = {"why": ", ".join(name for name, failed in wrong.items() if failed)} if any(wrong.values()) else {}
    return {"verdict": "wrong" if why else "prunes", "error": float(f"{error:.2g}"), **why}


def experts_of(stage: Path) -> int:
    """The experts in a block of the model that a stage was made from."""
    return int(json.loads((stage / "besa.json").read_text())["experts"]["experts"])


def _blocks(model: nn.Module, depth: int) -> nn.ModuleList:
    """The blocks of a stock model: the largest list of so many modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    return max(lists, key=lambda modules: sum(parameter.numel() for parameter in modules.parameters()))


def table() -> str:
    """The types from which whole experts can be removed, by group."""
    last = {line["type"]: line["verdict"] for line in besa_runs.read_lines(LINES)}
    named = architectures.groups()
    rows = ["| what the blocks hold | types | whole experts can be removed |", "|---|---|---|"]
    rows += [
        f"| {name} | {len(named[name])} | {sum(last.get(kind) == 'prunes' for kind in named[name])} |"
        for name in GROUPS
    ]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check types one after the other, and add a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="all by default")
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints; each goes when it is done")
    given = parser.parse_args(arguments)
    named = architectures.groups()
    kinds = given.types or [kind for name in GROUPS for kind in named[name]]
    architectures.record(kinds, given.work, checked, LINES, ("wanda",))


if __name__ == "__main__":
    main()
