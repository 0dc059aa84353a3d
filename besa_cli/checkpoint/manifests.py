"""The manifest of a stage or a calibration set: its kind, its options and sources, and its status."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NotRequired

from annotated_types import Ge, Gt, Le, Len
from typing_extensions import TypedDict

from besa_cli import __version__
from besa_cli.errors import BesaError
from besa_cli.system import disk, records
from besa_cli.system.disk import Json
from besa_cli.system.records import strict

FORMAT = 1
MANIFEST = disk.MANIFEST
EXPORT = "export.json"  # the manifest of an export, written last; an export is not a stage
_LIBRARIES = ("torch", "transformers", "safetensors")

MOST_BLOCKS = 10_000

Digest = Annotated[str, Len(64, 64)]  # SHA-256 in hexadecimal
Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
StageName = Literal["pruned", "tuned", "quantized"]
Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "float16", "bfloat16"]
Options = dict[str, str | int | float | bool | list[str | int] | None]


@strict
class SourceRecord(TypedDict):
    """A text or a file of token rows that calibration samples come from, or the model that wrote them.

    `chat_template` is the digest of the template that wrote out a file of conversations. `weight`, `samples` and
    `sampling` say what a source of a mixture contributes. `device` and `dtype` are those that the model wrote with.
    """

    asked: str
    source: str
    file: str
    sha256: Digest
    revision: NotRequired[str]
    documents: NotRequired[Count]
    rows: NotRequired[Count]
    padded: NotRequired[Count]
    chat_template: NotRequired[Digest]
    weight: NotRequired[str]
    samples: NotRequired[Positive]
    sampling: NotRequired[str]
    device: NotRequired[str]
    dtype: NotRequired[str]


@strict
class Origin(TypedDict):
    """The model that a stage was made from; `stage` is set if it is another stage of the run."""

    name: str
    kind: Literal["demo", "hub", "local", "gguf"]
    revision: str | None
    directory: str
    digest: Digest
    stage: NotRequired[StageName]


@strict
class Compute(TypedDict):
    """Settings of the computation that change the bytes of a stage."""

    device: Device
    dtype: Dtype
    threads: Annotated[int, Ge(1), Le(4096)]
    batch: Positive
    kernels: str
    processor: NotRequired[str]  # missing in old stages, whose reports have no seal either
    environment: NotRequired[dict[str, str]]
    dtype_reason: NotRequired[str | None]


@strict
class Quantization(TypedDict):
    """The grid of a quantized stage, see `besa_cli.ops.affine.Grid`."""

    bits: Literal[2, 3, 4, 8]
    group_size: Positive | None
    symmetric: bool


@strict
class Calibration(TypedDict):
    """The calibration tokens that a stage was made with; None and empty for methods that use none.

    `sensitivity` is the digest of the channels' sensitivity, for methods that weigh by it.
    """

    tokens_digest: Digest | None
    sources: list[SourceRecord]
    sensitivity: NotRequired[Digest]


@strict
class LeftOut(TypedDict):
    """Weights of the blocks that are left as they are and not counted: those of `tensors`, names inside a block."""

    tensors: list[str]
    weights: Count


class GridCounts(TypedDict, total=False):
    """Additional counts of a quantized stage."""

    rounded_to_zero: Count
    groups: Count
    bits: Count
    bits_per_weight: Annotated[float, Ge(0)]


@strict
class Counts(TypedDict):
    """Counts of a finished stage over the weights of the linears inside the blocks."""

    weights: Count
    pruned: Count
    zeros: Count
    blocks_kept_uniform: Count
    sparsity: Annotated[float, Ge(0), Le(1)]
    rounded_to_zero: NotRequired[Count]  # see `GridCounts`, from here on
    groups: NotRequired[Count]
    bits: NotRequired[Count]
    bits_per_weight: NotRequired[Annotated[float, Ge(0)]]
    unreached: NotRequired[Positive]  # linears of experts that no token reached, if there are some


@strict
class BlockBudgets(TypedDict):
    """The weights that each block prunes, with ``--budget model``, and the measurement that decided it.

    `pruned` and `weights` have a number for each block; `effects` has a row for each, with the effect of pruning it to
    each of the `sparsities`, in nats per token.
    """

    pruned: list[Count]
    weights: list[Count]
    sparsities: list[Annotated[float, Ge(0), Le(1)]]
    effects: list[list[float]]


@strict
class KeptExperts(TypedDict):
    """The experts that stay, with ``--experts``, and the measurement that decided it.

    `kept`, `scores` and `tokens` have a list for each block, which is empty for a block without experts: the numbers in
    the model of the experts that stay, and for all of its `experts` the score and the tokens that reached it.
    """

    experts: Positive
    kept: list[list[Count]]
    scores: list[list[Annotated[float, Ge(0)]]]
    tokens: list[list[Count]]
    removed: Count  # weights of the linears of the experts that do not stay


@strict
class HeldOut(TypedDict):
    """Result of the check on held-out samples: mean divergence per token from the dense model, in nats.

    A figure is None if logits were beyond the range of the compute dtype.
    """

    samples: Positive
    kl: float | None
    kl_uniform: float | None


@strict
class StageHistory(TypedDict):
    """An earlier stage that this one was made from."""

    stage: str
    command: str
    options: Options
    versions: dict[str, str]
    digest: NotRequired[Digest]


class _StageFields(TypedDict):
    format: int
    stage: StageName
    command: Literal["prune", "tune", "quantize"]
    options: Options
    compute: Compute
    model: Origin
    quantization: NotRequired[Quantization]
    calibration: Calibration
    versions: dict[str, str]
    history: list[StageHistory]


class GridEntry(TypedDict, total=False):
    """Entry of a manifest that describes the grid, if there is one."""

    quantization: Quantization


class NewStageManifest(_StageFields):
    """The manifest of a stage that is not begun: nothing of it is on disk."""

    status: Literal["new"]


@strict
class WholeModel(TypedDict):
    """Result of the passes in which the whole model learned: the sparsities of its rows, or its kept weights.

    `divergence` is the KL divergence to the dense model, in nats per token, on `held_out` samples that were not learned
    from: before the first pass, and after each. The stage is that after pass `kept`; 0 stands for the start. `part` is
    the part of the way from the start that is kept of that pass; absent: all of it.
    """

    held_out: Count
    divergence: list[Annotated[float, Ge(0)]]
    kept: Count
    part: NotRequired[Annotated[float, Gt(0), Le(1)]]


class AddedFields(TypedDict, total=False):
    """Fields that a job adds to the manifest of a finished stage."""

    whole_model: WholeModel
    held_out: HeldOut


@strict
class StageManifest(_StageFields):
    """`besa.json` of a stage."""

    status: Literal["beginning", "running", "complete"]
    blocks: Annotated[int, Ge(1), Le(MOST_BLOCKS)]
    files: NotRequired[list[str]]
    restart: NotRequired[bool]
    left_out: NotRequired[LeftOut]
    block_budgets: NotRequired[BlockBudgets]
    experts: NotRequired[KeptExperts]
    held_out: NotRequired[HeldOut]
    counts: NotRequired[Counts]
    digest: NotRequired[Digest]
    whole_model: NotRequired[WholeModel]


@strict
class CalibratedModel(TypedDict):
    """The model that a calibration set was made for."""

    name: str
    kind: str
    revision: str | None


class CalibrationOrigin(TypedDict):
    """Entries of a calibration set's manifest on the origin of its samples, and what they were made for."""

    sources: list[SourceRecord]
    sampling: str
    documents: NotRequired[int]
    separator: NotRequired[int | None]
    held_out_digest: NotRequired[Digest]
    command: NotRequired[str]
    model: NotRequired[CalibratedModel]


