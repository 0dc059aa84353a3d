"""Hidden states in files: the same numbers, no file left, and the same bytes in the end."""

import errno
import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tiny_models

from besa_cli.checkpoint.runs import Run
from besa_cli.commands.shared import options
from besa_cli.errors import BesaError, UsageError
from besa_cli.jobs import prune
from besa_cli.jobs.stage import StageJob
from besa_cli.stream import memory_model
from besa_cli.stream.activations import ActivationStore
from besa_cli.system import compute


def mapped(directory: Path) -> int:
    """How many mappings of this process lie in a directory."""
    return sum(str(directory) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_again_after_its_memory_was_given_back(dtype: torch.dtype, tmp_path: Path) -> None:
    shelf = ActivationStore(tmp_path)
    made = shelf.empty((3, 1000, 70), dtype)
    expected = torch.randn(3, 1000, 70).to(dtype)
    for part in range(3):
        made[part] = expected[part]
        shelf.release()
    assert torch.equal(made, expected)
    assert not list(tmp_path.iterdir())
    if Path("/proc/self/maps").exists():
        assert mapped(tmp_path) == 1
        del made
        gc.collect()
        assert mapped(tmp_path) == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_released_pages_are_not_resident(tmp_path: Path) -> None:
    shelf = ActivationStore(tmp_path)
    made = shelf.empty((64 << 20,), torch.uint8)
    made.fill_(1)
    full = compute.resident()
    shelf.release()
    assert full - compute.resident() > 60 << 20
    assert int(made.sum()) == 64 << 20


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BesaError, match="no room for 4 MB of hidden states: No space left"):
        ActivationStore(tmp_path).empty((1000, 1000), torch.float32)


@pytest.mark.parametrize(("target", "window"), [("block", "block"), ("stream", "attn-mlp"), ("block", "attn-mlp")])
def test_a_run_with_hidden_states_in_files_ends_in_the_same_bytes(
    target: str, window: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama")
    calibration = tiny_models.calibration_set(tiny_models.tokens(6, 12))
    chosen = {"target": target, "window": window}
    found = {}
    plan = memory_model.plan
    for name in ("memory", "files"):
        files = name == "files"
        monkeypatch.setattr(memory_model, "plan", lambda *a, f=files, **k: replace(plan(*a, **k), in_files=f))
        request = prune.request(options=chosen, device="cpu", dtype="float32", max_memory=64 * 10**9)
        notes: list[str] = []
        job = StageJob(Run(tmp_path / name), tiny_models.local(model), calibration, request, notify=notes.append)
        tiny_models.run(job)
        assert any("--max-memory" in note for note in notes) == (name == "files")
        found[name] = tiny_models.files(tmp_path / name)
    assert found["memory"] == found["files"]


def test_less_memory_than_a_window_needs_is_refused_before_any_work(tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama")
    request = prune.request(options={}, device="cpu", dtype="float32", max_memory=10**8)
    with pytest.raises(UsageError, match=r"--max-memory 0.1GB is too little: .* needs about \d+\.\d GB"):
        StageJob(
            Run(tmp_path / "run"),
            tiny_models.local(model),
            tiny_models.calibration_set(tiny_models.tokens(2, 12)),
            request,
        )
    assert not (tmp_path / "run" / "pruned").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 512 << 20), ("1.5g", 1_500_000_000), ("2 TB", 2 * 10**12), ("100k", 100_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert options.size_of(text) == size


@pytest.mark.parametrize("text", ["4", "GB", "-4GB", "4 apples", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        options.size_of(text)


@pytest.mark.parametrize("text", ["9223373TB", "8388608TiB", "9" * 400 + "GB"])  # 2^63 is 9,223,372.04 x 10^12
def test_a_size_of_2_to_the_63_or_more_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is too large"):
        options.size_of(text)
    assert options.size_of("9223372TB") == 9_223_372 * 10**12
