import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import besa_cli
from besa_cli import __version__, models
from besa_cli.app import app
from besa_cli.calibration import calibration_set
from besa_cli.errors import BesaError, UsageError
from besa_cli.pruners import besa as besa_pruner
from besa_cli.pruners import sparsegpt
from besa_cli.quantizers import clip, gptq
from besa_cli.system import signals

Besa = Callable[..., Any]  # conftest.Outcome

PROGRAM = [sys.executable, "-m", "besa_cli"]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `besa calibrate` meet an error at its first step."""

    def fail_with(error: BaseException) -> None:
        def resolve(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(models, "resolve", resolve)

    return fail_with


class OutOfMemoryError(RuntimeError):
    """Stands for torch's error of that name."""


def test_version(besa: Besa) -> None:
    outcome = besa("--version")
    assert (outcome.code, outcome.out, outcome.err) == (0, f"besa {__version__}\n", "")


@pytest.mark.parametrize("verb", ["calibrate", "prune", "eval", "show"])
def test_help_names_every_verb_and_each_explains_itself(besa: Besa, verb: str) -> None:
    assert f"\n  {verb} " in besa("--help").out
    outcome = besa(verb, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"Usage: besa {verb} ")


def test_a_group_without_a_verb_is_an_error_with_its_help(besa: Besa) -> None:
    outcome = besa("eval")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: besa eval")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pruen",), "No such command 'pruen'. Did you mean 'prune'"),
        (("calibrate", "--sampels", "3"), "No such option '--sampels'. Did you mean '--samples'?"),
        (("calibrate", "--samples", "many"), "invalid value 'many' for --samples: it is not a whole number"),
        (("calibrate", "--seed", "-1"), "invalid value '-1' for --seed: Input should be greater than or equal to 0"),
        (("prune", "--device", "gpu"), "invalid value 'gpu' for --device: 'gpu' is not one of 'auto', 'cpu', 'cuda'"),
        (("prune", "--foo"), "No such option '--foo'"),
        (("show", "a", "b"), "Got unexpected extra argument(s) (b)"),
    ],
)
def test_wrong_usage_is_one_line_and_a_hint(besa: Besa, words: tuple[str, ...], message: str) -> None:
    outcome = besa(*words)
    assert (outcome.code, outcome.out) == (2, "")
    error, hint = outcome.err.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint.startswith("hint: see 'besa")


def test_an_option_before_its_command_is_sent_behind_it(besa: Besa) -> None:
    outcome = besa("--sparsity", "0.5", "prune")
    assert outcome.code == 2
    assert outcome.err.splitlines() == [
        "error: No such option '--sparsity'",
        "hint: it is an option of besa prune: type it after the command",
    ]


def test_a_wrong_value_from_a_file_names_the_file(besa: Besa, workplace: Path) -> None:
    (workplace / "mine.yaml").write_text("seed: soon\n")
    outcome = besa("calibrate", "--config", "mine.yaml")
    assert outcome.code == 2
    assert outcome.err.splitlines()[0].startswith("error: invalid value 'soon' for --seed: ")
    assert outcome.err.splitlines()[0].endswith(" (from mine.yaml)")


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (BesaError("no [model] in /a b/c", "look there"), 1, ["error: no [model] in /a b/c", "hint: look there"]),
        (BesaError("no hint"), 1, ["error: no hint"]),
        (UsageError("--x 3", "give 4"), 2, ["error: --x 3", "hint: give 4"]),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk"),
            1,
            ["error: No space left on device: /full/disk", "hint: free disk space, then run the same command again"],
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, ["error: Permission denied: /x"]),
        (OutOfMemoryError("CUDA out of memory"), 1, ["error: out of memory: CUDA out of memory"]),
        (RuntimeError("alloc:\n can't allocate memory"), 1, ["error: out of memory: alloc: can't allocate memory"]),
        (MemoryError(), 1, ["error: out of memory"]),
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
    ],
)
def test_an_error_is_a_line_and_a_code(
    besa: Besa,
    failing: Callable[[BaseException], None],
    error: BaseException,
    code: int,
    lines: list[str],
) -> None:
    failing(error)
    outcome = besa("calibrate")
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.splitlines()[: len(lines)] == lines
    assert len(outcome.err.splitlines()) <= 2


class PanicException(BaseException):
    pass


FAULTS = [
    RuntimeError("a\nbug"),
    ValueError("a bug"),
    AssertionError("a bug"),
    PanicException("a bug"),
    RecursionError("a bug"),
]