@strict
class CalibrationManifest(TypedDict):
    """`besa.json` of a calibration set."""

    format: int
    stage: Literal["calibration"]
    status: Literal["complete"]
    options: Options
    sources: list[SourceRecord]
    sampling: str
    tokenizer_digest: Digest
    tokens_digest: Digest
    held_out_digest: NotRequired[Digest]
    samples: Positive
    seqlen: Positive
    seed: Count
    versions: dict[str, str]
    documents: NotRequired[Count]
    separator: NotRequired[int | None]
    command: NotRequired[str]
    model: NotRequired[CalibratedModel]


@strict
class _Kind(TypedDict):
    """The fields common to all manifests; `format` decides how the others are read."""

    format: int
    stage: NotRequired[str]
    status: NotRequired[str]


def versions() -> dict[str, str]:
    """Return the versions of besa and of the libraries that the numbers depend on."""
    return {"besa": __version__, **{name: version(name) for name in _LIBRARIES}}


def read(directory: Path) -> StageManifest | CalibrationManifest:
    """Read the manifest of a stage or a calibration set.

    Raises
    ------
    BesaError
        The manifest is missing, of another format, or damaged (the field is named).
    """
    path = directory / MANIFEST
    text = disk.read_text(path)
    if _parse_kind(path, text).get("stage") == "calibration":
        return _parse_calibration(path, text)
    return _parse_stage(path, text)


