"""Entry point of the command line `besa`: registers the commands and turns every error into a line and an exit code."""

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from traceback import print_exception
from typing import Annotated

import typer
from typer.main import get_command

from besa_cli import __version__
from besa_cli.commands import eval_
from besa_cli.commands.bench import bench
from besa_cli.commands.calibrate import calibrate
from besa_cli.commands.export import export
from besa_cli.commands.fit import fit
from besa_cli.commands.generate import generate
from besa_cli.commands.import_ import import_
from besa_cli.commands.overview import overview
from besa_cli.commands.prune import prune
from besa_cli.commands.quantize import quantize
from besa_cli.commands.report import report
from besa_cli.commands.run import run
from besa_cli.commands.shared.config_file import origin
from besa_cli.commands.shared.context import ProcessSettings
from besa_cli.commands.shared.panels import HelpCommand, HelpGroup
from besa_cli.commands.show import show
from besa_cli.commands.simulate import simulate
from besa_cli.commands.tune import tune
from besa_cli.console import show_error
from besa_cli.errors import BesaError, Interrupted, UsageError, reason_of
from besa_cli.system import signals, torchrun

INTERRUPTED = 128 + signal.SIGINT

_ON_RANKS = ("prune",)  # commands that several ranks can work on

app = typer.Typer(
    name="besa",
    cls=HelpGroup,
    invoke_without_command=True,
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
        bool, typer.Option("--debug", envvar="BESA_DEBUG", help="Also show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
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
        if context.invoked_subcommand is not None:
            _join_ranks(context, context.obj)
    if context.invoked_subcommand is None:
        overview(context)


def _join_ranks(context: typer.Context, settings: ProcessSettings) -> None:
    """Connect to the other ranks if `torchrun` started several, and silence all ranks but the main one."""
    info = torchrun.rank_from_environment(os.environ)
    if info.size == 1:
        return
    settings.speaks = lambda: info.rank == 0
    if context.invoked_subcommand not in _ON_RANKS:
        raise UsageError(
            f"besa {context.invoked_subcommand} does not work on {info.size} ranks: besa {', '.join(_ON_RANKS)} does",
            "start it once, without torchrun",
        )
    from besa_cli.system.ranks import Ranks

    settings.speaks = lambda: True  # until the ranks are connected, each must show its own errors
    settings.ranks = Ranks(info)
    settings.speaks = settings.ranks.first_to_fail
    if not settings.ranks.is_main:
        context.with_resource(_silenced())


app.command(cls=HelpCommand)(calibrate)
app.command(cls=HelpCommand)(prune)
app.command(cls=HelpCommand)(tune)
app.command(cls=HelpCommand)(quantize)
app.add_typer(eval_.app, name="eval")
app.command(cls=HelpCommand)(generate)
app.command(cls=HelpCommand)(bench)
app.command(cls=HelpCommand)(export)
app.command("import", cls=HelpCommand)(import_)
app.command(cls=HelpCommand)(simulate)
app.command(cls=HelpCommand)(show)
app.command(cls=HelpCommand)(fit)
app.command(cls=HelpCommand)(report)
app.command(cls=HelpCommand)(run)


@contextmanager
def _silenced() -> Iterator[None]:
    """Discard all output."""
    with Path(os.devnull).open("w") as null, redirect_stdout(null), redirect_stderr(null):
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    The exit code is 0 on success, 1 on failure, 2 for invalid usage, 130 if interrupted (Ctrl-C) and 143 if terminated
    (SIGTERM). A failure is one line and at most one hint on stderr; `--debug` adds the traceback. An error that is due
    neither to the user nor to the machine (out of space, out of memory) is a bug in besa: its traceback is written to a
    file named in the hint.

    Parameters
    ----------
    arguments : sequence of str, optional
        Arguments after `besa`; by default those of the process.
    """
    # Threads that wait by spinning make torch five to eight times slower when other programs run.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported, later
    settings = ProcessSettings()
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a character that cannot be encoded must not end the run
    code = _run_safely(arguments, settings)
    _replace_broken_streams()
    if settings.ranks is not None:
        settings.ranks.shutdown(code)
    return code


def _fill_closed_streams() -> None:
    """Open the null device in place of standard streams that are closed at the start, as under some daemons.

    Otherwise the next opened files would get their descriptors, and output of libraries would be written to them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is `number`
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _replace_broken_streams() -> None:
    """Redirect streams that cannot be written to the null device, so that flushing them at exit does not fail again."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)


def _show_error(message: str, hint: str = "") -> None:
    """Show an error, ignoring failures to write to stderr."""
    with suppress(OSError, ValueError):
        show_error(message, hint)


def _run_safely(arguments: Sequence[str] | None, settings: ProcessSettings) -> int:
    """Run the command line, show any error, and return the exit code."""
    resume_hint = "finished work is kept; run the same command again"
    with signals.interrupting(settings.signals, lambda: not settings.failed):
        try:
            code = _run(arguments, settings)
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Interrupted as error:
            code, resume_hint = INTERRUPTED, error.hint
        except SystemExit:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a Rust library
                raise
            # a library may raise its own error when a signal interrupts it
            code = INTERRUPTED if settings.signals else _report_error(error, settings)
    if code != INTERRUPTED:
        return code
    if settings.speaks():
        _show_error("interrupted", resume_hint)
    return 128 + settings.signals[-1] if settings.signals else INTERRUPTED


def _run(arguments: Sequence[str] | None, settings: ProcessSettings) -> int:
    result = get_command(app).main(args=arguments, prog_name="besa", standalone_mode=False, obj=settings)
    return result if isinstance(result, int) else 0


def _report_error(error: BaseException, settings: ProcessSettings) -> int:
    """Show an error and return its exit code."""
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
        _show_error(*(_error_line(error) or _crash_line(error, settings)))
    return error.exit_code if isinstance(error, BesaError | typer.TyperException) else 1


def _crash_line(error: BaseException, settings: ProcessSettings) -> tuple[str, str]:
    """Return message and hint for an unexpected error, after writing its traceback to a file."""
    message = f"besa failed with an unexpected error: {type(error).__name__}: {reason_of(error)}"
    if settings.debug:
        return message, "please report it with the traceback above"
    try:
        with NamedTemporaryFile("w", prefix="besa-traceback-", suffix=".txt", delete=False, encoding="utf-8") as file:
            print_exception(error, file=file)
    except (OSError, ValueError):
        return message, "please report it with the traceback that 'besa --debug …' shows"
    return message, f"please report it with the traceback in {file.name}"


def _error_line(error: BaseException) -> tuple[str, str] | None:
    """Return message and hint for an error, or None if it is unexpected."""
    if isinstance(error, BesaError):
        return error.message, error.hint
    if isinstance(error, typer.TyperException):
        return _usage_line(error)
    if _is_out_of_memory(error):
        return (
            f"out of memory: {' '.join(str(error).split())}" if str(error) else "out of memory",
            "close other programs, or use fewer or shorter samples, a smaller --batch-size or another --device",
        )
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        file = f": {error.filename}" if error.filename is not None else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{reason}{file}", "free disk space, then run the same command again" if full else _DEBUG_HINT
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Recognize out-of-memory errors of Python, of torch on a GPU, and of torch on a CPU, without importing torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


_DEBUG_HINT = "'besa --debug …' shows the traceback"
_PLAIN_REASONS = {"int_parsing": "it is not a whole number", "float_parsing": "it is not a number"}


def _usage_line(error: typer.TyperException) -> tuple[str, str]:
    context: typer.Context | None = getattr(error, "ctx", None)
    hint = f"see '{context.command_path} --help'" if context is not None else "see 'besa --help'"
    message = " ".join(error.format_message().split())
    option = getattr(error, "option_name", None)
    if context is not None and isinstance(option, str) and hasattr(error, "possibilities"):
        return _unknown_option(context, option, error.possibilities or (), hint)
    parameter, reasons = getattr(error, "param", None), _reasons(error.__cause__)
    if parameter is None or context is None:
        return message, hint
    if reasons:
        name = max([parameter.name, *parameter.opts], key=len) if parameter.opts else parameter.name
        reason = str(reasons[0].get("msg", "")).removeprefix("Value error, ").rstrip(".")
        reason = _PLAIN_REASONS.get(str(reasons[0].get("type")), reason)
        message = f"invalid value '{reasons[0].get('input')}' for {name}: {reason}"
    return message + origin(context, parameter.name), hint


def _unknown_option(context: typer.Context, option: str, similar: Sequence[str], hint: str) -> tuple[str, str]:
    """Return message and hint for an unknown option: the nearest known one, or the commands that have it."""
    if similar:
        return f"No such option '{option}'. Did you mean '{similar[0]}'?", hint
    having = [
        f"{context.command_path} {name}"
        for name, command in getattr(context.command, "commands", {}).items()
        if any(option in (*parameter.opts, *parameter.secondary_opts) for parameter in command.params)
    ]
    if having:
        hint = f"it is an option of {', '.join(having)}: type it after the command"
    return f"No such option '{option}'", hint


def _reasons(cause: BaseException | None) -> list[Mapping[str, object]]:
    """Return the details of a failed conversion, as dicts of pydantic, which Typer converts values with."""
    errors = getattr(cause, "errors", None)
    return list(errors()) if callable(errors) else []
