"""Do the exports of a run give the stage's logits in the programs that load them?

Loads every export in the *other* program (transformers, or llama.cpp out of the wheel `xllamacpp`) and prints one JSON
line for each: its size, the relative error of its logits on the first window against those of the stage, the share of
positions with the same likeliest token, and the perplexity of the first windows of WikiText-2 beside the stage's.

    pip install xllamacpp compressed-tensors
    python benchmarks/bench_export.py --run besa-run --windows 8
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from llama_cpp import LlamaCpp
from transformers import AutoModelForCausalLM, AutoTokenizer

import besa_cli.hf  # noqa: F401 - lets transformers load sparse checkpoints
from besa_cli import datahub, texts
from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.manifests import EXPORT
from besa_cli.checkpoint.runs import Run

Logits = Callable[[list[int]], np.ndarray]


def in_transformers(directory: Path) -> Logits:
    """Logits of shape (tokens, vocabulary) from stock transformers, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def logits(window: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([window])).logits[0].numpy()

    return logits


def losses(logits: np.ndarray, window: list[int]) -> np.ndarray:
    """−log p of each token but the first."""
    scores = torch.from_numpy(logits[:-1])
    return torch.nn.functional.cross_entropy(scores, torch.tensor(window[1:]), reduction="none").double().numpy()


def windows(stage: Path, count: int, seqlen: int) -> list[list[int]]:
    """The first windows of WikiText-2's test split."""
    tokenizer = AutoTokenizer.from_pretrained(stage)
    text = texts.evaluation_text("wikitext2", data_dir=None, hub=datahub.from_environment(), notify=print)
    ids = tokenizer(text.text, verbose=False)["input_ids"]
    return [ids[start * seqlen : (start + 1) * seqlen] for start in range(count)]


def opened(directory: Path, seqlen: int) -> Iterator[tuple[str, Logits]]:
    """The program that loads an export, and its logits."""
    files = list(directory.glob("*.gguf"))
    if not files:
        yield "transformers", in_transformers(directory)
        return
    model = LlamaCpp(files[0], seqlen)
    yield "llama.cpp", model.logits
    model.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("besa-run"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=2048)
    given = parser.parse_args()
    run = Run(given.run)
    stage = run.newest()
    if stage is None:
        sys.exit(f"{given.run} has no stage")
    text = windows(stage, given.windows, given.seqlen)
    model = in_transformers(stage)
    first = model(text[0])
    base = np.concatenate([losses(model(window), window) for window in text])
    del model
    print(json.dumps({"stage": str(stage), "perplexity": float(np.exp(base.mean()))}), flush=True)
    for directory in sorted(path.parent for path in run.exports.glob(f"*/{EXPORT}")):
        for program, logits in opened(directory, given.seqlen):
            found = logits(text[0])
            here = np.concatenate([losses(logits(window), window) for window in text])
            facts = {
                "export": directory.name,
                "program": program,
                "weights_mb": manifests.read(directory, EXPORT)["sizes"]["weights"] / 1e6,
                "logits_relative_error": float(np.linalg.norm(found - first) / np.linalg.norm(first)),
                "logits_largest_difference": float(np.abs(found - first).max()),
                "same_likeliest_token": float((found.argmax(1) == first.argmax(1)).mean()),
                "perplexity": float(np.exp(here.mean())),
                "perplexity_ratio": float(np.exp(here.mean() - base.mean())),
            }
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