def read_stage(directory: Path) -> StageManifest:
    """Read the manifest of a stage, finished or not; see `read`."""
    path = directory / MANIFEST
    text = disk.read_text(path)
    _parse_kind(path, text)
    return _parse_stage(path, text)


def read_calibration(directory: Path) -> CalibrationManifest:
    """Read the manifest of a calibration set; see `read`."""
    path = directory / MANIFEST
    text = disk.read_text(path)
    _parse_kind(path, text)
    return _parse_calibration(path, text)


def read_export(directory: Path) -> Json:
    """Read the manifest of an export, finished or not: only its format is checked.

    Raises
    ------
    BesaError
        The manifest is missing, of another format, or not a JSON object.
    """
    path = directory / EXPORT
    text = disk.read_text(path)
    _parse_kind(path, text)
    return disk.parse_json(text, path)


def _parse_calibration(path: Path, text: str) -> CalibrationManifest:
    return records.parse(CalibrationManifest, text, path, "make it again with: besa calibrate --restart")


def _parse_stage(path: Path, text: str) -> StageManifest:
    manifest = records.parse(StageManifest, text, path, _REMEDY)
    if "block_budgets" in manifest:
        _require_budgets(manifest["block_budgets"], manifest["blocks"], path)
    if "experts" in manifest:
        _require_experts(manifest["experts"], manifest["blocks"], path)
    if manifest["status"] == "complete":
        _require_finished(manifest, path)
    return manifest


def _require_budgets(budgets: BlockBudgets, blocks: int, path: Path) -> None:
    """Refuse budgets that are not those of so many blocks."""
    pruned, weights = budgets["pruned"], budgets["weights"]
    if (len(pruned), len(weights)) != (blocks, blocks):
        raise BesaError(f"{path} is not what besa wrote: block_budgets are not those of {blocks} blocks", _REMEDY)
    if any(count > size for count, size in zip(pruned, weights, strict=True)):
        raise BesaError(f"{path} is not what besa wrote: block_budgets prune more weights than there are", _REMEDY)


def _require_experts(experts: KeptExperts, blocks: int, path: Path) -> None:
    """Refuse experts that are not those of so many blocks, or are not in the blocks that they are kept in."""
    kept, scores, tokens = experts["kept"], experts["scores"], experts["tokens"]
    rows = list(zip(kept, scores, tokens, strict=False))
    sound = all(
        len(scored) == len(reached) == (experts["experts"] if stay else 0)
        and stay == sorted(set(stay))
        and all(number < experts["experts"] for number in stay)
        for stay, scored, reached in rows
    )
    if not len(kept) == len(scores) == len(tokens) == blocks or len({len(stay) for stay in kept if stay}) != 1:
        raise BesaError(f"{path} is not what besa wrote: experts are not those of {blocks} blocks", _REMEDY)
    if not sound:
        raise BesaError(f"{path} is not what besa wrote: experts are kept that a block does not have", _REMEDY)


