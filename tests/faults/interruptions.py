"""Do harm to `besa` at random, type the command again, and compare what it makes with an undisturbed run.

    python tests/faults/interruptions.py                                        # `make faults`
    python tests/faults/interruptions.py --tiny 400 --real 0 --seed 7 --write benchmarks/results/FAULTS.md

Two kinds of harm. *Interruptions* (SIGKILL, SIGTERM, SIGINT or a full disk at a random moment, a clock that jumps)
come one to three in a row; then the same command has to end in the same bytes, `timing.jsonl` and the lock's files
aside. *Damage* (a file cut short, a flipped bit, a manifest of a newer format, half-way or under the running command)
has to be refused with one line and exit code 1, or to make no difference to the bytes; put right again, the same
command has to end in the same bytes. Where nothing is lost but a traceback is shown, two lines where one says it, or
none since the command hangs, it is counted as unclear; everything else is counted as lost. The exit code is then 1.

Every long command works on a tiny model, as a fork of this process, which has imported torch: harm falls on its work,
not on imports. The disk that is full is a small filesystem of its own, where Linux allows to mount one. Not collected
by pytest: `tests/faults/test_interruptions.py` and `tests/jobs/test_resume.py` do harm at named points. Inputs that
were hostile from the beginning are in `tests/faults/hostile`.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from faults import commands_under_faults, fault_injection
from faults.commands_under_faults import Command, Ending
from faults.fault_tally import Tally, write_section
from support import tiny_models

TRANSIENT = ("timing.jsonl", ".lock", ".holder.json", ".eval.lock")
MOST_IN_A_ROW = 3
ROOM = 100 << 20  # bytes of the disk that can be full; an export wants 64 MB free
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
FULL, CLOCK = "disk full", "clock jumps"


class Campaign:
    """Harm in turn to some commands, each compared with an undisturbed run of its own in the same place.

    Parameters
    ----------
    commands : sequence of Command
    log : Path
        What a command says; not on the disk that may be full.
    tally : Tally
    disk : fault_injection.Disk, optional
        Where they write, if it can be made full.
    keep : Path, optional
        Where run directories go that lost something.
    """

    def __init__(
        self,
        commands: Sequence[Command],
        log: Path,
        tally: Tally,
        *,
        disk: fault_injection.Disk | None,
        keep: Path | None,
    ) -> None:
        self._commands, self._log, self._tally, self._disk, self._keep = commands, log, tally, disk, keep
        self._whole: dict[str, dict[str, bytes]] = {}
        self._seconds: dict[str, float] = {}
        for command in commands:
            command.begin()
            began = time.perf_counter()
            ending = command.end(log)
            if ending.code:
                raise SystemExit(f"{command.name} failed:\n{ending.said}")
            self._seconds[command.name] = time.perf_counter() - began
            self._whole[command.name] = tiny_models.files(command.run, without=TRANSIENT)
            sys.stderr.write(f"{command.name}: {self._seconds[command.name]:.2f} s\n")

    def run(self, injections: int, *, damages: bool) -> None:
        """Inject so many."""
        goal = self._tally.injected + injections
        number = 0
        while self._tally.injected < goal:
            command = self._commands[number % len(self._commands)]
            acts = [self._interruptions] * 2 + [self._damage, self._damage_under] * damages
            command.begin()
            random.choice(acts)(command)
            shutil.rmtree(command.run, ignore_errors=True)
            number += 1
            if number % 20 == 0:
                wrong = f"{self._tally.of('unclear')} unclear, {self._tally.of('lost')} lost"
                sys.stderr.write(f"{self._tally.injected} injections, {wrong}\n")

    def _differ(self, command: Command) -> list[str]:
        """The files of the run directory that are not those of an undisturbed run."""
        found, whole = tiny_models.files(command.run, without=TRANSIENT), self._whole[command.name]
        return sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))

    def _count(self, command: Command, harms: Sequence[str], outcome: str, why: str) -> None:
        for each in harms:
            self._tally.add(each, command.name, outcome, why)
        if outcome in ("lost", "unclear") and self._keep:
            shutil.copytree(command.run, self._keep / str(self._tally.injected), dirs_exist_ok=True)

    def _moment(self, command: Command) -> float:
        return random.uniform(0, self._seconds[command.name])

    def _interruptions(self, command: Command) -> None:
        """Some interruptions in a row, then the same command to its end."""
        weights = {**dict.fromkeys(SIGNALS, 3), FULL: 4 if self._disk else 0, CLOCK: 1}
        kinds = random.choices(list(weights), list(weights.values()), k=random.randint(1, MOST_IN_A_ROW))
        done, unclear = [], ""
        for kind in kinds:
            if (ending := self._interrupted(command, kind)) is not None:
                done.append(kind)
                unclear = unclear or ("" if ending.clear or kind == "SIGKILL" else f"{kind}: {ending.said}")
        ending = command.end(self._log)
        differ = self._differ(command)
        outcome = "lost" if ending.code or differ else "unclear" if unclear else "identical"
        why = f"after {done}: {', '.join(differ)}; exit {ending.code}; {unclear or ending.said[-300:]}"
        self._count(command, done, outcome, why)

    def _interrupted(self, command: Command, kind: str) -> Ending | None:
        """Start the command, do it harm, wait; None where it ended before the harm."""
        if kind == CLOCK:
            seed = random.randint(0, 1 << 30)
            return command.end(self._log, lambda: fault_injection.jumping_clock(seed))
        started = command.start(self._log)
        if started.ends(self._moment(command)):
            started.end()
            return None
        if kind in SIGNALS:
            started.send(SIGNALS[kind])
            return started.end()
        assert self._disk
        self._disk.fill(random.choice([0, random.randrange(1 << 17)]))
        ending = started.end()
        self._disk.free()
        return ending

    def _targets(self, command: Command, *, inputs: bool = False) -> list[tuple[str, Path]]:
        """What may be damaged, or only what the command reads and has not made.

        The source only once it is known which was meant: before, it is a model like any other.
        """
        found = fault_injection.targets(command.run, command.model if _pinned(command.run / command.pinned) else None)
        return [(kind, path) for kind, path in found if not inputs or command.reads(path)]

    def _damage(self, command: Command) -> None:
        """Stop half-way, damage one file, expect a refusal; put it right and run to the end."""
        self._interrupted(command, "SIGKILL")
        if targets := self._targets(command):
            self._damaged(command, "half-way", *random.choice(targets), lambda: command.end(self._log))

    def _damage_under(self, command: Command) -> None:
        """Damage one file that the running command reads."""
        started = command.start(self._log)
        ended = started.ends(self._moment(command))
        targets = self._targets(command, inputs=True)
        if ended or not targets:
            started.end()
        else:
            self._damaged(command, "under the command", *random.choice(targets), started.end)

    def _damaged(self, command: Command, when: str, kind: str, place: Path, end: Callable[[], Ending]) -> None:
        """Damage a file, see how the command ends, put the file right, run to the end."""
        before, stamp = place.read_bytes(), place.stat()
        fault_injection.KINDS[kind](place)
        harmed = place.read_bytes()
        ending = end()
        left = place.exists() and place.read_bytes() == harmed
        if left:
            place.write_bytes(before)
            os.utime(place, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        if ending.code == 0 and not self._differ(command):  # damage that nobody read made no difference
            outcome = "identical"
        elif ending.code == 0:
            outcome = "lost"
        else:
            outcome = "refused" if ending.code == 1 and ending.clear else "unclear"
        again = command.end(self._log)
        differ = self._differ(command)
        if again.code or differ:
            outcome = "lost"
        where = "source" if command.model and place.is_relative_to(command.model) else "run directory"
        why = f"{place}, exit {ending.code}: {ending.said[-600:]}; then {again.code}, {differ}: {again.said[-300:]}"
        self._count(command, [f"{kind}, {where}, {when}"], outcome, why)


def _pinned(manifest: Path) -> bool:
    """Tell whether a stage pins its model: one whose status is `beginning` has no block, and takes any model."""
    return manifest.exists() and json.loads(manifest.read_text()).get("status") != "beginning"


def campaigns(options: argparse.Namespace, tally: Tally) -> None:
    """All injections that are asked for."""
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="besa-faults-")))
        disk = None
        try:
            disk = fault_injection.Disk(place / "disk", ROOM)
            stack.callback(disk.close)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.stderr.write(f"no disk can be made full here: {error}\n")
        log = place / "said.log"
        if options.tiny:
            fault_injection.warm_up()
            commands = commands_under_faults.all_of(place / "disk", log)
            Campaign(commands, log, tally, disk=disk, keep=options.keep).run(options.tiny, damages=True)
        if options.real:
            run = place / "real"
            words = ("prune", "--data", "bundled", "--samples", "8", "--seqlen", "128", "--run", str(run))
            name = f"prune {Path(options.model).name}"
            real = Command(name=name, words=(*words, "--model", options.model), run=run, forks=False)
            Campaign([real], log, tally, disk=None, keep=options.keep).run(options.real, damages=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaigns and print the tables, of what was done where they are interrupted; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", type=int, default=320, help="injections on a tiny model")
    parser.add_argument("--real", type=int, default=6, help="interruptions on a real model, in processes of their own")
    parser.add_argument("--model", default="smollm2-135m", help="the real model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="copy run directories that lost something here")
    parser.add_argument("--save", type=Path, help="keep the counts in this file")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="counts of other campaigns, to be added")
    parser.add_argument("--write", type=Path, help="put the tables into this page, too")
    options = parser.parse_args(arguments)
    fault_injection.own_mounts()
    random.seed(options.seed)
    tally = Tally()
    for file in options.add:
        tally.load(file)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell in the background has them ignored
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        campaigns(options, tally)
    sys.stdout.write(tally.tables())
    if options.save:
        tally.save(options.save)
    if options.write:
        write_section(options.write, "Interruptions and damage", tally.tables())
    return int(tally.of("lost") + tally.of("unclear") > 0)


if __name__ == "__main__":
    sys.exit(main())
