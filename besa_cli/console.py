"""Terminal output: results on stdout, notes and progress on stderr.

The only module that imports rich, and only if the stream is a terminal; otherwise output is plain lines.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.console
    import rich.progress

    from besa_cli.checkpoint.reports import BlockReport, LinearReport, PassReport

Cell = str | int | float | None
Facts = list[tuple[str, str]]

# Control characters (C0, DEL, C1), line separators and bidirectional marks: in text from a file they could move the
# cursor, change terminal settings, forge a line or hide a name.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_NUMBER = re.compile(r"-?$|[-+]?(\d|inf|nan)")


def escaped(text: str, keep: str = "") -> str:
    r"""Escape every control character that is not in `keep`: `\n`, `\x1b`, `\u202e`."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def _escape(character: str) -> str:
    code, named = ord(character), {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return named.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def _json_escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


class Console:
    """Output streams of one command.

    Parameters
    ----------
    json : bool
        True with ``--json``: only `emit_json` prints to stdout. Otherwise only `table`, `line` and `text` do. Commands
        call all of them in either case.
    """

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        self._screen = _screen(sys.stderr)

    def note(self, line: str) -> None:
        """Print a note (stderr), above a running progress display."""
        if self._screen is None:
            with suppress(OSError):  # a closed stderr must not stop the work
                _write(sys.stderr, escaped(line))
        else:
            self._screen.print(escaped(line), markup=False, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Print one line of the result (stdout)."""
        self.text(escaped(text))

    def text(self, text: str) -> None:
        """Print text of any number of lines as part of the result (stdout), with control characters escaped."""
        if not self.json:
            _write(sys.stdout, escaped(text, keep="\n\t"))

    def stream(self, piece: str) -> None:
        """Print a piece of a text as part of the result (stdout) at once, without ending the line."""
        if not self.json:
            sys.stdout.write(escaped(piece, keep="\n\t"))
            sys.stdout.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Print a table of results (stdout): numbers right-aligned, no cell truncated, styled only at a terminal."""
        if self.json:
            return
        title, columns = escaped(title), [escaped(name) for name in columns]
        cells = [[_cell(value) for value in row] for row in rows]
        numeric = [all(_NUMBER.match(row[column]) for row in cells) for column in range(len(columns))]
        screen = _screen(sys.stdout)
        if screen is None:
            _write(sys.stdout, _plain_table(title, columns, cells, numeric))
        else:
            screen.print(_rich_table(title, columns, cells, numeric))

    def emit_json(self, value: Mapping[str, object]) -> None:
        """Print the result as one JSON object (stdout); infinite and NaN values become null."""
        if self.json:
            text = json.dumps(_json_value(value), indent=2, ensure_ascii=False, allow_nan=False)
            _write(sys.stdout, "\n".join(_CONTROL.sub(_json_escape, line) for line in text.split("\n")))

    @contextmanager
    def blocks(self, title: str, blocks: int, work: Sequence[float] | None = None) -> Iterator["BlockProgress"]:
        """Show progress over `blocks` blocks (stderr): a live display at a terminal, else one plain line per block.

        `work` is the relative amount of work of each block, by default equal.
        """
        if self._screen is None:
            yield BlockProgress(title, blocks, self, None, work)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]}", markup=False),
        )
        with Progress(*columns, console=self._screen, transient=True, redirect_stdout=False) as live:
            yield BlockProgress(title, blocks, self, live, work)


