"""What a directory is, what made it, and how sparse each linear is, counted in the tensors themselves."""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from besa_cli.checkpoint import manifests, weights
from besa_cli.checkpoint.exports import refuse_changed
from besa_cli.checkpoint.manifests import EXPORT, MANIFEST
from besa_cli.checkpoint.reports import BlockReport
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import STAGES, Stage
from besa_cli.errors import BesaError, reading
from besa_cli.models import headers
from besa_cli.ops import masks
from besa_cli.system import disk

_OPPOSITES = {"--symmetric": "--asymmetric"}

Kind = Literal["run", "calibration", "stage", "export", "checkpoint"]

_IN_BLOCK = re.compile(r"(?P<list>.*?)(?:^|\.)(?P<block>\d{1,9})\.(?P<linear>.+)\.weight", re.ASCII)
_ROUTERS = ("router", "gate")  # they decide between experts and are never pruned
_KINDS = ("weight", "bias")
_STORED_AS_IN_OUT = ("gpt2", "imagegpt", "openai-gpt", "decision_transformer")  # Conv1D: the weight is transposed


@dataclass(frozen=True, kw_only=True)
class LinearCount:
    """One linear as it is on the disk; `pruned` and `written` zeros by its report, None where there is no report."""

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
    """One block as it is on the disk, and its report where there is one."""

    index: int
    linears: tuple[LinearCount, ...]
    report: BlockReport | None


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockMatrices:
    """The tensors of one block's linears, by linear: weights of shape (rows, cols), and biases where there are any."""

    index: int
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    report: BlockReport | None


def kind_of(directory: Path) -> Kind:
    """What a directory is, from what lies in it.

    Raises
    ------
    BesaError
        It does not exist, or holds nothing that besa knows.
    """
    with reading(directory, "check the path and who may read it"):
        there = directory.is_dir()
    if not there:
        state = "is not a directory" if directory.exists() else "does not exist"
        raise BesaError(f"{directory} {state}", "name a run directory, a stage or a checkpoint: besa show DIR")
    if (directory / EXPORT).exists():
        return "export"
    if (directory / MANIFEST).exists():
        return "calibration" if manifests.read(directory).get("stage") == "calibration" else "stage"
    if (directory / "config.json").exists():
        return "checkpoint"
    run = Run(directory)
    parts = (run.calibration, run.evaluations, run.simulations, *stage_directories(run))
    if any(part.is_dir() for part in parts):
        return "run"
    raise BesaError(
        f"{directory} holds nothing that besa knows: no {MANIFEST}, no config.json, no stage",
        "name a run directory, a stage or a checkpoint: besa show DIR",
    )


def stage_directories(run: Run) -> list[Path]:
    """Where a run's stages are, whether there or not: the newest last, each before the one that will replace it."""
    return [directory for name in STAGES for directory in (run.stage(name), run.next_stage(name))]


def exports(run: Run) -> list[Path]:
    """The finished exports of a run."""
    return sorted(path.parent for path in run.exports.glob(f"*/{EXPORT}") if not path.parent.name.startswith("."))


def damage(export: Path, manifest: Mapping[str, Any]) -> str:
    """The first file of an export that is not as its manifest says, by names and sizes alone; empty where all are."""
    try:
        refuse_changed(export, manifest["files"], digests=False)
    except BesaError as error:
        return error.message
    return ""


def number_of_blocks(directory: Path) -> int:
    """How many blocks `blocks` will give for a stage or a checkpoint."""
    return len(linear_names(directory))


def linear_names(directory: Path) -> dict[int, list[str]]:
    """Block → the names of its linears, of a stage (as far as it is finished) or of any checkpoint; no tensor is read.

    Raises
    ------
    BesaError
        A file is missing or damaged, or there are no blocks.
    """
    if (directory / MANIFEST).exists():
        stage = _stage(directory)
        return {index: [each.name for each in stage.report(index).linears] for index in range(stage.finished())}
    return {index: list(names.values()) for index, names in _matrices(weights.Weights(directory)).items()}


