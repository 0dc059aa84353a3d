"""Interface between the stream and the methods: a loaded block with its activations, and a method's decision for it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from besa_cli.errors import BesaError
from besa_cli.ops.affine import Quantized
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.propagation import batches
from besa_cli.stream.rank_share import RankShare
from besa_cli.stream.windows import Window
from besa_cli.system import compute

# Phases of the work: "sensitivity", "experts" and "budget" come before the first window, "global" after the last;
# "tuning" is that of `besa tune`, "probe" one of `besa fit`. The duration of all but "update" grows with the number of
# samples: see forecast.py.
Phase = Literal[
    "sensitivity",
    "experts",
    "budget",
    "statistics",
    "target",
    "learning",
    "update",
    "repair",
    "propagation",
    "global",
    "tuning",
    "probe",
]
OnStep = Callable[[int, int, Phase], None]  # steps done, steps in all, phase


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Decision of a pruner or a quantizer for one window.

    Attributes
    ----------
    masks : mapping of linear name to boolean Tensor of shape (rows, cols)
        True = keep.
    weights : mapping of linear name to Tensor of shape (rows, cols), fp32
        Only linears whose kept weights were changed; the others keep the source's bits.
    quantized : mapping of linear name to Quantized
        Codes and scales of quantized linears; `weights` holds their dequantized weights.
    error_before, error_after : float, optional
        Mean relative error per token under the uniform masks and under `masks`, on the same samples. Where a method
        gives no `error_after`, the stream measures it over all samples.
    learned_loss : float, optional
        Mean loss of the last learning steps.
    curve : tuple of float
        Loss over the learning steps, in at most `descent.CURVE_POINTS` points; empty where nothing was learned.
    kept_uniform : bool
        True if the learned masks were no better than the uniform ones, which were kept.
    uniform : mapping of linear name to boolean Tensor of shape (rows, cols), optional
        Uniform masks of the same scores and the same count, for the check on held-out samples.
    exact : bool
        False if the method may prune a number of weights other than the budget.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    error_before: float | None = None
    error_after: float | None = None
    learned_loss: float | None = None
    curve: tuple[float, ...] = ()
    kept_uniform: bool = False
    uniform: Mapping[str, Tensor] | None = None
    exact: bool = True


class Block:
    """Loaded window (by default one block) with its calibration activations, passed to a pruner or quantizer.

    Attributes
    ----------
    index : int
        Number of the window's first block.
    linears : dict of name to nn.Linear, weights in the compute dtype
    weights : dict of name to Tensor of shape (rows, cols), in the source's dtype
    unreached : set of str
        Linears of experts that no token of the samples reached; known after `observe`.
    budget : int
        Number of weights to prune (see `besa_cli.ops.budget.window_counts`); 0 where an N:M pattern decides.
    must_meet_budget : bool
        True if exactly `budget` weights must be pruned.
    inputs : Tensor of shape (samples, seqlen, hidden)
        Input of the window in the compressed stream; only this rank's samples.
    tokens : Tensor of shape (samples, seqlen)
        Token ids of these samples.
    batch : int
        Samples in a pass without gradients.
    share : RankShare
        The samples that this rank holds, their total number, and the other ranks.
    seed : int
        Derived from the command's seed and `index`.
    sensitivity : Tensor of shape (hidden,), optional
        Sensitivity of the channels at the output of the window's last block (see `besa_cli.stream.sensitivity`), also
        for a window that ends inside a block; None if the method does not ask for it.
    """

    def __init__(
        self,
        window: Window,
        weights: Mapping[str, Tensor],
        *,
        budget: int | None,
        inputs: Tensor,
        tokens: Tensor,
        batch: int,
        target: Tensor | None = None,
        seed: int = 0,
        sensitivity: Tensor | None = None,
        on_step: OnStep = lambda done, total, phase: None,
        activations: ActivationStore | None = None,
        rank_share: RankShare | None = None,
    ) -> None:
        self._activations = activations or ActivationStore()
        self.rank_share = rank_share or RankShare(len(inputs))
        self.index, self.inputs, self.tokens, self.batch = window.blocks[0], inputs, tokens, batch
        self.must_meet_budget = budget is not None
        self.budget = budget or 0
        self.seed = (seed * 1_000_003 + self.index) % 2**63
        self.sensitivity = sensitivity
        self._on_step = on_step
        self.unreached: set[str] = set()
        self.linears: dict[str, nn.Linear] = window.linears
        self.weights = dict(weights)
        self._window = window
        self._target = target

    def on_step(self, done: int, total: int, phase: Phase) -> None:
        """Report progress within this window; must be called after every batch."""
        self._activations.release()
        self._on_step(done, total, phase)

    def step_batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and target of this rank's part of a learning step, both of shape (samples, seqlen, hidden).

        Parameters
        ----------
        chosen : integer Tensor of shape (samples in the step,)
            Sample numbers from 0 to `share.samples` − 1; the same on all ranks.
        """
        inputs, target = self.rank_share.fetch(chosen, self.inputs, self.target)
        return inputs, target

    def batches(self, batch: int | None = None) -> Iterator[slice]:
        """Yield slices of this rank's samples, of at most `batch` samples each, by default `self.batch`."""
        return batches(len(self.inputs), batch or self.batch)

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the window's output, of the same shape as its inputs `hidden`.

        Parameters
        ----------
        hidden : Tensor of shape (samples, seqlen, hidden)
            May have no samples.
        weights : mapping of linear name to Tensor of shape (rows, cols), optional
            Used instead of the linears' own weights; gradients flow to them.
        """
        device = next(iter(self.linears.values())).weight.device
        if not len(hidden):
            return hidden.to(device)
        return self._window.forward(hidden.to(device), self.tokens[: len(hidden)], weights)

    def observe(self, statistic: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Sum a statistic of each linear's inputs over all calibration samples of all ranks, with unchanged weights.

        Linears that receive the same tensor object (q, k and v; gate and up) share one statistic. The pass also
        computes `target` where that is the window's own output. Linears of experts that no token reached are noted in
        `unreached`; their statistic is that of the unit vectors, under which all columns count alike.

        Parameters
        ----------
        statistic : function of a linear's inputs, of shape (..., cols), returning a Tensor to sum

        Returns
        -------
        dict of linear name to the sum, fp32
        """
        sums: dict[str, Tensor] = {}
        tokens: dict[str, int] = {}
        leaders: dict[str, str] = {}
        seen: list[tuple[Tensor, str]] = []

        def note(name: str, tensor: Tensor) -> None:
            leader = next((other for known, other in seen if known is tensor), None)
            if leader is None:
                seen.append((tensor, name))
                value = statistic(tensor)
                sums[name] = sums[name].add_(value) if name in sums else value
                tokens[name] = tokens.get(name, 0) + tensor.shape[:-1].numel()
            leaders[name] = leader or name

        handles = [
            linear.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
            for name, linear in self.linears.items()
        ]
        try:
            self._pass(seen.clear, "statistics")
        finally:
            for handle in handles:
                handle.remove()
        unused = sorted(set(self.linears) - set(leaders))
        if unused:
            raise BesaError(
                f"{unused[0]} of block {self.index} is never called in a forward pass",
                "besa computes importance from a linear's inputs; this model cannot be pruned",
            )
        counts = torch.tensor(list(tokens.values()), dtype=torch.float32)
        self.rank_share.world.all_reduce_list_([*sums.values(), counts])
        for leader in (name for name, count in zip(tokens, counts.tolist(), strict=True) if not count):
            weight = self.linears[leader].weight
            sums[leader] = statistic(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))
            self.unreached |= {name for name, other in leaders.items() if other == leader}
        return {name: sums[leaders[name]] for name in self.linears}

    def _pass(self, after_batch: Callable[[], None], phase: Phase) -> None:
        """Run the unchanged window over all samples of this rank; store its output as the target if there is none."""
        new = self._target is None
        target = self._activations.empty(self.inputs.shape, self.inputs.dtype) if new else self._target
        total = len(self.inputs)
        with torch.no_grad(), compute.repeated_passes():
            for part in self.batches():
                output = self.forward(self.inputs[part])
                if new and target is not None:
                    target[part] = output
                after_batch()
                self.on_step(part.stop, total, phase)
        self._target = target

    @property
    def target(self) -> Tensor:
        """Output that the compressed window should reproduce: Tensor of shape (samples, seqlen, hidden)."""
        if self._target is None:
            self._pass(lambda: None, "target")
        if self._target is None:
            raise RuntimeError("the pass over the block stored no target")
        return self._target
