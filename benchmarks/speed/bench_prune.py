"""What does learning an allocation cost, in plain passes over the same blocks?

    python -m benchmarks.speed.bench_prune                               # hidden sizes 576 and 2048, bf16
    python -m benchmarks.speed.bench_prune --hidden 576 --dtype float32 --only step

Random LLaMA-shaped blocks: 576 has the shapes of the demo model's, 2048 those of a 1B model's. Prints JSON lines and
adds them to bench_prune.jsonl:

step    one learning step ÷ one plain forward and backward pass of the block (weights trainable, no mask, same batch)
whole   all of `besa prune` ÷ one plain pass without gradients of all blocks over the calibration set, one sample a time
state   bytes of ranks, mixtures, their gradients and the optimizer's moments ÷ weights

All parts of one line are timed in one process, in turn, and the line holds the median of the turns' ratios: of wall
time, and of the CPU time of all threads (`cpu_ratio`), which other programs on the machine disturb less. The unit of a
whole is the mean of the plain passes before and after it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `besa` does

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import recorded
from benchmarks.shared.besa_runs import RESULTS, append_line, commit, machine
from besa_cli.calibration import calibration_set
from besa_cli.checkpoint.manifests import versions
from besa_cli.checkpoint.runs import Run
from besa_cli.decoder.decoder import Decoder
from besa_cli.jobs import prune
from besa_cli.jobs.stage import StageJob
from besa_cli.models import Model
from besa_cli.ops import kernels, losses
from besa_cli.pruners import besa
from besa_cli.pruners.besa.learning import learn, optimizers
from besa_cli.pruners.besa.window import RankedWindow
from besa_cli.stream import propagation, windows
from besa_cli.stream.block import Block
from besa_cli.system import compute

LINES = RESULTS / "bench_prune.jsonl"
CPU = torch.device("cpu")
VOCABULARY = 512
SHAPES = {  # hidden: intermediate, heads, key-value heads
    576: (1536, 9, 3),
    2048: (8192, 32, 8),
    4096: (11008, 32, 32),
}


def checkpoint(directory: Path, hidden: int, blocks: int) -> Path:
    """A random checkpoint in bf16."""
    intermediate, heads, groups = SHAPES[hidden]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


class Took(NamedTuple):
    """Seconds of a call: on the wall, and of all threads on the CPU."""

    wall: float
    cpu: float

    def __add__(self, other: object) -> "Took":
        assert isinstance(other, Took)
        return Took(self.wall + other.wall, self.cpu + other.cpu)


def seconds(work: Callable[[], object]) -> Took:
    """How long a call takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


def first_block(decoder: Decoder, tokens: torch.Tensor) -> Block:
    """The first block with half of its weights to be pruned."""
    window = windows.WholeBlocks(decoder, range(1))
    hidden = propagation.embed(decoder, tokens, 8)
    places, source = decoder.tensor_places(0), decoder.load(0)
    weights = {name: places[f"{name}.weight"].of(source) for name in window.linears}
    budget = sum(weight.numel() for weight in weights.values()) // 2
    return Block(
        window, weights, budget=budget, inputs=hidden, tokens=tokens, batch=8, sensitivity=torch.ones(hidden.shape[-1])
    )


def plain_steps(block: Block, batch: int) -> None:
    """Forward and backward passes of the block with all linears' weights trainable."""
    weights = [linear.weight.requires_grad_() for linear in block.linears.values()]
    with compute.repeated_passes():
        for part in propagation.batches(len(block.inputs), batch):
            losses.token(block.forward(block.inputs[part]), block.target[part]).backward()
            for weight in weights:
                weight.grad = None
    for weight in weights:
        weight.requires_grad_(False)


