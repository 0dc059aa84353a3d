"""The sensitivity of the channels in a command: measured once, kept beside the samples, and never another on resume."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from test_architectures import CPU
from torch import Tensor

from besa_cli.checkpoint import sensitivity_file
from besa_cli.checkpoint.runs import Run
from besa_cli.decoder.decoder import Decoder
from besa_cli.jobs.stage import StageJob
from besa_cli.ops import losses
from besa_cli.stream import descent, sensitivity
from besa_cli.stream.block import Block

Besa = Callable[..., Any]  # conftest.Outcome

BLOCKS, SAMPLES, SEQLEN = 3, 4, 12
ROWS = tiny_models.tokens(SAMPLES, SEQLEN)
REUSED, KEPT = "sensitivity of the channels: reused from", "sensitivity of the channels: kept in"


@pytest.fixture
def words(workplace: Path) -> list[str]:
    """The command with the samples in calibrated/."""
    model = tiny_models.add_tokenizer(tiny_models.checkpoint(workplace / "model", blocks=BLOCKS))
    tiny_models.rows_file(workplace / "rows.jsonl", ROWS)
    return ["prune", "--model", str(model), "--dtype", "float32", "--loss", "sensitivity"]


@pytest.fixture
def drawn() -> list[str]:
    return ["--data", "rows.jsonl", "--samples", str(SAMPLES), "--seqlen", str(SEQLEN)]


def stored(run: Path) -> Path:
    (file,) = (run / "calibration").glob("sensitivity-*.safetensors")
    return file


def unmeasurable(*_: object, **__: object) -> Tensor:
    raise AssertionError("measured again")


def test_it_is_measured_once_and_reused(
    besa: Besa, words: list[str], drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = besa(*words, *drawn, "--run", "one")
    assert first.code == 0, first.err
    file = stored(Path("one"))
    assert f"{KEPT} {file}" in first.err
    values = load_file(file)["sensitivity"]
    assert torch.equal(values, sensitivity.measure(Decoder(Path("model"), CPU, torch.float32, quick=True), ROWS))
    manifest = json.loads(Path("one/pruned/besa.json").read_text())
    assert bytes(load_file(file)["sha256"].tolist()).hex() == manifest["calibration"]["sensitivity"]
    assert not Path("one/pruned/sensitivity.safetensors").exists()
    monkeypatch.setattr(sensitivity, "measure", unmeasurable)
    again = besa(*words, "--calibration", "one/calibration", "--run", "two")
    assert again.code == 0, again.err
    assert f"{REUSED} {file}" in again.err
    assert tiny_models.weights(Path("two/pruned")).keys() == tiny_models.weights(Path("one/pruned")).keys()
    for name, tensor in tiny_models.weights(Path("one/pruned")).items():
        assert torch.equal(tiny_models.weights(Path("two/pruned"))[name], tensor), name
    other = besa(*words, "--sparsity", "0.6", "--calibration", "one/calibration", "--run", "three")
    assert other.code == 0, other.err


def test_every_model_and_dtype_has_a_file_of_its_own(besa: Besa, words: list[str], drawn: list[str]) -> None:
    assert besa(*words, *drawn, "--run", "one").code == 0
    for run, more in (("two", ["--dtype", "bfloat16"]), ("three", ["--model", "other"])):
        tiny_models.add_tokenizer(tiny_models.checkpoint(Path("other"), blocks=2, seed=3))
        assert besa(*words, "--calibration", "one/calibration", "--run", run, *more).code == 0
    assert len(list(Path("one/calibration").glob("sensitivity-*"))) == 3
    assert len(list(Path("one/calibration").iterdir())) == 5
    again = besa("calibrate", "--model", "model", *drawn, "--run", "one", "--restart")  # nothing in it is foreign
    assert again.code == 0, again.err
    assert sorted(path.name for path in Path("one/calibration").iterdir()) == ["besa.json", "tokens.safetensors"]


def test_a_calibration_set_of_others_is_not_written_to(
    besa: Besa, words: list[str], drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert besa("calibrate", "--model", "model", *drawn, "--run", "one").code == 0
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not ("one" in str(path) and mode & os.W_OK)
    )
    made = besa(*words, "--calibration", "one/calibration", "--run", "two")
    assert made.code == 0, made.err
    assert "sensitivity of the channels" not in made.err
    assert sorted(path.name for path in Path("one/calibration").iterdir()) == ["besa.json", "tokens.safetensors"]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _shape(file: Path) -> None:
    tensors = load_file(file)
    save_file({**tensors, "sensitivity": tensors["sensitivity"][1:].clone()}, file)


def _lack(file: Path) -> None:
    save_file({"sensitivity": load_file(file)["sensitivity"]}, file)


def _infinite(file: Path) -> None:
    """A file that was written so."""
    values = torch.full((BLOCKS, tiny_models.HIDDEN), float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity_file, "digest", lambda values, key: "ab" * 32)
        sensitivity_file.write(file, values, "")


def _other(file: Path) -> None:
    """The values of another model under this one's name."""
    sensitivity_file.write(file, load_file(file)["sensitivity"], "another key")


