"""Files of YAML: experiments, options of one command, and consent to publish that only a hand may give."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.hostile.base import PRUNE
from faults.hostile.frame import Case, Harm, accepted, either, line, refused, several
from faults.hostile.harms import written

_HUGE = str(10**18)
_EXPERIMENT = "run: r\nprune:\n  model: m\n  method: magnitude\n  data: rows.jsonl\n  samples: 2\n  seqlen: 16\n"
_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 12)
)
_EXPERIMENTS: dict[str, str | bytes] = {
    "nothing": "",
    "a list": "- prune\n",
    "a word": "prune",
    "a tab": "prune:\n\tmodel: m\n",
    "aliases that multiply": _LAUGHS,
    "an alias of itself": "a: &a [*a]\nprune: *a\n",
    "a mapping that holds itself": "prune: &a\n  model: m\n  more: *a\n",
    "a merge": "x: &x\n  model: m\nprune:\n  <<: *x\n  run: r\n",
    "deep": "prune: " + "[" * 20_000 + "]" * 20_000,
    "deep mappings": "prune: " + "{a: " * 5000 + "1" + "}" * 5000,
    "a number of 6,000 digits": f"prune:\n  samples: {'9' * 6000}\n",
    "samples of 10^18": _EXPERIMENT.replace("samples: 2", f"samples: {_HUGE}"),
    "NaN": _EXPERIMENT + "  sparsity: .nan\n",
    "a date": _EXPERIMENT + "  sparsity: 2026-11-29\n",
    "a list for a word": _EXPERIMENT + "  sparsity: [0.5]\n",
    "a mapping for a word": _EXPERIMENT + "  sparsity: {a: 0.5}\n",
    "an unknown option": _EXPERIMENT + "  secret: 1\n",
    "an option twice": _EXPERIMENT + "  samples: 3\n",
    "a section twice": _EXPERIMENT + "prune:\n  model: m\n",
    "an unknown section": _EXPERIMENT + "format:\n  disk: c\n",
    "a section that runs a file": _EXPERIMENT + "run:\n  files: e.yaml\n",
    "a number for a key": _EXPERIMENT + "  7: 7\n",
    "a list for a key": _EXPERIMENT + "  ? [a, b]\n  : 7\n",
    "null for a key": _EXPERIMENT + "  ~: 7\n",
    "a Python object": "prune: !!python/object/apply:os.system ['touch ran']\n",
    "a Python name": "prune:\n  model: !!python/name:os.system\n",
    "an unknown tag": "prune:\n  model: !mine m\n",
    "a binary": "prune:\n  model: !!binary aGVsbG8=\n",
    "a set": "prune:\n  model: !!set {m}\n",
    "two documents": _EXPERIMENT + "---\n" + _EXPERIMENT,
    "control characters": 'prune:\n  model: "\\e[2J\\a"\n',
    "a key of control characters": '"\\e[2J": 1\nprune:\n  model: m\n',
    "a section of control characters": 'prune:\n  model: m\n"\\e[2J":\n  a: 1\n',
    "not UTF-8": b"prune:\n  model: \xff\xfe\n",
    "NUL": b"prune:\n  model: a\0b\n",
    "UTF-16": _EXPERIMENT.encode("utf-16"),
    "a model outside": "model: m\n" + _EXPERIMENT,
    "a run above": _EXPERIMENT.replace("run: r", "run: done/../mine/notes.txt"),
}  # fmt: skip
_FINE = ("a merge", "a date", "UTF-16")  # may be read, or not
_OF_A_COMMAND = (  # with --config what is typed goes before the file
    "nothing", "a model outside", "a run above", "samples of 10^18", "a number of 6,000 digits", "control characters",
)  # fmt: skip


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 36)


_PLACES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "of 64 GB": _sparse,
    "missing": lambda path: None,
    "a link to itself": lambda path: path.symlink_to(path.name),
}
_READERS = {"run": line("run", "e.yaml"), "prune --config": line(*PRUNE, "--config", "e.yaml")}


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    for reader, each in _READERS.items():
        for name, content in _EXPERIMENTS.items():
            free = name in _FINE or (reader != "run" and name in _OF_A_COMMAND)
            harm = {f"{name}: {reader}": written("e.yaml", content)}
            yield from several("experiment files", harm, each, expect=either() if free else refused())
        places: dict[str, Harm] = {
            f"{name}: {reader}": lambda place, make=make: make(place / "e.yaml")  # type: ignore[misc]
            for name, make in _PLACES.items()
        }
        yield from several("experiment files", places, each, expect=refused("e.yaml"))
    only = {"one that only prunes": written("e.yaml", _EXPERIMENT)}
    yield from several("experiment files", only, _READERS["run"], expect=accepted())
    yield from _publishing()


def _publishing() -> Iterator[Case]:
    """Consent to publish that a file gives."""
    yes = "y\n" * 9
    keys = (
        "push-to: org/x", "push-to: org/x\n  yes: true", "push_to: org/x\n  yes: true\n  public: true", "public: true",
        "yes: true",
    )  # fmt: skip
    harms = {key: written("e.yaml", f"run: done\nexport:\n  {key}\n") for key in keys}
    for reader, each in {
        "run": line("run", "e.yaml", answers=yes),
        "export --config": line("export", "--run", "done", "--config", "e.yaml", answers=yes),
    }.items():
        named = {f"{name!r}: {reader}": harm for name, harm in harms.items()}
        yield from several("consent from a file", named, each, expect=refused("e.yaml"))
