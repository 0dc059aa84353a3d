"""The command line `besa`: it wires the verbs, and is the one place where an error becomes a line and an exit code."""

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from traceback import print_exception
from typing import Annotated, Any

import typer
from typer.main import get_command

from besa_cli import __version__
from besa_cli.commands import eval_
from besa_cli.commands.calibrate import calibrate
from besa_cli.commands.export import export
from besa_cli.commands.import_ import import_
from besa_cli.commands.prune import prune
from besa_cli.commands.quantize import quantize
from besa_cli.commands.run import run
from besa_cli.commands.shared.config_file import origin
from besa_cli.commands.shared.context import ProcessSettings
from besa_cli.commands.shared.help import HelpCommand, HelpGroup
from besa_cli.commands.show import show
from besa_cli.commands.simulate import simulate
from besa_cli.console import show_error
from besa_cli.errors import BesaError, Interrupted, UsageError, reason_of
from besa_cli.system import signals, torchrun

INTERRUPTED = 128 + signal.SIGINT

_SHARED = ("prune",)  # commands that several ranks can share

app = typer.Typer(
    name="besa",
    cls=HelpGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"besa {__version__}")
        raise typer.Exit


@app.callback()
def besa(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="BESA_DEBUG", help="Show the traceback of an error, too.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and leave.")
    ] = False,
) -> None:
    """Make a large language model sparse without training it, block by block, and measure the quality lost.

    Examples:

        besa prune --data bundled --samples 32 --seqlen 512
        besa eval ppl wikitext2 --limit 8
        besa export --format sparse
    """
    if isinstance(context.obj, ProcessSettings):
        context.obj.debug = debug
        _join(context, context.obj)


def _join(context: typer.Context, settings: ProcessSettings) -> None:
    """Find the other ranks where `torchrun` started several; only the first one is heard from here on."""
    place = torchrun.rank_from_environment(os.environ)
    if place.size == 1:
        return
    settings.speaks = lambda: place.rank == 0
    if context.invoked_subcommand not in _SHARED:
        raise UsageError(
            f"besa {context.invoked_subcommand} does not work on {place.size} ranks: besa {', '.join(_SHARED)} does",
            "start it once, without torchrun",
        )
    from besa_cli.system.ranks import Ranks

    settings.speaks = lambda: True  # who has not met the others cannot know that one of them speaks
    settings.ranks = Ranks(place)
    settings.speaks = settings.ranks.first_to_fail
    if not settings.ranks.is_main:
        context.with_resource(_unheard())


app.command(cls=HelpCommand)(calibrate)
app.command(cls=HelpCommand)(prune)
app.command(cls=HelpCommand)(quantize)
app.add_typer(eval_.app, name="eval")
app.command(cls=HelpCommand)(export)
app.command("import", cls=HelpCommand)(import_)
app.command(cls=HelpCommand)(simulate)
app.command(cls=HelpCommand)(show)
app.command(cls=HelpCommand)(run)


@contextmanager
def _unheard() -> Iterator[None]:
    """What is printed goes nowhere."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0 done; 1 could not do it; 2 wrong usage; 130 interrupted (Ctrl-C); 143 terminated (SIGTERM), the numbers that
    shells and schedulers expect. A failure is one line and at most one hint on stderr; `--debug` adds the traceback.
    What is neither a user's error nor the machine's (out of space, out of memory) is a fault of besa: its traceback
    goes to a file that the hint names.

    Parameters
    ----------
    arguments : sequence of str, optional
        The words after `besa`; those of the process if not given.
    """
    # Threads that wait for each other by spinning make torch five to eight times slower wherever another program runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported, which is later
    settings = ProcessSettings()
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal lacks must not end the run
    code = _explained(arguments, settings)
    _give_up_on_dead_streams()
    if settings.ranks is not None:
        settings.ranks.shutdown(code)
    return code


def _fill_closed_streams() -> None:
    """Open the null device in the place of standard streams that were closed at the start, as under some daemons.

    Otherwise the next files that are opened take their numbers, and what a library prints goes into them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _give_up_on_dead_streams() -> None:
    """Point streams that cannot be written at the null device: what is left in them would fail again at the exit."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def _say(message: str, hint: str = "") -> None:
    """Show an error, where anything can be shown at all."""
    with suppress(OSError, ValueError):
        show_error(message, hint)