@pytest.mark.parametrize("harm", [_flip, _cut, _shape, _lack, _infinite, _other])
def test_a_damaged_file_is_refused_in_one_line(
    harm: Callable[[Path], None], besa: Besa, words: list[str], drawn: list[str]
) -> None:
    assert besa(*words, *drawn, "--run", "one").code == 0
    file = stored(Path("one"))
    harm(file)
    refused = besa(*words, "--calibration", "one/calibration", "--run", "two")
    assert refused.code == 1
    error, hint = refused.err.splitlines()[-2:]
    assert error.startswith(f"error: {file} ")
    assert hint == "hint: delete it: the same command makes it again"
    file.unlink()
    assert besa(*words, "--calibration", "one/calibration", "--run", "two").code == 0


def test_a_dry_run_says_what_the_measurement_takes(
    besa: Besa, words: list[str], drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "seconds", lambda decoder, tokens: 3600.0)
    before = tiny_models.files(Path(), without=())
    first = json.loads(besa(*words, *drawn, "--run", "one", "--dry-run", "--json").out)
    assert tiny_models.files(Path(), without=()) == before
    plain = json.loads(besa(*words, *drawn, "--run", "one", "--dry-run", "--json", "--loss", "token").out)
    assert first["seconds"] > 3600 > plain["seconds"]
    assert besa(*words, *drawn, "--run", "one").code == 0
    reused = json.loads(besa(*words, "--calibration", "one/calibration", "--run", "two", "--dry-run", "--json").out)
    assert reused["seconds"] < 3600


