"""What the paper's ablations consist of: experiments, their settings, and the cells to measure, each once a seed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.results import recorded
from besa_cli.choices import Budget, Update
from besa_cli.jobs import prune
from besa_cli.models import DEMO
from besa_cli.stream import tuning

Line = Mapping[str, Any]  # one measured cell, as it stands in ablations.jsonl

SEEDS = (0, 1, 2)
SPARSITIES = tuple(tenths / 10 for tenths in range(1, 9))
COUNTS = tuple(2**power for power in range(9))  # calibration samples
DENSE_METHOD = "dense"  # the model as it is
_SHARED = (
    "method",
    "sparsity",
    "samples",
    "budget",
    "global_epochs",
    "update",
    "tune_epochs",
)  # of every method; the others are BESA's own
_NAMED = ("method", "sparsity", "samples")  # in every cell's name
_PARTS = {
    "budget": "budget",
    "global_epochs": "global",
    "update": "repair",
    "tune_epochs": "tune",
}  # field → name of the version of what it adds to a method


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to prune, on so many calibration samples. What `besa prune` does by default is its default.

    With `tune_epochs` so many passes of `besa tune` follow.
    Of another method than BESA, BESA's own fields are those defaults, whatever is given.
    """

    method: str = "besa"
    sparsity: float = 0.5
    samples: int
    budget: Budget = "uniform"
    global_epochs: int = 0
    update: Update = "none"
    tune_epochs: int = 0
    granularity: str = "row"
    window: str = "block"
    importance: str = "wanda"
    epochs: int = 1
    candidates: int = 100
    target: str = "block"
    loss: str = "sensitivity"
    optimizer: str = "adamw"
    lr: float = 1.0
    penalty: float | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.method != "besa":
            for field in fields(self):
                if field.name not in _SHARED:
                    object.__setattr__(self, field.name, field.default)

    def record(self) -> dict[str, Any]:
        """The fields that this method has."""
        return {name: value for name, value in asdict(self).items() if self.method == "besa" or name in _SHARED}

    def words(self) -> list[str]:
        """The options of `besa prune`; the samples are drawn before, and the whole is tuned afterwards."""
        other = ("samples", "tune_epochs")
        named = {name: value for name, value in self.record().items() if name not in other and value is not None}
        return [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", str(value))]

    def options(self) -> dict[str, Any]:
        """All options that the method has today, by which a line is told from one of other defaults."""
        if self.method == DENSE_METHOD:
            return {}
        own = {name: value for name, value in self.record().items() if name not in _SHARED}
        made = prune.request(
            method=self.method,
            sparsity=self.sparsity,
            budget=self.budget,
            global_epochs=self.global_epochs,
            update=self.update,
            options=own,
        )
        rest = {name: value for name, value in made.command_options.items() if name not in asdict(self)}
        tuned = {"tune_lr": tuning.RATE} if self.tune_epochs else {}
        return made.method.options.record() | rest | tuned

    def methods(self) -> dict[str, int]:
        """The versions of all that has a part in it."""
        if self.method == DENSE_METHOD:
            return {}
        changed = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        return recorded.methods(self.method, *(name for field, name in _PARTS.items() if field in changed))

    @property
    def name(self) -> str:
        """A name for directories and tables: what differs from the defaults."""
        own = [field for field in fields(self) if field.name not in _NAMED]
        changed = [(field.name, getattr(self, field.name), field.default) for field in own]
        tail = [f"{name}-{value}" for name, value, default in changed if value != default]
        return "-".join([self.method, str(self.sparsity), f"samples-{self.samples}", *tail])


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement: a setting, and the seed of both the calibration draw and the learning."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """A name for directories and messages."""
        return f"{self.setting.name}-seed-{self.seed}"


DENSE = Cell(setting=Setting(method=DENSE_METHOD, sparsity=0.0, samples=0), seed=0)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the cells of one table have in common.

    Attributes
    ----------
    model : str
    data : tuple of str
        As for `besa calibrate`.
    samples : int
        Calibration samples where an experiment does not vary them.
    seqlen : int
        Tokens of each.
    context : int
        Tokens of a window of the evaluation.
    windows : int, optional
        Windows of the evaluation; all where None.
    dtype, device : str
        In which and where both compute.
    """

    model: str = DEMO
    data: tuple[str, ...] = ("c4",)
    samples: int = 128
    seqlen: int = 512
    context: int = 2048
    windows: int | None = 16
    dtype: str = "float32"
    device: str = "cpu"

    def record(self) -> dict[str, Any]:
        """What stands in a line; of a path only the last part, since lines are published."""
        return {
            "model": label(self.model),
            "data": [label(name) for name in self.data],
            "seqlen": self.seqlen,
            "context": self.context,
            "windows": self.windows,
            "dtype": self.dtype,
            "device": self.device,
        }


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table or figure: a setting for every point of every series; a pair that makes no sense is left out."""

    title: str
    axis: str
    settings: Mapping[tuple[str, str], Setting]

    @property
    def series(self) -> list[str]:
        """The columns."""
        return list(dict.fromkeys(series for series, _ in self.settings))

    @property
    def points(self) -> list[str]:
        """The rows."""
        return list(dict.fromkeys(point for _, point in self.settings))


def label(name: str) -> str:
    """A model, data or evaluation set without the directories of this machine."""
    return Path(name).resolve().name if Path(name).exists() else name


def base_of(samples: int) -> Setting:
    """What the ablations vary: the defaults, but for the loss that was the default when they were measured."""
    return Setting(samples=samples, loss="token")


def experiments(samples: int) -> dict[str, Experiment]:
    """All experiments by name, on so many calibration samples where they do not vary them."""
    base = base_of(samples)
    wanda, sparsegpt = replace(base, method="wanda"), replace(base, method="sparsegpt")
    layer = replace(base, granularity="layer")
    return {
        "epochs": _sweep("Epochs", "epochs", {str(n): replace(base, epochs=n) for n in (1, 3, 10, 30)}),
        "step": _sweep("Sparsity step", "step", {str(1 / n): replace(base, candidates=n) for n in (10, 100, 1000)}),
        "importance": _sweep(
            "Importance", "importance", {n: replace(base, importance=n) for n in ("magnitude", "wanda", "sparsegpt")}
        ),
        "window": _sweep(
            "What is reconstructed together",
            "window",
            {
                "layer (Wanda)": wanda,
                "attn-mlp": replace(base, window="attn-mlp"),
                "block": base,
                "two blocks": replace(base, window="2"),
            },
        ),
        "granularity": _sweep(
            "What gets a sparsity of its own, everything else equal", "granularity", {"row": base, "layer": layer}
        ),
        "sparsity": _sparsity({"BESA row": base, "BESA layer": layer, "Wanda": wanda, "SparseGPT": sparsegpt}),
        "samples": _samples({"BESA": base, "Wanda": wanda, "SparseGPT": sparsegpt}, base),
        "choices": _sweep(
            "What else is chosen",
            "choice",
            {
                "base (loss token)": base,
                "loss sensitivity (default)": replace(base, loss="sensitivity"),
                "target stream": replace(base, target="stream"),
                "loss channel": replace(base, loss="channel"),
                "loss frobenius": replace(base, loss="frobenius"),
                "optimizer prodigy": replace(base, optimizer="prodigy"),
                "lr 0.5": replace(base, lr=0.5),
                "lr 2": replace(base, lr=2.0),
                "penalty 0.5": replace(base, penalty=0.5),
                "penalty 5": replace(base, penalty=5.0),
                "batch size 4, as many steps": replace(base, batch_size=4, epochs=4),
            },
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the paper says of its choices: that one setting is better than each of the others, or as good.

    Attributes
    ----------
    text : str
    chosen : Setting
    others : mapping of name to Setting
    enough : bool
        The others cost more, and are said to be no better.
    """

    text: str
    chosen: Setting
    others: Mapping[str, Setting]
    enough: bool = False


def claims(samples: int) -> list[Claim]:
    """What the paper says of what is measured here."""
    base = base_of(samples)
    return [
        Claim(
            text="Two blocks are better than one",
            chosen=replace(base, window="2"),
            others={"one block": base},
        ),
        Claim(
            text="A block is better than its halves",
            chosen=base,
            others={"its halves": replace(base, window="attn-mlp")},
        ),
        Claim(
            text="Halves of a block are better than layers",
            chosen=replace(base, window="attn-mlp"),
            others={"layers (Wanda)": replace(base, method="wanda")},
        ),
        Claim(
            text="A sparsity for every row is better than one for every layer",
            chosen=base,
            others={"layer": replace(base, granularity="layer")},
        ),
        Claim(
            text="Wanda's importance is better than others",
            chosen=base,
            others={kind: replace(base, importance=kind) for kind in ("sparsegpt", "magnitude")},
        ),
        Claim(
            text="One epoch is enough",
            chosen=base,
            others={f"{n} epochs": replace(base, epochs=n) for n in (3, 10, 30)},
            enough=True,
        ),
        Claim(
            text="A step of 0.01 is fine enough",
            chosen=base,
            others={"0.001": replace(base, candidates=1000)},
            enough=True,
        ),
    ]


def _sweep(title: str, axis: str, settings: Mapping[str, Setting]) -> Experiment:
    return Experiment(
        title=title, axis=axis, settings={("BESA", point): setting for point, setting in settings.items()}
    )


def _sparsity(methods: Mapping[str, Setting]) -> Experiment:
    settings = {
        (series, str(sparsity)): replace(setting, sparsity=sparsity)
        for series, setting in methods.items()
        for sparsity in SPARSITIES
    }
    return Experiment(title="Sparsity", axis="sparsity", settings=settings)


def _samples(methods: Mapping[str, Setting], base: Setting) -> Experiment:
    """One epoch, where more samples are more steps; and as many epochs as make up the base's number of steps."""
    settings = {
        (series, str(count)): replace(setting, samples=count) for series, setting in methods.items() for count in COUNTS
    }
    steps = {
        (f"BESA at {base.samples} steps", str(count)): replace(base, samples=count, epochs=base.samples // count)
        for count in COUNTS
        if base.samples % count == 0
    }
    return Experiment(title="Calibration samples", axis="samples", settings=settings | steps)


def plan(chosen: Iterable[Experiment], seeds: Sequence[int]) -> list[Cell]:
    """Every setting once a seed, one seed after the other."""
    settings = list(dict.fromkeys(setting for experiment in chosen for setting in experiment.settings.values()))
    return [Cell(setting=setting, seed=seed) for seed in seeds for setting in settings]


def measured(lines: Iterable[Line], setup: Setup) -> dict[Cell, Line]:
    """The newest line of every cell that was measured in this setup, by what its method does and defaults to today.

    Perplexities on sets that only older lines of the cell have are added.
    """
    wanted, found = setup.record(), dict[Cell, Line]()
    for line in lines:
        if line["setup"] != wanted:
            continue
        cell = Cell(setting=Setting(**line["setting"]), seed=line["seed"])
        earlier = found.pop(cell, {"perplexity": {}})
        if recorded.same_options(line["options"], cell.setting.options()) and not recorded.is_old(line):
            found[cell] = {**line, "perplexity": {**earlier["perplexity"], **line["perplexity"]}}
    return found


def left(cells: Iterable[Cell], found: Mapping[Cell, Line], sets: Iterable[str]) -> list[Cell]:
    """The cells that were not measured yet on all evaluation sets."""
    wanted = {label(name) for name in sets}
    return [cell for cell in cells if cell not in found or not wanted <= found[cell]["perplexity"].keys()]
