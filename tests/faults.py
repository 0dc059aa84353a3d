"""Do harm to `besa` at random, type the command again, and compare what it makes with an undisturbed run.

    python tests/faults.py                                        # `make faults`
    python tests/faults.py --tiny 400 --demo 0 --seed 7

Two kinds of harm. *Interruptions* (SIGKILL, SIGTERM, SIGINT at a random moment, a disk that is full from the n-th
file on, a clock that jumps) come one to three in a row; then the same command has to end in the same bytes,
`timing.jsonl` and the lock's files aside. *Damage* (a file cut short, a flipped bit, a manifest of a newer format, a
changed source) has to be refused with one line and exit code 1, or to make no difference to the bytes; put right again,
the same command has to end in the same bytes. Everything else is counted as lost, and the exit code is then 1.

Commands on the tiny model are forks of this process, which has imported torch: harm falls on their work, not on
imports.
Not collected by pytest: `tests/test_faults.py` and `tests/test_resume.py` do it at named points.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import harm
import tiny

ROOT = Path(__file__).parent.parent
TRANSIENT = ("timing.jsonl", ".lock", ".holder.json", ".eval.lock")
MOST_IN_A_ROW = 3
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
PRUNES = (
    ["--method", "besa", "--epochs", "3"],
    ["--method", "besa", "--granularity", "layer", "--target", "stream", "--epochs", "3"],
    ["--method", "sparsegpt", "--nm", "2:4"],
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One command line, and what it works on.

    Attributes
    ----------
    name : str
    words : list of str
        ``{run}`` stands for the run directory.
    base : Path, optional
        A run directory that is copied before the command is typed.
    model : Path, optional
        A checkpoint outside the run directory that may be damaged.
    forks : bool
        Whether it runs in a fork of this process.
    """

    name: str
    words: list[str]
    base: Path | None = None
    model: Path | None = None
    forks: bool = True

    def begin(self, run: Path) -> None:
        """Make the run directory as it is before the command."""
        if self.base:
            shutil.copytree(self.base, run)

    def start(self, run: Path, before: Callable[[], None] = lambda: None) -> int:
        """Start the command after `before` in its process; returns the process. What it says goes to `run`.log."""
        words = [word.format(run=run) for word in self.words]
        log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        if not self.forks:
            command = [sys.executable, "-m", "besa_cli", *words]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment).pid
            os.close(log)
            return process
        process = os.fork()
        if process == 0:
            sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
            code = 70
            try:
                before()
                from besa_cli.app import main

                code = main(words)
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(log)
        return process

    def run(self, run: Path, before: Callable[[], None] = lambda: None) -> tuple[int, str]:
        """Run to the end; returns the exit code and what was said."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.start(run, before), 0)[1])
        return code, run.with_suffix(".log").read_text(errors="replace")


@dataclass(kw_only=True)
class Tally:
    """What became of the injections, by kind and outcome."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, kind: str, outcome: str, why: str = "") -> None:
        """Count one injection."""
        self.counts.setdefault(kind, Counter())[outcome] += 1
        if outcome == "lost":
            sys.stderr.write(f"LOST {kind}: {why}\n")

    def table(self) -> str:
        """All counts."""
        head = f"{'harm':34} {'injected':>9} {'identical':>10} {'refused':>8} {'lost':>5}"
        rows = [
            f"{kind:34} {sum(found.values()):9} {found['identical']:10} {found['refused']:8} {found['lost']:5}"
            for kind, found in [*self.counts.items(), ("all", sum(self.counts.values(), Counter()))]
        ]
        return "\n".join([head, *rows]) + "\n"

    @property
    def lost(self) -> int:
        """Injections after which something was lost."""
        return sum(found["lost"] for found in self.counts.values())


def interrupted(subject: Subject, run: Path, seconds: float, kind: str) -> bool:
    """Start the command, do it harm, wait; whether the harm found it alive."""
    if kind in SIGNALS:
        process = subject.start(run)
        time.sleep(random.uniform(0, seconds))
        done, _ = os.waitpid(process, os.WNOHANG)
        if done:
            return False
        os.kill(process, SIGNALS[kind])
        os.waitpid(process, 0)
        return True
    if kind == "disk full":
        number = random.randint(1, 14)
        code, said = subject.run(run, lambda: harm.full_disk(number))
        if code and "No space left on device" not in said:
            raise SystemExit(f"a full disk gave {code}: {said}")
        return code != 0
    subject.run(run, lambda: harm.jumping_clock(random.randint(0, 1 << 30)))
    return True


def interruptions(subject: Subject, run: Path, whole: dict[str, bytes], seconds: float, tally: Tally) -> None:
    """Some interruptions in a row, then the same command to its end."""
    subject.begin(run)
    kinds = random.choices([*SIGNALS, "disk full", "clock jumps"], [4, 3, 3, 3, 1], k=random.randint(1, MOST_IN_A_ROW))
    done = [kind for kind in kinds if interrupted(subject, run, seconds, kind)]
    code, said = subject.run(run)
    differ = different(run, whole)
    for kind in done:
        outcome = "lost" if code or differ else "identical"
        tally.add(f"{kind}, {subject.name}", outcome, f"exit {code}, {', '.join(differ)}: {said[-300:]}")