def test_the_hidden_states_of_the_measurement_lie_in_files_where_memory_is_short(
    besa: Besa, words: list[str], drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from besa_cli.stream import memory_model

    planned = memory_model.plan
    monkeypatch.setattr(
        memory_model, "plan", lambda *args, **rest: planned(*args, **rest).__class__(
            **{**vars(planned(*args, **rest)), "in_files": True}
        )
    )  # fmt: skip
    given: list[Any] = []
    measure = sensitivity.measure

    def noted(*args: Any, activations: Any, **rest: Any) -> Tensor:
        given.append(activations)
        return measure(*args, activations=activations, **rest)

    monkeypatch.setattr(sensitivity, "measure", noted)
    made = besa(*words, *drawn, "--run", "one")
    assert made.code == 0, made.err
    assert given[0]._directory == Path("one")


def job(place: Path, model: Path, notes: list[str] | None = None, **options: Any) -> StageJob:
    request = tiny_models.request("besa", **{"loss": "sensitivity", **options})
    rows = tiny_models.calibration_set(ROWS)
    notify = notes.append if notes is not None else lambda _: None
    return StageJob(Run(place), tiny_models.local(model), rows, request, notify=notify)


@pytest.mark.parametrize(
    ("window", "expected"), [("block", [0, 1, 2]), ("2", [1, 2]), ("attn-mlp", [0, 0, 1, 1, 2, 2])]
)
def test_a_window_has_the_sensitivity_behind_its_last_block(
    window: str, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", blocks=BLOCKS)
    seen: list[Tensor | None] = []
    measure = descent.measure

    def noted(block: Block, loss: Any) -> descent.Measure:
        seen.append(block.sensitivity)
        return measure(block, loss)

    monkeypatch.setattr(descent, "measure", noted)
    tiny_models.run(job(tmp_path / "run", model, window=window))
    values = sensitivity.measure(Decoder(model, CPU, torch.float32, quick=True), ROWS)
    learned = seen[::3]  # then the two allocations are compared
    assert len(seen) == 3 * len(expected)
    for found, index in zip(learned, expected, strict=True):
        assert found is not None
        assert torch.equal(found, values[index])
    seen.clear()
    tiny_models.run(job(tmp_path / "other", model, window=window, loss="token"))
    assert set(seen) == {None}


@pytest.mark.parametrize("options", [{}, {"window": "attn-mlp"}, {"preset": "authors"}, {"loss": "token"}])
def test_the_reported_error_is_the_loss_that_is_minimised(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", blocks=1)
    made = job(tmp_path / "run", model, **options)
    (report,) = made.blocks()
    made.finish()
    dense, pruned = (Decoder(path, CPU, torch.float32) for path in (model, tmp_path / "run" / "pruned"))
    hidden = dense.embed(ROWS)
    for decoder in (dense, pruned):
        decoder.load(0)
    with torch.no_grad():
        target, output = (decoder.forward(0, hidden, ROWS) for decoder in (dense, pruned))
    weighted = options.get("loss") != "token"
    channels = losses.channel_weights(sensitivity.measure(dense, ROWS)[0]) if weighted else None
    assert report.error_after == pytest.approx(float(losses.token(output, target, channels=channels)), rel=1e-4)
    assert report.error_after != pytest.approx(
        float(losses.token(output, target, channels=None if weighted else torch.rand(tiny_models.HIDDEN))), rel=1e-3
    )


def test_an_unfinished_stage_is_not_resumed_with_other_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", blocks=BLOCKS)
    begun = job(tmp_path / "run", model)
    next(iter(begun.blocks()))
    copy = tmp_path / "run" / "pruned" / "sensitivity.safetensors"
    content = copy.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "measure", unmeasurable)
        again = job(tmp_path / "run", model).blocks()
        assert next(again).resumed
        again.close()  # type: ignore[attr-defined]
    copy.unlink()
    measure = sensitivity.measure
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "measure", lambda *args, **rest: 2 * measure(*args, **rest))
        with pytest.raises(Exception, match="pruned was begun with another sensitivity of the channels than this mach"):
            next(iter(job(tmp_path / "run", model).blocks()))
    assert not copy.exists()
    list(job(tmp_path / "run", model).blocks())
    assert copy.read_bytes() == content


def test_a_model_whose_loss_depends_on_nothing_weighs_all_channels_alike(tmp_path: Path) -> None:
    """The head gives the same logits to all tokens: the gradient is zero, and the result is that of `token`."""
    made = tiny_models.built(tiny_models.config("llama", blocks=2))
    with torch.no_grad():
        made.get_parameter("lm_head.weight").zero_()
    made.save_pretrained(tmp_path / "model")
    found = [list(job(tmp_path / loss, tmp_path / "model", loss=loss).blocks()) for loss in ("sensitivity", "token")]
    assert [each.linears for each in found[0]] == [each.linears for each in found[1]]
    for name, tensor in tiny_models.weights(tmp_path / "token" / "pruned").items():
        assert torch.equal(tiny_models.weights(tmp_path / "sensitivity" / "pruned")[name], tensor)
