"""Compilation of the C++ kernels: `python besa_cli/ops/kernels/build.py` builds both libraries beside their sources.

Only the standard library is imported, so that the build hook of the package (`hatch_build.py`) can run this file alone.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).parent
# No -march: the sources ask for several processors themselves, so that a wheel runs everywhere. No fused multiply-add
# across statements: the same sums on every machine of one architecture.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-ffp-contract=off")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi", "-mavx512vbmi2")
# Instructions that the loops are compiled for; tiles.cpp takes the best that the processor has.
LEVELS = {"plain": (), "avx2": _AVX2, "avx512": _AVX512, "avx512bf16": (*_AVX512, "-mavx512bf16")}


def build_all(directory: Path) -> dict[str, str]:
    """Build the libraries in a directory; returns what went wrong by library, an empty string if nothing did."""
    problems = {}
    for name, build in {"loops.so": build_loops, "tiles.so": build_tiles}.items():
        (directory / name).unlink(missing_ok=True)
        problems[name] = build(directory / name)
    return problems


def build_loops(library: Path) -> str:
    """Build the loops of learning; returns what went wrong, or nothing."""
    return _compile(*FLAGS, "-shared", SOURCES / "loops.cpp", "-o", library)


def build_tiles(library: Path, extra: Sequence[str] = ()) -> str:
    """Build the products of pruned matrices; returns what went wrong, or nothing.

    Levels whose instructions the compiler does not know are left out.

    Parameters
    ----------
    library : Path
    extra : sequence of str
        More flags for the compiler, e.g. of a sanitizer.
    """
    levels = LEVELS if platform.machine() in ("x86_64", "AMD64") else {"plain": ()}
    flags = (*FLAGS, *extra)
    with TemporaryDirectory(prefix="besa-build-") as directory:
        objects = []
        for level, instructions in levels.items():
            targets, problem = [], ""
            for loops in ("tile", "code"):
                source, target = SOURCES / f"{loops}_kernels.cpp", Path(directory) / f"{loops}_{level}.o"
                problem = problem or _compile(
                    *flags, *instructions, f"-DLEVEL={loops}s_{level}", "-c", source, "-o", target
                )
                targets.append(target)
            if not problem:
                objects += targets
            elif level == "plain":
                return problem
        return _compile(*flags, "-shared", SOURCES / "tiles.cpp", *objects, "-o", library)


def _compile(*arguments: str | Path) -> str:
    named = [os.environ[name] for name in ("CXX",) if name in os.environ]
    compilers = [path for name in (*named, "c++", "g++", "clang++") if (path := shutil.which(name))]
    if not compilers:
        return "there is no C++ compiler"
    command = [compilers[0], *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return (finished.stderr.strip().splitlines() or ["the compiler failed"])[-1] if finished.returncode else ""


if __name__ == "__main__":
    for library, problem in build_all(SOURCES).items():
        if problem:
            raise SystemExit(f"{library}: {problem}")