class BlockProgress:
    """Progress display of finished blocks and of the steps within the current one; created by `Console.blocks`."""

    def __init__(
        self,
        title: str,
        blocks: int,
        console: Console,
        live: "rich.progress.Progress | None",
        work: Sequence[float] | None = None,
    ) -> None:
        self._title = escaped(title)
        self._blocks = blocks
        self._console = console
        self._live = live
        self._task = live.add_task(self._title, total=blocks, phase="") if live is not None else None
        self._work = [1.0] * blocks if work is None else list(work)
        self._done = self._seconds = 0.0
        self._began = time.monotonic()
        self._left = sum(self._work)
        self._header: list[str] = []

    def step(self, done: int, total: int, phase: str) -> None:
        """Show the progress within the current block; does nothing without a terminal."""
        if self._live is None or self._task is None:
            return
        left = self._time_left(time.monotonic() - self._began)
        left = f"  {left} left" if left else ""
        self._live.update(self._task, phase=f"{phase} {done}/{total}{left}")

    def finished(self, report: "BlockReport") -> None:
        """Show the line of a finished block; blocks of an earlier run do not count for the time left."""
        self._advance(report.index, None if report.resumed else report.seconds)
        duration = "resumed" if report.resumed else human_seconds(report.seconds)
        self._show(
            [
                ("block", f"{report.index + 1}/{self._blocks}"),
                *_sparsities(report.linears),
                ("error", _change(report.error_before, report.error_after)),
                ("loss", _scientific(report.learned_loss) + (" not better" if report.kept_uniform else "")),
                ("time", duration),
                ("left", self._time_left(0.0) or "-"),
                ("memory", human_bytes(report.peak_memory) if report.peak_memory else "-"),
            ]
        )

    def passed(self, report: "PassReport") -> None:
        """Show the line of a pass in which the whole model learned its rates."""
        learned = "" if report.learned is None else f", {report.learned:.4f} on those learned from"
        way = "" if report.part == 1 else f" at {report.part:.0%} of the way"
        self._console.note(
            f"{self._title}: whole model, pass {report.number}/{report.epochs}: KL divergence to dense "
            f"{report.held_out:.4f} on samples held out{way}{learned}"
        )

    def advance(self, index: int, seconds: float, phase: str = "") -> None:
        """Show that step `index`, counted from 0, of an evaluation is finished, with its duration."""
        self._advance(index, seconds)
        if self._live is None:
            position = f"{index + 1}/{self._blocks}"
            step = ("step", f"{position} ({phase})") if phase else ("block", position)
            self._show([step, ("time", human_seconds(seconds)), ("left", self._time_left(0.0) or "-")])

    def _advance(self, index: int, seconds: float | None) -> None:
        if seconds is not None:
            self._seconds += seconds
            self._done += self._work[index]
        self._began = time.monotonic()
        self._left = sum(self._work[index + 1 :])
        if self._live is not None and self._task is not None:
            self._live.update(self._task, completed=index + 1, phase="")

    def _time_left(self, spent: float) -> str:
        if not self._done:
            return ""
        return human_seconds(max(0.0, self._seconds / self._done * self._left - spent))

    def _show(self, facts: Facts) -> None:
        if self._live is None:
            self._console.note(f"{self._title}: " + "  ".join(f"{name} {value}" for name, value in facts))
            return
        widths = [max(len(name), len(value), _WIDTHS.get(name, 5)) for name, value in facts]
        header = [name for name, _ in facts]
        if header != self._header:  # linears may differ from block to block
            self._header = header
            self._console.note("  ".join(name.rjust(width) for name, width in zip(header, widths, strict=True)))
        self._console.note("  ".join(value.rjust(width) for (_, value), width in zip(facts, widths, strict=True)))


_WIDTHS = {"block": 7, "error": 18, "loss": 7, "time": 7, "left": 10, "memory": 8}


def show_error(message: str, hint: str = "") -> None:
    """Print `error: …` and, if there is one, `hint: …` (stderr), each on one line without wrapping."""
    screen = _screen(sys.stderr)
    for label, text in (("error", message), ("hint", hint)):
        if not text:
            continue
        if screen is None:
            _write(sys.stderr, f"{label}: {escaped(text)}")
        else:
            screen.print(f"{label}:", style="bold red" if label == "error" else "bold", end=" ", highlight=False)
            screen.print(escaped(text), markup=False, highlight=False, soft_wrap=True)


def human_bytes(count: int) -> str:
    """Format a number of bytes in decimal units: `1.92 GB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.3g} {unit}"


def human_seconds(seconds: float) -> str:
    """Format a duration: `12.3 s`, `5 min 58 s`, `2 h 03 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def human_perplexity(value: float) -> str:
    """Format a perplexity with four decimals, in scientific notation from 100,000."""
    return f"{value:.4f}" if not math.isfinite(value) or abs(value) < 1e5 else f"{value:.4e}"


def human_divergence(value: float) -> str:
    """Format a KL divergence with four decimals, in scientific notation below 0.01 (but for 0)."""
    return f"{value:.4f}" if value == 0 or value >= 0.01 else f"{value:.2e}"


def human_share(value: float) -> str:
    """Format a fraction as a percentage: `50.00 %`."""
    return f"{100 * value:.2f} %"


def short_names(linears: Sequence[str]) -> list[str]:
    """Abbreviate the names of a block's linears: `self_attn.q_proj` to `q`; ambiguous names are kept unchanged."""
    short = [name.rpartition(".")[2].removesuffix("_proj") for name in linears]
    return [name if short.count(brief) > 1 else brief for name, brief in zip(linears, short, strict=True)]


def _sparsities(linears: Sequence["LinearReport"]) -> Facts:
    names = short_names([linear.name for linear in linears])
    return [(name, f"{100 * linear.sparsity:.1f}%") for name, linear in zip(names, linears, strict=True)]


def _change(before: float | None, after: float | None) -> str:
    if before is None:
        return _scientific(after)
    return f"{_scientific(before)} -> {_scientific(after)}"


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else escaped(str(value))


def _json_value(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(stream: TextIO, text: str) -> None:
    stream.write(text + "\n")
    stream.flush()


def _screen(stream: TextIO) -> "rich.console.Console | None":
    """Return a rich console if the stream is a terminal that can move its cursor, else None."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return None
    from rich.console import Console as Screen

    return Screen(file=stream)


def _plain_table(title: str, columns: Sequence[str], rows: list[list[str]], numeric: list[bool]) -> str:
    widths = [max(len(line[column]) for line in [columns, *rows]) for column in range(len(columns))]

    def text(line: Sequence[str]) -> str:
        cells = zip(line, widths, numeric, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()

    head = [title, ""] if title else []
    return "\n".join([*head, text(columns), text(["-" * width for width in widths]), *map(text, rows)])


def _rich_table(
    title: str, columns: Sequence[str], rows: list[list[str]], numeric: list[bool]
) -> "rich.console.RenderableType":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    for column, right in zip(columns, numeric, strict=True):
        table.add_column(Text(column), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
