"""Help of a command: its options in panels, and examples at the end.

Typer shows panels only with rich, whose import would take longer than the rest of the help. These classes write them
as plain text.
"""

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

MOST = 1_000_000  # upper limit of options that count steps or tokens; more would take years

_EXAMPLES = "\n\nExamples:\n\n"  # heading in the docstring of a command; indented command lines follow
_LIMITS = re.compile(r"(?:([\d.]+)<=)?x<=(\d+)|x>=([\d.]+)")
_WIDEST = 27  # characters of the column of names; the text of a wider name begins on the next line


@dataclass(frozen=True)
class Panel:
    """Section of the help; calling it describes an option of the section."""

    title: str

    def __call__(self, name: str, text: str, default: str | None = None, **settings: Any) -> Any:
        """Return Typer's description of an option.

        Parameters
        ----------
        name : str
            ``--name``, or ``--name/--no-name``.
        text : str
            Help text.
        default : str, optional
            Text for the default, instead of the default of the parameter itself.
        **settings
            Other arguments of `typer.Option`.
        """
        shown = True if default is None else default
        return typer.Option(name, help=text, show_default=shown, rich_help_panel=self.title, **settings)


DATA = Panel("Model and data")
CALIBRATION = Panel("Calibration")
SPARSITY = Panel("What to prune")
BESA = Panel("How to learn")
WHOLE_MODEL = Panel("Whole model")
REPAIR = Panel("Repair")
QUANTIZATION = Panel("Few bits")
CLIPPING = Panel("Learned clipping")
GENERATION = Panel("Generation")
TARGETS = Panel("Targets")
CANDIDATES = Panel("Candidates")
MEASUREMENT = Panel("Measurement")
SIMULATION = Panel("Simulation")
EXPORT = Panel("Format")
HUB = Panel("Hugging Face hub")
COMPUTE = Panel("Machine")
RUN = Panel("Run")
OUTPUT = Panel("Output")
ADVANCED = Panel("Advanced")  # shown last


class _WithExamples:
    """Mixin for a command whose docstring ends in examples."""

    help: str | None

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the first sentence."""
        sentence, stop, _ = " ".join(_about(self.help).split()).partition(". ")
        return sentence + stop.strip()

    def format_help_text(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write the text without the examples."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(_about(self.help))

    def format_epilog(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write the examples, one per line and never wrapped, so that they can be copied."""
        with formatter.section("Examples"):
            for line in examples(self.help):
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class HelpCommand(_WithExamples, TyperCommand):
    """Command whose help has panels and examples."""

    @override
    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        """Write a section for each panel, all with the same two columns; options without a panel join the output's."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title, name = _panel(parameter), record[0].partition(" <list")[0]
                sections.setdefault(title, []).append((name, in_words(record[1])))
        if ADVANCED.title in sections:
            sections[ADVANCED.title] = sections.pop(ADVANCED.title)
        names = [name for records in sections.values() for name, _ in records]
        width = max(len(name) for name in names if len(name) <= _WIDEST)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in records], col_max=width)


class HelpGroup(_WithExamples, TyperGroup):
    """Group of commands whose help has examples."""


def in_words(text: str) -> str:
    """Return the help text of an option with its default and its range as a person writes them.

    ``[default: (128); x<=1000000]`` becomes ``[default: 128]``, ``1<=x<=1000`` becomes ``1 to 1000``, ``x>=0`` becomes
    ``0 or more``. The upper limit `MOST` is not shown.
    """
    about, bracket, details = text.rpartition("  [")
    if not bracket or not details.endswith("]"):
        return text
    parts = [_plain_detail(part) for part in details[:-1].split("; ")]
    shown = "; ".join(part for part in parts if part)
    return f"{about}  [{shown}]" if shown else about


def _plain_detail(detail: str) -> str:
    """Return one of the details that Typer shows after the help text; empty for an upper limit alone."""
    default, limits = re.fullmatch(r"default: \((.*)\)", detail), _LIMITS.fullmatch(detail)
    if default:
        return f"default: {default[1]}"
    if not limits:
        return detail
    least, most = ((number or "").removesuffix(".0") for number in (limits[1] or limits[3], limits[2]))
    if not least:
        return ""
    return f"{least} to {most}" if most and int(most) < MOST else f"{least} or more"


def examples(text: str | None) -> list[str]:
    """Return the command lines among the examples of a docstring."""
    lines = inspect.cleandoc(text or "").partition(_EXAMPLES)[2].splitlines()
    return [line.strip() for line in lines if line.strip()]


def _about(text: str | None) -> str:
    """Return a docstring without its examples."""
    return inspect.cleandoc(text or "").partition(_EXAMPLES)[0]


def _panel(parameter: Any) -> str:
    """Return the title of the section that a parameter belongs to."""
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or OUTPUT.title
