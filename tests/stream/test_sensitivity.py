"""The sensitivity of a model's channels: against autograd through the whole stock model, and what it weighs."""

from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.tiny_models import stock
from test_architectures import CPU
from torch import Tensor

from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.ops import losses
from besa_cli.stream import sensitivity
from besa_cli.stream.activations import ActivationStore

BLOCKS = 3


def by_autograd(directory: Path, family: str, rows: Tensor) -> Tensor:
    """The root mean square of the gradients at every block's output; labels drawn sample by sample."""
    model = stock(directory, torch.float32)
    model.requires_grad_(True)
    outputs: dict[int, Tensor] = {}
    for index, block in enumerate(model.get_submodule(tiny_models.blocks_of(family))):

        def keep(_: object, args: object, output: Tensor | tuple[Tensor, ...], index: int = index) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output
            outputs[index].retain_grad()

        block.register_forward_hook(keep)
    logits = model(rows, use_cache=False).logits
    generator = torch.Generator().manual_seed(sensitivity.SEED)
    labels = [torch.multinomial(row.softmax(-1), 1, generator=generator) for row in logits.detach()]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(labels).flatten(), reduction="sum").backward()
    gradients = [outputs[index].grad for index in range(BLOCKS)]
    return torch.stack([each.flatten(0, 1).square().mean(0).sqrt() for each in gradients if each is not None])


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_sensitivity_is_that_of_autograd_through_the_whole_model(
    family: str, in_files: bool, tmp_path: Path
) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", family, blocks=BLOCKS)
    rows, steps = tiny_models.tokens(3, 12), []
    decoder = Decoder(directory, CPU, torch.float32)
    found = sensitivity.measure(
        decoder,
        rows,
        on_step=lambda done, total, phase: steps.append((done, total, phase)),
        activations=ActivationStore(tmp_path if in_files else None),
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_autograd(directory, family, rows), rtol=1e-4, atol=1e-7)
    assert steps == [(done, 2 * BLOCKS, "sensitivity") for done in range(1, 2 * BLOCKS + 1)]
    assert decoder.head_bytes() > 0 or family in ("gemma2", "gemma3")  # the head is dropped again
    assert sensitivity.seconds(decoder, rows) > 0


def test_only_the_first_samples_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(tiny_models.checkpoint(tmp_path / "model"), CPU, torch.float32)
    monkeypatch.setattr(sensitivity, "SAMPLES", 2)
    rows = tiny_models.tokens(4, 12)
    assert torch.equal(sensitivity.measure(decoder, rows), sensitivity.measure(decoder, rows[:2]))
    assert not torch.equal(sensitivity.measure(decoder, rows), sensitivity.measure(decoder, rows[1:]))


def test_a_gradient_that_overflows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(tiny_models.checkpoint(tmp_path / "model"), CPU, torch.float32)
    own = losses.own_labels
    monkeypatch.setattr(losses, "own_labels", lambda logits, generator: own(logits, generator) * float("inf"))
    with pytest.raises(BesaError, match="the gradient behind block 1 is NaN or infinite in float32"):
        sensitivity.measure(decoder, tiny_models.tokens(2, 12))
