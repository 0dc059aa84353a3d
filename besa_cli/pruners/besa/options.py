"""Options of BESA, and the learning rules of its presets."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from typing_extensions import override

from besa_cli.choices import CLIP_RATE, GivenOptions, Importance, Loss, Optimizer, OptionValue, Target
from besa_cli.errors import UsageError, require_counts, require_factors
from besa_cli.ops import affine, allocation
from besa_cli.ops.affine import Grid
from besa_cli.stream import windows
from besa_cli.stream.memory_model import MemoryUse
from besa_cli.stream.method import MethodOptions

_RATES = {"adamw": 1.0, "prodigy": 1.0}
_GRID_OPTIONS = ("bits", "group_size", "symmetric")  # options of the command line that make a `Grid`
_AUTHORS_PENALTY = 5.0


@dataclass(frozen=True, kw_only=True)
class LearningRules:
    """Learning rules that presets change but no option exposes; the defaults are `besa`'s own.

    Attributes
    ----------
    sigmoid_logits : bool
        β = softmax(sigmoid(θ)) with θ starting at 0, instead of softmax(θ) starting at the target.
    shuffled : bool
        Draw the order of the samples, instead of taking that of the calibration set.
    decaying : bool
        Let the learning rate fall to 0 along a half cosine, instead of keeping it.
    summed_gradient : bool
        Give the optimizer the gradient of the sum over the step's tokens instead of their mean, so that its eps is
        negligible.
    floor_counts : bool
        Prune ⌊α·C⌋ weights of a row, with candidates covering the ranks j < ⌊p_d·C⌋; else round(α·C), and j < p_d·C.
    meets_budget : bool
        Project the learned sparsities onto the budget, and compare the result with uniform sparsity.
    """

    sigmoid_logits: bool = False
    shuffled: bool = True
    decaying: bool = True
    summed_gradient: bool = True
    floor_counts: bool = False
    meets_budget: bool = True


_AUTHORS = LearningRules(
    sigmoid_logits=True, shuffled=False, decaying=False, summed_gradient=False, floor_counts=True, meets_budget=False
)


@dataclass(frozen=True, kw_only=True)
class BesaOptions(MethodOptions):
    """Options of BESA.

    Attributes
    ----------
    window : "block", "attn-mlp" or a number
        Unit of reconstruction: a block, its halves one after the other, or this many blocks.
    granularity : "row", "layer" or a number
        Unit that has its own sparsity: a row, a linear, or this many rows.
    importance : {"wanda", "magnitude", "sparsegpt"}
        Score that ranks the weights of a row.
    target : {"block", "stream"}
        Output to reproduce: the block's own dense output on the compressed inputs, or the dense model's hidden states.
    epochs, batch_size : int
        Passes over the calibration samples, and samples in one step.
    optimizer : {"adamw", "prodigy"}
    lr : float, optional
        Learning rate of the mixture logits, 1 for both, decaying to 0 along a half cosine.
    d_coef : float
        Prodigy's factor on its own estimate of the rate.
    penalty : float, optional
        Weight of the sparsity penalty ((s − ŝ)/ŝ)². Without one, the budget is met at every step.
    candidates : int
        D: candidate sparsities are 0, 1/D, …, 1.
    loss : {"token", "sensitivity", "channel", "frobenius"}
        Squared error relative to each token's norm, to the same with every channel weighted by its sensitivity, to each
        channel's norm, or to the norm of the whole.
    grid : Grid, optional
        Grid that the weights are put on before they are pruned.
    clip_lr : float, optional
        AdamW's rate for the clipping strengths; 0.03 with a grid.
    preset : {"authors"}, optional
        ``authors``: the learning rules of the paper's released program; its other options are those of `authors`.
    """

    window: str = windows.BLOCK
    granularity: str = "row"
    importance: Importance = "wanda"
    target: Target = "block"
    epochs: int = 1
    batch_size: int = 1
    optimizer: Optimizer = "adamw"
    lr: float | None = None
    d_coef: float = 1.0
    penalty: float | None = None
    candidates: int = 100
    loss: Loss = "sensitivity"
    grid: Grid | None = None
    clip_lr: float | None = None
    preset: Literal["authors"] | None = None

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", _RATES[self.optimizer])
        if self.preset and self.penalty is None:  # its mixtures are not a plain softmax, so they cannot be projected
            object.__setattr__(self, "penalty", _AUTHORS_PENALTY)
        windows.check(self.window)
        self._check_grid()
        require_counts(epochs=self.epochs, batch_size=self.batch_size, candidates=self.candidates)
        require_factors(lr=self.lr, penalty=self.penalty, d_coef=self.d_coef)
        if self.granularity not in ("row", "layer") and not (self.granularity.isdecimal() and int(self.granularity)):
            raise UsageError(
                f"--granularity '{self.granularity}' is neither row nor layer nor a number of rows",
                "row gives every row a sparsity of its own",
            )

    def _check_grid(self) -> None:
        if self.grid is None and self.clip_lr is not None:
            raise UsageError("--clip-lr has no effect without --bits", "give --bits 4 with it")
        if self.grid is not None and self.clip_lr is None:
            object.__setattr__(self, "clip_lr", CLIP_RATE)
        if self.grid is not None and self.preset:
            raise UsageError(
                f"--bits {self.grid.bits} and --preset {self.preset} exclude each other", "leave one of them out"
            )
        require_factors(clip_lr=self.clip_lr)

    @classmethod
    @override
    def option_names(cls) -> list[str]:
        names = super().option_names()
        place = names.index("grid")
        return [*names[:place], *_GRID_OPTIONS, *names[place + 1 :]]

    @classmethod
    @override
    def from_given(cls, given: GivenOptions) -> Self:
        """Parse ``bits``, ``group_size`` and ``symmetric`` into a grid; a preset gives defaults of its own."""
        expanded = {**authors(given.get("granularity", "row")), **given} if given.get("preset") == "authors" else given
        own = {name: value for name, value in expanded.items() if name not in _GRID_OPTIONS}
        grid = {name: given[name] for name in _GRID_OPTIONS if given.get(name) is not None}
        if "bits" in grid:
            return cls(**own, grid=affine.grid(**{"group_size": affine.GROUP, "symmetric": True, **grid}))
        if grid:
            name, value = next(iter(grid.items()))
            flag = "asymmetric" if name == "symmetric" and not value else name.replace("_", "-")
            raise UsageError(f"--{flag} has no effect without --bits", "give --bits 4 with it")
        return cls(**own)

    @override
    def record(self) -> dict[str, OptionValue]:
        grid = affine.grid_options(self.grid) if self.grid else dict.fromkeys(_GRID_OPTIONS)
        return {name: grid[name] if name in grid else getattr(self, name) for name in self.option_names()}

    @override
    def memory_use(self) -> MemoryUse:
        learning = MemoryUse(
            state=2,  # two masks, which are compared
            learned=0,
            batch=self.batch_size,
            ranks=True,
            candidates=self.candidates,
            grams=self.importance == "sparsegpt",
            uniform=self.grid is None,
        )
        if self.grid is None:
            return learning
        return replace(learning, state=11, learned=4, changes=True, codes=True)  # values in fp32, codes, masks

    @override
    def reconstruction_window(self) -> str:
        return self.window

    @override
    def learning_target(self) -> Target:
        return self.target

    @override
    def needs_sensitivity(self) -> bool:
        return self.loss == "sensitivity"

    @override
    def weight_grid(self) -> Grid | None:
        return self.grid

    @override
    def has_uniform_rival(self) -> bool:
        """Return True unless uniform masks would be no fair rival.

        Grids are learned together with the masks, so that uniform masks on the same grids would be no fair rival; and
        the preset may prune another number of weights than uniform masks.
        """
        return self.grid is None and self.rules.meets_budget

    @override
    def sparsity_range(self) -> tuple[float, float]:
        return allocation.smoothed_range(self.candidates) if self.rules.sigmoid_logits else (0.0, 1.0)

    @property
    def rules(self) -> LearningRules:
        """Learning rules of the preset."""
        return LearningRules() if self.preset is None else _AUTHORS

    @property
    def rate(self) -> float:
        """Learning rate of the mixture logits."""
        return float(self.lr or 0)

    def group(self, rows: int) -> int:
        """Return how many rows of a linear with `rows` rows share one mixture."""
        return {"row": 1, "layer": rows}.get(self.granularity) or min(int(self.granularity), rows)


Options = BesaOptions


def authors(granularity: str = "row") -> GivenOptions:
    """Return the options of the released program: see docs/method.md, section 4."""
    target = "stream" if granularity == "layer" else "block"
    return {"target": target, "loss": "channel", "optimizer": "prodigy", "d_coef": 5.0, "penalty": _AUTHORS_PENALTY}
