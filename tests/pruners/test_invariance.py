"""What no pruning method may depend on: the order of the hidden channels, and the size of the hidden state."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny_models
from torch import Tensor

from besa_cli.checkpoint.runs import Run
from besa_cli.jobs.stage import StageJob
from besa_cli.pruners import PRUNERS

BLOCKS = 2
READ = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # the hidden state, through a norm
WRITE = ("o_proj", "down_proj")  # to the hidden state
ASKED: list[tuple[str, dict[str, Any]]] = [*((method, {}) for method in PRUNERS), ("besa", {"loss": "token"})]


def model() -> transformers.PreTrainedModel:
    """A tiny llama whose channels differ in size."""
    made = tiny_models.built(tiny_models.config("llama", blocks=BLOCKS))
    sizes = torch.randn(tiny_models.HIDDEN, generator=torch.Generator().manual_seed(4)).exp()
    with torch.no_grad():
        made.get_parameter("model.embed_tokens.weight").mul_(sizes)
    return made


def masks(made: transformers.PreTrainedModel, place: Path, method: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """True where a weight is kept, by the name of the linear's weight."""
    made.save_pretrained(place / "model")
    rows = tiny_models.calibration_set(tiny_models.tokens(samples=16))
    request = tiny_models.request(method, **options)
    tiny_models.run(StageJob(Run(place / "run"), tiny_models.local(place / "model"), rows, request))
    stored = tiny_models.weights(place / "run" / "pruned")
    return {name: tensor != 0 for name, tensor in stored.items() if name.split(".")[-2] in (*READ, *WRITE)}


def agreement(one: dict[str, Tensor], other: dict[str, Tensor], names: list[str]) -> float:
    """The share of weights with the same mask."""
    same = [(one[name] == other[name]).flatten() for name in names]
    return float(torch.cat(same).double().mean())


@pytest.mark.parametrize(("method", "options"), ASKED)
def test_permuted_channels_permute_the_masks(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    """But for SparseGPT, which goes from column to column: there only the rows of the first block's linears."""
    order = torch.randperm(tiny_models.HIDDEN, generator=torch.Generator().manual_seed(8))
    expected = masks(model(), tmp_path / "plain", method, options)
    permuted = model()
    with torch.no_grad():
        for name, weight in permuted.named_parameters():
            last = name.split(".")[-2]
            weight.copy_(weight[order] if last in WRITE or weight.ndim == 1 else weight[:, order])
    found = masks(permuted, tmp_path / "permuted", method, options)
    for name, mask in expected.items():
        expected[name] = mask[order] if name.split(".")[-2] in WRITE else mask[:, order]
    names = list(expected)
    if method == "sparsegpt":
        names = [name for name in names if ".0." in name and name.split(".")[-2] in WRITE]
    assert agreement(found, expected, names) > 0.995
    if names != list(expected):
        return
    assert agreement(found, {name: mask.flip(-1) for name, mask in expected.items()}, names) < 0.9


@pytest.mark.parametrize("power", [-7, 9])
@pytest.mark.parametrize(("method", "options"), ASKED)
def test_a_hidden_state_times_a_power_of_two_changes_nothing(
    method: str, options: dict[str, Any], power: int, tmp_path: Path
) -> None:
    expected = masks(model(), tmp_path / "plain", method, options)
    scaled, factor = model(), 2.0**power
    with torch.no_grad():
        for name, weight in scaled.named_parameters():
            if name.split(".")[-2] in (*WRITE, "embed_tokens"):
                weight.mul_(factor)
    scaled.config.rms_norm_eps *= factor**2
    found = masks(scaled, tmp_path / "scaled", method, options)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
