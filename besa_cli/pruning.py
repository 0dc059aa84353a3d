"""Pruning a model from its checkpoint to a stage of a run directory, resumable at every block."""

import importlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from besa_cli import checkpoint, compute, stream, weights, windows
from besa_cli.activations import Shelf
from besa_cli.calibration import CalibrationSet
from besa_cli.checkpoint import Run, Stage
from besa_cli.decoder import Decoder
from besa_cli.errors import BesaError, UsageError, unknown
from besa_cli.models import Model
from besa_cli.ops import budget, kernels
from besa_cli.pruners import PRUNERS
from besa_cli.reports import BlockReport
from besa_cli.stream import Step

STAGE = "pruned"
_PASS_TOKENS = 4096  # tokens in a pass without gradients
_WINDOW_BYTES = (
    9  # for each weight of a window, beside copies in the compute dtype: source, ranks, scores, what is learned
)
_WIDTH = 24  # numbers that a pass holds for each token and channel
_ARRAYS = 2  # tensors of hidden states: inputs and targets


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of `prune`.

    Attributes
    ----------
    method : str
        A key of `besa_cli.pruners.PRUNERS`.
    sparsity : float
        Share of the linears' weights to prune, in [0, 1).
    nm : (n, m), optional
        Prune n of every m columns instead.
    options : mapping
        The method's own options that were given, by the names of its `Options`.
    device, dtype : str
        As on the command line, ``auto`` included.
    seed : int
    calibration : str, optional
        Directory of a calibration set that was named, for the record.
    max_memory : int, optional
        Bytes of memory that the process is to stay within; the hidden states go to files where they would not fit.
    """

    method: str = "besa"
    sparsity: float = 0.5
    nm: tuple[int, int] | None = None
    options: Mapping[str, Any]
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    calibration: str | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.method not in PRUNERS:
            raise unknown("method", self.method, PRUNERS)
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"--sparsity {self.sparsity} is not in [0, 1)", "0.5 prunes half of the weights")
        if self.nm and not 0 < self.nm[0] < self.nm[1]:
            raise UsageError(
                f"--nm '{self.nm[0]}:{self.nm[1]}' is no pattern N:M with 0 < N < M", "2:4 prunes 2 of every 4 columns"
            )
        compute.device(self.device)
        self.method_options()

    def method_options(self) -> Any:
        """The method's `Options`.

        Raises
        ------
        UsageError
            An option that this method does not have; says which methods do.
        """
        known = _option_names(self.method)
        given = {**self.options, **({"nm": self.nm} if self.nm else {})}
        for name in given:
            if name not in known:
                having = [method for method in PRUNERS if name in _option_names(method)]
                raise UsageError(
                    f"--{name.replace('_', '-')} is no option of --method {self.method}",
                    f"methods with that option: {', '.join(having) or 'none'}",
                )
        module = _module(self.method)
        if given.get("preset") == "authors":
            given = {**module.authors(given.get("granularity", "row")), **given}
        return module.Options(**given)

    def record(self) -> dict[str, Any]:
        """All options with their values, under the names of the command line."""
        own = self.method_options()
        named = {field.name: getattr(own, field.name) for field in fields(own) if field.name != "nm"}
        amount = {"nm": f"{self.nm[0]}:{self.nm[1]}"} if self.nm else {"sparsity": self.sparsity}
        return {"method": self.method, **amount, **named, "device": self.device, "dtype": self.dtype, "seed": self.seed}


def _module(method: str) -> Any:
    return importlib.import_module(f"besa_cli.pruners.{method}")


def _option_names(method: str) -> list[str]:
    return [field.name for field in fields(_module(method).Options)]


class Job:
    """One prune command on one run directory: everything is checked when it is made, `blocks` does the work.

    Parameters
    ----------
    run : Run
        Its lock is held by the caller.
    model : Model
    calibration : CalibrationSet
    request : Request
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
        request: Request,
        *,
        restart: bool = False,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._run, self.model, self.calibration, self.request = run, model, calibration, request
        self._final = run.stage(STAGE)
        self._beside = run.next_stage(STAGE)
        checkpoint.recover(self._final, self._beside)
        for place in (self._final, self._beside):
            checkpoint.refuse_foreign(place, model.directory)
        source = weights.Weights(model.directory)
        self._digest = weights.check(source)
        self._directory, self.manifest = self._place(restart=restart)
        if not self.done and self.manifest["versions"] != checkpoint.versions():
            notify(f"{self._directory} was begun with {_versions(self.manifest['versions'])}, not with those here")
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
        manifests = {
            place: checkpoint.read_manifest(place)
            for place in (self._final, self._beside)
            if (place / checkpoint.MANIFEST).exists()
        }
        there = {place: old for place, old in manifests.items() if old["status"] != "beginning"}
        different = {place: _differences(old, new) for place, old in there.items()}
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
        return {
            "format": checkpoint.FORMAT,
            "stage": STAGE,
            "command": "prune",
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
            },
            "calibration": {"tokens_digest": self.calibration.digest, "sources": calibration["sources"]},
            "versions": checkpoint.versions(),
            "history": _history(self.model.directory),
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
        width = getattr(self.request.method_options(), "window", windows.BLOCK)
        self._segments = windows.segments(self._decoder, width)
        sizes = list(windows.sizes(self._segments))
        self._budgets = None if self.request.nm else budget.window_counts(self.request.sparsity, sizes)
        spilled = self._spills(max(sizes))
        if self.manifest["status"] == "new":
            checkpoint.require_space(self._directory, int(source.nbytes(source.names) * 1.02))
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
        window = largest * (_WINDOW_BYTES + 3 * dtype.itemsize) + passing * hidden * _WIDTH * dtype.itemsize
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
            f"pruning {self.model.name} with {self.request.method}: {self.number_of_blocks} blocks, "
            f"{samples} x {seqlen} calibration tokens, {settings['dtype']} on {settings['device']}"
        )

    @property
    def number_of_blocks(self) -> int:
        """Blocks of the model."""
        return self._stage.blocks

    def blocks(self, on_step: Step = lambda done, total, phase: None) -> Iterator[BlockReport]:
        """Prune block after block; each report is given when its block is safe on disk."""
        if self.done:
            yield from self._stage.reports()
            return
        module, options = _module(self.request.method), self.request.method_options()
        settings = self.manifest["compute"]
        reports = stream.compress(
            self._decoder,
            self._stage,
            self.calibration.tokens,
            lambda block: module.prune(block, options),
            segments=self._segments,
            budgets=self._budgets,
            target=getattr(options, "target", "block"),
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


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What would change the result, with both values; `auto` agrees with whatever it was resolved to."""
    mine = {**old["options"], "model": old["model"]["digest"], "calibration": old["calibration"]["tokens_digest"]}
    asked = {**new["options"], "model": new["model"]["digest"], "calibration": new["calibration"]["tokens_digest"]}
    for name in ("data", "samples", "seqlen", "pack"):  # the tokens themselves are compared
        mine.pop(name, None)
        asked.pop(name, None)
    for name in ("device", "dtype"):
        resolved = old["compute"][name]
        mine[name] = resolved
        asked[name] = resolved if asked[name] == "auto" else asked[name]
    names = list(dict.fromkeys([*mine, *asked]))
    return [
        f"{name} {_short(mine.get(name))} there, {_short(asked.get(name))} asked"
        for name in names
        if mine.get(name) != asked.get(name)
    ]


def _short(value: object) -> str:
    text = "-" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _history(directory: Path) -> list[dict[str, Any]]:
    """The stages before, where the model is itself a stage."""
    if not (directory / checkpoint.MANIFEST).exists():
        return []
    parent = checkpoint.finished(directory)
    own = {key: parent[key] for key in ("stage", "command", "options", "versions", "digest") if key in parent}
    return [*parent.get("history", []), own]


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
