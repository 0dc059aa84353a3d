"""The run directory and its stages: complete Hugging Face checkpoints, one shard a block, each with a manifest.

`docs/checkpoint.md` specifies the format.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from besa_cli import __version__, disk, weights
from besa_cli.errors import BesaError
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid
from besa_cli.reports import BlockReport, LinearReport

FORMAT = 1
MANIFEST = disk.MANIFEST
EXPORT = "export.json"  # the manifest of an export, written last; an export is no stage
TIMING = "timing.jsonl"
STAGES = ("pruned", "quantized")  # in the order in which they are made

_CODES = "codes"  # the folder of a quantized stage that holds what its weights were made from
_LIBRARIES = ("torch", "transformers", "safetensors")
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".index.json")
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")


class Run:
    """A run directory: the only state between commands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def calibration(self) -> Path:
        """Where the calibration set is."""
        return self.path / "calibration"

    @property
    def evaluations(self) -> Path:
        """Where evaluation results go, one file a result."""
        return self.path / "eval"

    @property
    def exports(self) -> Path:
        """Where exports go, one directory each."""
        return self.path / "export"

    @property
    def simulations(self) -> Path:
        """Where simulation results go, one file a result."""
        return self.path / "simulate"

    def stage(self, name: str) -> Path:
        """Where a stage is: ``pruned``, ``quantized``."""
        return self.path / name

    def stage_at(self, directory: Path) -> str | None:
        """The name of this run's stage in a directory; None where that is none of its stages."""
        return next((name for name in STAGES if self.stage(name).resolve() == directory.resolve()), None)

    def next_stage(self, name: str) -> Path:
        """Where a stage is written that will take the place of a finished one."""
        return self.path / f"{name}.next"

    def newest(self) -> Path | None:
        """The newest stage, or None where there is none; not one whose parent was made anew since.

        Raises
        ------
        BesaError
            It is unfinished.
        """
        for name in reversed(STAGES):
            directory = self.whole(name)
            if (directory / MANIFEST).exists() and not self.stale(name):
                finished(directory)
                return directory
        return None

    def whole(self, name: str) -> Path:
        """Where a stage is, also after a crash in the middle of an exchange."""
        directory, beside = self.stage(name), self.next_stage(name)
        return beside if not directory.exists() and is_complete(beside) else directory

    def stale(self, name: str) -> bool:
        """Whether a stage was made from another stage of this run that is not the same any more."""
        model = read_manifest(self.whole(name)).get("model", {})
        if "stage" not in model:
            return False
        parent = self.whole(model["stage"])
        return not is_complete(parent) or read_manifest(parent)["digest"] != model["digest"]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"besa": __version__, **{name: version(name) for name in _LIBRARIES}}


