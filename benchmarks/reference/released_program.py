"""Does `--preset authors` come to the allocation of the paper's released program, on the same tokens?

    python -m benchmarks.reference.released_program TOKENS.jsonl --work DIR [--model MODEL] [--sparsity 0.5]

The released program asks for CUDA and the libraries of 2023. What it does is written down here plainly, from reading
it: a probability and a mask for every weight, a learned matrix for each linear, none of the shortcuts of `besa`. The
model is pruned by the real command, and again with this in the place of `besa`'s learning; the rest, from the
calibration set to the files, is shared. Prints one JSON line: both overall sparsities, how far the linears' are apart,
and both perplexities. Finished runs are kept.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch
from prodigyopt import Prodigy
from torch import Tensor, nn

from benchmarks.shared.besa_runs import besa, calibrated, commit, machine, perplexity
from besa_cli import app
from besa_cli.pruners import besa as pruner
from besa_cli.pruners.besa import Options
from besa_cli.stream import uniform
from besa_cli.stream.block import Block, Decision

CANDIDATES = 1 - torch.arange(101) / 100  # from 1 down to 0


class Masked:
    """A linear with what the released program keeps for it."""

    def __init__(self, weight: Tensor, norms: Tensor, *, by_row: bool) -> None:
        rows, cols = weight.shape
        self.weight = weight.float()
        self.order = (self.weight.abs() * norms).sort(dim=1, stable=True).indices
        self.ranks = self.order.argsort(dim=1)
        self.theta = nn.Parameter(torch.zeros(rows if by_row else 1, len(CANDIDATES)))
        cuts = [int(cols * candidate) for candidate in CANDIDATES.tolist()]
        self.covered = torch.stack([(torch.arange(cols) < cut).float() for cut in cuts])

    def mixture(self) -> Tensor:
        """Of shape (rows or 1, candidates)."""
        return self.theta.sigmoid().softmax(dim=1)

    def sparsities(self) -> Tensor:
        """Of every row, or of the linear."""
        return self.mixture() @ CANDIDATES

    def kept(self) -> Tensor:
        """The mask: the floor of its share of each row is pruned, lowest scores first."""
        counts = (self.sparsities() * self.weight.shape[1]).long()
        return self.ranks >= counts.unsqueeze(1)

    def masked(self) -> Tensor:
        """The pruned weight, whose gradient goes to the probability of every weight to be kept."""
        probability = (1 - self.mixture() @ self.covered).expand_as(self.weight)
        soft = torch.zeros_like(self.weight).scatter(1, self.order, probability)
        return self.weight * (self.kept().float() - soft.detach() + soft)


def masks(block: Block, options: Options, goal: float) -> dict[str, Tensor]:
    """What the released program would keep of a block."""
    norms = uniform.input_norms(block)
    by_row = options.granularity == "row"
    penalty = options.penalty
    assert penalty is not None  # the preset has one
    linears = {name: Masked(weight, norms[name], by_row=by_row) for name, weight in block.weights.items()}
    size = sum(linear.weight.numel() for linear in linears.values())
    thetas = [linear.theta for linear in linears.values()]
    optimizer = Prodigy(thetas, lr=1.0, weight_decay=0, decouple=True, d_coef=options.d_coef)
    for _ in range(options.epochs):
        for sample in range(len(block.inputs)):
            inputs, target = block.step_batch(torch.tensor([sample]))
            output = block.forward(inputs, {name: linear.masked() for name, linear in linears.items()})[0]
            error = (((target[0] - output) / target[0].norm(dim=0)) ** 2).sum() / output.shape[-1]
            shares = [linear.sparsities().mean() * (linear.weight.numel() / size) for linear in linears.values()]
            optimizer.zero_grad()
            (error + penalty * ((torch.stack(shares).sum() - goal) / goal) ** 2).backward()
            optimizer.step()
            block.on_step(sample + 1, len(block.inputs), "learning")
    return {name: linear.kept() for name, linear in linears.items()}


def prune(block: Block, options: Options) -> Decision:
    """In the place of `besa_cli.pruners.besa.prune`."""
    goal = block.budget / sum(weight.numel() for weight in block.weights.values())
    return Decision(masks=masks(block, options, goal), exact=False)


def shares(stage: Path) -> dict[str, tuple[int, int]]:
    """Zeros and weights of every linear."""
    files = sorted(stage.glob("model-*.json"))
    blocks = [json.loads(file.read_text()) for file in files if "index" not in file.name]
    linears = [(block["index"], linear) for block in blocks for linear in block["linears"]]
    return {f"{index}.{x['name']}": (x["zeros"], x["rows"] * x["cols"]) for index, x in linears}


def compare(found: Path, expected: Path) -> dict[str, float]:
    """Two stages' sparsities."""
    ours, theirs = shares(found), shares(expected)
    size = sum(weights for _, weights in ours.values())
    apart = {name: abs(zeros - theirs[name][0]) / weights for name, (zeros, weights) in ours.items()}
    return {
        "sparsity": sum(zeros for zeros, _ in ours.values()) / size,
        "sparsity_released": sum(zeros for zeros, _ in theirs.values()) / size,
        "mean_difference_of_a_linear": sum(apart.values()) / len(apart),
        "largest_difference_of_a_linear": max(apart.values()),
    }


def main() -> None:
    """Prune twice, evaluate both, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path, help="a JSON line with `input_ids` for every sample")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--granularity", choices=["row", "layer"], default="row")
    options = parser.parse_args()
    calibration = calibrated(options.tokens, options.work, options.model)
    asked = ["--sparsity", options.sparsity, "--granularity", options.granularity, "--preset", "authors"]
    words = ["prune", "--model", options.model, "--calibration", str(calibration), "--dtype", "float32", *asked]
    name = f"{options.granularity}-{options.sparsity}"
    own, other = options.work / f"preset-{name}", options.work / f"released-{name}"
    besa(*words, "--run", str(own))
    pruner.prune = prune
    with contextlib.redirect_stdout(sys.stderr):
        app.app([*words, "--run", str(other)], standalone_mode=False)
    perplexities = [perplexity("--no-baseline", "--run", str(run)) for run in (own, other)]
    line = {
        **{name: vars(options)[name] for name in ("model", "sparsity", "granularity")},
        **compare(own / "pruned", other / "pruned"),
        "perplexity": perplexities[0],
        "perplexity_released": perplexities[1],
    }
    print(json.dumps({**line, "machine": machine(), "commit": commit()}))


if __name__ == "__main__":
    main()