def blocks(directory: Path) -> Iterator[BlockCount]:
    """The blocks of a stage (as far as it is finished) or of any checkpoint in safetensors, read one at a time.

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
            f"{name} in {directory} has the dtype {weight.dtype}, of which zeros cannot be counted",
            "name a checkpoint whose weights are numbers",
        ) from error


def matrices(directory: Path, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[BlockMatrices]:
    """The weights and biases of the wanted linears, by their name inside the block, one block at a time.

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
    """Bytes of all files of a stage or a checkpoint."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def packed_size(directory: Path, counts: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a finished quantized stage if its linears were stored in the bits that they need."""
    source, stage = weights.Weights(directory), _stage(directory)
    codes = [name for index in range(stage.blocks) for name in stage.code_names(index) if name.endswith(".codes")]
    wide = source.nbytes(f"{name.removesuffix('.codes')}.weight" for name in codes)
    return source.nbytes(source.names) - wide + -(-int(counts["bits"]) // 8)


def _stage(directory: Path) -> Stage:
    """A stage as far as it is finished; by its own word finished it has to be whole, as far as names and sizes say."""
    manifest = manifests.read(directory)
    stage = Stage(directory, int(manifest["blocks"]))
    if manifest["status"] == "complete":
        for index in range(-1, stage.blocks):
            if not stage.shard(index).exists():
                raise BesaError(f"{stage.shard(index)} is missing", "make the stage anew with --restart, or restore it")
        whole = weights.Weights(directory)
        if set(whole.shards()) != {stage.shard(index) for index in range(-1, stage.blocks)}:
            raise BesaError(
                f"{directory / headers.INDEX} does not name the shards of {stage.blocks} blocks", "restore the file"
            )
    return stage


def _stored_block(stage: Stage, index: int, wanted: Callable[[str], bool]) -> BlockMatrices:
    report = stage.report(index)
    linears = {linear.name: linear for linear in report.linears if wanted(linear.name)}
    places = {f"{name}.{kind}" for name in linears for kind in _KINDS}

    def place(name: str) -> str | None:
        """The tensor's name inside the block, if it is one of those wanted."""
        words = f".{name}".split(f".{index}.")
        ends = (f".{index}.".join(words[start:]) for start in range(1, len(words)))
        return next((end for end in ends if end in places), None)

    stored = stage.read_some(index, lambda name: place(name) is not None)
    found = {str(place(name)): tensor for name, tensor in stored.items()}
    for name, linear in linears.items():
        tensor = found.get(f"{name}.weight")
        if tensor is None or tuple(tensor.shape) != (linear.rows, linear.cols):
            raise BesaError(
                f"{stage.shard(index)} does not hold {name} ({linear.rows} x {linear.cols}) as its report says",
                "make the stage anew with --restart",
            )
    tensors = {
        f"{name}.{kind}": found[f"{name}.{kind}"] for name in linears for kind in _KINDS if f"{name}.{kind}" in found
    }
    return _block(index, tensors, report)


def _block(index: int, tensors: Mapping[str, Tensor], report: BlockReport | None) -> BlockMatrices:
    kinds = {
        kind: {name.removesuffix(f".{kind}"): tensor for name, tensor in tensors.items() if name.endswith(f".{kind}")}
        for kind in _KINDS
    }
    return BlockMatrices(index=index, weights=kinds["weight"], biases=kinds["bias"], report=report)


def _plain_blocks(source: weights.Weights, wanted: Callable[[str], bool]) -> Iterator[BlockMatrices]:
    turned = disk.read_json(source.directory / "config.json").get("model_type") in _STORED_AS_IN_OUT
    for index, names in _matrices(source).items():
        asked = {name: linear for name, linear in names.items() if wanted(linear)}
        places = {name: f"{linear}.weight" for name, linear in asked.items()}
        biases = {name.removesuffix("weight") + "bias": f"{linear}.bias" for name, linear in asked.items()}
        places |= {name: place for name, place in biases.items() if name in source}
        tensors = {places[name]: tensor for name, tensor in source.read(list(places)).items()}
        if turned:
            tensors = {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
        yield _block(index, tensors, None)


def _matrices(source: weights.Weights) -> dict[int, dict[str, str]]:
    """Block → tensor name → linear's name, for the largest of the checkpoint's numbered lists of modules."""
    lists: dict[str, dict[int, dict[str, str]]] = {}
    for name in source.names:
        match = _IN_BLOCK.fullmatch(name)
        if match and match["linear"].rpartition(".")[2] not in _ROUTERS:
            numbered = lists.setdefault(match["list"], {})
            numbered.setdefault(int(match["block"]), {})[name] = match["linear"]
    if not lists:
        raise BesaError(f"{source.directory} holds no blocks of weights", "name the checkpoint of a decoder")

    def size(numbered: Mapping[int, Mapping[str, str]]) -> int:
        return sum(source.nbytes(names) for names in numbered.values())

    found = sorted(max(lists.values(), key=size).items())
    shapes = source.shapes([name for _, names in found for name in names])
    matrices = {name for name, shape in shapes.items() if len(shape) == 2 and all(shape)}
    return {index: {name: names[name] for name in names if name in matrices} for index, names in found}


def command_line(command: str, options: Mapping[str, Any], run: Path | None = None) -> str:
    """The command that a manifest's options were typed as, in full; with the run directory, if given."""
    words = ["besa", command]
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
    if run is not None:
        words += ["--run", str(run)]
    return shlex.join(words)


def _data(source: Mapping[str, Any]) -> str:
    return "bundled" if source["source"] == "bundled" else str(source["asked"])


def options_to_repeat(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make a stage or a calibration set again on any machine, `auto` replaced by what it stood for."""
    options = dict(manifest.get("options", {}))
    model = manifest.get("model", {})
    options.setdefault("model", model.get("name"))
    if model.get("revision") and "@" not in str(options["model"]):
        options["model"] = f"{options['model']}@{model['revision']}"
    sources = manifest.get("calibration", {}).get("sources", manifest.get("sources", []))
    if "data" in options and any(source["source"] == "bundled" for source in sources):  # it may stand in for another
        options["data"] = list(dict.fromkeys(_data(source) for source in sources))
    resolved = manifest.get("compute", {})
    for name in ("device", "dtype"):
        if name in options and name in resolved:
            options[name] = resolved[name]
    return {name: value for name, value in options.items() if value is not None}


def evaluation_files(run: Run) -> list[Path]:
    """The files of a run's results, by name."""
    return sorted(run.evaluations.glob("*.json"))


def evaluations(run: Run) -> dict[str, Any]:
    """The results of a run by file name."""
    return _results(run.evaluations)


def simulations(run: Run) -> dict[str, Any]:
    """The simulations of a run by file name."""
    return _results(run.simulations)


def _results(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        return {}
    return {path.name: disk.read_json(path) for path in sorted(directory.glob("*.json"))}
