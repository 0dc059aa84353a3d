"""What `--dry-run` shows: memory, disk and time of a command that is not run."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from besa_cli.console import Console, human_bytes, human_seconds

if TYPE_CHECKING:
    from besa_cli.forecast import Forecast
    from besa_cli.jobs.job import Job


def job(made: "Job", console: Console) -> None:
    """Show what a dry job would take."""
    if made.done:
        console.note("the stage is finished already, with the same options: nothing would be done")
        console.emit_json({"done": True})
        return
    console.note(made.title)
    show(made.forecast(), console)


def show(forecast: "Forecast", console: Console) -> None:
    """Show a forecast beside what the machine has."""
    from besa_cli import compute
    from besa_cli.zeroshot import memory

    available = memory.available(compute.device("cpu")) + compute.resident()
    where = "hidden states in files" if forecast.in_files else "hidden states in memory"
    rows = [
        ("memory", human_bytes(forecast.memory), human_bytes(available), f"most in: {forecast.phase}; {where}"),
        ("disk", human_bytes(forecast.disk), human_bytes(forecast.free), ""),
        ("time", human_seconds(forecast.seconds), "", f"{forecast.left} of {forecast.blocks} blocks are left"),
    ]
    console.table("", ("", "takes", "there is", ""), rows)
    if forecast.memory > available:
        console.note("this is more memory than there is: give --max-memory, a shorter --seqlen or a narrower --window")
    console.emit_json({"done": False, **asdict(forecast), "available": available})
