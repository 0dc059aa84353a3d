"""The probe against stock transformers with the weights changed by hand, one compressed model after the other."""

from pathlib import Path

import pytest
import torch
from support import oracles, tiny_models
from support.tiny_models import stock
from test_architectures import CPU
from torch import Tensor, nn

from besa_cli.decoder.decoder import Decoder
from besa_cli.ops.affine import Grid
from besa_cli.stream import probe
from besa_cli.stream.probe import Compression

ROWS = tiny_models.tokens(3, 12)
GRID = Grid(bits=4, group_size=16)
COMPRESSIONS = [Compression(0.0), Compression(0.5), Compression(0.0, GRID), Compression(0.25, GRID)]


def rounded(weight: Tensor) -> Tensor:
    """Each group of 16 columns to the nearest of 16 codes between −max|W| and max|W|; the scale is in fp16."""
    result = weight.clone()
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 16):
            group = weight[row, start : start + 16]
            scale = (2 * group.abs().max() / 15).half().float()
            result[row, start : start + 16] = ((group / scale).round() + 8).clamp(0, 15).sub(8) * scale
    return result


def compress(model: nn.Module, blocks: nn.Module, compression: Compression) -> None:
    """Change the linears of all blocks, by the inputs that they have in the dense model."""
    oracles.prune_plainly(model, blocks, ROWS, compression.sparsity)
    if compression.grid is not None:
        for linear in (module for module in blocks.modules() if isinstance(module, nn.Linear)):
            linear.weight.data = rounded(linear.weight.data)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_divergences_are_those_of_stock_models_changed_by_hand(tmp_path: Path, family: str) -> None:
    directory = tiny_models.checkpoint(tmp_path / "m", family, blocks=2)
    decoder = Decoder(directory, CPU, torch.float32)
    found = probe.divergences(decoder, ROWS, COMPRESSIONS)
    with torch.no_grad():
        dense = stock(directory)(ROWS, use_cache=False).logits.log_softmax(-1)
        for compression, value in zip(COMPRESSIONS, found, strict=True):
            model = stock(directory)
            compress(model, model.get_submodule(decoder.prefix), compression)
            logits = model(ROWS, use_cache=False).logits.log_softmax(-1)
            expected = nn.functional.kl_div(logits, dense, log_target=True, reduction="sum") / ROWS.numel()
            assert value == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert found[1] > found[0]


def test_a_large_batch_gives_the_same(tmp_path: Path) -> None:
    decoder = Decoder(tiny_models.checkpoint(tmp_path / "m", blocks=2), CPU, torch.float32)
    single = probe.divergences(decoder, ROWS, COMPRESSIONS)
    assert probe.divergences(decoder, ROWS, COMPRESSIONS, batch=2) == pytest.approx(single, rel=1e-4, abs=1e-7)
