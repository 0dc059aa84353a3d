"""Jobs that make a stage of a run directory from a checkpoint: checked as a whole first, resumable at every block."""

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from besa_cli.calibration.calibration_set import CalibrationSet
from besa_cli.checkpoint import manifests, preflight, stages, swap
from besa_cli.checkpoint.manifests import StageManifest
from besa_cli.checkpoint.reports import BlockReport, PassReport
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.decoder import experts
from besa_cli.decoder.verify import room, verify
from besa_cli.jobs import ranks, stage_place
from besa_cli.jobs.channel_sensitivity import ChannelSensitivity
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.timing import Timing
from besa_cli.jobs.whole_model import WholeModelWork
from besa_cli.jobs.worker import StageWorker
from besa_cli.models import Model, config_json
from besa_cli.stream import forecast, memory_model, rank_share
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.background_writer import BackgroundWriter
from besa_cli.stream.block import OnStep
from besa_cli.system import compute, disk
from besa_cli.system.disk import Json
from besa_cli.system.notes import Notify
from besa_cli.system.ranks import Ranks


def finish_exchange(run: Run, stage: str) -> None:
    """Complete an exchange of stages that a crash interrupted; to be called before a `StageJob` is made."""
    swap.recover(run.stage(stage), run.next_stage(stage))


@dataclass(frozen=True, kw_only=True)
class _WorkPlan:
    """Work that is left of a stage, and the room that it takes.

    Attributes
    ----------
    worker : StageWorker
    memory : MemoryPlan
    bytes_to_write : int
    checking : float
        Seconds since the program started until everything was checked.
    """

    worker: StageWorker
    memory: memory_model.MemoryPlan
    bytes_to_write: int
    checking: float


