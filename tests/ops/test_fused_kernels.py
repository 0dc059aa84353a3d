"""The Triton kernels, interpreted on the CPU, compiled for GPUs, and run on one where there is one.

What they compute is checked by `fused_checks.py`. That runs in processes of its own, because Triton decides at its
import whether it interprets, and other tests may have imported it.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from besa_cli.ops.kernels import fused

ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).with_name("fused_checks.py")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
not_interpreted = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_triton
@pytest.mark.parametrize("interpret", ["1", pytest.param("0", marks=on_gpu)], ids=["interpreted", "compiled"])
def test_the_kernels_compute_what_the_plain_loops_do(interpret: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CHECKS)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    environment |= {"TRITON_INTERPRET": interpret, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins take seconds
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was compiled before, and nothing is left in the home of whoever runs this."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(name: str, sizes: dict[str, int], **pointers: str) -> str:
    """The PTX of a kernel; `ptxas` has taken it. Sizes of 1 are constants, as Triton makes them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from besa_cli.ops.kernels import triton_loops

    kernel = getattr(triton_loops, name)
    constants = {key: value for key, value in sizes.items() if value == 1 or key.isupper()}
    types = {key: "constexpr" if key in constants else pointers.get(key, "i32") for key in kernel.arg_names}
    source = ASTSource(kernel, types, constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()})
    result = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False})
    assert result.asm["cubin"]
    return str(result.asm["ptx"])


@needs_triton
@not_interpreted
@pytest.mark.usefixtures("own_cache")
def test_kernels_compile_without_atomic_operations() -> None:
    wide = {"cols": 4096, "WIDTH": 1024}
    found = [
        compiled("mask", wide, weight="*fp32", ranks="*i16", counts="*i32", out="*fp32"),
        compiled("mask", wide, weight="*bf16", ranks="*i32", counts="*i32", out="*fp16"),
        compiled("products", wide, gradient="*fp32", weight="*bf16", ranks="*i16", out="*fp32"),
        compiled("products", wide | {"cols": 1}, gradient="*fp16", weight="*fp32", ranks="*i32", out="*fp32"),
    ]
    for cols, count, longest, height, width in [(4096, 100, 41, 128, 16), (1, 1, 1, 2, 1), (1000, 1000, 1, 1024, 1)]:
        sizes = {"cols": cols, "count": count, "longest": longest, "CANDIDATES": height, "WIDTH": width}
        found.append(compiled("sums", sizes, ranked="*fp32", out="*fp32"))
    for text in found:
        assert "st.global" in text
        assert not re.search(r"\b(atom|red)\.", text)


@needs_triton
@not_interpreted
@pytest.mark.usefixtures("own_cache")
def test_narrower_weights_are_rounded_to_the_nearest() -> None:
    """The interpreter does not round as GPUs do, so this is read from the code."""
    for out in ("bf16", "f16"):
        pointer = "*bf16" if out == "bf16" else "*fp16"
        text = compiled("mask", {"cols": 64, "WIDTH": 64}, weight="*fp32", ranks="*i16", counts="*i32", out=pointer)
        assert f"cvt.rn.{out}" in text


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What is known of devices is forgotten before and after."""
    fused.available.cache_clear()
    yield
    fused.available.cache_clear()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("missing", ["a GPU", "Triton"])
def test_without_a_gpu_or_without_triton_all_is_left_to_others(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "Triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight, ranks = torch.ones(2, 3), torch.arange(3, dtype=torch.int16).repeat(2, 1)
    assert fused.mask(weight, ranks, torch.ones(2, dtype=torch.int64), torch.empty(2, 3)) is None
    assert fused.candidate_sums(weight, weight, ranks, 7) is None
