"""What `--dry-run` shows: memory, disk and time of a command that is not run."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from besa_cli.console import Console, human_bytes, human_seconds

if TYPE_CHECKING:
    from besa_cli.stream.forecast import Forecast


class ForecastJob(Protocol):
    """What can be forecast: a stage that is made, or an export."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""

    @property
    def title(self) -> str:
        """What would be done, in one line."""

    def forecast(self) -> "Forecast":
        """What it would take."""


def job(made: ForecastJob, console: Console) -> None:
    """Show what a dry job would take."""
    if made.done:
        console.note("it is finished already, with the same options: nothing would be done")
        console.emit_json({"done": True})
        return
    console.note(made.title)
    show(made.forecast(), console)


def available() -> int:
    """Bytes of main memory that this process could hold at most: what is free, and what it has."""
    from besa_cli.evaluation.zeroshot import memory
    from besa_cli.system import compute

    return memory.available(compute.device("cpu")) + compute.resident()


def show(forecast: "Forecast", console: Console) -> None:
    """Show a forecast beside what the machine has."""
    there = available()
    hidden = {None: "", True: "; hidden states in files", False: "; hidden states in memory"}[forecast.in_files]
    rows = [
        ("memory", human_bytes(forecast.memory), human_bytes(there), f"most in: {forecast.phase}{hidden}"),
        ("disk", human_bytes(forecast.disk), human_bytes(forecast.free), ""),
        ("time", human_seconds(forecast.seconds), "", f"{forecast.left} of {forecast.blocks} blocks are left"),
    ]
    console.table("", ("", "takes", "there is", ""), rows)
    if forecast.memory > there:
        smaller = ": give --max-memory, a shorter --seqlen or a narrower --window" if hidden else ""
        console.note(f"this is more memory than there is{smaller}")
    console.emit_json({"done": False, **asdict(forecast), "available": there})
