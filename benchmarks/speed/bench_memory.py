"""Does the memory of a command grow with the number of blocks?

Makes LLaMA-shaped random checkpoints that differ in nothing but their number of equal blocks, runs each command on each
of them in a process of its own, and prints one JSON line for each: the peak resident memory above the level after the
imports, in MB; at the end one line a command, with the growth, which bench_memory.jsonl keeps. What a command needs is
made by the commands before it.

    python -m benchmarks.speed.bench_memory                          # besa prune, 4 and 16 blocks of 67 MB
    python -m benchmarks.speed.bench_memory --case all --method wanda
    python -m benchmarks.speed.bench_memory --method sparsegpt --dtype bfloat16
"""

import argparse
import importlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.results import recorded
from benchmarks.shared.besa_runs import RESULTS, append_line, commit
from benchmarks.shared.random_checkpoint import Shape, checkpoint
from besa_cli import __version__
from besa_cli.checkpoint.manifests import versions
from besa_cli.exporters import EXPORTERS
from besa_cli.pruners import PRUNERS
from besa_cli.quantizers import QUANTIZERS

LINES = RESULTS / "bench_memory.jsonl"
VOCABULARY = 256


@dataclass(frozen=True)
class Case:
    """A command, ``{}`` standing for the directory of all runs, and the cases that it needs done."""

    words: str
    after: tuple[str, ...] = ()


QUANTIZE = "quantize --model {}/pruned/pruned --calibration {}/pruned/calibration"
EXPORT = "export --run {}/pruned --format"
CASES = {
    "prune": Case("prune --model {}/model --data {}/rows.jsonl --run {}/pruned"),
    "quantize-rtn": Case(f"{QUANTIZE} --method rtn --run {{}}/rtn", ("prune",)),
    "quantize-gptq": Case(f"{QUANTIZE} --method gptq --run {{}}/gptq", ("prune",)),
    "quantize-clip": Case(f"{QUANTIZE} --method clip --run {{}}/clip", ("prune",)),
    "export-hf": Case(f"{EXPORT} hf", ("prune",)),
    "export-sparse": Case(f"{EXPORT} sparse", ("prune",)),
    "export-sparse-zstd": Case(f"{EXPORT} sparse --compress zstd", ("prune",)),
    "export-gguf-F16": Case(f"{EXPORT} gguf --type F16", ("prune",)),
    "export-gguf-BF16": Case(f"{EXPORT} gguf --type BF16", ("prune",)),
    "export-gguf-Q8_0": Case(f"{EXPORT} gguf --type Q8_0", ("prune",)),
    "export-gguf-Q4_0": Case("export --run {}/rtn --format gguf --type Q4_0", ("prune", "quantize-rtn")),
    "export-compressed-tensors": Case("export --run {}/rtn --format compressed-tensors", ("prune", "quantize-rtn")),
    "export-sparse-codes": Case("export --run {}/rtn --format sparse", ("prune", "quantize-rtn")),
    "import": Case("import {}/pruned/export/sparse --run {}/again", ("prune", "export-sparse")),
    "import-zstd": Case(
        "import {}/pruned/export/sparse-zstd --run {}/again-zstd", ("prune", "export-sparse-zstd")
    ),
}  # fmt: skip
COMMANDS = ("prune", "quantize", "export", "import_")
WORK = (
    "calibration.prepare",
    "jobs.export",
    "jobs.import_",
    "jobs.prune",
    "jobs.quantize",
    "jobs.stage",
    "system.lock",
)
METHODS = {"pruners": PRUNERS, "quantizers": QUANTIZERS, "exporters": EXPORTERS}


def import_all() -> None:
    """Everything that a command imports, so that it counts as imports."""
    names = [f"commands.{name}" for name in COMMANDS] + ["app", "console", *WORK]
    names += [f"{folder}.{name.replace('-', '_')}" for folder, known in METHODS.items() for name in known]
    for name in ["transformers.models.llama.modeling_llama", "pyarrow", *(f"besa_cli.{name}" for name in names)]:
        importlib.import_module(name)


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _measured(words: Sequence[str], log: Path, answer: "multiprocessing.SimpleQueue[tuple[int, int, int]]") -> None:
    from besa_cli.app import main as besa

    sys.stdout = sys.stderr = log.open("w", buffering=1)
    before = resident("VmRSS")
    code = besa(words)
    answer.put((code, before, resident("VmHWM")))


