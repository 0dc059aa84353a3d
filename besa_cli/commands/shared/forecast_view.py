"""Output of `--dry-run`: memory, disk space and time that a command would take."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from besa_cli.console import Console, human_bytes, human_seconds

if TYPE_CHECKING:
    from besa_cli.stream.forecast import Forecast


class ForecastJob(Protocol):
    """Job that can be forecast: a stage or an export."""

    @property
    def done(self) -> bool:
        """True if nothing is left to do."""

    @property
    def title(self) -> str:
        """Description of the job in one line."""

    def forecast(self) -> "Forecast":
        """Return memory, disk space and time of the job."""


def show_job(job: ForecastJob, console: Console) -> None:
    """Show the forecast of a job, or that it is finished."""
    if job.done:
        console.note("finished already, with the same options: nothing to do")
        console.emit_json({"done": True})
        return
    console.note(job.title)
    show(job.forecast(), console)


def available() -> int:
    """Return the bytes of main memory that this process could use: those that are free, and those it uses already."""
    from besa_cli.system import compute, memory

    return memory.available(compute.device("cpu")) + compute.resident()


def show(forecast: "Forecast", console: Console) -> None:
    """Show a forecast beside the memory and disk space that the machine has."""
    memory = available()
    hidden = {None: "", True: "; hidden states in files", False: "; hidden states in memory"}[forecast.in_files]
    rows = [
        ("memory", human_bytes(forecast.memory), human_bytes(memory), f"most in: {forecast.phase}{hidden}"),
        ("disk", human_bytes(forecast.disk), human_bytes(forecast.free), ""),
        ("time", human_seconds(forecast.seconds), "", f"{forecast.left} of {forecast.blocks} blocks are left"),
    ]
    console.table("", ("", "needed", "available", ""), rows)
    if forecast.memory > memory:
        remedy = ": give --max-memory, a shorter --seqlen or a narrower --window" if hidden else ""
        console.note(f"this is more memory than available{remedy}")
    console.emit_json({"done": False, **asdict(forecast), "available": memory})
