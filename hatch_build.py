"""Builds the C++ kernels when the package is installed; without a compiler plain torch does their work."""

import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("besa_cli/ops/kernels")


class KernelsHook(BuildHookInterface):
    """Compiles the libraries beside their sources; in a wheel it makes the wheel one for this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects the files."""
        if self.target_name != "wheel":
            return
        kernels = Path(self.root) / KERNELS
        build_all = runpy.run_path(str(kernels / "build.py"))["build_all"]
        for library, problem in build_all(kernels).items():
            if problem:
                sys.stderr.write(f"besa: {library} was not built ({problem}); what it does will be slower\n")
                continue
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
