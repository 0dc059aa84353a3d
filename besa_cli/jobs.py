"""Making a stage of a run directory from a checkpoint, resumable at every block."""

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from besa_cli import checkpoint, compute, manifests, stream, weights, windows
from besa_cli.activations import Shelf
from besa_cli.calibration import CalibrationSet
from besa_cli.checkpoint import Run, Stage
from besa_cli.choices import Target
from besa_cli.decoder import Decoder
from besa_cli.errors import BesaError, UsageError
from besa_cli.models import Model
from besa_cli.ops import kernels
from besa_cli.ops.affine import Grid
from besa_cli.reports import BlockReport
from besa_cli.stream import Block, Pruned, Step

_PASS_TOKENS = 4096  # tokens in a pass without gradients
_WINDOW_BYTES = (
    9  # for each weight of a window, beside copies in the compute dtype: source, ranks, scores, what is learned
)
_GRID_BYTES = 20  # more for each weight whose grid is learned: itself in fp32, what it becomes, and their gradients
_WIDTH = 24  # numbers that a pass holds for each token and channel
_ARRAYS = 2  # tensors of hidden states: inputs and targets


class Plan(Protocol):
    """What is asked of a job: see `besa_cli.pruning.Request` and `besa_cli.quantizing.Request`."""

    @property
    def stage(self) -> str:
        """The stage that is made."""

    @property
    def command(self) -> str:
        """The command that makes it."""

    @property
    def device(self) -> str:
        """As on the command line, ``auto`` included."""

    @property
    def dtype(self) -> str:
        """As on the command line, ``auto`` included."""

    @property
    def seed(self) -> int:
        """Seed of every random choice."""

    @property
    def calibration(self) -> str | None:
        """Directory of a calibration set that was named, for the record."""

    @property
    def max_memory(self) -> int | None:
        """Bytes that the process is to stay within; the hidden states go to files where they would not fit."""

    @property
    def window(self) -> str:
        """What is reconstructed together, see `besa_cli.windows.segments`."""

    @property
    def target(self) -> Target:
        """What a window should keep, see `besa_cli.stream.compress`."""

    @property
    def grid(self) -> Grid | None:
        """The grid that weights are put on."""

    @property
    def observes(self) -> bool:
        """Whether anything is decided from calibration samples; where not, none pass through the model."""

    def record(self) -> dict[str, Any]:
        """All options with their values, under the names of the command line."""

    def facts(self) -> dict[str, Any]:
        """What else the manifest says of what is made."""

    def doing(self, model: str) -> str:
        """What is done to a model of this name, in a few words."""

    def budgets(self, sizes: Sequence[int]) -> list[int] | None:
        """Weights that each window prunes, from the windows' numbers of weights; None where none are counted out."""

    def change(self, block: Block) -> Pruned:
        """What becomes of a block."""


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
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._run, self.model, self.calibration, self.request = run, model, calibration, request
        self._final = run.stage(request.stage)
        self._beside = run.next_stage(request.stage)
        checkpoint.recover(self._final, self._beside)
        for place in (self._final, self._beside):
            checkpoint.refuse_foreign(place, model.directory)
        source = weights.Weights(model.directory)
        self._digest = weights.check(source)
        self._directory, self.manifest = self._place(restart=restart)
        if not self.done and self.manifest["versions"] != checkpoint.versions():
            notify(
                f"{self._directory} was begun with {manifests.listed(self.manifest['versions'])}, not with those here"
            )
        self._check_and_begin(source, notify)

    @property
    def done(self) -> bool:
        """Whether the stage was finished before."""
        return bool(self.manifest["status"] == "complete")

    def _place(self, *, restart: bool) -> tuple[Path, dict[str, Any]]:
        """The stage made or begun with what is asked, and its manifest; a new one where there is none.

        With `restart` only a stage that an interrupted ``--restart`` has begun counts.
        """
        new = self._new_manifest()
        found = {
            place: checkpoint.read_manifest(place)
            for place in (self._final, self._beside)
            if (place / checkpoint.MANIFEST).exists()
        }
        there = {place: old for place, old in found.items() if old["status"] != "beginning"}
        different = {place: manifests.differences(old, new) for place, old in there.items()}
        for place, old in there.items():
            if not different[place] and (not restart or (old["status"] == "running" and "restart" in old)):
                return place, old
        if restart:
            return self._beside if checkpoint.is_complete(self._final) else self._final, {**new, "restart": True}
        for place, differences in different.items():
            state = "a finished" if there[place]["status"] == "complete" else "an unfinished"
            raise BesaError(
                f"{place} holds {state} stage made with other options: {'; '.join(differences)}",
                "give --run NAME to keep both, or --restart to replace it",
            )
        return self._final, new

    def _new_manifest(self) -> dict[str, Any]:
        request, calibration = self.request, self.calibration.manifest
        drawn = {name: calibration["options"][name] for name in ("data", "samples", "seqlen", "pack")}
        if request.calibration is not None:
            drawn = {"calibration": request.calibration}
        elif calibration["options"].get("seed") != request.seed:
            drawn = {"calibration": str(self._run.calibration.resolve())}
        device = compute.device(request.device)
        seqlen = self.calibration.tokens.shape[1]
        parent = self._run.stage_at(self.model.directory)
        return {
            "format": checkpoint.FORMAT,
            "stage": request.stage,
            "command": request.command,
            "options": {"model": self.model.name, **request.record(), **drawn},
            "compute": {
                "device": device.type,
                "dtype": compute.name_of(compute.dtype(request.dtype, device)),
                "threads": torch.get_num_threads(),
                "batch": max(_PASS_TOKENS // seqlen, 1),
                "kernels": kernels.name(),
            },
            "model": {
                "name": self.model.name,
                "kind": self.model.kind,
                "revision": self.model.revision,
                "directory": str(self.model.directory.resolve()),
                "digest": self._digest,
                **({"stage": parent} if parent else {}),
            },
            **request.facts(),
            "calibration": {"tokens_digest": self.calibration.digest, "sources": calibration["sources"]},
            "versions": checkpoint.versions(),
            "history": manifests.history(self.model.directory),
            "status": "new",
        }

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
        spilled = self._spills(max(sizes))
        if self.manifest["status"] == "new":
            codes = sum(sizes) if self.request.grid else 0
            checkpoint.require_space(self._directory, int(source.nbytes(source.names) * 1.02) + codes)
            self._decoder.verify(self.calibration.tokens)
            checkpoint.discard(self._directory, self._final)
            self._stage.begin(self.manifest, self.model.directory)
        else:
            done = self._stage.finished()
            notify(f"{self._directory}: {done} of {len(self._decoder)} blocks are done, going on from there")
        checkpoint.sweep(self._directory)
        self._shelf = Shelf(self._directory if spilled else None)
        if spilled:
            notify(f"the hidden states lie in files in {self._directory}, to stay within --max-memory")
        if not self._stage.shard(-1).exists():
            self._stage.write_rest(source.read(self._decoder.rest_names()))

    def _spills(self, largest: int) -> bool:
        """Whether the hidden states have to go to files, for windows of up to `largest` weights.

        Raises
        ------
        UsageError
            A window alone would not fit.
        """
        limit = self.request.max_memory
        if limit is None:
            return False
        dtype = self._decoder.dtype
        hidden = int(self._decoder.config.get_text_config().hidden_size)
        tokens = self.calibration.tokens.numel()
        passing = min(tokens, self.manifest["compute"]["batch"] * self.calibration.tokens.shape[1])
        each = _WINDOW_BYTES + 3 * dtype.itemsize + (_GRID_BYTES if self.request.grid else 0)
        window = largest * each + passing * hidden * _WIDTH * dtype.itemsize
        needed: int = compute.resident() + window
        if needed > limit:
            raise UsageError(
                f"--max-memory {limit / 1e9:.1f}GB is too little: with one window of the model the process needs "
                f"about {needed / 1e9:.1f} GB",
                f"give at least {needed / 1e9 + 0.1:.1f}GB, a narrower --window or a shorter --seqlen",
            )
        return needed + _ARRAYS * tokens * hidden * dtype.itemsize > limit

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
        reports = stream.compress(
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
            checkpoint.replace_stage(self._final, self._directory)
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
        with (self._directory / checkpoint.TIMING).open("a") as file:
            file.write(json.dumps(line) + "\n")
