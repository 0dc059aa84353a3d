"""Do the exports of a run give the stage's logits in the programs that load them?

Loads every export in the *other* program (transformers, or llama.cpp out of the wheel `xllamacpp`) and prints one JSON
line for each: its size, the relative error of its logits on the first window against those of the stage, the share of
positions with the same likeliest token, the perplexity of the first windows of WikiText-2 beside the stage's, and how
many of the pruned weights are zero there, as that program (for GGUF, gguf's own reader) holds them.

    pip install xllamacpp compressed-tensors
    python -m benchmarks.exports.bench_export --run besa-run --windows 8
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import besa_cli.hf  # noqa: F401 - lets transformers load sparse checkpoints
from benchmarks.exports import export_values
from benchmarks.exports.llama_cpp import LlamaCpp
from besa_cli.checkpoint import exports, inspection
from besa_cli.checkpoint.runs import Run
from besa_cli.evaluation import texts
from besa_cli.text import hub_files


@dataclass(frozen=True)
class Opened:
    """An export in the program that loads it: logits of shape (tokens, vocabulary) in fp32, and its linears by name."""

    program: str
    logits: Callable[[list[int]], np.ndarray]
    linear: export_values.Read


def in_transformers(directory: Path) -> Opened:
    """Stock transformers: weights as they are loaded, products in fp32."""
    settings = {}
    if json.loads((directory / "config.json").read_text()).get("quantization_config", {}).get("config_groups"):
        settings["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **settings)
    model = model.to(torch.float32)  # type: ignore[arg-type]
    state = model.state_dict()

    def logits(window: list[int]) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = model(torch.tensor([window])).logits[0].numpy()
        return found

    return Opened("transformers", logits, state.__getitem__)


def losses(logits: np.ndarray, window: list[int]) -> np.ndarray:
    """−log p of each token but the first."""
    scores = torch.from_numpy(logits[:-1])
    return torch.nn.functional.cross_entropy(scores, torch.tensor(window[1:]), reduction="none").double().numpy()


def windows(stage: Path, count: int, seqlen: int) -> list[list[int]]:
    """The first windows of WikiText-2's test split."""
    tokenizer = AutoTokenizer.from_pretrained(stage)
    text = texts.evaluation_text("wikitext2", data_dir=None, hub=hub_files.from_environment(), notify=print)
    ids = tokenizer(text.text, verbose=False)["input_ids"]
    return [ids[start * seqlen : (start + 1) * seqlen] for start in range(count)]


@contextlib.contextmanager
def opened(directory: Path, stage: Path, seqlen: int) -> Iterator[Opened]:
    """An export in the program that loads it."""
    files = list(directory.glob("*.gguf"))
    if not files:
        yield in_transformers(directory)
        return
    model = LlamaCpp(files[0], seqlen, torch.get_num_threads())
    config = json.loads((stage / "config.json").read_text())
    yield Opened("llama.cpp", model.logits, export_values.from_gguf(files[0], config))
    model.close()


def over(model: Opened, text: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the first window, and the losses on all of them."""
    first = model.logits(text[0])
    return first, np.concatenate([losses(first, text[0]), *(losses(model.logits(each), each) for each in text[1:])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("besa-run"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--only", nargs="+", help="names of exports, in this order; all by default")
    given = parser.parse_args()
    run = Run(given.run)
    stage = run.newest()
    if stage is None:
        sys.exit(f"{given.run} has no stage")
    text = windows(stage, given.windows, given.seqlen)
    first, base = over(in_transformers(stage), text)
    print(json.dumps({"stage": stage.name, "perplexity": float(np.exp(base.mean()))}), flush=True)
    wanted = [run.exports / name for name in given.only] if given.only else inspection.exports(run)
    for directory in wanted:
        with opened(directory, stage, given.seqlen) as model:
            found, here = over(model, text)
            facts = {
                "export": directory.name,
                "program": model.program,
                "weights_mb": exports.read(directory)["sizes"]["weights"] / 1e6,
                "logits_relative_error": float(np.linalg.norm(found - first) / np.linalg.norm(first)),
                "logits_largest_difference": float(np.abs(found - first).max()),
                "same_likeliest_token": float((found.argmax(1) == first.argmax(1)).mean()),
                "perplexity": float(np.exp(here.mean())),
                "perplexity_ratio": float(np.exp(here.mean() - base.mean())),
                **export_values.zeros(stage, model.linear),
            }
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