def different(run: Path, whole: dict[str, bytes]) -> list[str]:
    """The files of a run directory that are not those of an undisturbed run."""
    found = tiny.files(run, without=TRANSIENT)
    return sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))


def damage(subject: Subject, run: Path, whole: dict[str, bytes], seconds: float, tally: Tally) -> None:
    """Stop half-way, damage one file, expect a refusal; put it right and run to the end."""
    subject.begin(run)
    interrupted(subject, run, seconds, "SIGKILL")
    begun = (run / "pruned" / "besa.json").exists()  # before, nothing says which source was meant
    targets = harm.targets(run, subject.model if begun else None)
    if not targets:
        return
    kind, place = random.choice(targets)
    before, stamp = place.read_bytes(), place.stat()
    harm.KINDS[kind](place)
    code, said = subject.run(run)
    found = tiny.files(run, without=TRANSIENT)
    place.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    if code == 0 and {**found, **_own(place, run, before)} == whole:
        outcome = "identical"
    elif code == 1 and len(lines) == 1 and "Traceback" not in said:
        outcome = "refused"
    else:
        outcome = "lost"
    place.write_bytes(before)
    os.utime(place, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    code, again = subject.run(run)
    if code or different(run, whole):
        outcome, said = "lost", f"{', '.join(different(run, whole))}: {again}"
    where = "source" if subject.model and place.is_relative_to(subject.model) else "run"
    tally.add(f"{kind}, {where}", outcome, f"{subject.name}, {place.name}, exit {code}: {said[-300:]}")


def _own(place: Path, run: Path, before: bytes) -> dict[str, bytes]:
    """The damaged file as it was, by its name in the run directory: damage that nobody reads may stay."""
    return {str(place.relative_to(run)): before} if place.is_relative_to(run) else {}


def campaign(subjects: Sequence[Subject], injections: int, place: Path, tally: Tally, *, damages: bool) -> None:
    """Injections in turn over the subjects, each compared with one undisturbed run of its subject in the same place."""
    references: list[tuple[float, dict[str, bytes]]] = []
    run = place / "run"
    for subject in subjects:
        subject.begin(run)
        began = time.perf_counter()
        code, said = subject.run(run)
        if code:
            raise SystemExit(f"{subject.name} failed:\n{said}")
        references.append((time.perf_counter() - began, tiny.files(run, without=TRANSIENT)))
        shutil.rmtree(run)
    goal = sum(sum(found.values()) for found in tally.counts.values()) + injections
    number = 0
    while (done := sum(sum(found.values()) for found in tally.counts.values())) < goal:
        index = number % len(subjects)
        seconds, whole = references[index]
        act = damage if damages and random.random() < 1 / 3 else interruptions
        act(subjects[index], run, whole, seconds, tally)
        shutil.rmtree(run, ignore_errors=True)  # killed early enough, there is none
        number += 1
        if number % 10 == 0:
            sys.stderr.write(f"{done} injections, {tally.lost} lost\n")


def tiny_subjects(place: Path) -> list[Subject]:
    """Prune, quantize and eval on a tiny model of four blocks."""
    model = tiny.add_tokenizer(tiny.checkpoint(place / "tiny", blocks=4, dtype=torch.bfloat16, shard_size="20KB"))
    rows = tiny.rows_file(place / "tiny.jsonl", tiny.tokens(8, 32))
    text = place / "text.txt"
    text.write_text(" ".join(f"w{3 + number * 7 % 120}" for number in range(400)))
    drawn = ["--data", str(rows), "--samples", "8", "--seqlen", "32"]
    common = ["--dtype", "float32", "--run", "{run}"]
    prunes = [
        Subject(name="prune", words=["prune", "--model", str(model), *drawn, *method, *common], model=model)
        for method in PRUNES
    ]
    base = place / "base"
    code, said = prunes[0].run(base)
    if code:
        raise SystemExit(said)
    quantize = ["quantize", "--bits", "4", "--group-size", "16", *common]
    evaluate = ["eval", "ppl", str(text), "--seqlen", "32", *common]
    return [
        *prunes,
        Subject(name="quantize", words=[*quantize, "--method", "gptq"], base=base),
        Subject(name="eval", words=evaluate, base=base, model=model),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaigns and print the table, of what was done where it is interrupted; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", type=int, default=320, help="injections on a tiny model")
    parser.add_argument("--demo", type=int, default=6, help="interruptions on the demo model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    random.seed(options.seed)
    tally = Tally()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell in the background has them ignored
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="besa-faults-") as name, contextlib.suppress(KeyboardInterrupt):
        place = Path(name)
        if options.tiny:
            harm.warm_up()
            campaign(tiny_subjects(place), options.tiny, place, tally, damages=True)
        if options.demo:
            words = ["prune", "--data", "bundled", "--samples", "8", "--seqlen", "128", "--run", "{run}"]
            demo = Subject(name="prune demo model", words=words, forks=False)
            campaign([demo], options.demo, place, tally, damages=False)
    sys.stdout.write(tally.table())
    return int(tally.lost > 0)


if __name__ == "__main__":
    sys.exit(main())