def _explained(arguments: Sequence[str] | None, settings: ProcessSettings) -> int:
    """Run the command line; what goes wrong becomes a line and an exit code."""
    way_on = "nothing that was finished is lost; run the same command again"
    with signals.interrupting(settings.signals, lambda: not settings.failed):
        try:
            code = _run(arguments, settings)
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Interrupted as error:
            code, way_on = INTERRUPTED, error.hint
        except SystemExit:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
                raise
            code = INTERRUPTED if settings.signals else _report(error, settings)  # taken for an error of its own
    if code != INTERRUPTED:
        return code
    if settings.speaks():
        _say("interrupted", way_on)
    return 128 + settings.signals[-1] if settings.signals else INTERRUPTED


def _run(arguments: Sequence[str] | None, settings: ProcessSettings) -> int:
    result = get_command(app).main(args=arguments, prog_name="besa", standalone_mode=False, obj=settings)
    return result if isinstance(result, int) else 0


def _report(error: BaseException, settings: ProcessSettings) -> int:
    """Show what a user can act on, and give its exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        with suppress(OSError):
            typer.echo(str(error), err=True)
        return 2
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    settings.failed = settings.ranks is not None
    if settings.speaks():
        if settings.debug:
            with suppress(OSError, ValueError):
                print_exception(error)
        _say(*(_line(error) or _fault_line(error, settings)))
    return error.exit_code if isinstance(error, BesaError | typer.TyperException) else 1


def _fault_line(error: BaseException, settings: ProcessSettings) -> tuple[str, str]:
    """The message and the hint for an error that nobody foresaw; its traceback goes to a file."""
    message = f"besa failed in a way that nobody foresaw: {type(error).__name__}: {reason_of(error)}"
    if settings.debug:
        return message, "please report it with the traceback above"
    try:
        with NamedTemporaryFile("w", prefix="besa-traceback-", suffix=".txt", delete=False, encoding="utf-8") as file:
            print_exception(error, file=file)
    except (OSError, ValueError):
        return message, "please report it with the traceback that 'besa --debug …' shows"
    return message, f"please report it with the traceback in {file.name}"


def _line(error: BaseException) -> tuple[str, str] | None:
    """The message and the hint for an error, or None if nobody foresaw it."""
    if isinstance(error, BesaError):
        return error.message, error.hint
    if isinstance(error, typer.TyperException):
        return _usage_line(error)
    if _is_out_of_memory(error):
        return (
            f"out of memory: {' '.join(str(error).split())}" if str(error) else "out of memory",
            "close other programs, or take fewer or shorter samples, a smaller --batch-size or another --device",
        )
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        place = f": {error.filename}" if error.filename is not None else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{reason}{place}", "free disk space, then run the same command again" if full else _SEE_WHERE
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's own error, that of torch on a GPU (not imported here), and the plain one that torch raises on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


_SEE_WHERE = "'besa --debug …' shows where"
_IN_OUR_WORDS = {"int_parsing": "it is not a whole number", "float_parsing": "it is not a number"}


def _usage_line(error: typer.TyperException) -> tuple[str, str]:
    context: typer.Context | None = getattr(error, "ctx", None)
    hint = f"see '{context.command_path} --help'" if context is not None else "see 'besa --help'"
    message = " ".join(error.format_message().split())
    parameter, reasons = getattr(error, "param", None), _reasons(error.__cause__)
    if parameter is None or context is None:
        return message, hint
    if reasons:
        name = max([parameter.name, *parameter.opts], key=len) if parameter.opts else parameter.name
        reason = str(reasons[0].get("msg", "")).removeprefix("Value error, ").rstrip(".")
        reason = _IN_OUR_WORDS.get(str(reasons[0].get("type")), reason)
        message = f"invalid value '{reasons[0].get('input')}' for {name}: {reason}"
    return message + origin(context, parameter.name), hint


def _reasons(cause: BaseException | None) -> list[dict[str, Any]]:
    """What a failed conversion says of the value, in the terms of the library that Typer converts with."""
    errors = getattr(cause, "errors", None)
    return list(errors()) if callable(errors) else []
