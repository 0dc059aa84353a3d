"""A loaded block with its calibration activations, and what a pruner or a quantizer decides for it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from besa_cli.errors import BesaError
from besa_cli.ops.affine import Quantized
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.propagation import batches
from besa_cli.stream.rank_share import RankShare
from besa_cli.stream.windows import Window
from besa_cli.system import compute

OnStep = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a pruner or a quantizer decided for one block.

    Attributes
    ----------
    masks : one boolean Tensor of shape (rows, cols) a linear, True = keep
    weights : the linears whose surviving weights were changed, fp32; the others keep the source's bits
    quantized : the linears on a grid, as de-quantized in `weights`
    error_before, error_after : mean relative error of each token under the uniform masks and under `masks`, on the same
        samples; where a method does not compare, the latter is measured over all samples
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    error_before: float | None = None
    error_after: float | None = None
    learned_loss: float | None = None
    kept_uniform: bool = False
    exact: bool = True


class Block:
    """A loaded block with its calibration activations, as a pruner sees it; with `--window`, what is pruned together.

    Attributes
    ----------
    index : int
        The (first) block's number.
    linears : dict of name to nn.Linear, weights in the compute dtype
    weights : dict of name to Tensor of shape (rows, cols), in the source's own dtype
    budget : int
        Weights to prune here (see `besa_cli.ops.budget.window_counts`); 0 where a pattern N:M decides.
    exact : bool
        Whether the budget is to be met.
    inputs : Tensor of shape (samples, seqlen, hidden)
        What enters the block in the model as compressed so far; of several ranks each holds its own samples.
    share : Share
        Which samples those are, of how many, and the other ranks.
    seed : int
        From the command's seed and the block's index.
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
        on_step: OnStep = lambda done, total, phase: None,
        shelf: ActivationStore | None = None,
        rank_share: RankShare | None = None,
    ) -> None:
        self._shelf = shelf or ActivationStore()
        self.share = rank_share or RankShare(len(inputs))
        self.index, self.inputs, self.tokens, self.batch = window.blocks[0], inputs, tokens, batch
        self.must_meet_budget = budget is not None
        self.budget = budget or 0
        self.seed = (seed * 1_000_003 + self.index) % 2**63
        self._on_step = on_step
        self.linears: dict[str, nn.Linear] = window.linears
        self.weights = dict(weights)
        self._window = window
        self._target = target

    def on_step(self, done: int, total: int, phase: str) -> None:
        """Say how far the work on this block is; to be called after every batch."""
        self._shelf.release()
        self._on_step(done, total, phase)

    def step_batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and target of this rank's part of the samples of a step, both of shape (samples, seqlen, hidden).

        Parameters
        ----------
        chosen : integer Tensor of shape (samples in the step,)
            Numbers from 0 to `share.samples`; the same on all ranks.
        """
        inputs, target = self.share.fetch(chosen, self.inputs, self.target)
        return inputs, target

    def batches(self, batch: int | None = None) -> Iterator[slice]:
        """This rank's samples in batches of `batch`, by default the batches that all passes without gradients use."""
        return batches(len(self.inputs), batch or self.batch)

    def forward(self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output for hidden states of shape (samples, seqlen, hidden).

        Parameters
        ----------
        hidden : Tensor of shape (samples, seqlen, hidden)
            Where there are no samples, there is nothing to compute.
        weights : one Tensor of shape (rows, cols) a linear, optional
            Used instead of the linears' own; gradients reach them.
        """
        device = next(iter(self.linears.values())).weight.device
        if not len(hidden):
            return hidden.to(device)
        return self._window.forward(hidden.to(device), self.tokens[: len(hidden)], weights)

    def observe(self, statistic: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Sum a statistic of each linear's inputs over all calibration samples, the block's weights untouched.

        Linears that are given the very same tensor (q, k and v; gate and up) share one statistic. The pass also gives
        the target where that is the block's own output.

        Parameters
        ----------
        statistic : function of the inputs, of shape (samples, seqlen, cols), to a Tensor to be summed

        Returns
        -------
        dict of linear name to the sum, fp32
        """
        sums: dict[str, Tensor] = {}
        leaders: dict[str, str] = {}
        seen: list[tuple[Tensor, str]] = []

        def note(name: str, tensor: Tensor) -> None:
            leader = next((other for known, other in seen if known is tensor), None)
            if leader is None:
                seen.append((tensor, name))
                value = statistic(tensor)
                sums[name] = sums[name].add_(value) if name in sums else value
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
                "besa finds a linear's importance from its inputs; this model cannot be pruned",
            )
        self.share.world.all_reduce_list_(list(sums.values()))
        return {name: sums[leaders[name]] for name in self.linears}

    def _pass(self, after_batch: Callable[[], None], phase: str) -> None:
        keep = self._target is None
        target = self._shelf.empty(self.inputs.shape, self.inputs.dtype) if keep else self._target
        total = len(self.inputs)
        with torch.no_grad(), compute.repeated_passes():
            for part in self.batches():
                output = self.forward(self.inputs[part])
                if keep and target is not None:
                    target[part] = output
                after_batch()
                self.on_step(part.stop, total, phase)
        self._target = target

    @property
    def target(self) -> Tensor:
        """What the block should give: Tensor of shape (samples, seqlen, hidden)."""
        if self._target is None:
            self._pass(lambda: None, "target")
        if self._target is None:
            raise RuntimeError("the pass over the block left no target")
        return self._target
