"""Reading ahead and writing behind change nothing but the time: not a byte, not an error, not the order on disk."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import calls, tiny_models
from torch import Tensor

from besa_cli.checkpoint.manifests import HeldOut
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.decoder.prefetch import Prefetcher
from besa_cli.errors import BesaError
from besa_cli.jobs.stage import StageJob
from besa_cli.stream.background_writer import BackgroundWriter
from besa_cli.system import compute


def report(index: int) -> BlockReport:
    return BlockReport(index=index, blocks=9, linears=(), error_before=None, error_after=None)


class Store:
    """Notes what it is told, and waits for a sign before each block is written."""

    def __init__(self, *, fails: int | None = None) -> None:
        self.told: list[str] = []
        self.go = threading.Semaphore(0)
        self.fails = fails

    def finished(self) -> int:
        self.told.append("finished")
        return 0

    def read(self, index: int) -> dict[str, Tensor]:
        self.told.append(f"read {index}")
        return {}

    def report(self, index: int) -> BlockReport:
        return report(index)

    def read_state(self) -> dict[str, Tensor]:
        self.told.append("read state")
        return {}

    def write_held_out(self, figures: HeldOut) -> None:
        self.told.append("written held out")

    def write(
        self,
        report: BlockReport,
        tensors: Mapping[str, Tensor],
        codes: Mapping[str, Tensor],
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert self.go.acquire(timeout=60)
        if report.index == self.fails:
            raise BesaError(f"block {report.index} cannot be written")
        self.told.append(f"written {report.index}")


def test_a_block_is_written_while_the_next_one_is_made_and_before_it_is_written() -> None:
    store = Store()
    with BackgroundWriter(store) as behind:
        behind.write(report(0), {}, {})
        assert store.told == []  # handed over, and not waited for
        store.go.release()
        behind.write(report(1), {}, {})
        assert store.told == ["written 0"]
        store.go.release()
        behind.read(0)
        assert store.told == ["written 0", "written 1", "read 0"]
        behind.write(report(2), {}, {})
        store.go.release()
        behind.write_held_out({"samples": 1, "kl": 0.1, "kl_uniform": 0.2})
        assert store.told[-2:] == ["written 2", "written held out"]
        behind.write(report(3), {}, {})
        store.go.release()
    assert store.told[-1] == "written 3"


def hand_over(store: Store, blocks: int, *, interrupted: bool = False) -> None:
    store.go.release(blocks)
    with BackgroundWriter(store) as behind:
        for index in range(blocks):
            behind.write(report(index), {}, {})
        if interrupted:
            raise KeyboardInterrupt


@pytest.mark.parametrize("blocks", [1, 2])
def test_what_goes_wrong_is_raised_at_the_next_block_or_at_the_end(blocks: int) -> None:
    store = Store(fails=0)
    with pytest.raises(BesaError, match="block 0 cannot be written"):
        hand_over(store, blocks)
    assert store.told == []


def test_the_first_error_is_the_one_that_is_shown() -> None:
    with pytest.raises(KeyboardInterrupt):
        hand_over(Store(fails=0), 1, interrupted=True)


def test_an_interrupted_run_keeps_the_block_that_is_being_written() -> None:
    store = Store()
    with pytest.raises(KeyboardInterrupt):
        hand_over(store, 1, interrupted=True)
    assert store.told == ["written 0"]


def test_what_is_expected_is_read_once_and_elsewhere() -> None:
    readers: list[threading.Thread] = []

    def read(index: int) -> dict[str, Tensor]:
        readers.append(threading.current_thread())
        if index == 3:
            raise BesaError("block 3 cannot be read")
        return {"index": torch.tensor(index)}

    ahead = Prefetcher(read, pinned=False)
    ahead.prefetch(1)
    ahead.prefetch(1)
    ahead.prefetch(3)
    assert int(ahead.take(1)["index"]) == 1
    assert int(ahead.take(2)["index"]) == 2
    with pytest.raises(BesaError, match="block 3 cannot be read"):
        ahead.take(3)
    main = threading.main_thread()
    assert sorted(reader is main for reader in readers) == [False, False, True]
    assert int(ahead.take(1)["index"]) == 1  # what was taken is forgotten
    assert readers[-1] is main


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("llama", {"method": "besa"}),
        ("gemma3", {"method": "besa", "window": "2", "target": "stream"}),
        ("llama", {"method": "besa", "window": "attn-mlp"}),
        ("qwen2", {"method": "sparsegpt"}),
    ],
)
def test_the_same_bytes_with_and_without(
    family: str, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.local(tiny_models.checkpoint(tmp_path / "model", family, blocks=4, dtype=torch.bfloat16))
    expected: list[int] = []
    noted = calls.noting(Prefetcher.prefetch, lambda self, index: expected.append(index))
    monkeypatch.setattr(Prefetcher, "prefetch", noted)

    def files(run: Path, *, overlapping: bool) -> dict[str, bytes]:
        monkeypatch.setattr(compute, "overlaps", lambda device: overlapping)
        job = StageJob(
            Run(run), model, tiny_models.calibration_set(tiny_models.tokens(3, 12)), tiny_models.request(**asked)
        )
        if not overlapping:
            tiny_models.run(job)
            assert expected == []
            return tiny_models.files(run)
        next(job.blocks())  # abandoned: what is being written is still written
        assert Stage(run / "pruned", 4).finished() >= 1
        tiny_models.run(
            StageJob(
                Run(run), model, tiny_models.calibration_set(tiny_models.tokens(3, 12)), tiny_models.request(**asked)
            )
        )
        return tiny_models.files(run)

    assert files(tmp_path / "one", overlapping=False) == files(tmp_path / "other", overlapping=True)
    assert set(expected) == set(range(2 if asked.get("window") == "2" else 1, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["besa", "wanda", "sparsegpt"])
def test_on_a_gpu_too(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.local(tiny_models.checkpoint(tmp_path / "model", blocks=4, dtype=torch.bfloat16))
    found = []
    for overlapping in (False, True):
        monkeypatch.setattr(compute, "overlaps", lambda device, overlapping=overlapping: overlapping)
        asked = tiny_models.request(method, device="cuda")
        run = tmp_path / str(overlapping)
        tiny_models.run(StageJob(Run(run), model, tiny_models.calibration_set(tiny_models.tokens(3, 12)), asked))
        found.append({name: data for name, data in tiny_models.files(run).items() if name.endswith(".safetensors")})
    assert found[0] == found[1]


@pytest.mark.gpu
def test_what_is_read_ahead_for_a_gpu_is_page_locked() -> None:
    ahead = Prefetcher(lambda index: {"index": torch.tensor([index])}, pinned=True)
    ahead.prefetch(1)
    assert ahead.take(1)["index"].is_pinned()