def step_ratio(directory: Path, dtype: torch.dtype, batch: int, tokens: torch.Tensor, turns: int) -> dict[str, float]:
    """One learning step ÷ one plain forward and backward pass."""
    block = first_block(Decoder(directory, CPU, dtype, quick=True), tokens)
    stock = first_block(Decoder(directory, CPU, dtype), tokens)
    window = RankedWindow(block, besa.Options(batch_size=batch))
    found = []
    for turn in range(turns + 1):
        plain = seconds(lambda: plain_steps(stock, batch))
        learning = seconds(lambda: learn(window))
        if turn:  # the first warms up
            found.append((learning.wall / plain.wall, learning.cpu / plain.cpu, plain.wall))
    steps = -(-len(tokens) // batch)
    walls, cpus, plains = zip(*found, strict=True)
    return {**_spread(walls, cpus), "turns": turns, "plain_ms": 1e3 * statistics.median(plains) / steps}


def one_by_one(decoder: Decoder, index: int, hidden: torch.Tensor) -> None:
    """Pass the samples through a block."""
    for row in torch.split(hidden, 1):
        decoder.forward(index, row, torch.zeros(row.shape[:2], dtype=torch.long))


def plain_pass(decoder: Decoder, tokens: torch.Tensor) -> Took:
    """Seconds of one pass without gradients of all blocks, a sample at a time; neither loading nor warming up counts.

    Freed memory is kept from sample to sample as `besa` keeps it, and as the C library would if left alone.
    """
    hidden, total = propagation.embed(decoder, tokens, 8), Took(0.0, 0.0)
    for index in range(len(decoder)):
        decoder.load(index)
        with torch.no_grad(), compute.repeated_passes():
            one_by_one(decoder, index, hidden[:2])
            total += seconds(partial(one_by_one, decoder, index, hidden))
        decoder.drop(index)
    return total


def whole_ratio(directory: Path, dtype: torch.dtype, target: str, tokens: torch.Tensor, turns: int) -> dict[str, float]:
    """All of `besa prune`, checks and reports included but not the start of Python, ÷ one plain pass."""
    settings = {"options": {"data": [], "samples": len(tokens), "seqlen": tokens.shape[1], "seed": 0, "pack": None}}
    drawn: Any = {**settings, "sources": [], "tokens_digest": calibration_set.tokens_digest(tokens)}
    calibrated = calibration_set.CalibrationSet(tokens=tokens, manifest=drawn)
    model = Model(name="random", kind="local", directory=directory, revision=None)
    request = prune.request(options={"target": target}, device="cpu", dtype=compute.name_of(dtype))
    decoder, reports = Decoder(directory, CPU, dtype), list[Any]()

    def prune_once() -> None:
        with tempfile.TemporaryDirectory() as run:
            job = StageJob(Run(Path(run)), model, calibrated, request)
            reports.extend(job.blocks())
            job.finish()

    found, before = [], plain_pass(decoder, tokens)
    for _ in range(turns):
        took, after = seconds(prune_once), plain_pass(decoder, tokens)
        found.append((2 * took.wall / (before + after).wall, 2 * took.cpu / (before + after).cpu, after.wall))
        before = after
    walls, cpus, passes = zip(*found, strict=True)
    return {
        **_spread(walls, cpus),
        "turns": turns,
        "pass_seconds": statistics.median(passes),
        "kept_uniform": sum(report.kept_uniform for report in reports),
    }


def _spread(walls: Sequence[float], cpus: Sequence[float]) -> dict[str, float]:
    """The medians and the extremes of the turns' ratios."""
    return {
        "ratio": statistics.median(walls),
        "lowest": min(walls),
        "highest": max(walls),
        "cpu_ratio": statistics.median(cpus),
        "cpu_lowest": min(cpus),
        "cpu_highest": max(cpus),
    }


def state_bytes(directory: Path, tokens: torch.Tensor) -> dict[str, float]:
    """Bytes of ranks and learned state of one block in bf16 ÷ its weights."""
    block = first_block(Decoder(directory, CPU, torch.bfloat16), tokens)
    window = RankedWindow(block, besa.Options())
    theta = torch.zeros(len(window.sizes), len(window.candidates), requires_grad=True)
    optimizer = optimizers(theta, [], window.options)[0][0]
    theta.grad = torch.zeros_like(theta)
    optimizer.step()
    moments = [value for value in optimizer.state[theta].values() if isinstance(value, torch.Tensor)]
    learned = [theta, theta.grad, *moments, *(linear.ranks for linear in window.linears.values())]
    weights = sum(linear.size for linear in window.linears.values())
    return {"bytes_per_weight": sum(x.numel() * x.element_size() for x in learned) / weights, "weights": weights}


def lines(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure what is asked for, a line at a time."""
    dtype = compute.DTYPES[arguments.dtype]
    for hidden in arguments.hidden:
        with tempfile.TemporaryDirectory() as folder:
            directory = checkpoint(Path(folder) / "model", hidden, arguments.blocks)
            tokens = torch.randint(0, VOCABULARY, (arguments.samples, arguments.seqlen))
            few = tokens[: arguments.step_samples]
            if "step" in arguments.only:
                for batch in arguments.batch:
                    yield {"what": "step", "hidden": hidden, "batch": batch, "samples": len(few),
                           **step_ratio(directory, dtype, batch, few, arguments.turns)}  # fmt: skip
            if "whole" in arguments.only:
                for target in ("block", "stream"):
                    yield {"what": "whole", "hidden": hidden, "target": target, "samples": len(tokens),
                           **whole_ratio(directory, dtype, target, tokens, arguments.whole_turns)}  # fmt: skip
            if "state" in arguments.only:
                yield {"what": "state", "hidden": hidden, **state_bytes(directory, tokens[:1, :16])}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[576, 2048], choices=sorted(SHAPES))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", nargs="+", default=["step", "whole", "state"], choices=("step", "whole", "state"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--step-samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5, help="of steps")
    parser.add_argument("--whole-turns", type=int, default=3, help="of the whole")
    arguments = parser.parse_args(words)
    dtype = compute.DTYPES[arguments.dtype]
    made = {
        "dtype": arguments.dtype, "blocks": arguments.blocks, "seqlen": arguments.seqlen,
        "threads": torch.get_num_threads(), "kernels": kernels.name(CPU, dtype), "machine": machine(),
        "commit": commit(), "methods": recorded.methods("besa"),
        "versions": versions(),
    }  # fmt: skip
    for line in lines(arguments):
        append_line(LINES, {**line, **made})
        print(json.dumps({**line, **made}), flush=True)


if __name__ == "__main__":
    main()
