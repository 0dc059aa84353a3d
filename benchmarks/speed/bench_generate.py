"""How fast does a pruned model generate from its sparse file, beside dense transformers and llama.cpp?

    python -m benchmarks.speed.bench_generate --work DIR --shape 1b --sparsity 0.5 0.7
    python -m benchmarks.speed.bench_generate --work DIR --shape 1b --sparsity 0.5 0.7 --bits 4 --prompt-tokens 128
    python -m benchmarks.speed.bench_generate --work DIR --model smollm2-135m --sparsity 0.5

A checkpoint of random weights (or a model) is pruned by magnitude, with --bits rounded to codes in groups of 128,
exported (sparse, and GGUF for llama.cpp: BF16, or Q4_0 with --bits 4), and measured by `besa bench`: all programs in
turns on the threads that torch takes, the medians of the rounds. What `besa bench` prints is kept, one line a
sparsity, with the version of llama.cpp. Everything made stays in DIR and is used again.
"""

import argparse
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared import random_checkpoint
from benchmarks.shared.besa_runs import RESULTS, append_line, besa, commit, machine, read_lines

FILE = RESULTS / "bench_generate.jsonl"
_LLAMA_CPP = "llama_cpp_python"
_FEW_TOKENS = ("--data", "bundled", "--samples", "4", "--seqlen", "64")  # magnitude does not look at them


def made(work: Path, model: str, sparsity: float, bits: int | None) -> Path:
    """The run directory of a pruned model with its exports; what is there already is not made again."""
    run = work / f"{Path(model).name}-{sparsity}{f'-{bits}-bits' if bits else ''}"
    how = ["--method", "magnitude", "--sparsity", str(sparsity), *_FEW_TOKENS]
    besa("prune", "--model", model, *how, "--run", str(run))
    if bits:
        grid = ["--bits", str(bits), "--group-size", "128", "--symmetric"]
        besa("quantize", "--method", "rtn", *grid, "--run", str(run))
    besa("export", "--format", "sparse", "--run", str(run))
    besa("export", "--format", "gguf", "--type", "Q4_0" if bits else "BF16", "--run", str(run))
    return run


def byte_tokenizer(directory: Path) -> None:
    """Write a tokenizer of single bytes and one pair, which a GGUF file can hold."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE({**letters, "in": len(letters)}, [("i", "n")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(directory)


def measure(run: Path, words: Sequence[str]) -> dict[str, Any]:
    """What `besa bench` prints of a run, without the paths of this machine."""
    printed = besa("bench", "--run", str(run), *words)
    return {name: printed[name] for name in ("machine", "bandwidth", "rounds", "results", "comparisons")}


def _llama_cpp() -> str | None:
    """The version of the package that holds llama.cpp, where it is installed."""
    try:
        return importlib.metadata.version(_LLAMA_CPP)
    except importlib.metadata.PackageNotFoundError:
        return None


def table() -> str:
    """Tokens per second and memory of the newest line of every model, and how many times as fast sparse is."""
    lines = {(line["model"], line["bits"] or 16, line["sparsity"]): line for line in read_lines(FILE)}
    rows = [
        "| model | sparsity | prompt | | prefill, tokens/s | decode, tokens/s | memory | sparse: prefill | decode |",
        "|---" * 9 + "|",
    ]
    for (model, bits, sparsity), line in sorted(lines.items()):
        title = f"{model}, {'bf16' if bits == 16 else f'{bits} bits'} | {sparsity:.0%}".replace("%", " %")
        for found in line["results"]:
            against = _against(line, found)
            times = [f"× {against[name]:.2f}" if against else "" for name in ("prefill", "decode")]
            speeds = f"{found['prefill']:,.0f} | {found['decode']:.1f} | {found['resident'] / 1e9:.2f} GB"
            about = f"{found['workload']['prompt']} | {found['name']} | {speeds}"
            rows.append(f"| {title} | {about} | {' | '.join(times)} |")
    return "\n\n".join(["\n".join(rows), _slower(list(lines.values())), _conditions(list(lines.values()))])


def _slower(lines: Sequence[dict[str, Any]]) -> str:
    """A sentence on every other program beside which sparse is not faster, and how often."""
    parts = []
    for name in ("prefill", "decode"):
        pairs = [(each["other"], each[name] <= 1) for line in lines for each in line["comparisons"]]
        for other in dict.fromkeys(other for other, _ in pairs):
            slower = [is_slower for candidate, is_slower in pairs if candidate == other]
            if any(slower):
                parts.append(f"{name} beside {other} (in {sum(slower)} of {len(slower)})")
    return f"Sparse is not faster: {'; '.join(parts)}." if parts else "Sparse is faster in every line."


def _against(line: dict[str, Any], found: dict[str, Any]) -> dict[str, Any] | None:
    """The comparison of the sparse file with that contender on the same tokens; None for the sparse file itself."""
    same = [
        each for each in line["comparisons"] if (each["other"], each["workload"]) == (found["name"], found["workload"])
    ]
    return same[0] if same else None


def _conditions(lines: Sequence[dict[str, Any]]) -> str:
    """Processor, threads, bandwidth and versions of the lines."""
    facts = sorted(
        {
            f"{line['machine']['processor']}, {line['machine']['threads']} threads that read "
            f"{line['bandwidth'] / 1e9:.0f} GB/s, llama-cpp-python {line['llama_cpp'] or 'not installed'}"
            for line in lines
        }
    )
    commits = sorted({line["commit"] for line in lines})
    return f"Medians of {min((line['rounds'] for line in lines), default=0)} rounds. " + "; ".join(
        [*facts, f"commits {', '.join(commits)}"]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Make and measure one model at every sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--shape", choices=random_checkpoint.SHAPES, help="of a checkpoint of random weights")
    chosen.add_argument("--model", help="as for besa prune")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--bits", type=int, choices=(4, 8))
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    model = options.model
    if options.shape:
        model = str(options.work / options.shape)
        if not (options.work / options.shape / "tokenizer.json").exists():
            random_checkpoint.checkpoint(Path(model), random_checkpoint.SHAPES[options.shape], torch.bfloat16)
            byte_tokenizer(Path(model))
    name = f"random, shape of {options.shape}" if options.shape else Path(model).name
    prompts = [word for length in options.prompt_tokens for word in ("--prompt-tokens", str(length))]
    for sparsity in options.sparsity:
        run = made(options.work, model, sparsity, options.bits)
        words = [*prompts, "--new-tokens", str(options.new_tokens), "--rounds", str(options.rounds)]
        about = {"model": name, "bits": options.bits, "sparsity": sparsity, "llama_cpp": _llama_cpp()}
        append_line(FILE, {**about, **measure(run, words), "host": machine(), "commit": commit(), "methods": {}})


if __name__ == "__main__":
    main()