def read_manifest(directory: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a stage or calibration set, or, under its own name, of an export.

    Raises
    ------
    BesaError
        There is none, or a newer version of besa wrote it.
    """
    manifest = disk.read_json(directory / name)
    found = manifest.get("format")
    if not isinstance(found, int) or found > FORMAT:
        raise BesaError(
            f"{directory / name} has format {found}, this besa {__version__} knows {FORMAT}",
            "use the besa version that wrote it, or a newer one",
        )
    return manifest


def finished(directory: Path) -> dict[str, Any]:
    """The manifest of a finished stage.

    Raises
    ------
    BesaError
        The stage is unfinished; the hint names the command that continues it.
    """
    manifest = read_manifest(directory)
    if manifest.get("status") != "complete":
        stage = Stage(directory, int(manifest.get("blocks", 0)))
        raise BesaError(
            f"{directory} is unfinished: {stage.finished()} of {stage.blocks} blocks are done",
            f"run the same 'besa {manifest.get('command', 'prune')}' again to finish it",
        )
    return manifest


class Stage:
    """One stage directory while it is written or read, a shard a block.

    A block counts as finished when its shard is there under its own name; the block's report lies beside it and is
    written first.

    Parameters
    ----------
    directory : Path
    blocks : int
        Number of blocks of the model.
    """

    def __init__(self, directory: Path, blocks: int) -> None:
        self.directory = directory
        self.blocks = blocks
        self._seen: set[int] = set()  # blocks that were written or read whole in this process

    def shard(self, index: int) -> Path:
        """The shard of block `index`; −1 is what belongs to no block."""
        return self.directory / f"model-{index + 2:05d}-of-{self.blocks + 1:05d}.safetensors"

    def finished(self) -> int:
        """How many blocks are on disk, from the first on without a gap."""
        return next((index for index in range(self.blocks) if not self.shard(index).exists()), self.blocks)

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block, by checkpoint name.

        Raises
        ------
        BesaError
            They are not those that were written.
        """
        tensors = self._checked(self.shard(index), index, "digest")
        self._seen.add(index)
        return tensors

    def read_some(self, index: int, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Those tensors of a finished block whose names are wanted, not compared with what was written."""
        return weights.read_file(self.shard(index), wanted)

    def _checked(self, path: Path, index: int, key: str) -> dict[str, Tensor]:
        """What a file holds, compared with the digest in the report of its block; older reports have none."""
        tensors = weights.read_file(path)
        written = disk.read_json(self._report(index)).get(key)
        if written not in (None, weights.digest(tensors)):
            raise BesaError(
                f"{path} is damaged: it does not hold what was written",
                "delete this file; in an unfinished stage the same command makes its block anew, else give --restart",
            )
        return tensors

    def _report(self, index: int) -> Path:
        return self.shard(index).with_suffix(".json")

    def codes(self, index: int) -> dict[str, Tensor]:
        """Codes, scales and zero points of a finished block, see `affine.tensors`; none where it is not quantized."""
        path = self._codes(index)
        return self._checked(path, index, "codes_digest") if path.exists() else {}

    def code_names(self, index: int) -> list[str]:
        """The names of the tensors that `codes` reads."""
        path = self._codes(index)
        return list(weights.header(path)) if path.exists() else []

    def _codes(self, index: int) -> Path:
        return self.directory / _CODES / self.shard(index).name

    def report(self, index: int) -> BlockReport:
        """The report of a finished block."""
        record = disk.read_json(self._report(index))
        for key in ("digest", "codes_digest"):
            record.pop(key, None)
        return BlockReport.from_record(record)

    def reports(self) -> Iterator[BlockReport]:
        """The reports of all finished blocks."""
        return (self.report(index) for index in range(self.finished()))

    def write(self, report: BlockReport, tensors: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
        """Put a block's report, codes and tensors on disk, the shard last."""
        digests = {"digest": weights.digest(tensors)} | ({"codes_digest": weights.digest(codes)} if codes else {})
        disk.write_json(self._report(report.index), {**report.record(), **digests})
        if codes:
            self._codes(report.index).parent.mkdir(exist_ok=True)
            self._save(self._codes(report.index), codes)
        self._save(self.shard(report.index), tensors)
        self._seen.add(report.index)

    def write_rest(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the tensors that belong to no block on disk."""
        if not self.shard(-1).exists():
            self._save(self.shard(-1), tensors)

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        disk.publish(path, lambda temporary: disk.save_tensors(temporary, tensors))

    def begin(self, manifest: Mapping[str, Any], source: Path) -> None:
        """Make the directory: the manifest that says whose it is, configuration and tokenizer files of the source."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise BesaError(f"cannot make {self.directory}: {reason}", "name another directory with --run") from error
        disk.write_json(self.directory / MANIFEST, {**manifest, "status": "beginning", "blocks": self.blocks})
        copy_small_files(source, self.directory)
        disk.write_json(self.directory / MANIFEST, {**manifest, "status": "running", "blocks": self.blocks})

    def finish(self) -> dict[str, Any]:
        """Write the index, then the manifest with what was reached; returns the manifest.

        Raises
        ------
        BesaError
            A block that another process wrote is not what it was.
        """
        for index in set(range(self.blocks)) - self._seen:
            self.read(index)
        table, total = {}, 0
        for index in range(-1, self.blocks):
            shard = self.shard(index)
            for name, size in weights.header(shard).items():
                table[name] = shard.name
                total += size
        index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        disk.write_json(self.directory / weights.INDEX, index_file)
        linears = [linear for report in self.reports() for linear in report.linears]
        counts: dict[str, float] = {
            "weights": sum(linear.rows * linear.cols for linear in linears),
            "pruned": sum(linear.pruned for linear in linears),
            "zeros": sum(linear.zeros for linear in linears),
            "blocks_kept_uniform": sum(report.kept_uniform for report in self.reports()),
        }
        counts["sparsity"] = counts["pruned"] / max(counts["weights"], 1)
        manifest = disk.read_json(self.directory / MANIFEST)
        manifest.pop("restart", None)
        if "quantization" in manifest:
            counts |= _grid_counts(linears, Grid(**manifest["quantization"]))
        manifest |= {"status": "complete", "counts": counts, "digest": weights.check(weights.Weights(self.directory))}
        disk.write_json(self.directory / MANIFEST, manifest)
        return manifest


def _grid_counts(linears: Sequence[LinearReport], grid: Grid) -> dict[str, float]:
    """What a grid adds to a stage's counts."""
    weights = sum(linear.rows * linear.cols for linear in linears)
    needed = sum(affine.bits_needed(each.rows, each.cols, each.rows * each.cols - each.zeros, grid) for each in linears)
    return {
        "rounded_to_zero": sum(linear.zeros - linear.pruned for linear in linears),
        "groups": sum(linear.rows * grid.groups(linear.cols) for linear in linears),
        "bits": needed,
        "bits_per_weight": needed / max(weights, 1),
    }


def replace_stage(old: Path, new: Path) -> None:
    """Let the finished stage `new` take the place of `old`; a crash in between is made good by `recover`."""
    if old.exists():
        _put_aside(old, old)
    new.rename(old)
    disk.flush_directory(old.parent)
    shutil.rmtree(_aside(old), ignore_errors=True)


def recover(old: Path, new: Path) -> None:
    """Finish an exchange or a removal of stages that a crash interrupted."""
    if (new / MANIFEST).exists() and read_manifest(new).get("status") == "complete":
        replace_stage(old, new)
    if _aside(old).exists():
        shutil.rmtree(_aside(old), ignore_errors=True)


def discard(stage: Path, final: Path) -> None:
    """Remove a stage whose final place is `final`; half removed, it is nowhere that it could be taken for a stage."""
    if stage.exists():
        _put_aside(stage, final)
        shutil.rmtree(_aside(final))


def _put_aside(stage: Path, final: Path) -> None:
    if _aside(final).exists():
        shutil.rmtree(_aside(final))
    stage.rename(_aside(final))


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def is_complete(directory: Path) -> bool:
    """Whether a finished stage is there."""
    return (directory / MANIFEST).exists() and read_manifest(directory).get("status") == "complete"


def sweep(directory: Path) -> None:
    """Remove what a killed process left of files that it had not finished."""
    for pattern in (".*.partial", f"{_CODES}/.*.partial"):
        for left in directory.glob(pattern):
            left.unlink(missing_ok=True)


def refuse_foreign(directory: Path, model: Path) -> None:
    """Refuse to write a stage over what is not a stage of besa, or over the very model that is read.

    Raises
    ------
    BesaError
        The directory holds files but no manifest, or it is the model's.
    """
    if model.resolve() == directory.resolve():
        raise BesaError(f"{directory} is both the model to prune and the place to write to", "name another --run")
    if directory.exists() and not directory.is_dir():
        raise BesaError(f"cannot make {directory}: a file is in its place", "name another directory with --run")
    if (directory / MANIFEST).exists() or not directory.exists():
        return
    strangers = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    if strangers:
        raise BesaError(
            f"{directory} was not made by besa: it holds {strangers[0]} and no {MANIFEST}",
            "move it away, or name another run directory with --run",
        )


def refuse_damaged(directory: Path, found: str) -> None:
    """Refuse a finished stage whose tensors are not those that were written.

    Parameters
    ----------
    directory : Path
        A model; what is no stage has no digest to compare with.
    found : str
        The digest of what lies there now.

    Raises
    ------
    BesaError
        The digests differ.
    """
    if not (directory / MANIFEST).exists():
        return
    written = read_manifest(directory).get("digest")
    if written not in (None, found):
        raise BesaError(
            f"{directory} is damaged or was changed since it was made: digest {written[:12]} then, {found[:12]} now",
            f"restore its files, make it anew with --restart, or name it with --model {directory} to take it as it is",
        )


def require_space(directory: Path, needed: int) -> None:
    """Refuse early what the disk cannot hold.

    Parameters
    ----------
    directory : Path
        Where it is to be written; it may not exist yet.
    needed : int
        Bytes.
    """
    free = disk.free(directory)
    if free < needed:
        raise BesaError(
            f"{directory} needs {needed / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB free",
            "free disk space, or name a directory on another disk with --run",
        )


def copy_small_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and licence files of a model; nothing that holds weights, nothing of besa's own."""
    for path in sorted(source.iterdir()):
        if path.is_file() and _is_copied(path.name):
            disk.publish(target / path.name, partial(_copy, path))


def _is_copied(name: str) -> bool:
    if (
        name in (MANIFEST, EXPORT)
        or name.startswith((".", "model-"))
        or any(name.endswith(suffix) for suffix in _WEIGHTS)
    ):
        return False
    return name.endswith(_COPIED) or name.upper().startswith("LICENSE")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
