"""The options of BESA."""

from dataclasses import dataclass, replace
from typing import Any

from besa_cli.choices import Importance, Loss, Optimizer, Preset, Target
from besa_cli.errors import UsageError, require_counts, require_factors
from besa_cli.ops import affine, allocation
from besa_cli.ops.affine import Grid
from besa_cli.stream import windows
from besa_cli.stream.memory_model import MemoryUse

_RATES = {"adamw": 1.0, "prodigy": 1.0}
_CLIP_RATE = 0.03
_AUTHORS_PENALTY = 5.0


@dataclass(frozen=True, kw_only=True)
class LearningRules:
    """What no option says: how learning is done and what becomes of it. The defaults are `besa`'s own.

    Attributes
    ----------
    smoothed : bool
        β = softmax(sigmoid(θ)) with θ from 0, and not softmax(θ) from the target.
    shuffled : bool
        Samples come in a drawn order, and not in that of the calibration set.
    decaying : bool
        The rate falls to 0 along a half cosine, and does not stay.
    scaled : bool
        The optimizer sees the gradients of the loss times the step's tokens, so that its own eps is nothing beside
        them, and not those of the mean.
    floors : bool
        A row prunes ⌊α·C⌋ weights, and a candidate covers the ranks j < ⌊p_d·C⌋; else round(α·C), and j < p_d·C.
    exact : bool
        The learned sparsities are projected onto the budget and compared with the uniform ones.
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
class Options:
    """Options of BESA.

    Attributes
    ----------
    window : "block", "attn-mlp" or a number
        What is reconstructed together: a block, its halves one after the other, or so many blocks.
    granularity : "row", "layer" or a number
        What gets a sparsity of its own: every row, every linear, or every so many rows.
    importance : {"wanda", "magnitude", "sparsegpt"}
        What ranks the weights of a row.
    target : {"block", "stream"}
        What the block should keep: its own dense output on the compressed inputs, or the dense model's hidden states.
    epochs, batch_size : int
        Passes over the calibration samples, and samples in one step.
    optimizer : {"adamw", "prodigy"}
    lr : float, optional
        Learning rate of the mixture logits, 1 for both, decaying to 0 along a half cosine.
    d_coef : float
        Prodigy's factor on its own estimate of the rate.
    penalty : float, optional
        Weight of the sparsity penalty ((s − ŝ)/ŝ)². Without one the budget is held in every step.
    candidates : int
        D: candidate sparsities are 0, 1/D, …, 1.
    loss : {"token", "channel", "frobenius"}
        Squared error relative to each token's norm, to each channel's norm, or to the norm of the whole.
    bits, group_size, symmetric : optional
        The grid on which the weights are put, see `besa_cli.ops.affine.grid`; 128 and symmetric with `bits` alone.
    clip_lr : float, optional
        AdamW's rate for the clipping strengths; 0.03 with `bits`.
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
    loss: Loss = "token"
    bits: int | None = None
    group_size: str | None = None
    symmetric: bool | None = None
    clip_lr: float | None = None
    preset: Preset | None = None

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", _RATES[self.optimizer])
        if self.preset and self.penalty is None:  # its mixtures are no plain softmax, which alone can be held
            object.__setattr__(self, "penalty", _AUTHORS_PENALTY)
        windows.check(self.window)
        self._settle_grid()
        require_counts(epochs=self.epochs, batch_size=self.batch_size, candidates=self.candidates)
        require_factors(lr=self.lr, penalty=self.penalty, d_coef=self.d_coef)
        if self.granularity not in ("row", "layer") and not (self.granularity.isdecimal() and int(self.granularity)):
            raise UsageError(
                f"--granularity '{self.granularity}' is neither row nor layer nor a number of rows",
                "row gives every row a sparsity of its own",
            )

    def _settle_grid(self) -> None:
        own = {"group_size": affine.GROUP, "symmetric": True, "clip_lr": _CLIP_RATE}
        for name, default in own.items():
            if self.bits is not None and getattr(self, name) is None:
                object.__setattr__(self, name, default)
            if self.bits is None and getattr(self, name) is not None:
                flag = "asymmetric" if name == "symmetric" and not self.symmetric else name.replace("_", "-")
                raise UsageError(f"--{flag} says nothing without --bits", "give --bits 4 with it")
        if self.bits is not None and self.preset:
            raise UsageError(
                f"--bits {self.bits} and --preset {self.preset} exclude each other", "leave one of them out"
            )
        require_factors(clip_lr=self.clip_lr)
        _ = self.grid

    @property
    def grid(self) -> Grid | None:
        """The grid on which the weights are put."""
        if self.bits is None:
            return None
        group_size = affine.GROUP if self.group_size is None else self.group_size
        return affine.grid(self.bits, group_size, symmetric=self.symmetric is not False)

    @property
    def rules(self) -> LearningRules:
        """How learning is done."""
        return LearningRules() if self.preset is None else _AUTHORS

    @property
    def learnable_range(self) -> tuple[float, float]:
        """The least and the greatest sparsity that can be learned."""
        return allocation.smoothed_range(self.candidates) if self.rules.sigmoid_logits else (0.0, 1.0)

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return float(self.lr or 0)

    def group(self, rows: int) -> int:
        """Rows of a linear with `rows` rows that share one mixture."""
        return {"row": 1, "layer": rows}.get(self.granularity) or min(int(self.granularity), rows)


def authors(granularity: str = "row") -> dict[str, Any]:
    """The released program's options: see docs/method.md, section 4."""
    target = "stream" if granularity == "layer" else "block"
    return {"target": target, "loss": "channel", "optimizer": "prodigy", "d_coef": 5.0, "penalty": _AUTHORS_PENALTY}


def memory_use(options: Options) -> MemoryUse:
    """Two masks (1 byte each) when they are compared; on a grid what stands on it (4), its codes and the masks."""
    held = MemoryUse(
        state=2,
        learned=0,
        batch=options.batch_size,
        ranks=True,
        candidates=options.candidates,
        grams=options.importance == "sparsegpt",
    )
    return replace(held, state=11, learned=4, changes=True, codes=True) if options.grid else held
