"""Jobs that tune the kept weights of a pruned stage: checked as a whole first, resumable every few steps."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from besa_cli.calibration.calibration_set import CalibrationSet
from besa_cli.checkpoint import manifests, origins, preflight, stages, weights
from besa_cli.checkpoint.manifests import StageManifest
from besa_cli.checkpoint.reports import PassReport
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.checkpoint.tuning_states import TuningStates
from besa_cli.checkpoint.weights import Weights
from besa_cli.decoder import architecture, experts
from besa_cli.decoder.decoder import Decoder
from besa_cli.decoder.verify import room, verify
from besa_cli.errors import BesaError
from besa_cli.jobs import stage_place
from besa_cli.jobs.timing import Timing
from besa_cli.jobs.tune import TuneRequest
from besa_cli.models import Model
from besa_cli.stream import memory_model, tuning, windows
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.block import OnStep
from besa_cli.stream.distillation import LearningPlan, LearningProgress
from besa_cli.stream.forecast import Forecast
from besa_cli.stream.memory_model import MemoryPlan
from besa_cli.stream.tuning import Tuner
from besa_cli.system import compute, disk, memory
from besa_cli.system.notes import Notify

_ROOMY = 2  # share of the free memory that blocks and learned weights may fill and stay there: one of so many


class TuneJob:
    """One command that makes the tuned stage of a run directory.

    Making the job only checks and writes nothing, so that a dry run is a job of which `forecast` is asked. `work` does
    the work, and `finish` puts the stage in its place.

    Parameters
    ----------
    run : Run
        Its lock is held by the caller, and an interrupted exchange was completed.
    model : Model
        A finished pruned stage.
    calibration : CalibrationSet
    request : TuneRequest
    restart : bool
        Begin again; a finished stage is replaced when the new one is finished.
    notify : callable
        Takes one-line notes.

    Raises
    ------
    BesaError
        Anything that can be known before the first step.
    """

    def __init__(
        self,
        run: Run,
        model: Model,
        calibration: CalibrationSet,
        request: TuneRequest,
        *,
        restart: bool = False,
        notify: Notify = lambda _: None,
    ) -> None:
        self._model, self._calibration, self._request, self._notify = model, calibration, request, notify
        self._source = Stage(model.directory, refuse_unpruned(model.directory)["blocks"])
        self._place = stage_place.find(run, model, calibration, request, restart=restart)
        self._stage = Stage(self._place.directory, self._source.blocks)
        self._states = TuningStates(self._stage)
        self.manifest = self._place.manifest
        if not self.done:
            self._plan_work()

    @property
    def done(self) -> bool:
        """True if the stage was already finished."""
        return self._place.done

    @property
    def title(self) -> str:
        """One line that says what is about to be done."""
        settings, (samples, seqlen) = self.manifest["compute"], self._calibration.tokens.shape
        return (
            f"{self._request.describe(self._model.name)}: {self.number_of_blocks} blocks, {samples} x {seqlen} "
            f"calibration tokens, {settings['dtype']} on {settings['device']}"
        )

    @property
    def number_of_blocks(self) -> int:
        """Number of blocks of the model."""
        return self._stage.blocks

    def _plan_work(self) -> None:
        """Check both models and the machine, and plan memory and disk."""
        self._dense = _dense_weights(self._model.directory, self._notify)
        settings = self.manifest["compute"]
        torch.set_num_threads(settings["threads"])
        device, dtype = compute.device(settings["device"]), compute.DTYPES[settings["dtype"]]
        self._decoder = Decoder(self._model.directory, device, dtype, quick=True)
        self._decoder.weights.refuse_change(self._place.source)
        self._decoder.weights.require_floats(self._decoder.linear_tensors())
        for note in self._decoder.notes:
            self._notify(note)
        self._memory = self._plan_memory()
        if self._place.is_new:
            settings["batch"] = self._memory.batch
            preflight.require_space(self._stage.directory, self._bytes_to_write)
            verify(self._decoder, self._calibration.tokens, room=room(self._memory.peak, self._request.max_memory))
        self._memory = replace(self._memory, peak=max(self._memory.peak, compute.peak_resident()))

    def _plan_memory(self) -> MemoryPlan:
        """Plan how to keep within --max-memory, or without that within what is free.

        Raises
        ------
        UsageError
            It cannot be done.
        """
        self._resident = self._request.max_memory is None and self._is_roomy()
        batch, now = self.manifest["compute"]["batch"], compute.resident()
        if self._request.max_memory is None and not self._resident:
            needed = self._demand(batch)
            return MemoryPlan(batch=batch, in_files=True, peak=now + needed.peak(in_files=True), phase=needed.phase)
        return memory_model.plan(self._request.max_memory, now, batch, self._demand, fixed=not self._place.is_new)

    def _is_roomy(self) -> bool:
        """Return True if all blocks, and what is learned of them, fit into the free memory easily."""
        parameters = sum(parameter.numel() for block in self._decoder.blocks for parameter in block.parameters())
        needed = Counter({self._decoder.device.type: parameters * self._decoder.dtype.itemsize})
        needed["cpu"] += self._kept * memory_model.LEARNED_BYTES
        return all(size * _ROOMY < memory.available(torch.device(device)) for device, size in needed.items())

    @property
    def _kept(self) -> int:
        """Kept weights of all linears."""
        counts = manifests.read_stage(self._model.directory)["counts"]
        return counts["weights"] - counts["zeros"]

    def _demand(self, batch: int) -> memory_model.Demand:
        samples, seqlen = self._calibration.tokens.shape
        return memory_model.tune_demand(
            memory_model.shape(self._decoder, windows.segments(self._decoder, windows.BLOCK)),
            self.number_of_blocks,
            kept=self._kept,
            tokens=self._tokens * seqlen,
            passing=min(samples, batch) * seqlen,
            seqlen=seqlen,
            resident=self._resident,
        )

    @property
    def _tokens(self) -> int:
        """Samples that are learned from, and those that are not."""
        held_out = self._calibration.held_out
        return len(self._calibration.tokens) + (0 if held_out is None else len(held_out))

    @property
    def _bytes_to_write(self) -> int:
        """Bytes of the blocks that are left, the stored states, and what lies in files."""
        whole = int(self._place.source.nbytes(self._place.source.names) * 1.02)
        left = 0 if self._place.is_new else self._stage.finished()
        states = self._kept * tuning.STATE_BYTES * (2 if self._request.epochs == 1 else 3)  # one while it is replaced
        in_files = self._demand(self._memory.batch).hidden if self._memory.in_files else 0
        return whole * (self.number_of_blocks - left) // self.number_of_blocks + states + in_files

    def forecast(self) -> Forecast:
        """Forecast memory, disk and time.

        Raises
        ------
        BesaError
            The run directory cannot be written.
        """
        disk.require_writable(self._stage.directory)
        working = self._tuner(ActivationStore(), lambda done, total, phase: None).seconds()
        finished = 0 if self._place.is_new else self._stage.finished()
        return Forecast(
            memory=self._memory.peak,
            phase=self._memory.phase,
            in_files=self._memory.in_files,
            batch=self.manifest["compute"]["batch"],
            disk=self._bytes_to_write,
            free=disk.free(self._stage.directory),
            seconds=compute.age() + working + self._place.reading,  # the end reads all that is written
            blocks=self.number_of_blocks,
            left=self.number_of_blocks - finished,
        )

    def work(self, on_step: OnStep = lambda done, total, phase: None) -> Iterator[PassReport]:
        """Learn from the stored state on, and write the blocks.

        Yields a report before the first pass over the samples and after each.
        """
        if self.done:
            return
        self._begin_or_resume()
        tuner = self._tuner(ActivationStore(self._stage.directory if self._memory.in_files else None), on_step)
        timing, began = Timing(directory=self._stage.directory, ranks=1), time.perf_counter()
        for report in tuner.learn():
            now = time.perf_counter()
            timing.whole_pass(report, now - began)
            began = now
            yield report
        tuner.write(self._stage)

    def _tuner(self, activations: ActivationStore, on_step: OnStep) -> Tuner:
        plan = LearningPlan(
            epochs=self._request.epochs,
            rate=self._request.rate,
            batch=self.manifest["compute"]["batch"],
            seed=self._request.seed,
            resident=self._resident,
        )
        return Tuner(
            self._decoder,
            self._source,
            self._dense_block,
            self._calibration.tokens,
            plan,
            states=self._states,
            held_out=self._calibration.held_out,
            activations=activations,
            on_step=on_step,
        )

    def _dense_block(self, index: int) -> dict[str, Tensor]:
        return self._dense.read(self._decoder.stored_names(index))

    def _begin_or_resume(self) -> None:
        """Write everything but the blocks."""
        if self._place.is_new:
            self._place.begin(self._stage, self._decoder.left_out())
        else:
            steps = LearningProgress.of(stored).step if (stored := self._states.progress()) else 0
            self._notify(f"{self._stage.directory}: {steps} steps are done, resuming from there")
        stages.sweep(self._stage.directory)
        if self._memory.in_files:
            self._notify(f"the learned weights and the hidden states lie in files in {self._stage.directory}")
        self._place.write_rest(self._stage, self._decoder.rest_names())

    def finish(self) -> StageManifest:
        """Complete the stage after `work` and put it in its place; return its manifest."""
        if self.manifest["status"] == "complete":
            self._states.remove()
            return self.manifest
        progress, held_out = LearningProgress.of(self._states.progress()), self._calibration.held_out
        whole_model: manifests.WholeModel = {
            "held_out": 0 if held_out is None else len(held_out),
            "divergence": progress.held,
            "kept": progress.kept,
        }
        if progress.kept_part < 1:
            whole_model["part"] = progress.kept_part
        manifest = self._stage.finish({"whole_model": whole_model})
        self._states.remove()
        self._place.take()
        return manifest


def refuse_unpruned(directory: Path) -> StageManifest:
    """Refuse to tune what is not a finished stage of pruned weights; return its manifest.

    Raises
    ------
    BesaError
        It is another checkpoint, unfinished, or quantized.
    """
    if not (directory / manifests.MANIFEST).exists():
        raise BesaError(f"{directory} was not made by besa: only a pruned stage is tuned", "make one: besa prune")
    manifest = stages.require_finished(directory)
    if "quantization" in manifest:
        raise BesaError(
            f"{directory} is quantized: tuning would move its weights off their grid",
            "tune the pruned stage, then quantize it: besa prune, besa tune, besa quantize",
        )
    return manifest


def _dense_weights(stage: Path, notify: Notify) -> Weights:
    """Return the weights of the dense model that a stage was made from.

    Raises
    ------
    BesaError
        They have changed since, or cannot be had.
    """
    directory, digest = origins.dense(stage, notify)
    found = Weights(directory)
    computed = weights.check_source(found)
    if computed != digest:
        raise BesaError(
            f"the dense model in {directory} has changed since {stage} was made from it ({digest[:12]} then, "
            f"{computed[:12]} now)",
            "restore it, or prune it again",
        )
    return _with_kept_experts(found, stage)


def _with_kept_experts(dense: Weights, stage: Path) -> Weights:
    """Return the weights of the dense model with the experts alone that a stage has kept.

    Raises
    ------
    BesaError
        The experts were removed from a model that was not the dense one.
    """
    manifest = manifests.read_stage(stage)
    if any(step["options"].get("experts") for step in manifest["history"]):
        raise BesaError(
            f"the model that {stage} was made from has fewer experts than its dense model: it cannot be tuned",
            "prune the dense model with --experts, then tune that stage",
        )
    if "experts" not in manifest:
        return dense
    share = float(str(manifest["options"]["experts"]))
    _, fewer = experts.without(architecture.config_of(dense.directory), dense, share)
    fewer.keep(manifest["experts"]["kept"])
    return fewer
