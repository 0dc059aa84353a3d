"""A block small enough to check by hand: a gated MLP behind the face of a window."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from besa_cli.stream.block import Block


class GatedMLP(nn.Module):
    """x + down(silu(gate(x)) · up(x)): gate and up share their inputs."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=True)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return result


class ToyWindow:
    """One block, always loaded; counts how often it is run."""

    def __init__(self, module: GatedMLP) -> None:
        self.module = module.requires_grad_(False)
        self.blocks = range(1)
        self.linears = {"gate": module.gate, "up": module.up, "down": module.down}
        self.locations = {name: (0, name) for name in self.linears}
        self.calls = 0

    def inputs_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return hidden

    def forward(self, inputs: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        assert tokens.shape == inputs.shape[:2]
        self.calls += 1
        named = {f"{name}.weight": weight for name, weight in (weights or {}).items()}
        result: Tensor = torch.func.functional_call(self.module, named, (inputs,))
        return result

    def output_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.forward(hidden, tokens)


def source(
    *, hidden: int = 10, inner: int = 14, seed: int = 0, dtype: torch.dtype = torch.float32, zeros: float = 0.0
) -> dict[str, Tensor]:
    """Weights whose rows differ widely in size, so that an even sparsity is a poor choice; a share of them zero."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> Tensor:
        sizes = torch.randn(rows, 1, generator=generator).exp()
        weight = torch.randn(rows, cols, generator=generator) * sizes / cols**0.5
        dead = torch.rand(rows, cols, generator=generator) < zeros
        made: Tensor = weight.masked_fill(dead, 0.0).to(dtype)
        return made

    return {"gate": matrix(inner, hidden), "up": matrix(inner, hidden), "down": matrix(hidden, inner)}


def block(
    weights: Mapping[str, Tensor],
    budget: int,
    *,
    samples: int = 8,
    seqlen: int = 5,
    batch: int = 3,
    seed: int = 0,
    target: Tensor | None = None,
    sensitivity: Tensor | None = None,
) -> Block:
    """A block with these weights (in the source's dtype; computed in fp32) and random inputs of uneven channels.

    All its channels are alike where no `sensitivity` is given.
    """
    inner, hidden = weights["up"].shape
    torch.manual_seed(7)
    module = GatedMLP(hidden, inner)
    with torch.no_grad():
        for name, weight in weights.items():
            module.get_submodule(name).weight.copy_(weight)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(samples, seqlen, hidden, generator=generator) * torch.linspace(0.1, 3, hidden)
    return Block(
        ToyWindow(module),
        weights,
        budget=budget,
        inputs=inputs,
        tokens=torch.zeros(samples, seqlen, dtype=torch.long),
        batch=batch,
        target=target,
        seed=seed,
        sensitivity=torch.ones(hidden) if sensitivity is None else sensitivity,
    )


def size(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.numel() for weight in weights.values())


def pruned(masks: Mapping[str, Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def linear_inputs(made: Block) -> dict[str, Tensor]:
    """The inputs of each linear over all samples, of shape (tokens, cols), by writing the block out."""
    linears = made.linears
    x = made.inputs.reshape(-1, made.inputs.shape[-1])
    with torch.no_grad():
        inside = nn.functional.silu(linears["gate"](x)) * linears["up"](x)
    return {"gate": x, "up": x, "down": inside}


def outputs(made: Block, masks: Mapping[str, Tensor]) -> list[Tensor]:
    """What the block gives for each sample under masks, by writing the block out."""
    kept = {name: (linear.weight * masks[name]).detach() for name, linear in made.linears.items()}
    bias = made.linears["up"].bias
    return [
        x + (nn.functional.silu(x @ kept["gate"].T) * (x @ kept["up"].T + bias)) @ kept["down"].T for x in made.inputs
    ]


def error(made: Block, masks: Mapping[str, Tensor], over: tuple[int, ...] = (-1,)) -> float:
    """Mean over samples of Σ (output − target)² / Σ target², both sums over the axes `over` of (tokens, channels)."""
    errors = []
    for output, target in zip(outputs(made, masks), made.target, strict=True):
        errors.append(float(((output - target).square().sum(over) / target.square().sum(over)).mean()))
    return sum(errors) / len(errors)
