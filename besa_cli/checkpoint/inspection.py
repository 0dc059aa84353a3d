"""Inspection of a directory: its kind, the command that made it, and the zeros of each linear, counted."""

import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from besa_cli.checkpoint import manifests, sparse_format, weights
from besa_cli.checkpoint.exports import Manifest, refuse_changed
from besa_cli.checkpoint.manifests import EXPORT, MANIFEST, Counts
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import STAGES, Stage
from besa_cli.choices import ROUTERS
from besa_cli.errors import BesaError, reading
from besa_cli.models import headers
from besa_cli.ops import masks
from besa_cli.system import disk
from besa_cli.system.disk import Json, JsonObject

_OPPOSITES = {"--symmetric": "--asymmetric"}

Kind = Literal["run", "calibration", "stage", "export", "checkpoint"]

_IN_BLOCK = re.compile(r"(?P<list>.*?)(?:^|\.)(?P<block>\d{1,9})\.(?P<linear>.+)\.weight", re.ASCII)
_KINDS = ("weight", "bias")
_STORED_AS_IN_OUT = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")  # Conv1D: the weight is transposed


@dataclass(frozen=True, kw_only=True)
class LinearCount:
    """Counts of one linear on disk; `pruned` and `written` (zeros) are from its report, None without a report."""

    name: str
    rows: int
    cols: int
    zeros: int
    pruned: int | None
    written: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.rows * self.cols


@dataclass(frozen=True, kw_only=True)
class BlockCount:
    """Counts of one block on disk, with its report if there is one."""

    index: int
    linears: tuple[LinearCount, ...]
    report: BlockReport | None


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockMatrices:
    """The tensors of one block's linears by name: weights of shape (rows, cols), and biases if there are any."""

    index: int
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    report: BlockReport | None


def kind_of(directory: Path) -> Kind:
    """Return the kind of a directory, judged by its files.

    Raises
    ------
    BesaError
        The directory does not exist, or holds nothing that besa knows.
    """
    with reading(directory, "check the path and its permissions"):
        is_directory = directory.is_dir()
    if not is_directory:
        state = "is not a directory" if directory.exists() else "does not exist"
        raise BesaError(f"{directory} {state}", "name a run directory, a stage or a checkpoint: besa show DIR")
    if (directory / EXPORT).exists():
        return "export"
    if (directory / MANIFEST).exists():
        return "calibration" if manifests.read(directory)["stage"] == "calibration" else "stage"
    if (directory / "config.json").exists():
        return "checkpoint"
    run = Run(directory)
    parts = (run.calibration, run.evaluations, run.simulations, run.speeds, *stage_directories(run))
    if any(part.is_dir() for part in parts):
        return "run"
    raise BesaError(
        f"{directory} holds nothing that besa knows: no {MANIFEST}, no config.json, no stage",
        "name a run directory, a stage or a checkpoint: besa show DIR",
    )


def stage_directories(run: Run) -> list[Path]:
    """List the directories of a run's stages, existing or not, newest last, each before its replacement."""
    return [directory for name in STAGES for directory in (run.stage(name), run.next_stage(name))]


def exports(run: Run) -> list[Path]:
    """List the finished exports of a run."""
    return sorted(path.parent for path in run.exports.glob(f"*/{EXPORT}") if not path.parent.name.startswith("."))


def damage(export: Path, manifest: Manifest) -> str:
    """Describe the first file of an export that contradicts the manifest by name or size; empty if none does."""
    try:
        refuse_changed(export, manifest["files"], digests=False)
    except BesaError as error:
        return error.message
    return ""


def label(linear: str) -> str:
    """Merge the names of experts: return `mlp.experts.*.up_proj` for `mlp.experts.3.up_proj`."""
    return re.sub(r"\.\d+\.", ".*.", linear)


def number_of_blocks(directory: Path) -> int:
    """Return the number of blocks that `blocks` yields for a stage or a checkpoint."""
    return len(linear_names(directory))


def linear_names(directory: Path) -> dict[int, list[str]]:
    """Map each block to the names of its linears, for a stage (finished blocks) or any checkpoint; reads no tensor.

    Raises
    ------
    BesaError
        A file is missing or damaged, or there are no blocks.
    """
    if (directory / MANIFEST).exists():
        stage = _stage(directory)
        return {index: [linear.name for linear in stage.report(index).linears] for index in range(stage.finished())}
    return {index: list(names.values()) for index, names in _matrices(weights.Weights(directory)).items()}


