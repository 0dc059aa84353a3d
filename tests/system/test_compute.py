"""What `auto` stands for: what the machine has, and nothing that another minute would answer otherwise."""

import json
import os
import platform
import time
from pathlib import Path

import pytest
import torch
from support import tiny_models

from besa_cli.checkpoint.runs import Run
from besa_cli.jobs import prune
from besa_cli.jobs.stage import StageJob
from besa_cli.system import compute

CPU = torch.device("cpu")


def machine(
    monkeypatch: pytest.MonkeyPatch, kind: str, *, library: bool = True, x86: bool = False, arm: bool = False
) -> None:
    """A processor of some kind: with oneDNN or not, with bf16 instructions or not."""
    monkeypatch.setattr(platform, "machine", lambda: kind)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: x86)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm, raising=False)


@pytest.mark.parametrize(
    ("kind", "found", "expected"),
    [
        ("x86_64", {"x86": True}, torch.bfloat16),
        ("AMD64", {"x86": True}, torch.bfloat16),
        ("x86_64", {"x86": False, "arm": True}, torch.float32),  # oneDNN counts slow emulation as support there
        ("x86_64", {"x86": True, "library": False}, torch.float32),
        ("aarch64", {"arm": True}, torch.bfloat16),
        ("aarch64", {"arm": False}, torch.float32),
        ("arm64", {"arm": True, "library": False}, torch.float32),  # macOS
    ],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    kind: str, found: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, kind, **found)
    assert compute.dtype("auto", CPU) == expected
    assert compute.dtype_reason("auto", CPU) == (
        "the processor multiplies bfloat16 in hardware"
        if expected == torch.bfloat16
        else "the processor does not multiply bfloat16 in hardware"
    )
    assert compute.dtype("float16", CPU) == torch.float16
    assert compute.dtype_reason("float16", CPU) == "asked for"


def test_no_clock_decides_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> float:
        raise AssertionError("a clock was read")

    for name in ("perf_counter", "monotonic", "time", "process_time", "clock_gettime", "perf_counter_ns", "time_ns"):
        monkeypatch.setattr(time, name, refuse)
    compute.dtype("auto", CPU)


@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_the_manifest_says_why_the_dtype_was_chosen(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, "x86_64", x86=False)
    request = prune.request(method="wanda", dtype=asked, options={})
    model = tiny_models.local(tiny_models.checkpoint(tmp_path / "model"))
    tiny_models.run(StageJob(Run(tmp_path / "run"), model, tiny_models.calibration_set(tiny_models.tokens()), request))
    found = json.loads((tmp_path / "run" / "pruned" / "besa.json").read_text())["compute"]
    reason = "asked for" if asked == "float32" else "the processor does not multiply bfloat16 in hardware"
    assert (found["dtype"], found["dtype_reason"]) == ("float32", reason)


def test_the_number_of_kept_products_is_bounded_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compute.PRIMITIVES, "7")
    compute.bound_primitives()
    assert os.environ[compute.PRIMITIVES] == "7"
    monkeypatch.delenv(compute.PRIMITIVES)
    compute.bound_primitives()
    assert int(os.environ[compute.PRIMITIVES]) < 1024
