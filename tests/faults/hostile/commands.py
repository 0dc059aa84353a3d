"""What is typed and what surrounds it: values of options, prompts, the environment, the terminal."""

from collections.abc import Iterator
from pathlib import Path

from faults.hostile.base import FLOAT, PPL, PRUNE, SAMPLE
from faults.hostile.frame import Case, Expectation, Judged, Line, accepted, either, line, refused, several
from faults.hostile.harms import nothing, written

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
        "--budget", "--update", "--update-lr",
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

_SIZES = (
    "9" * 400 + "GB", "9" * 30 + "TiB", "9000000TB", "0GB", "0.0000001KB", "1e400GB", "nanGB", "-4GB", "4PB", "٣GB",
    "GB",
)  # fmt: skip
_SIZED: dict[tuple[str, ...], str] = {
    PRUNE: "--max-memory",
    ("quantize", "--run", "done"): "--max-memory",
    ("export", "--run", "done"): "--shard-size",
}


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    yield from _options()
    yield from _sizes()
    yield from _environments()
    yield from _homes()
    yield from _outputs()
    yield from _prompts()
    yield from _accelerators()


def _typed(kind: str, name: str, each: Line, expect: Expectation) -> Iterator[Case]:
    return several(kind, {name: nothing}, each, expect=expect)


def _options() -> Iterator[Case]:
    """Every option × wrong values, last on the line."""
    for words, options in _OPTIONS.items():
        for option in options:
            for value in _WRONG:
                said = f"{words[0]} {option} {value[:9]!r}"
                yield from _typed("options: a value", said, line(*words, f"{option}={value}"), either())


def _sizes() -> Iterator[Case]:
    """Every option that is a size × wrong sizes."""
    for words, option in _SIZED.items():
        for size in _SIZES:
            said = f"{words[0]} {option} {size[:9]!r}"
            yield from _typed("options: a size", said, line(*words, f"{option}={size}"), either())


_PATIENCE = 150  # seconds; other ranks may be slow to come
_RANKS = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
_ENVIRONMENTS: dict[str, tuple[dict[str, str | None], Expectation]] = {
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
    "no master": ({"WORLD_SIZE": "2", "RANK": "1"}, refused()),
}  # fmt: skip


def _environments() -> Iterator[Case]:
    """Variables that are missing or wrong."""
    for name, (environment, expect) in _ENVIRONMENTS.items():
        yield from _typed("the environment", name, Line(words=PRUNE, environment=environment), expect)
    alone = Line(words=PRUNE, environment=_RANKS, seconds=_PATIENCE)
    yield from _typed("the environment", "another rank that never comes", alone, refused())


def _homes() -> Iterator[Case]:
    """The run directory in the home directory, which a shell does not find behind `=`."""

    def harm(place: Path) -> None:
        (place / "done" / "home").mkdir()
        (place / "home").symlink_to("done/home")
        (place / "e.yaml").write_text('run: "~/x"\n')

    def at_home(judged: Judged) -> str:
        return "" if (judged.place / "home" / "x" / "pruned").is_dir() else "not at home"

    plain, home = PRUNE[:-2], {"HOME": "home"}
    for name, each in {
        "--run=~/x": Line(words=(*plain, "--run=~/x"), environment=home),
        "BESA_RUN=~/x": Line(words=plain, environment={**home, "BESA_RUN": "~/x"}),
        "run: ~/x": Line(words=(*plain, "--config", "e.yaml"), environment=home),
    }.items():
        yield from several("the environment", {name: harm}, each, expect=accepted(at_home))


_SPOKEN = (
    ("show", "done"), ("show", "done", "--json"), ("--help",), ("--version",), ("show", "nowhere"),
    (*PPL, "--run", "done"), PRUNE,
)  # fmt: skip


def _outputs() -> Iterator[Case]:
    """A terminal that goes away; where nothing can be said, the exit code alone tells."""
    both = [(out, out) for out in ("closed", "broken", "full")]
    for out, err in (*both, ("broken", "file"), ("full", "file")):
        for words in _SPOKEN:
            said = f"output {out}, errors to {err}: besa {' '.join(words[:3])}"
            each = Line(words=words, out=out, err=err)
            yield from _typed("output that cannot be written", said, each, either())


def _prompts() -> Iterator[Case]:
    """Prompts, and how much is to follow them."""
    prompts = {
        "empty": "", "a space": " ", "not UTF-8": "\udcff", "a NUL": "a\0b", "control characters": "\x1b[2J w5",
        "60 words": "w5 " * 60, "10,000 words": "w5 " * 10_000, "unknown words": "x y z",
        "a word of 10^6 letters": "w" * 10**6, "the end": "</s>", "markup": "[red]w5[/red] [/]",
    }  # fmt: skip
    for name, prompt in prompts.items():
        for tokens in ("6", "200"):
            each = line("eval", "sample", prompt, "--model", "m", "--tokens", tokens, *FLOAT)
            yield from _typed("prompts", f"{name}, {tokens} tokens", each, either())


def _accelerators() -> Iterator[Case]:
    """Descriptions of an accelerator."""
    texts = {
        "nothing": "", "not TOML": "= = =", "deep": "a = " + "[" * 5000 + "]" * 5000,
        "a number of 6,000 digits": f"a = {'9' * 6000}", "an unknown field": "secret = 1", "NaN": "frequency = nan",
        "control characters": 'name = "\\u001b[2J"', "not UTF-8": "name = \udcff", "a list": "[[a]]\nb = 1",
    }  # fmt: skip
    harms = {name: written("a.toml", text) for name, text in texts.items()}
    each = line("simulate", "--run", "done", "--accelerator", "a.toml")
    yield from several("descriptions of an accelerator", harms, each, expect=refused("a.toml"))
