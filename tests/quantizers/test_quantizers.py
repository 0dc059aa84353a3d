"""Round to nearest, GPTQ and learned clipping on a toy block."""

import importlib

import pytest
import torch
from support import toy_block
from torch import Tensor

from besa_cli.errors import UsageError
from besa_cli.ops import affine, importance, obs
from besa_cli.ops import gptq as columns
from besa_cli.ops.affine import Grid
from besa_cli.quantizers import QUANTIZERS, clip, gptq
from besa_cli.stream import descent
from besa_cli.stream import quantized as quantized_blocks
from besa_cli.stream.block import Block, Decision

COARSE = Grid(bits=2, group_size=5, symmetric=False)


def run(method: str, weights: dict[str, Tensor], grid: Grid) -> Decision:
    module = importlib.import_module(f"besa_cli.quantizers.{method}")
    made: Decision = module.quantize(toy_block.block(weights, 0), grid, module.Options())
    return made


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("bits", affine.BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 4])
def test_zeros_stay_zero_and_what_is_stored_is_on_the_grid(
    method: str, bits: int, symmetric: bool, group_size: int | None
) -> None:
    weights = toy_block.source(zeros=0.4, dtype=torch.bfloat16)
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    made = run(method, weights, grid)
    assert set(made.quantized) == set(made.weights) == set(made.masks) == set(weights)
    for name, weight in weights.items():
        assert torch.equal(made.masks[name], weight != 0)
        assert bool((made.weights[name][weight == 0] == 0).all())
        assert torch.equal(made.weights[name], affine.dequantize(made.quantized[name]))
        assert int(made.quantized[name].codes.max()) <= 2**bits - 1


def test_round_to_nearest_and_gptq_are_their_operators_on_the_blocks_inputs() -> None:
    weights = toy_block.source(zeros=0.4)
    inputs = toy_block.linear_inputs(toy_block.block(weights, 0))
    nearest, spread = (run(method, weights, COARSE) for method in ("rtn", "gptq"))
    for name, weight in weights.items():
        assert torch.equal(nearest.quantized[name].codes, affine.nearest(weight, COARSE).codes)
        factor = obs.inverse_factor(importance.gram(inputs[name]), gptq.Options().damping)
        expected = affine.dequantize(columns.quantize(weight, weight != 0, factor, COARSE, search=True))
        agree = torch.isclose(spread.weights[name], expected, rtol=1e-3, atol=1e-6)
        assert float(agree.float().mean()) > 0.95  # sums over batches round otherwise; a code may tip


@pytest.mark.parametrize(("least", "tokens", "compared"), [(8, 4096, 24), (8, 1, 8), (2, 31, 7), (99, 1, 24)])
def test_learned_clipping_beats_rounding_on_the_samples_it_compares(
    least: int, tokens: int, compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descent, "_SAMPLES", least)
    monkeypatch.setattr(descent, "_COMPARED", tokens)  # of 5 a sample
    block = toy_block.block(toy_block.source(), 0, samples=24)
    made = clip.quantize(block, COARSE, clip.Options(lr=0.1, epochs=4))
    plain = quantized_blocks.round_to_nearest(block, COARSE)
    before, after = (
        _error(block, {name: affine.dequantize(each)[None] for name, each in chosen.items()}, compared)
        for chosen in (plain, made.quantized)
    )
    assert not made.kept_uniform
    assert made.error_before == pytest.approx(before, rel=1e-4)
    assert made.error_after == pytest.approx(after, rel=1e-4)
    assert after < 0.99 * before


def _error(block: Block, weights: dict[str, Tensor], compared: int) -> float:
    """Mean over the first samples' tokens of ‖output − target‖² / ‖target‖², the block written out."""
    gate, up, down = (weights[name][0] for name in ("gate", "up", "down"))
    x = block.inputs[:compared]
    inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T + block.linears["up"].bias)
    target = block.target[:compared]
    return float(((x + inner @ down.T - target).square().sum(-1) / target.square().sum(-1)).mean())


def test_rounding_is_kept_where_nothing_was_learned() -> None:
    block = toy_block.block(toy_block.source(), 0)
    made = clip.quantize(block, Grid(bits=8, group_size=None, symmetric=True), clip.Options(lr=50.0))
    assert made.kept_uniform
    assert made.error_after == made.error_before
    for name, each in quantized_blocks.round_to_nearest(block, Grid(bits=8, group_size=None, symmetric=True)).items():
        assert torch.equal(made.quantized[name].codes, each.codes)


def test_bad_options() -> None:
    with pytest.raises(UsageError, match=r"--damping -1.0 is not a finite number of 0 or more"):
        gptq.Options(damping=-1.0)
    with pytest.raises(UsageError, match="--epochs 0 is less than 1"):
        clip.Options(epochs=0)
    with pytest.raises(UsageError, match="--lr nan is not"):
        clip.Options(lr=float("nan"))
