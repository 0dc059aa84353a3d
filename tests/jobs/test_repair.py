"""`besa prune --update`: masks stay, errors fall, resuming, and what is refused."""

import itertools
from pathlib import Path

import pytest
import torch
from support import tiny_models

from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.choices import Update
from besa_cli.errors import UsageError
from besa_cli.jobs import prune
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.stage import StageJob
from besa_cli.stream.block import OnStep

BLOCKS = 3


def asked(
    method: str = "wanda", update: Update = "tune", *, sparsity: float = 0.5, nm: tuple[int, int] | None = None
) -> StageRequest:
    return prune.request(method=method, sparsity=sparsity, nm=nm, update=update, device="cpu", dtype="float32")


def job(directory: Path, run: Path, request: StageRequest, samples: int = 24) -> StageJob:
    rows = tiny_models.calibration_set(tiny_models.tokens(samples, 12), tiny_models.tokens(2, 12, seed=9))
    return StageJob(Run(run), tiny_models.local(directory), rows, request)


def masks_of(run: Path) -> dict[str, torch.Tensor]:
    return {name: weight != 0 for name, weight in tiny_models.weights(run / "pruned").items() if weight.ndim == 2}


def errors(run: Path) -> list[float]:
    return [float(report.error_after or 0.0) for report in Stage(run / "pruned", BLOCKS).reports()]


@pytest.mark.parametrize("update", ["solve", "tune"])
@pytest.mark.parametrize("method", ["wanda", "besa", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_the_count_is_exact_and_the_first_block_keeps_its_mask_and_more_of_its_output(
    family: str, method: str, update: Update, tmp_path: Path
) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", family, blocks=BLOCKS)
    plain = tiny_models.run(job(directory, tmp_path / "plain", asked(method, "none")))
    changed = tiny_models.run(job(directory, tmp_path / "changed", asked(method, update)))
    assert changed["counts"] == {**plain["counts"], "blocks_kept_uniform": changed["counts"]["blocks_kept_uniform"]}
    assert changed["options"]["update"] == update
    assert "update" not in plain["options"]
    before, after = masks_of(tmp_path / "plain"), masks_of(tmp_path / "changed")
    first = [name for name in before if ".layers.0." in name or ".blocks.0." in name]
    assert first
    for name in first:  # later blocks get other inputs
        assert torch.equal(before[name], after[name])
    if update == "tune":
        assert errors(tmp_path / "changed")[0] < errors(tmp_path / "plain")[0]


def test_every_row_keeps_its_pattern(tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", blocks=BLOCKS)
    tiny_models.run(job(directory, tmp_path / "run", asked("wanda", nm=(2, 4))))
    names = tiny_models.linear_names(tiny_models.built(tiny_models.config("llama", blocks=BLOCKS)), "model.layers")
    kept = masks_of(tmp_path / "run")
    for block in names:
        for name in block:
            assert (kept[name].unfold(1, 4, 4).sum(-1) == 2).all()


def test_where_nothing_is_pruned_nothing_changes(tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", blocks=BLOCKS)
    tiny_models.run(job(directory, tmp_path / "run", asked(sparsity=0.0)))
    found, dense = tiny_models.weights(tmp_path / "run" / "pruned"), tiny_models.weights(directory)
    assert all(torch.equal(found[name], weight) for name, weight in dense.items())


def together() -> StageRequest:
    return prune.request(method="wanda", update="tune", global_epochs=1, global_lr=0.05, device="cpu", dtype="float32")


def test_what_the_whole_model_learned_is_repaired(tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", blocks=BLOCKS)
    rates = prune.request(method="wanda", global_epochs=1, global_lr=0.05, device="cpu", dtype="float32")
    plain = tiny_models.run(job(directory, tmp_path / "plain", rates))
    both = tiny_models.run(job(directory, tmp_path / "both", together()))
    assert plain["whole_model"]["kept"] == both["whole_model"]["kept"] == 1
    before, after = masks_of(tmp_path / "plain"), masks_of(tmp_path / "both")
    assert all(torch.equal(mask, after[name]) for name, mask in before.items())
    assert errors(tmp_path / "both")[0] > 0


class Killed(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("request_", [asked("besa"), together()], ids=["blocks", "whole model"])
def test_a_killed_run_ends_in_the_same_bytes(request_: StageRequest, tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", blocks=BLOCKS)
    tiny_models.run(job(directory, tmp_path / "whole", request_))
    steps = iter(range(40))

    def stop(done: int, total: int, phase: str) -> None:
        if phase == "repair" and next(steps, None) is None:
            raise Killed

    on_step: OnStep = stop
    killed = job(directory, tmp_path / "run", request_)
    with pytest.raises(Killed):
        for _ in itertools.chain(killed.blocks(on_step), killed.passes(on_step), killed.repaired(on_step)):
            pass
    tiny_models.run(job(directory, tmp_path / "run", request_))
    for name, weight in tiny_models.weights(tmp_path / "whole" / "pruned").items():
        assert torch.equal(weight, tiny_models.weights(tmp_path / "run" / "pruned")[name])


def test_a_rate_that_ruins_a_block_does_no_harm(tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", blocks=BLOCKS)
    tiny_models.run(job(directory, tmp_path / "solved", asked(update="solve")))
    wild = prune.request(method="wanda", update="tune", update_lr=10.0, device="cpu", dtype="float32")
    tiny_models.run(job(directory, tmp_path / "run", wild))
    for name, weight in tiny_models.weights(tmp_path / "solved" / "pruned").items():
        assert torch.equal(weight, tiny_models.weights(tmp_path / "run" / "pruned")[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"update": "solve", "update_epochs": 2}, "--update-epochs has no effect without --update tune"),
        ({"update_lr": 0.1}, "--update-lr has no effect without --update tune"),
        ({"update": "tune", "options": {"bits": 4}}, "--update tune and --bits 4 exclude each other"),
        ({"update": "tune", "update_epochs": 0}, "0"),
    ],
)
def test_what_cannot_be_done_is_refused(words: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prune.request(**words)  # type: ignore[arg-type]
