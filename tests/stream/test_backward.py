"""The backward stream against autograd through the whole stock model."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.tiny_models import stock
from test_architectures import CPU
from torch import Tensor

from besa_cli.decoder.decoder import Decoder
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.backward import BackwardStream, StoredBlocks

BLOCKS = 3


class WeightedBlocks(StoredBlocks):
    """Blocks whose linears are leaves that gradients reach, of which only one block is loaded at a time."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.loaded = set[int]()

    def load(self, index: int) -> dict[str, Tensor]:
        super().load(index)
        self.loaded.add(index)
        assert len(self.loaded) == 1
        linears = self._decoder.linears(index)
        return {f"{name}.weight": linear.weight.detach().clone().requires_grad_() for name, linear in linears.items()}

    def drop(self, index: int) -> None:
        super().drop(index)
        self.loaded.discard(index)


def own_loss(logits: Tensor, part: slice, positions: slice, labels: Tensor) -> Tensor:
    wanted = labels[part, positions]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_streamed_gradients_are_those_of_the_whole_model(family: str, in_files: bool, tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", family, blocks=BLOCKS)
    rows, labels = tiny_models.tokens(3, 12), tiny_models.tokens(3, 12, seed=5)
    model = stock(directory, torch.float32)
    model.requires_grad_(True)
    outputs: dict[int, Tensor] = {}
    blocks = model.get_submodule(tiny_models.blocks_of(family))
    for index, block in enumerate(blocks):

        def keep(_: object, args: object, output: Tensor | tuple[Tensor, ...], index: int = index) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output
            outputs[index].retain_grad()

        block.register_forward_hook(keep)
    loss = torch.nn.functional.cross_entropy(
        model(rows, use_cache=False).logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    loss.backward()

    decoder = Decoder(directory, CPU, torch.float32)
    store = ActivationStore(tmp_path if in_files else None)
    stream = BackwardStream(decoder, WeightedBlocks(decoder), rows, batch=2, activations=store)
    total, gradient = stream.head_gradient(
        stream.forward(), lambda logits, part, positions: own_loss(logits, part, positions, labels)
    )
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    visited: list[int] = []

    def visit(index: int, weights: Mapping[str, Tensor] | None, at_output: Tensor) -> None:
        visited.append(index)
        torch.testing.assert_close(at_output, outputs[index].grad, rtol=1e-4, atol=1e-6)
        for name, weight in (weights or {}).items():
            torch.testing.assert_close(weight.grad, blocks[index].get_parameter(name).grad, rtol=1e-4, atol=1e-6)

    stream.backward(gradient, visit)
    assert visited == [2, 1, 0]
