"""`besa prune --global-epochs`: exact counts, a falling divergence, resuming, and what is refused."""

from pathlib import Path

import pytest
import torch
from support import tiny_models
from support.tiny_models import stock

from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError, UsageError
from besa_cli.jobs import prune
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.stage import StageJob
from besa_cli.ops import losses
from besa_cli.stream.block import OnStep

BLOCKS = 3
HELD_OUT = tiny_models.tokens(2, 12, seed=9)


def asked(method: str = "wanda", *, sparsity: float = 0.5, epochs: int = 2, **options: object) -> StageRequest:
    return prune.request(
        method=method,
        sparsity=sparsity,
        global_epochs=epochs,
        global_lr=0.05,
        options=options,
        device="cpu",
        dtype="float32",
    )


def job(directory: Path, run: Path, request: StageRequest, samples: int = 16) -> StageJob:
    rows = tiny_models.calibration_set(tiny_models.tokens(samples, 12), HELD_OUT)
    return StageJob(Run(run), tiny_models.local(directory), rows, request)


def divergence(dense: Path, pruned: Path, rows: torch.Tensor) -> float:
    with torch.no_grad():
        target, found = (stock(each, torch.float32)(rows, use_cache=False).logits for each in (dense, pruned))
        p, q = target.log_softmax(-1), found.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("method", ["wanda", "besa", "magnitude"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_the_counts_are_exact_and_the_divergence_is_that_of_the_stock_models(
    family: str, method: str, tmp_path: Path
) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", family, blocks=BLOCKS)
    made = job(directory, tmp_path / "run", asked(method))
    reports = [*made.blocks()]
    passes = [*made.passes()]
    manifest = made.finish()
    assert [report.index for report in reports] == list(range(BLOCKS))
    assert [report.number for report in passes] == [0, 1, 2]
    counts, whole = manifest["counts"], manifest["whole_model"]
    size = sum(linear.rows * linear.cols for report in reports for linear in report.linears)
    assert counts["pruned"] == counts["zeros"] == tiny_models.prefix_counts(0.5, [size])[-1]
    assert whole["divergence"] == [report.held_out for report in passes]
    assert whole["kept"] == min(range(3), key=lambda number: whole["divergence"][number])
    assert whole["held_out"] == len(HELD_OUT)
    expected = divergence(directory, tmp_path / "run" / "pruned", HELD_OUT)
    assert whole["divergence"][whole["kept"]] == pytest.approx(expected, rel=1e-4)
    assert not (tmp_path / "run" / "pruned" / "draft").exists()


def test_kept_weights_are_the_models_own_and_rows_differ(tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", "llama", blocks=BLOCKS)
    made = job(directory, tmp_path / "run", asked(epochs=4))
    tiny_models.run(made)
    dense, pruned = tiny_models.weights(directory), tiny_models.weights(tmp_path / "run" / "pruned")
    changed = 0
    for name, weight in pruned.items():
        assert torch.equal(weight[weight != 0], dense[name][weight != 0])
        if (weight == 0).any():
            changed += len(set((weight == 0).sum(1).tolist())) > 2
    assert changed


def test_where_nothing_is_pruned_the_divergence_is_not_negative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divergence_of = losses.divergence
    monkeypatch.setattr(losses, "divergence", lambda logits, target: divergence_of(logits, target) - 1e-6)
    directory = tiny_models.checkpoint(tmp_path / "model", "llama", blocks=BLOCKS)
    manifest = tiny_models.run(job(directory, tmp_path / "run", asked(sparsity=0.0, epochs=1), samples=4))
    assert manifest["counts"]["pruned"] == 0
    assert manifest["whole_model"]["divergence"] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert min(manifest["whole_model"]["divergence"]) >= 0.0


class Killed(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("at", [("global", 1), ("global", 17), ("global", 28), ("write", 0), ("write", 2), ("end", 0)])
def test_a_killed_run_ends_in_the_same_bytes(
    at: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", "llama", blocks=BLOCKS)
    whole = job(directory, tmp_path / "whole", asked())
    tiny_models.run(whole)
    where, number = at

    def stop(done: int, total: int, phase: str) -> None:
        if (phase, done) == at:
            raise Killed

    first = job(directory, tmp_path / "run", asked())
    list(first.blocks())
    with monkeypatch.context() as patched:
        if where == "write":
            write = first._stage.write
            written: list[object] = []

            def writing(*each: object) -> None:
                if len(written) == number:
                    raise Killed
                written.append(each)
                write(*each)  # type: ignore[arg-type]

            patched.setattr(first._stage, "write", writing)
        if where == "end":
            patched.setattr("besa_cli.checkpoint.stages.drop_draft", lambda place: stop(0, 0, "end"))
        with pytest.raises(Killed):
            to_the_end(first, stop)
    again = job(directory, tmp_path / "run", asked())
    tiny_models.run(again)
    assert tiny_models.files(tmp_path / "run" / "pruned") == tiny_models.files(tmp_path / "whole" / "pruned")


def to_the_end(made: StageJob, on_step: OnStep) -> None:
    list(made.passes(on_step))
    made.finish()


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", "llama", blocks=BLOCKS)
    first = job(directory, tmp_path / "run", asked())
    list(first.blocks())
    next(first.passes())
    state = tmp_path / "run" / "pruned" / "draft" / "rates.safetensors"
    content = bytearray(state.read_bytes())
    content[-5] ^= 1
    state.write_bytes(bytes(content))
    with pytest.raises(BesaError, match=r"rates\.safetensors is damaged"):
        tiny_models.run(job(directory, tmp_path / "run", asked()))


@pytest.mark.parametrize(
    ("method", "changed", "said"),
    [
        ("wanda", {"nm": (2, 4)}, "--nm 2:4 exclude each other"),
        ("besa", {"options": {"bits": 4}}, "--bits 4 exclude each other"),
        ("sparsegpt", {}, "--method sparsegpt exclude"),
        ("wanda", {"global_epochs": 0, "global_lr": 0.1}, "--global-lr has no effect"),
        ("wanda", {"global_epochs": -1}, "--global-epochs -1 is less than 1"),
        ("wanda", {"global_lr": float("nan")}, "--global-lr nan is not a finite number"),
    ],
)
def test_nonsense_is_refused(method: str, changed: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        prune.request(method=method, **{"global_epochs": 1, **changed})  # type: ignore[arg-type]
