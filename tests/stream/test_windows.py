"""Windows of several blocks and of half a block: what they compute, what they prune, and how they go on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.tiny_models import stock
from test_architectures import CPU, check_bits, finish
from torch import Tensor

from besa_cli.checkpoint.reports import BlockReport
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError, UsageError
from besa_cli.jobs.stage import StageJob
from besa_cli.stream import propagation, windows

HALVED = [family for family in tiny_models.FAMILIES if family != "opt"]


def loaded(directory: Path, blocks: int) -> Decoder:
    decoder = Decoder(directory, CPU, torch.float32)
    for index in range(blocks):
        decoder.load(index)
    return decoder


def zeros(stage: Path) -> list[int]:
    """Zeros in the linears of each block."""
    model = stock(stage)
    state = model.state_dict()
    return [
        sum(int((state[name] == 0).sum()) for name in block)
        for block in tiny_models.linear_names(model, "model.layers")
    ]


@pytest.mark.parametrize("family", HALVED)
def test_half_windows_give_what_the_stock_models_own_modules_give(family: str, tmp_path: Path) -> None:
    directory, rows = tiny_models.checkpoint(tmp_path, family), tiny_models.tokens(2, 12)
    model, seen = stock(directory, torch.float32), {}
    blocks = model.get_submodule(tiny_models.blocks_of(family))
    for index, block in enumerate(blocks):
        for name, module in block.named_children():
            module.register_forward_hook(
                lambda _, args, output, key=(index, name): seen.update(
                    {key: output[0] if isinstance(output, tuple) else output}
                )
            )
    with torch.no_grad():
        model(rows, use_cache=False)
    decoder = loaded(directory, 2)
    hidden = propagation.embed(decoder, rows, 2)
    for index, segment in enumerate(windows.segments(decoder, "attn-mlp")):
        attention, mlp = segment.windows
        names = [next(iter(window.linears)).split(".")[0] for window in segment.windows]
        assert {*attention.linears, *mlp.linears} == set(decoder.linears(index))
        with torch.no_grad():
            for window, name in zip(segment.windows, names, strict=True):
                expected = seen[index, name]
                assert torch.allclose(window.output_from(hidden, rows), expected, atol=1e-5)
                assert torch.allclose(window.forward(window.inputs_from(hidden, rows), rows), expected, atol=1e-5)
        propagation.advance(decoder, index, hidden, rows, 2)


def gradients(window: windows.Window, hidden: Tensor, rows: Tensor) -> dict[str, Tensor]:
    weights = {name: linear.weight.detach().clone().requires_grad_() for name, linear in window.linears.items()}
    window.forward(hidden, rows, weights).square().sum().backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_wide_window_gives_the_gradients_of_its_blocks_in_a_row(family: str, tmp_path: Path) -> None:
    """Four blocks are computed twice to save memory, two are not: the gradients are those of a plain loop."""
    directory, rows = tiny_models.checkpoint(tmp_path, family, blocks=4), tiny_models.tokens(2, 12)
    decoder = loaded(directory, 4)
    hidden = propagation.embed(decoder, rows, 2)
    for width in (2, 4):
        window = windows.WholeBlocks(decoder, range(width))
        found = gradients(window, hidden, rows)
        weights = {name: linear.weight.detach().clone().requires_grad_() for name, linear in window.linears.items()}
        states = hidden
        for index in range(width):
            own = {f"{name.split('.', 1)[1]}.weight": w for name, w in weights.items() if name.startswith(f"{index}.")}
            states = decoder.forward(index, states, rows, own)
        states.square().sum().backward()
        assert found.keys() == weights.keys()
        for name, gradient in found.items():
            assert torch.allclose(gradient, weights[name].grad, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["block", "stream"])
@pytest.mark.parametrize("width", ["attn-mlp", "2", "3", "9"])
def test_every_window_prunes_its_exact_count(width: str, target: str, tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama", blocks=4, dtype=torch.float16)
    request = tiny_models.request("besa", sparsity=0.43, window=width, target=target)
    stage = finish(tmp_path / "run", model, request)
    check_bits(stage, model, survivors=True)
    sizes = [sum(w.numel() for w in block) for block in linear_weights(model)]
    expected, found = tiny_models.prefix_counts(0.43, sizes), zeros(stage)
    blocks = 1 if width == "attn-mlp" else min(int(width), 4)
    for end in [*range(blocks, 4, blocks), 4]:
        assert sum(found[:end]) == expected[end - 1]
    if width == "2":
        assert found[0] != expected[0]  # the two blocks of a window share their budget as they need it


class Stop(Exception):
    """Where the run ends."""


def linear_weights(directory: Path) -> list[list[Tensor]]:
    model = stock(directory)
    state = model.state_dict()
    return [[state[name] for name in block] for block in tiny_models.linear_names(model, "model.layers")]


@pytest.mark.parametrize("width", ["attn-mlp", "2"])
@pytest.mark.parametrize("target", ["block", "stream"])
def test_an_interrupted_run_ends_in_the_same_bytes(
    width: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama", blocks=4)
    request = tiny_models.request("besa", window=width, target=target, epochs=2)
    whole = finish(tmp_path / "whole", model, request)
    write = Stage.write
    for blocks in range(1, 4):  # with two-block windows, 1 and 3 lie inside of one
        left = iter(range(blocks))

        def stopping(
            stage: Stage,
            report: BlockReport,
            tensors: dict[str, Tensor],
            codes: dict[str, Tensor],
            state: dict[str, Tensor] | None = None,
            left: Iterator[int] = left,
        ) -> None:
            if next(left, None) is None:
                raise Stop
            write(stage, report, tensors, codes, state)

        run = tmp_path / f"run{blocks}"
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "write", stopping)
            with pytest.raises(Stop):
                finish(run, model, request)
        stage = finish(run, model, request)
        names = sorted(path.name for path in whole.iterdir() if path.name != "timing.jsonl")
        assert names == sorted(path.name for path in stage.iterdir() if path.name != "timing.jsonl")
        for name in names:
            if name != "besa.json":
                assert (stage / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_block_without_two_such_modules_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "opt")
    calibration = tiny_models.calibration_set(tiny_models.tokens(2, 12))
    with pytest.raises(BesaError, match="OPTForCausalLM has its linears in self_attn, fc1, fc2"):
        StageJob(
            Run(tmp_path / "run"), tiny_models.local(model), calibration, tiny_models.request("besa", window="attn-mlp")
        )


@pytest.mark.parametrize("width", ["0", "-1", "blocks", "1.5", ""])
def test_what_is_no_window_is_refused(width: str) -> None:
    with pytest.raises(UsageError, match="is not block, attn-mlp or a number"):
        tiny_models.request("besa", window=width)


def test_two_blocks_together_are_learned_for_what_leaves_the_second(tmp_path: Path) -> None:
    """The report of a window's last block has its errors; learning lowers them, as it does for single blocks."""
    model = tiny_models.checkpoint(tmp_path / "model", "llama", blocks=2)
    request = tiny_models.request("besa", window="2", epochs=8)
    job = StageJob(
        Run(tmp_path / "run"),
        tiny_models.local(model),
        tiny_models.calibration_set(tiny_models.tokens(16, 16)),
        request,
    )
    first, second = job.blocks()
    assert (first.error_before, first.error_after) == (None, None)
    assert second.error_before is not None
    assert second.error_after is not None
    assert second.error_after < second.error_before
    assert first.learned_loss == second.learned_loss is not None
