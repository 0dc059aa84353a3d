"""What is typed and what surrounds it: values of options, experiment files, the environment, the terminal."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.base import FLOAT, PPL, PRUNE
from hostile.frame import Case, Expectation, Judged, Line, accepted, either, line, refused
from hostile.models import SAMPLE

_HUGE = str(10**18)
_WRONG = (
    _HUGE,
    "-1",
    "0",
    "nan",
    "inf",
    "1e400",
    "0x10",
    "1_000",
    "٣",
    "",
    " ",
    "9" * 6000,
    "\x1b[2J",
    "\udcff",
    "../x",
    "--help-me",
)
_OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    (*PRUNE, "--method", "besa"): (
        "--sparsity", "--epochs", "--batch-size", "--lr", "--candidates", "--window", "--granularity", "--penalty",
        "--d-coef", "--bits", "--group-size", "--seed", "--samples", "--seqlen", "--data", "--model", "--method",
        "--nm", "--device", "--dtype", "--calibration", "--preset", "--optimizer",
    ),
    (*PRUNE, "--method", "sparsegpt"): ("--damping",),
    (*PPL, "--model", "m"): ("--seqlen", "--stride", "--limit", "--batch-size", "--data-dir", "--dtype"),
    SAMPLE: ("--tokens", "--model", "--dtype"),
    ("calibrate", "--model", "m", "--data", "text.txt", "--run", "r"): ("--samples", "--seqlen", "--seed"),
    ("quantize", "--run", "done"): (
        "--bits", "--group-size", "--damping", "--method", "--epochs", "--batch-size", "--lr",
    ),
    ("simulate", "--run", "done"): (
        "--batch", "--word-bits", "--threshold", "--func", "--accelerator", "--dataflow", "--plot",
    ),
    ("export", "--run", "done"): ("--shard-size", "--format", "--dtype", "--type", "--push-to"),
    ("show",): ("--run",),
    ("eval", "compare", "done"): ("--format",),
}  # fmt: skip


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    yield from _options()
    yield from _experiments()
    yield from _publishing()
    yield from _environments()
    yield from _outputs()
    yield from _prompts()
    yield from _accelerators()


def _nothing(place: Path) -> None:
    return


def _options() -> Iterator[Case]:
    """Every option × wrong values, last on the line."""
    for words, options in _OPTIONS.items():
        for option in options:
            for value in _WRONG:
                said = f"{words[0]} {option} {value[:9]!r}"
                yield Case(
                    kind="options: a value",
                    name=said,
                    harm=_nothing,
                    lines=(line(*words, f"{option}={value}"),),
                    expect=either(),
                )


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


def _experiments() -> Iterator[Case]:
    """Files of YAML."""
    for name, content in _EXPERIMENTS.items():

        def harm(place: Path, content: str | bytes = content) -> None:
            (place / "e.yaml").write_bytes(content.encode() if isinstance(content, str) else content)

        expect = either() if name in _FINE else refused()
        for each in (line("run", "e.yaml"), line(*PRUNE, "--config", "e.yaml")):
            free = each.words[0] == "prune" and name in (
                "nothing",
                "a model outside",
                "a run above",
                "samples of 10^18",
            )
            yield Case(
                kind="experiment files",
                name=f"{name}: {each.words[0]}",
                harm=harm,
                lines=(each,),
                expect=either() if free else expect,
            )
    made: dict[str, Callable[[Path], object]] = {
        "a pipe": os.mkfifo,
        "a directory": Path.mkdir,
        "a device without end": lambda path: path.symlink_to("/dev/zero"),
        "of 64 GB": lambda path: (path.touch(), os.truncate(path, 1 << 36)),
        "missing": lambda path: None,
        "a link to itself": lambda path: path.symlink_to(path.name),
    }
    for name, make in made.items():

        def put(place: Path, make: Callable[[Path], object] = make) -> None:
            make(place / "e.yaml")

        for each in (line("run", "e.yaml"), line(*PRUNE, "--config", "e.yaml")):
            yield Case(
                kind="experiment files",
                name=f"{name}: {each.words[0]}",
                harm=put,
                lines=(each,),
                expect=refused("e.yaml"),
            )

    def only(place: Path) -> None:
        (place / "e.yaml").write_text(_EXPERIMENT)

    yield Case(
        kind="experiment files",
        name="one that only prunes",
        harm=only,
        lines=(line("run", "e.yaml"),),
        expect=accepted(),
    )


def _publishing() -> Iterator[Case]:
    """Consent to publish that a file gives."""
    for name in (
        "push-to: org/x",
        "push-to: org/x\n  yes: true",
        "push_to: org/x\n  yes: true\n  public: true",
        "public: true",
        "yes: true",
    ):
        for each in (
            line("run", "e.yaml", answers="y\n" * 9),
            line("export", "--run", "done", "--config", "e.yaml", answers="y\n" * 9),
        ):

            def harm(place: Path, name: str = name) -> None:
                (place / "e.yaml").write_text(f"run: done\nexport:\n  {name}\n")

            yield Case(
                kind="consent from a file",
                name=f"{name!r}: {each.words[0]}",
                harm=harm,
                lines=(each,),
                expect=refused("e.yaml"),
            )


_RANKS = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


def _environments() -> Iterator[Case]:
    """Variables that are missing or wrong."""
    environments: dict[str, tuple[dict[str, str | None], Expectation]] = {
        "no HOME": ({"HOME": None}, accepted()),
        "no HOME and no caches": ({"HOME": None, "BESA_CACHE": None, "HF_HOME": None}, either()),
        "a HOME that is a file": ({"HOME": "text.txt", "BESA_CACHE": None}, either()),
        "a HOME that is missing": ({"HOME": "/nonexistent", "BESA_CACHE": None}, either()),
        "an empty HOME": ({"HOME": "", "BESA_CACHE": None}, either()),
        "a cache that is a file": ({"BESA_CACHE": "text.txt"}, either()),
        "a cache in /proc": ({"BESA_CACHE": "/proc/x"}, either()),
        "no PATH": ({"PATH": None}, accepted()),
        "no TERM": ({"TERM": None}, accepted()),
        "a TERM that nobody knows": ({"TERM": "\x1b[2J"}, accepted()),
        "COLUMNS of 0": ({"COLUMNS": "0"}, accepted()),
        "COLUMNS of words": ({"COLUMNS": "wide"}, accepted()),
        "COLUMNS of 10^18": ({"COLUMNS": _HUGE}, accepted()),
        "forced colours": ({"FORCE_COLOR": "0"}, accepted()),
        "a locale that is missing": ({"LC_ALL": "xx_XX.UTF-8"}, accepted()),
        "the C locale": ({"LC_ALL": "C"}, accepted()),
        "threads of words": ({"OMP_NUM_THREADS": "many"}, accepted()),
        "kernels that are none": ({"BESA_KERNELS": "wondrous"}, refused("wondrous")),
        "an empty BESA_RUN": ({"BESA_RUN": ""}, accepted()),
        "a data directory that is missing": ({"BESA_DATA": "/nonexistent"}, refused("/nonexistent")),
        "a debug that is no word": ({"BESA_DEBUG": "\x1b[2J"}, either()),
        "a temporary directory that is missing": ({"TMPDIR": "/nonexistent"}, accepted()),
        "ranks of words": ({"WORLD_SIZE": "two", "RANK": "0"}, refused("WORLD_SIZE")),
        "a negative rank": ({"WORLD_SIZE": "2", "RANK": "-1"}, refused()),
        "10^18 ranks": ({**_RANKS, "WORLD_SIZE": _HUGE}, refused()),
        "a port of words": ({**_RANKS, "MASTER_PORT": "x"}, refused()),
        "another rank that never comes": ({**_RANKS}, refused()),
        "no master": ({"WORLD_SIZE": "2", "RANK": "1"}, refused()),
    }  # fmt: skip
    for name, (environment, expect) in environments.items():
        lines = (Line(words=PRUNE, environment=environment),)
        yield Case(kind="the environment", name=name, harm=_nothing, lines=lines, expect=expect)

    def home(judged: Judged) -> str:
        return (
            ""
            if (judged.place / "home" / "x" / "pruned").is_dir() and not (judged.place / "~").exists()
            else "not at home"
        )

    plain = PRUNE[:-2]
    for name, each in {
        "--run=~/x": Line(words=(*plain, "--run=~/x"), environment={"HOME": "home"}),
        "BESA_RUN=~/x": Line(words=plain, environment={"HOME": "home", "BESA_RUN": "~/x"}),
        "run: ~/x": Line(words=(*plain, "--config", "e.yaml"), environment={"HOME": "home"}),
    }.items():

        def harm(place: Path) -> None:
            (place / "done" / "home").mkdir()
            (place / "home").symlink_to("done/home")
            (place / "e.yaml").write_text('run: "~/x"\n')

        yield Case(kind="the environment", name=name, harm=harm, lines=(each,), expect=accepted(home))


_SPOKEN = (
    ("show", "done"), ("show", "done", "--json"), ("--help",), ("--version",), ("show", "nowhere"),
    (*PPL, "--run", "done"), PRUNE,
)  # fmt: skip


def _outputs() -> Iterator[Case]:
    """A terminal that goes away; where nothing can be said, the exit code alone tells."""
    for out, err in (
        ("closed", "closed"),
        ("broken", "broken"),
        ("full", "full"),
        ("broken", "file"),
        ("full", "file"),
    ):
        for words in _SPOKEN:
            said = f"output {out}, errors to {err}: besa {' '.join(words[:3])}"
            lines = (Line(words=words, out=out, err=err),)
            yield Case(kind="output that cannot be written", name=said, harm=_nothing, lines=lines, expect=either())


def _prompts() -> Iterator[Case]:
    """Prompts, and how much is to follow them."""
    prompts = {
        "empty": "", "a space": " ", "not UTF-8": "\udcff", "a NUL": "a\0b", "control characters": "\x1b[2J w5",
        "60 words": "w5 " * 60, "10,000 words": "w5 " * 10_000, "unknown words": "x y z",
        "a word of 10^6 letters": "w" * 10**6, "the end": "</s>", "markup": "[red]w5[/red] [/]",
    }  # fmt: skip
    for name, prompt in prompts.items():
        for tokens in ("6", "200"):
            words = ("eval", "sample", prompt, "--model", "m", "--tokens", tokens, *FLOAT)
            yield Case(
                kind="prompts", name=f"{name}, {tokens} tokens", harm=_nothing, lines=(line(*words),), expect=either()
            )


def _accelerators() -> Iterator[Case]:
    """Descriptions of an accelerator."""
    for name, text in {
        "nothing": "", "not TOML": "= = =", "deep": "a = " + "[" * 5000 + "]" * 5000,
        "a number of 6,000 digits": f"a = {'9' * 6000}", "an unknown field": "secret = 1", "NaN": "frequency = nan",
        "control characters": 'name = "\\u001b[2J"', "not UTF-8": "name = \udcff", "a list": "[[a]]\nb = 1",
    }.items():  # fmt: skip

        def harm(place: Path, text: str = text) -> None:
            (place / "a.toml").write_bytes(text.encode("utf-8", "surrogateescape"))

        each = line("simulate", "--run", "done", "--accelerator", "a.toml")
        yield Case(kind="descriptions of an accelerator", name=name, harm=harm, lines=(each,), expect=refused("a.toml"))
