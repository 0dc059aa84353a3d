"""Does the memory of `besa prune` grow with the number of blocks?

Makes LLaMA-shaped random checkpoints that differ in nothing but their number of equal blocks, prunes each in a process
of its own, and prints one JSON line for each: the peak resident memory above the level after the imports, in MB.

    python benchmarks/bench_memory.py                     # 4 and 16 blocks of 67 MB
    python benchmarks/bench_memory.py --method sparsegpt --dtype bfloat16
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from besa_cli import __version__
from besa_cli.checkpoint.manifests import versions

VOCABULARY = 256

MEASURED = """
import json, sys
from pathlib import Path

def now(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

import torch, transformers, transformers.models.llama.modeling_llama
from besa_cli import app, calibration, console, evaluation, lock, preparation, pruning
from besa_cli.pruners import besa, magnitude, sparsegpt, wanda

before = now("VmRSS")
code = app.main(sys.argv[1:])
print(json.dumps({"code": code, "imports": before, "peak": now("VmHWM")}))
"""


def checkpoint(directory: Path, blocks: int, hidden: int, intermediate: int, dtype: torch.dtype) -> int:
    """Write a random LLaMA-shaped checkpoint, a shard a block; returns the bytes of one block."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype=str(dtype).removeprefix("torch."),
    )
    config.save_pretrained(directory)
    square, up, down = (hidden, hidden), (intermediate, hidden), (hidden, intermediate)
    matrices = {f"self_attn.{name}_proj": square for name in "qkvo"}
    matrices |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    table, size = {}, 0
    for index in range(blocks):
        torch.manual_seed(index)
        tensors = {
            f"model.layers.{index}.{name}.weight": (torch.randn(shape) / hidden**0.5).to(dtype)
            for name, shape in matrices.items()
        }
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{name}.weight"] = torch.ones(hidden, dtype=dtype)
        size = sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, directory / f"block-{index}.safetensors", metadata={"format": "pt"})
        table |= dict.fromkeys(tensors, f"block-{index}.safetensors")
    rest = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, hidden).to(dtype),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
    }
    save_file(rest, directory / "rest.safetensors", metadata={"format": "pt"})
    table |= dict.fromkeys(rest, "rest.safetensors")
    index_file = {"metadata": {}, "weight_map": table}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return size


def measure(place: Path, model: Path, options: argparse.Namespace) -> dict[str, int]:
    """Prune `model` in a process of its own; returns its resident bytes after the imports and at the peak."""
    rows = place / "rows.jsonl"
    row = json.dumps({"input_ids": [number % VOCABULARY for number in range(options.seqlen)]})
    rows.write_text(f"{row}\n" * options.samples)
    words = ["prune", "--model", str(model), "--run", str(place / f"run-{model.name}"), "--method", options.method]
    words += ["--data", str(rows), "--samples", str(options.samples), "--seqlen", str(options.seqlen)]
    command = [sys.executable, "-c", MEASURED, *words, "--dtype", options.compute, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    if result.pop("code"):
        raise SystemExit(done.stderr)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print, a line a number of blocks, then one with the growth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32", help="dtype to compute in")
    parser.add_argument("--method", default="besa")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=32)
    options = parser.parse_args(arguments)
    above = []
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory(prefix="besa-memory-") as name:
            model = Path(name, f"{blocks}-blocks")
            dtype = getattr(torch, options.dtype)
            size = checkpoint(model, blocks, options.hidden, options.intermediate, dtype)
            start = time.perf_counter()
            found = measure(Path(name), model, options)
            seconds = time.perf_counter() - start
        above.append(found["peak"] - found["imports"])
        line = {
            "blocks": blocks,
            "block_mb": round(size / 1e6, 1),
            "method": options.method,
            "imports_mb": round(found["imports"] / 1e6, 1),
            "above_imports_mb": round(above[-1] / 1e6, 1),
            "seconds": round(seconds, 1),
        }
        print(json.dumps(line), flush=True)
    growth = {
        "growth_mb": round((above[-1] - above[0]) / 1e6, 1),
        "of_a_block": round((above[-1] - above[0]) / size, 3),
    }
    made = {"date": time.strftime("%Y-%m-%d"), "besa": __version__, **versions()}
    print(json.dumps({**growth, "arguments": vars(options), "versions": made}))


if __name__ == "__main__":
    main()
