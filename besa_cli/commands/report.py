"""`besa report`: one page on one run or several, with figures, that needs no network."""

import functools
import shlex
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from besa_cli.commands.shared import options, panels
from besa_cli.console import Console, human_bytes

if TYPE_CHECKING:
    from besa_cli.report.rows import SparsityMap
    from besa_cli.report.runs import Collected

_NAME = "report.html"


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            callback=options.expand_utf8,
            help="Run directories, shown side by side.",
            show_default="the run directory",
        ),
    ] = None,
    run: options.RunOption = options.DEFAULT_RUN,
    output: Annotated[
        Path | None,
        panels.OUTPUT(
            "--output",
            "File to write.",
            f"{_NAME} in the first run directory",
            metavar="FILE",
            callback=options.expand_home,
        ),
    ] = None,
    png: Annotated[
        Path | None,
        panels.OUTPUT(
            "--png", "Also write the figures as PNG files to DIR.", metavar="DIR", callback=options.expand_home
        ),
    ] = None,
    show: Annotated[bool, panels.OUTPUT("--open", "Open the page in the browser.")] = False,
    force: Annotated[bool, panels.OUTPUT("--force", "Replace files that are not of a report.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Write a page on one run or several: sizes, quality, sparsity of every row, errors, learning curves, cycles.

    It is one HTML file without scripts, to be opened from the disk, sent or printed. What is not measured yet is left
    out, and an interrupted run is shown as far as it came.

    Examples:

        besa report
        besa report besa-run wanda-run --output compared.html --open
        besa report --png figures
    """
    console = Console(json=as_json)
    from besa_cli.report import page, pictures
    from besa_cli.report import runs as reported
    from besa_cli.system import disk

    paths = list(dict.fromkeys(runs or [run]))
    reported.require(paths)
    file = output or paths[0] / _NAME
    pictures.require_own(file, "--output", force=force)
    if png is not None:
        pictures.require_png(png)
    collected = reported.collect(paths)
    maps = _count(collected, console)
    drawn = page.all_drawings(collected, maps) if png is not None else []
    if png is not None:
        for drawing in drawn:
            pictures.require_own(pictures.png_file(drawing, png), "--png", force=force)
    text = page.render(collected, maps, shlex.join(["besa", "report", *(path.name or str(path) for path in paths)]))
    disk.publish(file, lambda temporary: _write(temporary, text))
    size = file.stat().st_size
    console.line(f"{file}: report on {', '.join(str(path) for path in paths)}, {human_bytes(size)}")
    written = [str(pictures.write_png(drawing, png)) for drawing in drawn if png is not None]
    if png is not None:
        console.line(f"{png}: {len(written)} figures")
    if not pictures.installed():
        console.note("figures are left out, because matplotlib is not installed: pip install 'besa-cli[plot]'")
    if show and not webbrowser.open(file.resolve().as_uri()):
        console.note(f"no browser was found: open {file.resolve().as_uri()}")
    console.emit_json({"report": str(file), "bytes": size, "runs": [str(path) for path in paths], "figures": written})


def _count(collected: "Collected", console: Console) -> "dict[int, SparsityMap]":
    """Count the zeros of each run's first stage that prunes, by the number of the run."""
    from besa_cli.report import rows

    counted = {}
    for number, run in enumerate(collected.runs):
        stage = run.mapped
        if stage is None or not run.prunes:
            continue
        with console.blocks(f"{run.title}: counting zeros", stage.finished) as progress:
            show = functools.partial(progress.step, total=stage.finished, phase="block")
            counted[number] = rows.count(stage.directory, show)
    return counted


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
