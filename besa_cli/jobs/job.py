"""Making a stage of a run directory from a checkpoint, resumable at every block."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from besa_cli import compute, disk, footprint, forecast, weights, windows
from besa_cli.activations import Shelf
from besa_cli.calibration import CalibrationSet
from besa_cli.checkpoint import exchange, manifests, refusals, stages
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.decoder.running import Decoder
from besa_cli.decoder.verification import verify
from besa_cli.jobs import beginning
from besa_cli.jobs.plan import Plan
from besa_cli.models import Model
from besa_cli.reports import BlockReport
from besa_cli.stream import walk
from besa_cli.stream.block import Step


class Job:
    """One command that makes a stage of a run directory: everything is checked when it is made, `blocks` does the work.

    Parameters
    ----------
    run : Run
        Its lock is held by the caller.
    model : Model
    calibration : CalibrationSet
    request : Plan
    restart : bool
        Begin anew; a finished stage is replaced when the new one is finished.
    dry : bool
        Only check; nothing is written. For `forecast`.
    notify : callable
        Takes one-line notes.

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
        request: Plan,
        *,
        restart: bool = False,
        dry: bool = False,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        began, self._dry = time.perf_counter(), dry
        self._run, self.model, self.calibration, self.request = run, model, calibration, request
        self._final = run.stage(request.stage)
        self._beside = run.next_stage(request.stage)
        if not dry:
            exchange.recover(self._final, self._beside)
        for place in (self._final, self._beside):
            refusals.refuse_foreign(place, model.directory)
        source = weights.Weights(model.directory)
        self._digest = weights.check(source)
        self._checking = time.perf_counter() - began
        refusals.refuse_damaged(model.directory, self._digest)
        new = beginning.new_manifest(run, model, self._digest, calibration, request)
        self._directory, self.manifest = beginning.place(self._final, self._beside, new, restart=restart)
        if not self.done and self.manifest["versions"] != manifests.versions():
            notify(
                f"{self._directory} was begun with {beginning.listed(self.manifest['versions'])}, not with those here"
            )
        self._check_and_begin(source, notify)

    @property
    def done(self) -> bool:
        """Whether the stage was finished before."""
        return bool(self.manifest["status"] == "complete")

    def _check_and_begin(self, source: weights.Weights, notify: Callable[[str], None]) -> None:
        if self.done:
            self._stage = Stage(self._directory, int(self.manifest["blocks"]))
            return
        settings = self.manifest["compute"]
        torch.set_num_threads(settings["threads"])
        device = compute.device(settings["device"])
        self._decoder = Decoder(self.model.directory, device, compute.DTYPES[settings["dtype"]])
        self._stage = Stage(self._directory, len(self._decoder))
        self._segments = windows.segments(self._decoder, self.request.window)
        sizes = list(windows.sizes(self._segments))
        self._budgets = self.request.budgets(sizes)
        self._decoder.weights.refuse_change(source)
        placing = self._place_in_memory()
        hidden = self._demand(placing.batch).hidden if placing.in_files else 0
        whole = int(source.nbytes(source.names) * 1.02) + (sum(sizes) if self.request.grid else 0)
        self._to_write = whole * (len(self._decoder) - self._stage.finished()) // len(self._decoder) + hidden
        if self.manifest["status"] == "new":
            settings["batch"] = placing.batch
            self._to_write = whole + hidden
            refusals.require_space(self._directory, self._to_write)
            verify(self._decoder, self.calibration.tokens)
        if self._dry:
            disk.require_writable(self._directory)
            self._placing = replace(placing, peak=max(placing.peak, compute.peak_resident()))
            self._checked = compute.age()
        else:
            self._begin(source, notify, spilled=placing.in_files)

    def _begin(self, source: weights.Weights, notify: Callable[[str], None], *, spilled: bool) -> None:
        if self.manifest["status"] == "new":
            exchange.discard(self._directory, self._final)
            self._stage.begin(self.manifest, self.model.directory)
        else:
            done = self._stage.finished()
            notify(f"{self._directory}: {done} of {len(self._decoder)} blocks are done, going on from there")
        stages.sweep(self._directory)
        self._shelf = Shelf(self._directory if spilled else None)
        if spilled:
            notify(f"the hidden states lie in files in {self._directory}, to stay within --max-memory")
        if not self._stage.shard(-1).exists():
            self._stage.write_rest(source.read(self._decoder.rest_names()))

    def _place_in_memory(self) -> footprint.Placing:
        """How to stay within --max-memory; the batch of a stage that was begun stays as it is.

        Raises
        ------
        UsageError
            It cannot be done.
        """
        most = self.manifest["compute"]["batch"]
        limit, new = self.request.max_memory, self.manifest["status"] == "new"
        return footprint.place(limit, compute.resident(), most, self._demand, fixed=not new)

    def _demand(self, batch: int) -> footprint.Demand:
        own, (samples, seqlen) = self.request.method_options(), self.calibration.tokens.shape
        observed = samples if self.request.observes else 0
        return footprint.compressing(
            footprint.shape(self._decoder, self._segments),
            self.request.method,
            tokens=observed * seqlen,
            passing=min(observed, batch) * seqlen,
            learning=min(samples, getattr(own, "batch_size", 1)) * seqlen,
            candidates=getattr(own, "candidates", 0),
            grid=self.request.grid is not None,
        )

    def forecast(self) -> forecast.Forecast:
        """What the command will take, from the model of memory and a trial of the first window; for a dry job."""
        finished = self._stage.finished() if self.manifest["status"] != "new" else 0
        batch = self.manifest["compute"]["batch"]
        working = forecast.seconds(
            self._decoder,
            self.calibration.tokens if self.request.observes else self.calibration.tokens[:0],
            self.request.change,
            segments=self._segments,
            budgets=self._budgets,
            target=self.request.target,
            batch=batch,
            seed=self.request.seed,
            finished=finished,
        )
        left = len(self._decoder) - finished
        return forecast.Forecast(
            memory=self._placing.peak,
            phase=self._placing.phase,
            in_files=self._placing.in_files,
            batch=batch,
            disk=self._to_write,
            free=disk.free(self._directory),
            seconds=self._checked + working + self._checking,  # what is written is read and digested at the end
            blocks=len(self._decoder),
            left=left,
        )

    @property
    def title(self) -> str:
        """What is about to be done, in one line."""
        settings, (samples, seqlen) = self.manifest["compute"], self.calibration.tokens.shape
        return (
            f"{self.request.doing(self.model.name)}: {self.number_of_blocks} blocks, "
            f"{samples} x {seqlen} calibration tokens, {settings['dtype']} on {settings['device']}"
        )

    @property
    def number_of_blocks(self) -> int:
        """Blocks of the model."""
        return self._stage.blocks

    def blocks(self, on_step: Step = lambda done, total, phase: None) -> Iterator[BlockReport]:
        """Do block after block; each report is given when its block is safe on disk."""
        if self.done:
            yield from self._stage.reports()
            return
        settings = self.manifest["compute"]
        reports = walk.compress(
            self._decoder,
            self._stage,
            self.calibration.tokens if self.request.observes else self.calibration.tokens[:0],
            self.request.change,
            segments=self._segments,
            budgets=self._budgets,
            target=self.request.target,
            batch=settings["batch"],
            seed=self.request.seed,
            on_step=on_step,
            shelf=self._shelf,
        )
        for report in reports:
            self._note_time(report)
            yield report

    def finish(self) -> dict[str, Any]:
        """Complete the stage and put it in its place; returns its manifest."""
        if self.done:
            return self.manifest
        manifest = self._stage.finish()
        if self._directory != self._final:
            exchange.replace_stage(self._final, self._directory)
        return manifest

    def _note_time(self, report: BlockReport) -> None:
        line = {
            "block": report.index,
            "resumed": report.resumed,
            "seconds": round(report.seconds, 3),
            "peak_memory": report.peak_memory,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "host": socket.gethostname(),
        }
        with (self._directory / stages.TIMING).open("a") as file:
            file.write(json.dumps(line) + "\n")
