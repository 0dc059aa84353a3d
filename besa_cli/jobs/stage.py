"""Making a stage of a run directory from a checkpoint, resumable at every block."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from besa_cli.calibration.calibration_set import CalibrationSet
from besa_cli.checkpoint import ownership, preflight, stages, swap, weights
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.decoder.verify import SMALL, verify
from besa_cli.jobs import ranks, stage_manifest
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.worker import StageWorker
from besa_cli.models import Model, cache
from besa_cli.stream import forecast, memory_model
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.background_writer import BackgroundWriter
from besa_cli.stream.block import OnStep
from besa_cli.system import compute, disk
from besa_cli.system.ranks import Ranks


class StageJob:
    """One command that makes a stage of a run directory: everything is checked when it is made, `blocks` does the work.

    Parameters
    ----------
    run : Run
        Its lock is held by the caller.
    model : Model
    calibration : CalibrationSet
    request : Request
    restart : bool
        Begin anew; a finished stage is replaced when the new one is finished.
    dry : bool
        Only check; nothing is written. For `forecast`.
    notify : callable
        Takes one-line notes.
    world : Ranks, optional
        This is the first of them, and the others are in `besa_cli.jobs.ranks.follow`; alone by default.

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
        dry: bool = False,
        notify: Callable[[str], None] = lambda _: None,
        world: Ranks | None = None,
    ) -> None:
        began, self._dry = time.perf_counter(), dry
        self._run, self.model, self.calibration, self.request = run, model, calibration, request
        self._world = world or Ranks()
        ranks.require_samples(len(calibration.tokens), self._world)
        self._final = run.stage(request.stage)
        self._beside = run.next_stage(request.stage)
        if not dry:
            swap.recover(self._final, self._beside)
        for place in (self._final, self._beside):
            preflight.refuse_foreign(place, model.directory)
            if restart:
                ownership.refuse_to_replace(place, self._sources())
        source = weights.Weights(model.directory)
        extremes: dict[str, tuple[float, float]] = {}
        self._digest = weights.check(source, extremes)
        cache.confirm(model.directory, self._digest)
        self._checking = time.perf_counter() - began
        preflight.refuse_damaged(model.directory, self._digest)
        new = stage_manifest.new_manifest(run, model, self._digest, calibration, request, self._world.size)
        self._directory, self.manifest = stage_manifest.place(self._final, self._beside, new, restart=restart)
        if self.done:
            preflight.refuse_damaged(self._directory, weights.check(weights.Weights(self._directory)))
            preflight.refuse_incomplete(self._directory)
        elif self.manifest["status"] != "new":
            stage_manifest.refuse_other_environment(self._directory, self.manifest, new)
        self._check_and_begin(source, extremes, notify)

    def _sources(self) -> list[Path]:
        """What is read while the stage is made."""
        named = self.request.calibration
        return [self.model.directory, *([Path(named)] if named else [])]

    @property
    def done(self) -> bool:
        """Whether the stage was finished before."""
        return bool(self.manifest["status"] == "complete")

    def _check_and_begin(
        self, source: weights.Weights, extremes: Mapping[str, tuple[float, float]], notify: Callable[[str], None]
    ) -> None:
        if self.done:
            self._stage = Stage(self._directory, int(self.manifest["blocks"]))
            return
        settings = self.manifest["compute"]
        self._work = StageWorker(self.model.directory, self.request, settings, self.calibration.tokens, self._world)
        self._stage = Stage(self._directory, len(self._work.decoder))
        self._work.decoder.weights.refuse_change(source)
        self._work.decoder.weights.require_floats(self._work.decoder.linear_tensors())
        for note in self._work.decoder.notes:
            notify(note)
        if self.request.grid:
            names = self._work.decoder.linear_tensors()
            preflight.refuse_beyond_fp16(
                {name: extremes[name] for name in names if name in extremes}, self.request.grid
            )
        placing = self._place_in_memory()
        hidden = self._work.demand(placing.batch).hidden * self._world.size if placing.in_files else 0
        whole = int(source.nbytes(source.names) * 1.02) + (sum(self._work.sizes) if self.request.grid else 0)
        self._to_write = whole * (len(self._work.decoder) - self._stage.finished()) // len(self._work.decoder) + hidden
        if self.manifest["status"] == "new":
            settings["batch"] = placing.batch
            self._to_write = whole + hidden
            preflight.require_space(self._directory, self._to_write)
            verify(self._work.decoder, self.calibration.tokens, room=self._room(placing))
        self._placing = replace(placing, peak=max(placing.peak, compute.peak_resident()))
        if self._dry:
            disk.require_writable(self._directory)
            self._checked = compute.age()
        else:
            self._begin(source, notify, spilled=placing.in_files)

    def _begin(self, source: weights.Weights, notify: Callable[[str], None], *, spilled: bool) -> None:
        if self.manifest["status"] == "new":
            swap.discard(self._directory, self._final, self._sources())
            self._stage.begin(self.manifest, self.model.directory)
        else:
            done = self._stage.finished()
            notify(f"{self._directory}: {done} of {len(self._work.decoder)} blocks are done, going on from there")
        stages.sweep(self._directory)
        self._spilled = spilled
        if spilled:
            notify(f"the hidden states lie in files in {self._directory}, to stay within --max-memory")
        rest = self._work.decoder.rest_names()
        if self._stage.shard(-1).exists():
            self._stage.check_rest(weights.digest(source.read(rest)))
        else:
            self._stage.write_rest(source.read(rest))

    def _place_in_memory(self) -> memory_model.MemoryPlan:
        """How to stay within --max-memory; the batch of a stage that was begun stays as it is.

        Raises
        ------
        UsageError
            It cannot be done.
        """
        most = self.manifest["compute"]["batch"]
        limit, new = self.request.max_memory, self.manifest["status"] == "new"
        overlapping = compute.overlaps(self._work.decoder.device)
        return memory_model.plan(
            limit, compute.resident(), most, self._work.demand, fixed=not new, overlapping=overlapping
        )

    def _room(self, placing: memory_model.MemoryPlan) -> int:
        """Bytes that checking the decoder may take: no more than the work after it, or little."""
        limit = self.request.max_memory
        most = max(placing.peak, compute.resident() + SMALL)
        return (most if limit is None else min(most, limit)) - compute.resident()

    def forecast(self) -> forecast.Forecast:
        """What the command will take, from the model of memory and a trial of the first window; for a dry job."""
        finished = self._stage.finished() if self.manifest["status"] != "new" else 0
        left = len(self._work.decoder) - finished
        return forecast.Forecast(
            memory=self._placing.peak,
            phase=self._placing.phase,
            in_files=self._placing.in_files,
            batch=self.manifest["compute"]["batch"],
            disk=self._to_write,
            free=disk.free(self._directory),
            seconds=self._checked + self._work.seconds(finished) + self._checking,  # the end reads all that is written
            blocks=len(self._work.decoder),
            left=left,
        )

    @property
    def title(self) -> str:
        """What is about to be done, in one line."""
        settings, (samples, seqlen) = self.manifest["compute"], self.calibration.tokens.shape
        observed = f"{samples} x {seqlen} calibration tokens, " if self.request.uses_calibration else ""
        return (
            f"{self.request.describe(self.model.name)}: {self.number_of_blocks} blocks, {observed}"
            f"{settings['dtype']} on {settings['device']}"
        )

    @property
    def number_of_blocks(self) -> int:
        """Blocks of the model."""
        return self._stage.blocks

    def blocks(self, on_step: OnStep = lambda done, total, phase: None) -> Iterator[BlockReport]:
        """Do block after block; each report is given when its block is on disk, or the only one on its way there."""
        if self.done:
            ranks.stop_workers(self._world)
            yield from self._stage.reports()
            return
        files, overlapping = self._directory if self._spilled else None, self._placing.overlapping
        ranks.run_main(
            self.request, self._digest, self.calibration.tokens, self.manifest["compute"], files, self._world,
            ahead=overlapping,
        )  # fmt: skip
        with BackgroundWriter(self._stage) if overlapping else contextlib.nullcontext(self._stage) as store:
            for report in self._work.reports(store, ActivationStore(files), on_step, ahead=overlapping):
                self._note_time(report)
                yield report

    def finish(self) -> dict[str, Any]:
        """Complete the stage and put it in its place; returns its manifest."""
        if self.done:
            return self.manifest
        manifest = self._stage.finish()
        if self._directory != self._final:
            swap.replace_stage(self._final, self._directory)
        return manifest

    def _note_time(self, report: BlockReport) -> None:
        line = {
            "block": report.index,
            "resumed": report.resumed,
            "ranks": self._world.size,
            "seconds": round(report.seconds, 3),
            "peak_memory": report.peak_memory,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": socket.gethostname(),
        }
        disk.append_line(self._directory / stages.TIMING, json.dumps(line))