def blocks(directory: Path) -> Iterator[BlockCount]:
    """Count the blocks of a stage (finished blocks) or of any safetensors checkpoint, reading one at a time.

    Raises
    ------
    BesaError
        A shard is missing or damaged.
    """
    for block in matrices(directory):
        reports = {linear.name: linear for linear in block.report.linears} if block.report else {}
        counts = (
            LinearCount(
                name=name,
                rows=weight.shape[0],
                cols=weight.shape[1],
                zeros=_zeros(directory, name, weight),
                pruned=reports[name].pruned if name in reports else None,
                written=reports[name].zeros if name in reports else None,
            )
            for name, weight in block.weights.items()
        )
        yield BlockCount(index=block.index, linears=tuple(counts), report=block.report)


def _zeros(directory: Path, name: str, weight: Tensor) -> int:
    try:
        return masks.count_zeros(weight)
    except (RuntimeError, NotImplementedError) as error:
        raise BesaError(
            f"{name} in {directory} has the dtype {weight.dtype}, whose zeros cannot be counted",
            "name a checkpoint whose weights are numbers",
        ) from error


def matrices(directory: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[BlockMatrices]:
    """Yield the weights and biases of the wanted linears, by their name inside the block, one block at a time.

    Raises
    ------
    BesaError
        A shard is missing or damaged.
    """
    if (directory / MANIFEST).exists():
        stage = _stage(directory)
        return (_stored_block(stage, index, wanted) for index in range(stage.finished()))
    return _plain_blocks(weights.Weights(directory), wanted)


def size(directory: Path) -> int:
    """Return the bytes of all files of a stage or a checkpoint."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def packed_size(directory: Path, counts: Counts) -> int:
    """Return the bytes of a finished quantized stage's tensors if its linears were packed into `counts["bits"]`."""
    source, stage = weights.Weights(directory), _stage(directory)
    coded = [index for index in range(stage.blocks) if stage.code_names(index)]
    places = [linear.place(index, source.names) for index in coded for linear in stage.report(index).linears]
    unpacked = {place.tensor for place in places if place is not None}
    return source.nbytes(source.names) - source.nbytes(unpacked) + -(-int(counts["bits"]) // 8)


def sparse_sizes(directory: Path) -> tuple[int, int]:
    """Return the bytes of a finished stage's linears and of all its tensors, stored as `besa export --format sparse`.

    Quantized linears count as they are; see `packed_size` for these.
    """
    source, stage = weights.Weights(directory), _stage(directory)
    dense = sparse = 0
    for report in stage.reports():
        names = stage.names(report.index)
        places = {place.tensor: linear for linear in report.linears if (place := linear.place(report.index, names))}
        for name, linear in places.items():
            size = source.nbytes([name])
            dense += size
            if len(source.shape(name)) != 2 or not name.endswith(".weight"):  # such tensors stay dense
                sparse += size
                continue
            rows, cols = source.shape(name)
            kept = rows * cols - linear.zeros
            sparse += sparse_format.encoded_bytes(rows, cols, kept, size // (rows * cols))
    return sparse, source.nbytes(source.names) - dense + sparse


def _stage(directory: Path) -> Stage:
    """Open a stage; one that its manifest calls complete must have all its shards and a matching index."""
    manifest = manifests.read_stage(directory)
    stage = Stage(directory, manifest["blocks"])
    if manifest["status"] == "complete":
        for index in range(-1, stage.blocks):
            if not stage.shard(index).exists():
                raise BesaError(
                    f"{stage.shard(index)} is missing", "restore the file, or make the stage again with --restart"
                )
        source = weights.Weights(directory)
        if set(source.shards()) != {stage.shard(index) for index in range(-1, stage.blocks)}:
            raise BesaError(
                f"{directory / headers.INDEX} does not name the shards of {stage.blocks} blocks", "restore the file"
            )
    return stage


def _stored_block(stage: Stage, index: int, wanted: Callable[[str], bool]) -> BlockMatrices:
    report = stage.report(index)
    names = stage.names(index)
    places = {linear: linear.place(index, names) for linear in report.linears if wanted(linear.name)}
    biases = {f".{index}.{linear.name}.bias": f"{linear.name}.bias" for linear in places}
    biased = {name: biases[end] for name in names for end in biases if f".{name}".endswith(end)}
    used = {place.tensor for place in places.values() if place is not None} | biased.keys()
    stored = stage.read_some(index, used.__contains__)
    tensors = {biased[name]: stored[name] for name in biased}
    for linear, place in places.items():
        matrix = None if place is None else place.of(stored)
        if matrix is None or tuple(matrix.shape) != (linear.rows, linear.cols):
            raise BesaError(
                f"{stage.shard(index)} does not hold {linear.name} ({linear.rows} x {linear.cols}) as its report says",
                "make the stage again with --restart",
            )
        tensors[f"{linear.name}.weight"] = matrix
    return _block(index, tensors, report)


def _block(index: int, tensors: Mapping[str, Tensor], report: BlockReport | None) -> BlockMatrices:
    kinds = {
        kind: {name.removesuffix(f".{kind}"): tensor for name, tensor in tensors.items() if name.endswith(f".{kind}")}
        for kind in _KINDS
    }
    return BlockMatrices(index=index, weights=kinds["weight"], biases=kinds["bias"], report=report)


def _plain_blocks(source: weights.Weights, wanted: Callable[[str], bool]) -> Iterator[BlockMatrices]:
    transposed = disk.read_json(source.directory / "config.json").get("model_type") in _STORED_AS_IN_OUT
    for index, names in _matrices(source).items():
        linears = {name: linear for name, linear in names.items() if wanted(linear)}
        inner_names = {name: f"{linear}.weight" for name, linear in linears.items()}
        biases = {name.removesuffix("weight") + "bias": f"{linear}.bias" for name, linear in linears.items()}
        inner_names |= {name: inner for name, inner in biases.items() if name in source}
        tensors = {inner_names[name]: tensor for name, tensor in source.read(list(inner_names)).items()}
        if transposed:
            tensors = {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
        yield _block(index, tensors, None)


def _matrices(source: weights.Weights) -> dict[int, dict[str, str]]:
    """Map block → tensor name → name of the linear, for the largest of the checkpoint's numbered lists of modules."""
    lists: dict[str, dict[int, dict[str, str]]] = {}
    for name in source.names:
        match = _IN_BLOCK.fullmatch(name)
        if match and match["linear"].rpartition(".")[2] not in ROUTERS:
            numbered = lists.setdefault(match["list"], {})
            numbered.setdefault(int(match["block"]), {})[name] = match["linear"]
    if not lists:
        raise BesaError(f"{source.directory} holds no blocks of weights", "name the checkpoint of a decoder")

    def size(numbered: Mapping[int, Mapping[str, str]]) -> int:
        return sum(source.nbytes(names) for names in numbered.values())

    largest = sorted(max(lists.values(), key=size).items())
    shapes = source.shapes([name for _, names in largest for name in names])
    matrices = {name for name, shape in shapes.items() if len(shape) == 2 and all(shape)}
    return {index: {name: names[name] for name in names if name in matrices} for index, names in largest}


def command_line(command: str, options: Mapping[str, object], run: Path | None = None) -> str:
    """Return the command line for a manifest's options, with ``--run`` if a run directory is given."""
    words = ["besa", command, *option_words(options)]
    if run is not None:
        words += ["--run", str(run)]
    return shlex.join(words)


def option_words(options: Mapping[str, object]) -> list[str]:
    """Return the words that give options on a command line, named as in a manifest; those that are None give none."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else _OPPOSITES.get(flag, flag.replace("--", "--no-", 1)))
        elif isinstance(value, list):
            words += [word for item in value for word in (flag, str(item))]
        else:
            words += [flag, str(value)]
    return words


def _available(value: str, replaced: Collection[str]) -> str:
    """Return a value of ``--data`` with the bundled text in place of a data set that it replaced."""
    name, colon, weight = value.rpartition(":")
    if value in replaced:
        return "bundled"
    return f"bundled{colon}{weight}" if name in replaced else value


def options_to_repeat(manifest: Json) -> JsonObject:
    """Return the options that reproduce a stage or a calibration set on any machine, with `auto` resolved."""
    options = dict(manifest.get("options", {}))
    model = manifest.get("model", {})
    options.setdefault("model", model.get("name"))
    if model.get("revision") and "@" not in str(options["model"]):
        options["model"] = f"{options['model']}@{model['revision']}"
    sources = manifest.get("calibration", {}).get("sources", manifest.get("sources", []))
    replaced = {source["asked"] for source in sources if source["source"] == "bundled"}  # c4, where it was not reached
    if "data" in options and replaced:
        options["data"] = [_available(value, replaced) for value in options["data"]]
    resolved = manifest.get("compute", {})
    for name in ("device", "dtype"):
        if name in options and name in resolved:
            options[name] = resolved[name]
    return {name: value for name, value in options.items() if value is not None}


def evaluation_files(run: Run) -> list[Path]:
    """List the files of a run's evaluation results, sorted by name."""
    return sorted(run.evaluations.glob("*.json"))


def evaluations(run: Run) -> dict[str, JsonObject]:
    """Read the evaluation results of a run, by file name."""
    return _results(run.evaluations)


def simulations(run: Run) -> dict[str, JsonObject]:
    """Read the simulations of a run, by file name."""
    return _results(run.simulations)


def speeds(run: Run) -> dict[str, JsonObject]:
    """Read the measured speeds of a run, by file name."""
    return _results(run.speeds)


def _results(directory: Path) -> dict[str, JsonObject]:
    if not directory.is_dir():
        return {}
    return {path.name: disk.read_json(path) for path in sorted(directory.glob("*.json"))}