class StageJob:
    """One command that makes a stage of a run directory.

    Making the job only checks and writes nothing, so that a dry run is a job of which `forecast` is asked. `blocks`
    does the work, and `finish` puts the stage in its place.

    Parameters
    ----------
    run : Run
        Its lock is held by the caller, and `recover` was called.
    model : Model
    calibration : CalibrationSet
    request : StageRequest
    restart : bool
        Begin again; a finished stage is replaced when the new one is finished.
    notify : callable
        Takes one-line notes.
    world : Ranks, optional
        This is the first of them, and the others are in `besa_cli.jobs.ranks.run_worker`; alone by default.

    Raises
    ------
    BesaError
        Anything that can be known before the first block.
    """

    def __init__(
        self,
        run: Run,
        model: Model,
        calibration: CalibrationSet,
        request: StageRequest,
        *,
        restart: bool = False,
        notify: Notify = lambda _: None,
        world: Ranks | None = None,
    ) -> None:
        self.model, self.calibration, self.request = model, calibration, request
        self._world, self._notify = world or Ranks(), notify
        self._whole_model: WholeModelWork | None = None
        self._sensitivity: Tensor | None = None
        ranks.require_samples(len(calibration.tokens), self._world)
        self._place = stage_place.find(run, model, calibration, request, restart=restart, ranks=self._world.size)
        self._directory, self.manifest = self._place.directory, self._place.manifest
        if self.manifest["status"] == "complete":
            self._stage = Stage(self._directory, self.manifest["blocks"])
            return
        self._plan = self._plan_work()
        if request.whole_model is not None:
            self._whole_model = WholeModelWork(
                worker=self._plan.worker,
                memory=self._plan.memory,
                directory=self._directory,
                stage=self._stage,
                draft=self._draft,
                repairs=request.repair is not None,
            )

    @property
    def _timing(self) -> Timing:
        return Timing(directory=self._directory, ranks=self._world.size)

    @property
    def done(self) -> bool:
        """True if the stage was already finished."""
        return self._place.done

    def _plan_work(self) -> _WorkPlan:
        """Check model and machine, and plan memory and disk."""
        settings = self.manifest["compute"]
        torch.set_num_threads(ranks.threads(settings, self._world))
        tokens, held_out = self.calibration.tokens, self.calibration.held_out
        worker = StageWorker(self.model.directory, self.request, settings, tokens, self._world, held_out=held_out)
        self._stage = Stage(self._directory, len(worker.decoder))
        self._channels = self._channel_sensitivity(worker)
        worker.decoder.weights.refuse_change(self._place.source)
        names = worker.dense.linear_tensors()
        worker.dense.weights.require_floats(names)
        for note in worker.dense.notes:
            self._notify(note)
        if self.request.grid:
            known = {name: self._place.extremes[name] for name in names if name in self._place.extremes}
            preflight.refuse_beyond_fp16(known, self.request.grid)
        memory = self._plan_memory(worker)
        if self._place.is_new:
            settings["batch"] = memory.batch
        size = self._bytes_to_write(worker, memory)
        if self._place.is_new:
            preflight.require_space(self._directory, size)
            verify(worker.dense, self.calibration.tokens, room=room(memory.peak, self.request.max_memory))
        if worker.dense is not worker.decoder:
            worker.dense.drop_embedding()
        memory = replace(memory, peak=max(memory.peak, compute.peak_resident()))
        return _WorkPlan(worker=worker, memory=memory, bytes_to_write=size, checking=compute.age())

    def _plan_memory(self, worker: StageWorker) -> memory_model.MemoryPlan:
        """Plan how to keep within --max-memory; the batch of a stage that was begun stays as it is.

        Raises
        ------
        UsageError
            It cannot be done.
        """
        return memory_model.plan(
            self.request.max_memory,
            compute.resident(),
            self.manifest["compute"]["batch"],
            partial(worker.demand, measures=self._measures),
            fixed=not self._place.is_new,
            overlapping=compute.overlaps(worker.decoder.device),
            windows=self.request.command == "prune",
        )

    @property
    def _draft(self) -> Stage:
        """The blocks as they were pruned one after the other, while the whole model learns from them."""
        return Stage(self._directory / stages.DRAFT, self._stage.blocks, home=self._directory)

    @property
    def _blocks(self) -> Stage:
        """The stage into which blocks are pruned one after the other."""
        return self._stage if self.request.whole_model is None else self._draft

    def _finished(self, worker: StageWorker) -> int:
        """Return the number of pruned blocks, from which the work is resumed."""
        done = rank_share.resumable(self._blocks, checked=self._checks(worker))
        return done if self.request.whole_model is None else max(done, self._stage.finished())

    def _channel_sensitivity(self, worker: StageWorker) -> ChannelSensitivity | None:
        """Return where the sensitivity of the channels comes from; None if the method needs none."""
        if not self.request.needs_sensitivity:
            return None
        return ChannelSensitivity(
            decoder=worker.dense,
            calibration=self.calibration,
            model=self._place.digest,
            stage=self._directory,
            recorded=self.manifest["calibration"].get("sensitivity"),
        )

    @property
    def _measures(self) -> bool:
        """True if the sensitivity of the channels must be measured."""
        return self._channels is not None and self._channels.place is None

    def _bytes_to_write(self, worker: StageWorker, memory: memory_model.MemoryPlan) -> int:
        """Return the bytes of the blocks that are left, their codes, and the hidden states that lie in files."""
        hidden = (
            worker.demand(memory.batch, measures=self._measures).hidden * self._world.size if memory.in_files else 0
        )
        hidden += worker.state_bytes()
        tensors = worker.decoder.weights
        whole = int(tensors.nbytes(tensors.names) * 1.02) + (sum(worker.sizes) if self.request.grid else 0)
        draft = whole if self.request.whole_model else 0
        if self._place.is_new:
            return whole + draft + hidden
        left = self._stage.blocks - self._stage.finished()
        return (whole * left + draft * (self._stage.blocks - self._finished(worker))) // self._stage.blocks + hidden

    def forecast(self) -> forecast.Forecast:
        """Forecast memory, disk and time, from the model of memory and a trial of the first window.

        Raises
        ------
        BesaError
            The run directory cannot be written.
        """
        disk.require_writable(self._directory)
        plan, finished = self._plan, 0 if self._place.is_new else self._finished(self._plan.worker)
        working = plan.worker.seconds(finished, plan.memory.batch, measures=self._measures)
        return forecast.Forecast(
            memory=plan.memory.peak,
            phase=plan.memory.phase,
            in_files=plan.memory.in_files,
            batch=self.manifest["compute"]["batch"],
            disk=plan.bytes_to_write,
            free=disk.free(self._directory),
            seconds=plan.checking + working + self._place.reading,  # the end reads all that is written
            blocks=self._stage.blocks,
            left=self._stage.blocks - finished,
        )

    @property
    def title(self) -> str:
        """One line that says what is about to be done."""
        settings, (samples, seqlen) = self.manifest["compute"], self.calibration.tokens.shape
        observed = f"{samples} x {seqlen} calibration tokens, " if self.request.uses_calibration else ""
        return (
            f"{self.request.describe(self.model.name)}: {self.number_of_blocks} blocks, {observed}"
            f"{settings['dtype']} on {settings['device']}"
        )

    @property
    def number_of_blocks(self) -> int:
        """Number of blocks of the model."""
        return self._stage.blocks

    def blocks(self, on_step: OnStep = lambda done, total, phase: None) -> Iterator[BlockReport]:
        """Do block after block; each report is yielded when its block is on disk, or is the only one being written.

        If the whole model learns afterwards, these are the blocks that it starts from: see `passes`.
        """
        if self.done:
            ranks.stop_workers(self._world)
            yield from self._stage.reports()
            return
        memory = self._plan.memory
        channels = self._sensitivity = self._sensitivity_values(on_step)
        self._begin_or_resume()
        if self._stage.finished() == self._stage.blocks and not self._checks(self._plan.worker):
            ranks.stop_workers(self._world)
            yield from self._stage.reports()
            return
        if self._channels is not None and channels is not None:
            self._channels.keep_in_stage(channels)
        files = self._directory if memory.in_files else None
        kept = None
        if self.request.removed_experts is not None:
            kept = self._kept_experts(ActivationStore(files), on_step)
        budgets = self._block_budgets(ActivationStore(files), on_step) if self.request.measures_blocks else None
        ranks.run_main(
            self.request, self._place.digest, self.calibration.tokens, self.manifest["compute"], files, self._world,
            prefetch=memory.overlapping, channels=channels, budgets=budgets, kept_experts=kept,
        )  # fmt: skip
        stage = self._blocks
        with BackgroundWriter(stage) if memory.overlapping else contextlib.nullcontext(stage) as store:
            for report in self._plan.worker.reports(
                store,
                ActivationStore(files),
                on_step,
                batch=memory.batch,
                prefetch=memory.overlapping,
                check=self._checks(self._plan.worker),
                channels=channels,
            ):
                self._timing.block(report)
                yield report

    def _sensitivity_values(self, on_step: OnStep) -> Tensor | None:
        """Return the sensitivity of the channels, whose digest goes to the manifest; None if the method needs none.

        It is ready before the stage begins, and what lies in files meanwhile does so in the run directory.
        """
        if self._channels is None:
            return None
        files = self._directory.parent if self._plan.memory.in_files else None
        if files is not None:
            files.mkdir(parents=True, exist_ok=True)
        values = self._channels.values(on_step, ActivationStore(files), self._notify)
        self.manifest["calibration"]["sensitivity"] = self._channels.digest(values)
        return values

    def _begin_or_resume(self) -> None:
        """Write everything but the blocks: the manifest, the small files, and the tensors that belong to no block."""
        if self._place.is_new:
            self._place.begin(self._stage, self._plan.worker.decoder.left_out(), self._changed_files())
        else:
            self._note_resumption()
        stages.sweep(self._directory)
        if self._plan.memory.in_files:
            self._notify(f"the hidden states lie in files in {self._directory}, to stay within --max-memory")
        self._place.write_rest(self._stage, self._plan.worker.decoder.rest_names())

    def _changed_files(self) -> dict[str, Json]:
        """Return the contents of the small files that differ from the model's."""
        share = self.request.removed_experts
        return {} if share is None else {config_json.FILE: experts.config_file(self.model.directory, share)}

    def _kept_experts(self, activations: ActivationStore, on_step: OnStep) -> list[list[int]]:
        """Return the experts of each block that stay: those in the manifest, else measured and recorded there."""
        recorded = manifests.read_stage(self._directory).get("experts")
        if recorded is None:
            recorded = self._plan.worker.measure_experts(activations, on_step, batch=self._plan.memory.batch)
            self._stage.record_experts(recorded)
            self._notify(manifests.describe_experts(recorded))
        self._plan.worker.decoder.keep_experts(recorded["kept"])
        return recorded["kept"]

    def _block_budgets(self, activations: ActivationStore, on_step: OnStep) -> list[int]:
        """Return the weights that each block prunes: those in the manifest, else measured and recorded there."""
        recorded = manifests.read_stage(self._directory).get("block_budgets")
        if recorded is None:
            recorded = self._plan.worker.measure(activations, on_step, batch=self._plan.memory.batch)
            self._stage.record_budgets(recorded)
            self._notify(manifests.describe_budgets(recorded))
        self._plan.worker.share_out(recorded["pruned"])
        return recorded["pruned"]

    def _note_resumption(self) -> None:
        done, blocks = self._finished(self._plan.worker), self._stage.blocks
        if not done and self._blocks.finished():
            self._notify(
                f"{self._directory}: {stages.HELD_OUT} is missing or ahead of the blocks, so all {blocks} are "
                "computed again"
            )
        else:
            self._notify(f"{self._directory}: {done} of {blocks} blocks are done, resuming from there")

    def _checks(self, worker: StageWorker) -> bool:
        """Return True if samples are held out to check the result, and the manifest does not have the figures yet."""
        return worker.checked and "held_out" not in self.manifest

    def work(self, on_step: OnStep = lambda done, total, phase: None) -> Iterator[BlockReport | PassReport]:
        """Do all parts of the work, one after the other; see `blocks`, `passes` and `repaired`."""
        yield from self.blocks(on_step)
        yield from self.passes(on_step)
        yield from self.repaired(on_step)

    def passes(self, on_step: OnStep = lambda done, total, phase: None) -> Iterator[PassReport]:
        """Let the whole model learn the sparsities of its rows, if the request asks for it.

        Comes after `blocks`, and yields a report before the first pass over the samples and after each.
        """
        if self._whole_model is None:  # not asked for, or finished already
            return
        began = time.perf_counter()
        for report in self._whole_model.passes(on_step):
            now = time.perf_counter()
            self._timing.whole_pass(report, now - began)
            began = now
            yield report

    def repaired(self, on_step: OnStep = lambda done, total, phase: None) -> Iterator[BlockReport]:
        """Change the kept weights of the blocks under what the whole model learned, if both are asked for.

        Comes after `passes`, and yields the report of each block.
        """
        if self._whole_model is None:  # not asked for, or finished already
            return
        for report in self._whole_model.repaired(on_step, self._sensitivity):
            self._timing.block(report)
            yield report

    def finish(self) -> StageManifest:
        """Complete the stage and put it in its place; return its manifest."""
        if self.manifest["status"] == "complete":
            stages.drop_draft(self._directory)
            return self.manifest
        for _ in itertools.chain(self.passes(), self.repaired()):
            pass
        held_out = self.calibration.held_out
        added = self._whole_model.record(0 if held_out is None else len(held_out)) if self._whole_model else {}
        manifest = self._stage.finish(added)
        stages.drop_draft(self._directory)
        self._place.take()
        return manifest