@pytest.mark.parametrize("error", FAULTS)
def test_an_error_that_nobody_foresaw_is_a_line_and_its_traceback_a_file(
    besa: Besa,
    failing: Callable[[BaseException], None],
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("besa_cli.app.NamedTemporaryFile", partial(tempfile.NamedTemporaryFile, dir=tmp_path))
    failing(error)
    outcome = besa("calibrate")
    (file,) = tmp_path.glob("besa-traceback-*.txt")
    assert outcome.code == 1
    assert outcome.err.splitlines() == [
        f"error: besa failed with an unexpected error: {type(error).__name__}: a bug",
        f"hint: please report it with the traceback in {file}",
    ]
    text = file.read_text(encoding="utf-8")
    assert text.startswith("Traceback (most recent call last):")
    assert "in calibrate" in text


def test_where_no_file_can_be_made_the_hint_names_debug(
    besa: Besa, failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("besa_cli.app.NamedTemporaryFile", full)
    failing(ValueError("a bug"))
    outcome = besa("calibrate")
    assert (outcome.code, len(outcome.err.splitlines())) == (1, 2)
    assert "besa --debug" in outcome.err


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both", "all"])
def test_closed_streams_change_nothing_but_what_is_seen(workplace: Path, closed: str) -> None:
    ends = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-", "all": "<&- >&- 2>&-"}[closed]
    words = shlex.join([*PROGRAM, "show", "nowhere"])
    done = subprocess.run(["bash", "-c", f"{words} {ends}"], capture_output=True, text=True, check=False)
    said = ["error: nowhere does not exist"] if closed == "stdout" else []
    assert (done.returncode, done.stderr.splitlines()[:1]) == (1, said)


@pytest.mark.parametrize("by_variable", [False, True])
def test_debug_shows_where(
    besa: Besa, failing: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    failing(BesaError("no model", "look there"))
    if by_variable:
        monkeypatch.setenv("BESA_DEBUG", "1")
    outcome = besa("calibrate") if by_variable else besa("--debug", "calibrate")
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback (most recent call last):")
    assert outcome.err.endswith("error: no model\nhint: look there\n")


@pytest.mark.parametrize("error", [ValueError("no shape"), RuntimeError("no storage"), BesaError("cannot read it")])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_an_extension_made_another_error_of(
    number: signal.Signals, code: int, error: Exception, besa: Besa, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(*_: object, **__: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise error from None

    monkeypatch.setattr(models, "resolve", resolve)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        outcome = besa("calibrate")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.code, outcome.err.splitlines()[0]) == (code, "error: interrupted")


class Callback:
    """What goes wrong in here can only be ignored, as in a callback of an extension."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_that_was_ignored_comes_again(
    number: signal.Signals, code: int, besa: Besa, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(*_: object, **__: object) -> None:
        Callback(number)
        for _try in range(200):
            time.sleep(0.1)
        raise AssertionError("the interrupt was lost")

    monkeypatch.setattr(models, "resolve", resolve)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcome = besa("calibrate")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.code, outcome.err.splitlines()[0]) == (code, "error: interrupted")


def test_an_interrupt_that_was_ignored_does_not_outlive_the_command(
    besa: Besa, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(*_: object, **__: object) -> None:
        Callback(signal.SIGTERM)
        raise BesaError("no model")

    monkeypatch.setattr(models, "resolve", resolve)
    monkeypatch.setattr(signals, "_AGAIN", 3600.0)
    assert besa("calibrate").code == 1
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for timer in timers:
        timer.join(10)
        assert not timer.is_alive()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_one_line_that_says_how_to_go_on(workplace: Path, number: int, code: int) -> None:
    (workplace / "sitecustomize.py").write_text(
        "import signal, time\n"
        "from besa_cli import models\n"
        "def resolve(*_, notify):\n"
        "    notify('working')\n"
        "    time.sleep(60)\n"
        "models.resolve = resolve\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job begins with it ignored
    )
    path = os.pathsep.join([str(workplace), str(Path(besa_cli.__file__).parents[1])])
    process = subprocess.Popen(
        [*PROGRAM, "calibrate"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "working\n"
    time.sleep(0.2)  # until it sleeps
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    error, hint = err.splitlines()
    assert error == "error: interrupted"
    assert "run the same command again" in hint


def test_a_closed_pipe_is_no_traceback(workplace: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [*PROGRAM, "prune", "--help"], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["show", "nowhere"], ["--version"], ["prune", "--help"], []])
@pytest.mark.parametrize("ends", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "| true", "2>&1 | true"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_no_traceback(workplace: Path, ends: str, words: list[str]) -> None:
    line = f"{shlex.join([*PROGRAM, *words])} {ends}; echo rc ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] in ("rc 0", "rc 1", "rc 2")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len([each for each in done.stderr.splitlines() if each.startswith("error: ")]) <= 1


def test_the_help_states_the_defaults_that_hold(besa: Besa) -> None:
    text = " ".join(besa("calibrate", "--help").out.split())
    default = calibration_set.CalibrationOptions()
    stated = {
        "data": ",".join(default.data),
        "samples": str(default.samples),
        "seed": f"{default.seed}; 0 or more",
    }
    for option, value in stated.items():
        assert f"[default: {value}]" in text.split(f" --{option} ")[1].split(" --")[0]
    assert f"[default: {default.seqlen}, or" in text.split("--seqlen ")[1]


METHOD_OPTIONS = {
    "prune": [besa_pruner.Options(), sparsegpt.Options()],
    "quantize": [clip.Options(), gptq.Options()],
}


@pytest.mark.parametrize("command", METHOD_OPTIONS)
def test_the_help_of_a_method_states_the_defaults_that_hold(command: str) -> None:
    shown = {param.name: param for param in get_command(app).commands[command].params}  # type: ignore[attr-defined]
    for own in METHOD_OPTIONS[command]:
        for field in fields(own):
            value = getattr(own, field.name)
            if value is None or field.name == "nm":
                continue
            said = shown[field.name].show_default
            stated = f"{value:g}" if isinstance(value, float) else str(value)
            if isinstance(value, bool):
                stated = field.name if value else f"no-{field.name}"
            assert re.search(rf"(^|\W){re.escape(stated)}(\W|$)", str(said)), (field.name, said, stated)


def test_waiting_threads_do_not_spin_unless_asked_to(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    """torch's OpenMP reads the variable when it is loaded: it has to be set before any command imports torch."""
    script = """
import os, sys
from besa_cli.app import main
main(["--version"])
print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
"""
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stdout.splitlines()[-1] == f"{expected} False"
