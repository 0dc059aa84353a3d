"""Times of a stage's parts, one line each, of every attempt to make it."""

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from besa_cli.checkpoint import stages
from besa_cli.checkpoint.reports import BlockReport, PassReport
from besa_cli.system import compute, disk


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Writer of a stage's times.

    Attributes
    ----------
    directory : Path
        Directory of the stage.
    ranks : int
        Number of ranks that make it.
    """

    directory: Path
    ranks: int

    def block(self, report: BlockReport) -> None:
        """Append the line of a block."""
        self._append("block", report.index, report.seconds, resumed=report.resumed, memory=report.peak_memory)

    def whole_pass(self, report: PassReport, seconds: float) -> None:
        """Append the line of a pass of the whole model."""
        self._append("pass", report.number, seconds, resumed=report.resumed, memory=compute.peak_memory())

    def _append(self, part: str, number: int, seconds: float, *, resumed: bool, memory: int) -> None:
        line = {
            part: number,
            "resumed": resumed,
            "ranks": self.ranks,
            "seconds": round(seconds, 3),
            "peak_memory": memory,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": socket.gethostname(),
        }
        disk.append_line(self.directory / stages.TIMING, json.dumps(line))
