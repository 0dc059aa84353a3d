"""What a case is, how a command is typed at it, and what is wrong whatever the input was.

Wrong for every case: a traceback, an exit code other than 0, 1 and 2, another number of error lines than one where the
command fails, control characters on the terminal, code of the input that ran, a file outside of the run directories
that is new, changed or gone (or one named `canary` in them), more than `SECONDS` or `MEMORY`.
"""

import hashlib
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Words = tuple[str, ...]

SECONDS = 40  # after which a command is taken to hang
MEMORY = 1 << 30  # bytes more than a fork begins with
RUNS = ("done", "r")  # directories that commands may write to
RAN = "ran"  # the file that code of an input makes
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LARGEST_DIGESTED = 64 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class Line:
    """A command line, and how it is typed.

    Attributes
    ----------
    words : tuple of str
    answers : str
        What stands on standard input.
    environment : mapping
        Variables; None takes one away.
    out, err : str
        What standard output and error are: a `file`, `closed`, a `broken` pipe, or a `full` disk.
    seconds : int
        After which the command is taken to hang.
    """

    words: Words
    answers: str = ""
    environment: Mapping[str, str | None] = field(default_factory=dict)
    out: str = "file"
    err: str = "file"
    seconds: int = SECONDS


@dataclass(frozen=True, kw_only=True)
class Seen:
    """How a command line ended: exit code (negative: a signal), output, seconds, and bytes more than at its start."""

    code: int
    out: str
    err: str
    seconds: float
    memory: int

    @property
    def errors(self) -> list[str]:
        """The lines that say what is wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def said(self) -> str:
        """What it said last, for the log of the campaign."""
        frames = [line for line in self.err.splitlines() if "besa_cli/" in line and " line " in line]
        return " ".join(repr(line[-300:]) for line in [*frames[-1:], *(self.errors or self.err.splitlines()[-1:])])


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What an expectation looks at: the place, how each line ended, and figures of the undisturbed model and run."""

    place: Path
    seen: Sequence[Seen]
    whole: "Whole"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What commands say without any harm: perplexities of model, finished stage and GGUF file, and a sample."""

    perplexity: float
    pruned: float
    gguf: float
    sample: str


Harm = Callable[[Path], object]
Expectation = Callable[[Judged], str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input.

    Attributes
    ----------
    kind, name : str
        The row of the table, and what is done.
    harm : callable
        Makes the input in a copy of the base material, which is the current directory of the commands.
    lines : tuple of Line
        Typed in turn until one fails.
    expect : callable
        Says what is wrong, or nothing.
    """

    kind: str
    name: str
    harm: Harm
    lines: tuple[Line, ...]
    expect: Expectation


def line(*words: str, **how: object) -> Line:
    """A command line."""
    return Line(words=words, **how)  # type: ignore[arg-type]


def several(kind: str, harms: Mapping[str, Harm], *lines: Line, expect: Expectation) -> Iterator[Case]:
    """One case for each harm by name, all answered alike."""
    for name, harm in harms.items():
        yield Case(kind=kind, name=name, harm=harm, lines=lines, expect=expect)


def refused(*said: str) -> Expectation:
    """The last line fails, and its error or hint holds each of these words (`a|b`: one of the two)."""

    def judge(judged: Judged) -> str:
        last = judged.seen[-1]
        missing = [word for word in said if not any(each in last.err for each in word.split("|"))]
        return "accepted" if last.code == 0 else f"does not say {missing}" if missing else ""

    return judge


def fine(judged: Judged) -> str:
    """Nothing more is asked of what was accepted."""
    return ""


def accepted(check: Expectation = fine) -> Expectation:
    """All lines succeed, and the check finds nothing."""
    return lambda judged: check(judged) if judged.seen[-1].code == 0 else "refused"


def either(check: Expectation = fine, *said: str) -> Expectation:
    """A refusal that holds these words is as good as a success where the check finds nothing."""
    return lambda judged: (check if judged.seen[-1].code == 0 else refused(*said))(judged)


def run(case: Case, place: Path, whole: Whole, *, typing: Callable[[Line, Path], Seen]) -> str:
    """Do the harm, type the lines (`typing`: see `typed`), and say what is wrong; nothing where all is right."""
    case.harm(place)
    before, seen = snapshot(place), list[Seen]()
    for each in case.lines:
        seen.append(typing(each, place))
        if seen[-1].code:
            break
    wrong = [complaint for how, each in zip(case.lines, seen, strict=False) for complaint in _universal(each, how)]
    after = snapshot(place)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    wrong += [f"code ran: {RAN}"] if (place / RAN).exists() else [f"changed: {', '.join(changed)}"] if changed else []
    said = case.expect(Judged(place=place, seen=seen, whole=whole))
    wrong += [said] if said else []
    return "; ".join(wrong) and f"{'; '.join(wrong)} | exit {seen[-1].code}: {seen[-1].said}"


def _universal(seen: Seen, how: Line) -> Iterator[str]:
    """What is wrong with an ending, whatever the input was."""
    if "Traceback" in seen.err or "failed with an unexpected error" in seen.err:
        yield "a traceback"
    if seen.code not in (0, 1, 2):
        yield f"exit code {seen.code}"
    elif seen.code and len(seen.errors) != 1 and (how.out, how.err) == ("file", "file"):
        yield f"{len(seen.errors)} error lines"
    if found := _CONTROL.search(seen.out + seen.err):
        yield f"control character {found[0]!r} on the terminal"
    if seen.seconds > how.seconds:
        yield f"{seen.seconds:.0f} seconds"
    if seen.memory > MEMORY or "out of memory" in seen.err:
        yield f"{seen.memory >> 20} MB of memory"


def snapshot(place: Path) -> dict[str, str]:
    """What each file of the user's is: all outside of the run directories, and those named `canary` in them."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.relative_to(place).parts[0] not in RUNS or "canary" in path.name:
            found[name] = _described(path)
    return found


def _described(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"link to {path.readlink()}"
    if not stat.S_ISREG(status.st_mode):
        return f"mode {status.st_mode:o}"
    if status.st_size > _LARGEST_DIGESTED:
        return f"{status.st_size} bytes, changed {status.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()
