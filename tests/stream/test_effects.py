"""Effects of blocks against a plain computation with the whole stock model, and the budgets that follow."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from support import oracles, tiny_models
from support.tiny_models import stock
from test_architectures import CPU
from torch import Tensor, nn

from besa_cli.decoder.decoder import Decoder
from besa_cli.stream import effects, windows
from besa_cli.stream.activations import ActivationStore

BLOCKS, SPARSITIES = 3, (0.25, 0.5, 0.75)
ROWS = tiny_models.tokens(3, 12)


def output_of(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def plain_gradients(model: nn.Module, blocks: nn.Module) -> list[Tensor]:
    """The gradient of the model's own loss at the output of each block, row by row, in one graph."""
    generator, gradients = torch.Generator().manual_seed(0), []
    for row in ROWS:
        outputs: list[Tensor] = []

        def keep(_: object, args: object, output: Tensor | tuple[Tensor, ...], kept: list[Tensor] = outputs) -> None:
            kept.append(output_of(output))

        handles = [block.register_forward_hook(keep) for block in blocks.children()]
        logits = model(row[None], use_cache=False).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients.append(torch.stack(torch.autograd.grad(loss, outputs))[:, 0])
        for handle in handles:
            handle.remove()
    return list(torch.stack(gradients, 1))


def plain_outputs(model: nn.Module, block: nn.Module) -> Tensor:
    found: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, args, output: found.append(output_of(output)))
    with torch.no_grad():
        model(ROWS, use_cache=False)
    handle.remove()
    return found[0]


def plain_effects(directory: Path, family: str) -> list[list[float]]:
    model = stock(directory, torch.float32)
    model.requires_grad_(True)
    blocks = model.get_submodule(tiny_models.blocks_of(family))
    gradients = plain_gradients(model, blocks)
    found = []
    for block, gradient in zip(blocks.children(), gradients, strict=True):
        dense, row = plain_outputs(model, block), []
        before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        for sparsity in SPARSITIES:
            oracles.prune_plainly(model, block, ROWS, sparsity)
            change = gradient * (plain_outputs(model, block) - dense)
            row.append(float(change.square().sum()) / 2 / ROWS.numel())
            block.load_state_dict(before)
        found.append(row)
    return found


@pytest.mark.parametrize("in_files", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_effects_are_those_of_the_whole_model(
    family: str, in_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    even = {**tiny_models._COMMON, "intermediate_size": 64, "ffn_dim": 64}  # whole shares of every row
    monkeypatch.setitem(
        tiny_models.CONFIGS, family, (tiny_models.CONFIGS[family][0], {**tiny_models.CONFIGS[family][1], **even})
    )
    directory = tiny_models.checkpoint(tmp_path / "model", family, blocks=BLOCKS)
    decoder = Decoder(directory, CPU, torch.float32)
    steps: list[tuple[int, int, str]] = []
    measured = effects.measure(
        decoder,
        ROWS,
        sparsities=SPARSITIES,
        batch=2,
        on_step=lambda *step: steps.append(step),
        activations=ActivationStore(tmp_path if in_files else None),
    )
    for own, expected in zip(measured.errors, plain_effects(directory, family), strict=True):
        assert own == pytest.approx(expected, rel=1e-3)
    assert steps == [(done, BLOCKS, "budget") for done in (1, 2, 3)]
    assert len(set(measured.sizes)) == 1
    assert measured.zeros == (0,) * BLOCKS


def some_effects(sizes: tuple[int, ...], zeros: tuple[int, ...] | None = None) -> effects.BlockEffects:
    errors = tuple(
        tuple((2 + index) ** 3 * 100.0**sparsity for sparsity in effects.SPARSITIES) for index in range(len(sizes))
    )
    return effects.BlockEffects(
        sparsities=effects.SPARSITIES, errors=errors, sizes=sizes, zeros=zeros or (0,) * len(sizes)
    )


@pytest.mark.parametrize("sparsity", [0.01, 0.1, 0.333, 0.5, 0.7, 0.9, 0.97, 0.999])
def test_budgets_meet_the_count_of_the_whole_model_within_the_bounds(sparsity: float) -> None:
    sizes = (1001, 997, 2003, 13)
    counts = effects.block_budgets(some_effects(sizes), sparsity)
    assert sum(counts) == round(Fraction(str(sparsity)) * sum(sizes))
    for count, size in zip(counts, sizes, strict=True):
        assert sparsity - effects.FARTHEST - 1 / size <= count / size <= sparsity + effects.FARTHEST + 1 / size
        assert 0 <= count <= size
    assert counts[0] / sizes[0] >= counts[2] / sizes[2] - 1e-3  # pruning the third has more effect


def test_budgets_stay_within_what_a_method_reaches_and_above_the_zeros_that_are_there() -> None:
    sizes = (1000, 1000, 1000)
    counts = effects.block_budgets(some_effects(sizes), 0.5, (0.45, 0.52))
    assert counts == [510, 510, 480]  # half of the way to 520, 520, 460, as half is pruned
    assert effects.block_budgets(some_effects(sizes, (0, 0, 600)), 0.5)[2] == 600


def test_windows_get_the_sum_of_their_blocks_and_halves_share_it_by_size(tmp_path: Path) -> None:
    decoder = Decoder(tiny_models.checkpoint(tmp_path, blocks=3), CPU, torch.float32)
    pruned = [101, 203, 307]
    assert windows.budgets(windows.segments(decoder, "block"), pruned) == pruned
    assert windows.budgets(windows.segments(decoder, "2"), pruned) == [304, 307]
    halves = windows.segments(decoder, "attn-mlp")
    sizes, counts = list(windows.sizes(halves)), windows.budgets(halves, pruned)
    for index, count in enumerate(pruned):
        first, second = sizes[2 * index : 2 * index + 2]
        assert counts[2 * index] == round(Fraction(count * first, first + second))
        assert counts[2 * index] + counts[2 * index + 1] == count


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.5, [0.3, 0.4, 0.5, 0.6, 0.7]),
        (0.7, [0.5, 0.6, 0.7, 0.8, 0.9]),
        (0.75, [0.6, 0.7, 0.8, 0.9]),
        (0.01, [0.1, 0.2]),
        (0.999, [0.8, 0.9]),
    ],
)
def test_only_what_encloses_the_sparsities_of_the_blocks_is_measured(sparsity: float, expected: list[float]) -> None:
    assert effects.sparsities_around(sparsity) == expected
    assert effects.sparsities_around(0.5, (0.376, 0.624)) == [0.3, 0.4, 0.5, 0.6, 0.7]


def test_samples_are_eight_or_as_many_as_have_4096_tokens() -> None:
    assert [effects.measured_samples(128, seqlen) for seqlen in (256, 512, 2048)] == [16, 8, 8]
    assert effects.measured_samples(3, 12) == 3
