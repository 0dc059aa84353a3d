"""The long commands on a tiny model, as `interruptions.py` types them: forks of one process that has imported torch.

`besa run` is not among them, which starts these commands one after the other, nor `besa eval tasks`, which is lm-eval.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from faults import fault_injection
from support import tiny_models

ROOT = Path(__file__).parents[2]
PATIENCE = 900  # seconds; a command that takes longer hangs
_ESCAPED = 70  # exit code where an exception left `main`


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a command ended.

    Attributes
    ----------
    code : int
        Its exit code; −9 where it was killed.
    said : str
    """

    code: int
    said: str

    @property
    def clear(self) -> bool:
        """Whether it is done, or says in one line why not."""
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return "Traceback" not in self.said and (self.code == 0 or len(lines) == 1)


class Started:
    """A command at work.

    Parameters
    ----------
    process : int
    log : Path
        What it says.
    """

    def __init__(self, process: int, log: Path) -> None:
        self._process, self._log, self._handle = process, log, os.pidfd_open(process)

    def ends(self, within: float) -> bool:
        """Wait at most so many seconds; whether it has ended."""
        return bool(select.select([self._handle], [], [], within)[0])

    def send(self, number: int) -> None:
        """Send it a signal."""
        signal.pidfd_send_signal(self._handle, number)

    def end(self) -> Ending:
        """Wait for it; one that hangs is killed, and says so."""
        hangs = not self.ends(PATIENCE)
        if hangs:
            self.send(signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        os.close(self._handle)
        said = self._log.read_text(errors="replace")
        return Ending(code=code, said=f"{said}\nTraceback: it hung" if hangs else said)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command line, and what it works on.

    Attributes
    ----------
    name : str
    words : tuple of str
    run : Path
        The run directory that it writes.
    base : Path, optional
        A run directory that `run` is a copy of before the command is typed.
    model : Path, optional
        A checkpoint outside the run directory that it reads.
    pinned : str
        The file below `run` from which on it is known which content of `model` is meant.
    forks : bool
        Whether it runs in a fork of this process.
    """

    name: str
    words: tuple[str, ...]
    run: Path
    base: Path | None = None
    model: Path | None = None
    pinned: str = "pruned/besa.json"
    forks: bool = True

    def begin(self) -> None:
        """Make the run directory as it is before the command."""
        shutil.rmtree(self.run, ignore_errors=True)
        if self.base:
            shutil.copytree(self.base, self.run)

    def reads(self, path: Path) -> bool:
        """Whether a file was there before the command: it is of the model, or of the run directory as it was."""
        if self.model and path.is_relative_to(self.model):
            return True
        return self.base is not None and (self.base / path.relative_to(self.run)).exists()

    def start(self, log: Path, before: Callable[[], None] = lambda: None) -> Started:
        """Start it, after `before` in its own process; returns when it has begun."""
        if not self.forks:
            with log.open("w") as file:
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                command = [sys.executable, "-m", "besa_cli", *self.words]
                made = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            made.returncode = 0  # waited for in `Started`
            return Started(made.pid, log)
        ready, begun = os.pipe()
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                _main(self.words, log, begun, before)
            os._exit(_ESCAPED)
        os.close(begun)
        os.read(ready, 1)
        os.close(ready)
        return Started(process, log)

    def end(self, log: Path, before: Callable[[], None] = lambda: None) -> Ending:
        """Run it to its end."""
        return self.start(log, before).end()


def _main(words: tuple[str, ...], log: Path, begun: int, before: Callable[[], None]) -> None:
    """The command's own `main` in this process, which then ends."""
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    code = _ESCAPED
    try:
        from besa_cli.app import main

        fault_injection.settle_fork()
        before()
        os.close(begun)
        code = main(words)
    except BaseException:  # noqa: BLE001 - what leaves `main` is what is looked for
        traceback.print_exc()
    finally:
        os._exit(code)


def all_of(place: Path, log: Path) -> list[Command]:
    """Every long command, on a tiny model of three blocks below `place`."""
    made = Workshop(place, log)
    return [*made.prunes(), *made.stages(), *made.measurements(), *made.exports()]


class Workshop:
    """A tiny model, its data, and run directories that commands begin from."""

    def __init__(self, place: Path, log: Path) -> None:
        self._place, self._log, self._run = place, log, place / "run"
        dense = tiny_models.checkpoint(place / "tiny", blocks=3, dtype=torch.bfloat16, shard_size="20KB")
        self._model = tiny_models.add_tokenizer(dense)
        rows = tiny_models.rows_file(place / "rows.jsonl", tiny_models.tokens(8, 32))
        self._drawn = ("--data", str(rows), "--samples", "4", "--seqlen", "32")
        self._text = place / "text.txt"
        self._text.write_text(" ".join(f"w{3 + number * 7 % 120}" for number in range(400)))
        self._common = ("--dtype", "float32", "--run", str(self._run))
        self._pruned = self._made("pruned", self._prune("besa").words)

    def _made(self, name: str, *commands: tuple[str, ...], base: Path | None = None) -> Path:
        """A run directory that these commands made."""
        begin = Command(name=name, words=(), run=self._run, base=base)
        begin.begin()
        for words in commands:
            done = Command(name=name, words=words, run=self._run).end(self._log)
            if done.code:
                raise SystemExit(f"besa {' '.join(words)}: {done.said}")
        (self._run / ".lock").unlink(missing_ok=True)
        return self._run.rename(self._place / f"made-{name}")

    def _prune(self, method: str, *more: str, name: str = "", **how: object) -> Command:
        words = ("prune", "--model", str(self._model), "--method", method, *self._drawn, *self._common, *more)
        return Command(name=name or f"prune {method}", words=words, run=self._run, model=self._model, **how)  # type: ignore[arg-type]

    def prunes(self) -> list[Command]:
        """`besa prune` in several ways, and over a finished stage."""
        return [
            self._prune("besa"),
            self._prune(
                "besa", "--granularity", "layer", "--target", "stream", "--window", "2", name="prune besa, windows of 2"
            ),
            self._prune("besa", "--samples", "8", name="prune besa, held out"),
            self._prune("sparsegpt", "--nm", "2:4"),
            self._prune("wanda", "--budget", "model", name="prune --budget model"),
            self._prune("wanda", "--global-epochs", "2", name="prune --global-epochs"),
            self._prune("wanda", "--update", "tune", name="prune --update"),
            self._prune(
                "wanda", "--restart", name="prune --restart", base=self._pruned, pinned="pruned.next/besa.json"
            ),
            self._prune("besa", "--bits", "4", "--group-size", "16", name="prune --bits", pinned="quantized/besa.json"),
        ]

    def stages(self) -> list[Command]:
        """Commands beside `besa prune` that write a calibration set or a stage."""
        quantize = ("quantize", "--bits", "4", "--group-size", "16", "--method", "gptq", *self._common)
        tune = ("tune", "--epochs", "5", "--lr", "0.01", *self._common)  # 20 steps: the state is stored within a pass
        calibrate = ("calibrate", "--model", str(self._model), "--data", str(self._text), "--samples", "4")
        again = (*calibrate, "--seqlen", "16", "--restart", "--run", str(self._run))
        return [
            Command(name="quantize", words=quantize, run=self._run, base=self._pruned),
            Command(name="tune", words=tune, run=self._run, base=self._pruned, model=self._model),
            Command(name="calibrate --restart", words=again, run=self._run, base=self._pruned),
        ]

    def measurements(self) -> list[Command]:
        """Commands that write results."""
        evaluate = ("eval", "ppl", str(self._text), "--seqlen", "32", *self._common)
        simulate = ("simulate", "--func", "model", "--run", str(self._run))
        return [
            Command(name="eval ppl", words=evaluate, run=self._run, base=self._pruned, model=self._model),
            Command(name="simulate", words=simulate, run=self._run, base=self._pruned),
        ]

    def exports(self) -> list[Command]:
        """`besa export` and `besa import`."""
        export = ("export", "--run", str(self._run))
        sparse = (*export, "--format", "sparse")
        exported = self._made("exported", sparse, base=self._pruned)
        back = ("import", str(self._run / "export" / "sparse"), "--run", str(self._run / "again"))
        return [
            Command(name="export hf", words=export, run=self._run, base=self._pruned),
            Command(name="export sparse --restart", words=(*sparse, "--restart"), run=self._run, base=exported),
            Command(name="import", words=back, run=self._run, base=exported),
        ]