def measure(words: Sequence[str], log: Path) -> tuple[int, int]:
    """Run a command in a fork of this process; its resident bytes at its beginning, and at the peak."""
    fork = multiprocessing.get_context("fork")
    answer = fork.SimpleQueue()
    process = fork.Process(target=_measured, args=(words, log, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(log.read_text())
    code, before, peak = answer.get()
    if code:
        raise SystemExit(f"besa {' '.join(words)}: {log.read_text()}")
    return before, peak


def make(place: Path, shape: Shape, options: argparse.Namespace) -> None:
    """The checkpoint with a tokenizer of bytes, and the calibration rows; in a process that ends with its memory."""
    checkpoint(place / "model", shape, getattr(torch, options.dtype))
    alphabet = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(place / "model")
    row = json.dumps({"input_ids": [number % VOCABULARY for number in range(options.seqlen)]})
    (place / "rows.jsonl").write_text(f"{row}\n" * options.samples)


def command(name: str, place: Path, options: argparse.Namespace) -> list[str]:
    """The words of a case."""
    words = CASES[name].words.replace("{}", str(place)).split()
    if name == "prune":
        words += ["--method", options.method, "--samples", str(options.samples), "--seqlen", str(options.seqlen)]
    return words if name.startswith(("export", "import")) else [*words, "--dtype", options.compute, "--device", "cpu"]


def measure_all(place: Path, shape: Shape, options: argparse.Namespace) -> dict[str, int]:
    """Of each case asked for, the peak above the imports with a model of that shape; printed, too."""
    maker = multiprocessing.get_context("fork").Process(target=make, args=(place, shape, options))
    maker.start()
    maker.join()
    found = {}
    needed = {name for case in options.case for name in (*CASES[case].after, case)}
    for name in (name for name in CASES if name in needed):
        start = time.perf_counter()
        before, peak = measure(command(name, place, options), place / "log")
        if name not in options.case:
            continue
        found[name] = peak - before
        line = {
            "case": name,
            "blocks": shape.blocks,
            "imports_mb": round(before / 1e6, 1),
            "above_imports_mb": round(found[name] / 1e6, 1),
            "seconds": round(time.perf_counter() - start, 1),
        }
        print(json.dumps(line), flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, a line a number of blocks and case, then one a case with the growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=[*CASES, "all"], default=["prune"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32", help="dtype to compute in")
    parser.add_argument("--method", default="besa", help="what prunes")
    parser.add_argument("--work", type=Path, help="where the models lie meanwhile; where temporary files do by default")
    parser.add_argument("--lines", type=Path, default=LINES, help="the file that the results are added to")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=32)
    options = parser.parse_args(arguments)
    options.case = list(CASES) if "all" in options.case else options.case
    import_all()
    above: list[dict[str, int]] = []
    for blocks in options.blocks:
        heads = options.hidden // 64
        shape = Shape(
            hidden=options.hidden, intermediate=options.intermediate, heads=heads, key_heads=heads, blocks=blocks,
            vocabulary=VOCABULARY, longest=512, tied=True,
        )  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="besa-memory-", dir=options.work) as name:
            above.append(measure_all(Path(name), shape, options))
    matrices = sum(rows * cols for rows, cols in shape.linears().values())
    block = (matrices + 2 * shape.hidden) * getattr(torch, options.dtype).itemsize
    for case in options.case:
        least, most = above[0][case], above[-1][case]
        growth = most - least
        kept = {"case": case, "method": options.method, "blocks": options.blocks, "compute": options.compute,
                "above_imports": [least, most], "block": block, "commit": commit(),
                "methods": recorded.methods(options.method)}  # fmt: skip
        append_line(options.lines, kept)
        line = {"case": case, "growth_mb": round(growth / 1e6, 1), "of_a_block": round(growth / block, 3)}
        print(json.dumps({**line, "block_mb": round(block / 1e6, 1)}))
    made = {"date": time.strftime("%Y-%m-%d"), "besa": __version__, **versions()}
    print(json.dumps({"arguments": {**vars(options), "work": None, "lines": None}, "versions": made}))


if __name__ == "__main__":
    main()
