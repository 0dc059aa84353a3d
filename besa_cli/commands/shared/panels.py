"""Help of a command: its options in panels, and examples at the end.

Typer shows panels only with rich, whose import would take longer than the rest of the help. These classes write them
as plain text.
"""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typing_extensions import override

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

_EXAMPLES = "\n\nExamples:\n\n"  # heading in the docstring of a command; indented command lines follow
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
SPARSITY = Panel("Sparsity")
BESA = Panel("BESA")
WHOLE_MODEL = Panel("Whole model")
REPAIR = Panel("Repair")
QUANTIZATION = Panel("Quantization")
CLIPPING = Panel("Learned clipping")
MEASUREMENT = Panel("Measurement")
SIMULATION = Panel("Simulation")
EXPORT = Panel("Format")
HUB = Panel("Hugging Face hub")
COMPUTE = Panel("Compute")
RUN = Panel("Run")
OUTPUT = Panel("Output")


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
        """Write a section for each panel, all with the same two columns; options without a panel join the last one."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                title, name = _panel(parameter), record[0].partition(" <list")[0]
                sections.setdefault(title, []).append((name, record[1]))
        names = [name for records in sections.values() for name, _ in records]
        width = max(len(name) for name in names if len(name) <= _WIDEST)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in records], col_max=width)


class HelpGroup(_WithExamples, TyperGroup):
    """Group of commands whose help has examples."""


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
