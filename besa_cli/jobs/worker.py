"""Work of every rank of a job: the model's windows in order, on the rank's own samples."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.checkpoint.manifests import BlockBudgets, Compute, KeptExperts
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.decoder import experts
from besa_cli.decoder.decoder import Decoder
from besa_cli.jobs.request import StageRequest
from besa_cli.ops import budget
from besa_cli.ops.experts import remaining
from besa_cli.stream import (
    effects,
    expert_scores,
    forecast,
    global_rates,
    held_out,
    memory_model,
    repair,
    sensitivity,
    walk,
    windows,
)
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.block import Decision, OnStep
from besa_cli.stream.distillation import LearningPlan
from besa_cli.stream.global_rates import GlobalRates, StateFile
from besa_cli.stream.rank_share import Store
from besa_cli.system import compute, memory
from besa_cli.system.ranks import Ranks

_RESIDENT = 4  # share of the free memory that the blocks may fill while the whole model learns: one of so many
_SECOND_WALK = 2  # passes of the walk that repairs what the whole model learned: statistics, propagation


class StageWorker:
    """A model cut into windows, and the loop over them.

    Parameters
    ----------
    directory : Path
        The model's checkpoint.
    request : StageRequest
    settings : mapping
        ``compute`` of the job's manifest; its threads are those of all ranks together.
    tokens : Tensor of shape (samples, seqlen)
        Token ids of all ranks' samples.
    world : Ranks
    held_out : Tensor of shape (windows, seqlen), optional
        Token ids on which the result is checked; of the main rank alone.
    """

    def __init__(
        self,
        directory: Path,
        request: StageRequest,
        settings: Compute,
        tokens: Tensor,
        world: Ranks,
        *,
        held_out: Tensor | None = None,
    ) -> None:
        self._request, self._world = request, world
        self._samples, self._seqlen = tokens.shape
        self._all_tokens, self._all_held_out = tokens, held_out
        self._tokens = tokens if request.uses_calibration else tokens[:0]
        self._held_out = held_out if request.method.options.has_uniform_rival() else None
        measured = effects.measured_samples(len(self._tokens), self._seqlen) if request.measures_blocks else 0
        self._measured = self._tokens[:measured]
        device, dtype = compute.device(settings["device"]), compute.DTYPES[settings["dtype"]]
        self._directory, self._device, self._dtype = directory, device, dtype
        self.decoder = Decoder(directory, device, dtype, quick=True, removed_experts=request.removed_experts)
        self.segments = windows.segments(self.decoder, request.method.options.reconstruction_window())
        self.sizes = list(windows.sizes(self.segments))
        share = request.target_sparsity
        self._budgets = None if share is None else budget.window_counts(share, self.sizes)

    @cached_property
    def dense(self) -> Decoder:
        """The whole model: that of the windows, but for whole experts that are removed."""
        if self._request.removed_experts is None:
            return self.decoder
        return Decoder(self._directory, self._device, self._dtype, quick=True)

    def measure_experts(self, activations: ActivationStore, on_step: OnStep, *, batch: int) -> KeptExperts:
        """Measure the scores of all experts, and decide which of them stay; of the main rank alone."""
        self.decoder.drop_embedding()
        measured = expert_scores.measure(
            self.dense, self._all_tokens, batch=batch, on_step=on_step, activations=activations
        )
        numbers = experts.numbers_of(self.dense.config)
        left = experts.numbers_of(self.decoder.config).experts
        whole = windows.sizes(windows.segments(self.dense, windows.BLOCK))
        return {
            "experts": numbers.experts,
            "kept": [remaining(scores, left, numbers.groups) if scores else [] for scores in measured.scores],
            "scores": [list(scores) for scores in measured.scores],
            "tokens": [list(tokens) for tokens in measured.tokens],
            "removed": sum(whole) - sum(self.sizes),
        }

    def measure(self, activations: ActivationStore, on_step: OnStep, *, batch: int) -> BlockBudgets:
        """Measure the effect of pruning each block, and decide how many weights each of them prunes."""
        share, reachable = self._request.target_sparsity or 0.0, self._request.method.options.sparsity_range()
        measured = effects.measure(
            self.decoder,
            self._measured,
            sparsities=effects.sparsities_around(share, reachable),
            batch=batch,
            seed=self._request.seed,
            on_step=on_step,
            activations=activations,
        )
        return {
            "pruned": effects.block_budgets(measured, share, reachable),
            "weights": list(measured.sizes),
            "sparsities": list(measured.sparsities),
            "effects": [list(errors) for errors in measured.errors],
        }

    def share_out(self, pruned: Sequence[int]) -> None:
        """Let each block prune so many weights, instead of the same share of all."""
        self._budgets = windows.budgets(self.segments, pruned)

    def demand(self, batch: int, *, measures: bool = False) -> memory_model.Demand:
        """Return the memory of the rank with most samples, for `batch` samples in a pass without gradients.

        If this rank `measures` the sensitivity of the channels, it needs memory for that, too.
        """
        method, size = self._request.memory_use, self._world.size
        passed, learned = -(-len(self._tokens) // size), -(-min(self._samples, method.batch) // size)
        shape = memory_model.shape(self.decoder, self.segments)
        demand = memory_model.prune_demand(
            shape,
            method,
            tokens=passed * self._seqlen,
            passing=min(passed, batch) * self._seqlen,
            learning=learned * self._seqlen,
            held_out=0 if self._held_out is None else self._held_out.numel(),
            head=self.decoder.head_bytes(),
        )
        if len(self._measured):
            measuring = memory_model.effects_demand(
                shape,
                blocks=len(self.decoder),
                tokens=self._measured.numel(),
                passing=min(len(self._measured), batch) * self._seqlen,
                seqlen=self._seqlen,
                head=self.decoder.head_bytes(),
            )
            demand = memory_model.larger(demand, measuring)
        if self._request.removed_experts is not None:
            whole = memory_model.shape(self.dense, windows.segments(self.dense, windows.BLOCK))
            scoring = memory_model.experts_demand(
                whole,
                tokens=self._all_tokens.numel(),
                passing=min(self._samples, batch) * self._seqlen,
            )
            demand = memory_model.larger(demand, scoring)
        else:
            whole = shape
        if measures:
            demand = memory_model.with_sensitivity(
                demand,
                whole,
                blocks=len(self.decoder),
                tokens=min(self._samples, sensitivity.SAMPLES) * self._seqlen,
                seqlen=self._seqlen,
                head=self.decoder.head_bytes(),
            )
        if self._request.whole_model is None:
            return demand
        together = memory_model.global_demand(
            shape,
            len(self.decoder),
            tokens=self._samples * self._seqlen,
            passing=min(self._samples, batch) * self._seqlen,
            seqlen=self._seqlen,
            resident=self.resident,
        )
        return memory_model.larger(demand, together)

    @cached_property
    def resident(self) -> bool:
        """True if all blocks stay loaded while the whole model learns; changes no result."""
        blocks = sum(parameter.numel() for block in self.decoder.blocks for parameter in block.parameters())
        needed = blocks * self.decoder.dtype.itemsize
        return self._request.max_memory is None and needed * _RESIDENT < memory.available(self.decoder.device)

    def global_rates(
        self, start: Store, state: StateFile, activations: ActivationStore, on_step: OnStep, *, batch: int
    ) -> GlobalRates:
        """Return the learner of all rows' sparsities, from the finished blocks of `start`; of the main rank alone."""
        options = self._request.whole_model
        if options is None:
            raise ValueError("the request asks for no learning of the whole model")
        plan = LearningPlan(
            epochs=options.epochs, rate=options.rate, batch=batch, seed=self._request.seed, resident=self.resident
        )
        return GlobalRates(
            self.decoder,
            start,
            self._all_tokens,
            plan,
            held_out=self._all_held_out,
            state=state,
            activations=activations,
            on_step=on_step,
        )

    def repaired(
        self,
        learner: GlobalRates,
        store: Store,
        activations: ActivationStore,
        on_step: OnStep,
        *,
        batch: int,
        channels: Tensor | None,
    ) -> Iterator[BlockReport]:
        """Write all blocks with the masks that the whole model learned, their kept weights changed; of the main rank.

        `channels` is the sensitivity of the channels, if the repair needs it.
        """
        options = self._request.repair
        if options is None:
            raise ValueError("the request asks for no repair")
        segments = windows.segments(self.decoder, windows.BLOCK)
        plan = walk.PrunePlan(
            decide=lambda block: repair.repair(block, Decision(masks=learner.masks(block.index)), options),
            segments=segments,
            budgets=windows.budgets(segments, learner.block_counts()),
            target=self._request.method.options.learning_target(),
            batch=batch,
            seed=self._request.seed,
            sensitivity=channels,
        )
        return walk.compress(self.decoder, store, self._all_tokens, plan, on_step=on_step, activations=activations)

    def held_out_divergence(self, store: Store, *, batch: int) -> float | None:
        """Return the mean divergence per token of the blocks in `store` from the dense model, on held-out samples."""
        if self._all_held_out is None:
            return None
        return held_out.stored_divergence(self.decoder, store, self._all_held_out, batch)

    @property
    def checked(self) -> bool:
        """True if some samples are held out to check the result."""
        return self._held_out is not None

    def state_bytes(self) -> int:
        """Return the bytes on disk that the state of this check takes while a new one replaces it; 0 without it."""
        tokens = 0 if self._held_out is None else self._held_out.numel()
        hidden = memory_model.shape(self.decoder, self.segments).hidden
        return 2 * len(held_out.STREAMS) * tokens * hidden * self.decoder.dtype.itemsize

    def reports(
        self,
        store: Store | None,
        activations: ActivationStore,
        on_step: OnStep,
        *,
        batch: int,
        prefetch: bool,
        check: bool = False,
        channels: Tensor | None = None,
    ) -> Iterator[BlockReport]:
        """Process block by block, reading the next ones meanwhile with `prefetch`; only the main rank has the store.

        With `check`, also of the main rank alone, the samples that are held out pass through the blocks, too.
        `channels` is the sensitivity of the channels, of shape (blocks, hidden), if the method needs it.
        """
        plan, world = self._prune_plan(batch, channels, check=check), self._world
        return walk.compress(
            self.decoder,
            store,
            self._tokens,
            plan,
            on_step=on_step,
            activations=activations,
            prefetch=prefetch,
            world=world,
        )

    def seconds(self, finished: int, batch: int, *, measures: bool = False) -> float:
        """Return the seconds that the work takes after `finished` blocks, from a trial of the first window.

        If this rank `measures` the sensitivity of the channels, the time of that is included.
        """
        first = sensitivity.seconds(self.decoder, self._tokens) if measures else 0.0
        needed, hidden = self._request.needs_sensitivity, self.decoder.hidden_size
        channels = torch.ones(len(self.decoder), hidden) if needed else None
        options = self._request.whole_model
        after = 0.0 if options is None else global_rates.passes(options.epochs, *self._all_tokens.shape)
        before = 0.0 if finished else effects.PASSES * len(self._measured) / self._samples
        if self._request.removed_experts is not None and not finished:
            before += 1  # for the scores of the experts
        plan = replace(self._prune_plan(batch, channels, check=True), decide=self._request.decide)
        if options is not None and self._request.repair is not None:
            after += _SECOND_WALK
        return first + forecast.seconds(
            self.decoder,
            self._tokens,
            plan,
            finished,
            whole_passes=after + before,
        )

    def _prune_plan(self, batch: int, channels: Tensor | None, *, check: bool) -> walk.PrunePlan:
        return walk.PrunePlan(
            decide=self._request.method.decide if self._request.whole_model else self._request.decide,
            segments=self.segments,
            budgets=self._budgets,
            target=self._request.method.options.learning_target(),
            batch=batch,
            seed=self._request.seed,
            sensitivity=channels,
            held_out=self._held_out if check else None,
        )
