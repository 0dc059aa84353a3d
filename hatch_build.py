"""Builds the C++ loops when the package is installed; without a compiler the plain torch form does their work."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("besa_cli/ops/kernels")
# No -march: the source asks for several processors itself, so that a wheel runs everywhere. No fused multiply-add
# across statements: the same sums on every machine of one architecture.
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-ffp-contract=off")


class LoopsHook(BuildHookInterface):
    """Compiles loops.cpp beside its source; in a wheel it makes the wheel one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects the files."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        library = root / KERNELS / "loops.so"
        library.unlink(missing_ok=True)
        problem = compile_loops(root / KERNELS / "loops.cpp", library)
        if problem:
            sys.stderr.write(f"besa: the C++ loops were not built ({problem}); learning will be slower\n")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_loops(source: Path, library: Path) -> str:
    """Build the library; returns what went wrong, or nothing."""
    named = [os.environ[name] for name in ("CXX",) if name in os.environ]
    compilers = [path for name in (*named, "c++", "g++", "clang++") if (path := shutil.which(name))]
    if not compilers:
        return "there is no C++ compiler"
    command = [compilers[0], *FLAGS, str(source), "-o", str(library)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return (finished.stderr.strip().splitlines() or ["the compiler failed"])[-1] if finished.returncode else ""