_REMEDY = "restore the file, or make the stage again with --restart"


def _parse_kind(path: Path, text: str) -> _Kind:
    kind = records.parse(_Kind, text, path, _REMEDY)
    if kind["format"] != FORMAT:
        raise BesaError(
            f"{path} has format {kind['format']}, this besa {__version__} reads {FORMAT}",
            "use the besa version that wrote it, or a newer one",
        )
    return kind


def _require_finished(manifest: StageManifest, path: Path) -> None:
    """Refuse a finished stage without digest or counts, or with counts that contradict each other."""
    missing = [name for name in ("digest", "counts") if name not in manifest]
    if missing:
        raise BesaError(f"{path} is not what besa wrote: {missing[0]} is missing", _REMEDY)
    counts = manifest["counts"]
    if not counts["pruned"] <= counts["weights"] or not counts["pruned"] <= counts["zeros"] <= counts["weights"]:
        raise BesaError(
            f"{path} is not what besa wrote: {counts['pruned']} pruned and {counts['zeros']} zeros "
            f"of {counts['weights']} weights",
            _REMEDY,
        )
    if abs(counts["sparsity"] - counts["pruned"] / max(counts["weights"], 1)) > 1e-12:
        raise BesaError(
            f"{path} is not what besa wrote: counts.sparsity {counts['sparsity']} is not the share that was pruned",
            _REMEDY,
        )
    if (manifest["stage"] == "quantized") != ("quantization" in manifest):
        raise BesaError(f"{path} is not what besa wrote: stage {manifest['stage']} and its grid disagree", _REMEDY)


def describe_left_out(left: LeftOut) -> str:
    """Return one line on the weights of the blocks that are left as they are."""
    return f"not pruned, not counted: {left['weights']:,} weights of the blocks, in {', '.join(left['tensors'])}"


def describe_budgets(budgets: BlockBudgets) -> str:
    """Describe the budgets of all blocks by the lowest and the highest."""
    shares = [count / max(size, 1) for count, size in zip(budgets["pruned"], budgets["weights"], strict=True)]
    low, high = shares.index(min(shares)), shares.index(max(shares))
    return f"budget of the blocks: {100 * shares[low]:.1f} % (block {low}) to {100 * shares[high]:.1f} % (block {high})"


def describe_experts(experts: KeptExperts) -> str:
    """Describe how many experts were removed from how many blocks."""
    stay = [len(kept) for kept in experts["kept"] if kept]
    return (
        f"removed {experts['experts'] - stay[0]} of the {experts['experts']} experts in each of {len(stay)} blocks: "
        f"{experts['removed']:,} weights, which are not counted"
    )


def describe_scores(experts: KeptExperts) -> str:
    """Describe the tokens that reached the experts, and the scores of those that were removed, by their extremes."""
    tokens = [(count, block, number) for block, row in enumerate(experts["tokens"]) for number, count in enumerate(row)]
    removed = [
        score / max(row)
        for row, kept in zip(experts["scores"], experts["kept"], strict=True)
        for number, score in enumerate(row)
        if number not in kept and max(row)
    ]
    low, high = min(tokens), max(tokens)
    return (
        f"an expert was reached by {low[0]:,} (block {low[1]}, expert {low[2]}) to {high[0]:,} (block {high[1]}, "
        f"expert {high[2]}) tokens; those removed scored up to {100 * max(removed, default=0.0):.1f} % of the highest "
        "score in their block"
    )


def is_complete(directory: Path) -> bool:
    """Return True if the directory has a manifest with the status "complete"."""
    path = directory / MANIFEST
    return path.exists() and _parse_kind(path, disk.read_text(path)).get("status") == "complete"
