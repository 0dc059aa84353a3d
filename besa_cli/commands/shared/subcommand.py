"""Commands of `besa` that another command runs, each in a process of its own, whose memory is all freed at its end."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import typer

from besa_cli.errors import BesaError, Interrupted

# With -P nothing is imported from the current directory, which may hold files of others. The directory of this program
# comes last on the path: it is needed only if the program is not installed.
_PACKAGES = str(Path(__file__).parents[3])
_BESA = "import sys; sys.path.append(sys.argv.pop(1)); from besa_cli.app import main; sys.exit(main())"


def call(
    words: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    output: Literal["shown", "discarded", "returned"] = "shown",
) -> str:
    """Run one command; what it writes to stderr is shown.

    Parameters
    ----------
    words : sequence of str
        The command with its options, without `besa`.
    environment : mapping, optional
        Variables beside those of this process.
    output : {"shown", "discarded", "returned"}
        What becomes of its stdout.

    Returns
    -------
    str
        Its stdout if that is returned, else an empty string.

    Raises
    ------
    typer.Exit
        The command failed and has shown why; its exit code is passed on.
    BesaError
        A signal killed it.
    Interrupted
        Ctrl-C ended it.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _BESA, _PACKAGES, *words],
        env={**os.environ, **(environment or {})},
        stdout={"shown": None, "discarded": subprocess.DEVNULL, "returned": subprocess.PIPE}[output],
    )
    try:
        text, _ = process.communicate()
    except KeyboardInterrupt:
        _wait_or_terminate(process)
        raise Interrupted("run the same command again to resume") from None
    code = process.returncode
    if code < 0:
        raise BesaError(f"besa {words[0]} was killed by signal {-code}", "run the same command again to resume")
    if code:
        raise typer.Exit(code)
    return (text or b"").decode()


def _wait_or_terminate(process: "subprocess.Popen[bytes]") -> None:
    """Wait for the command to end; terminate it if the interrupt reached only this process (Ctrl-C reaches both)."""
    try:
        process.wait(0.5)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
