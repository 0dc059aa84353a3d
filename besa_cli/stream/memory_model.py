"""Memory model: peak bytes held while a window is compressed or the perplexity of a text is measured.

`--dry-run` prints its estimates, and `--max-memory` is enforced with them. `docs/scale.md` explains the model and
compares it with measurements.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import UsageError
from besa_cli.ops import attention
from besa_cli.stream import windows
from besa_cli.stream.windows import Segment

_NARROW, _WIDE = 8, 4  # tensors of the hidden width, and of the widest linear, held during a pass over a block
_KEPT = 2.5  # factor by which the backward pass holds more activations
_MIXTURES = 12  # fp32 tensors with one value per candidate and row: logits, gradient, two moments, eight temporaries
_SCRATCH = 12  # bytes per weight of the linear being processed: scores, ranks, their order
_SHORT = 1 << 15  # with fewer columns a rank takes two bytes
HEAD_TOKENS = 512  # positions whose logits are computed at a time
CHECK_TOKENS = 64  # the same of the check on held-out samples, beside the hidden states of all samples
_CHECKED = 6  # hidden states of the held-out samples: three streams, and a copy that is being written
LEARNED_BYTES = 16  # of a weight that learns: the weight in fp32, two moments, and its place
_ROOM = 80 << 20  # allocator fragmentation, matrix-product buffers, lazily loaded libraries


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Extra memory of a method, beside the block and its source, as returned by `MethodOptions.memory_use`.

    Attributes
    ----------
    state : float
        Bytes per weight of the window at the end of its decision, independent of the compute dtype.
    learned : float, optional
        Bytes per weight while learning; None if no gradients pass through the block.
    batch : int
        Samples in a learning step.
    ranks : bool
        True if it holds the rank of every weight within its row.
    candidates : int
        Candidate sparsities per learned mixture; there is at most one mixture per row.
    grams : bool
        True if it holds the Gram matrix of every linear's inputs.
    changes : bool
        True if it changes weights, which are then held in fp32 until they are stored.
    codes : bool
        True if it quantizes weights: one byte each until they are stored.
    uniform : bool
        True if it also holds the uniform masks until the block is stored.
    """

    state: float
    learned: float | None = None
    batch: int = 1
    ranks: bool = False
    candidates: int = 0
    grams: bool = False
    changes: bool = False
    codes: bool = False
    uniform: bool = False


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Dimensions of a model's largest window on which memory use depends.

    Attributes
    ----------
    blocks : int
        Blocks in which the window lies.
    loaded : int
        Number of parameters of these blocks.
    weights : int
        Number of weights of the window's linears.
    largest : int
        Number of weights of the largest linear.
    rows, columns : tuple of int
        Rows and columns of each linear.
    hidden, widest : int
        Width of the hidden states, and of the widest input or output of a linear.
    source : float
        Bytes per parameter on disk.
    rest : int
        Bytes on disk of all tensors outside the blocks.
    embedding : int
        Bytes in memory of the token embedding, held until all samples are embedded.
    vocabulary : int
        Size of the vocabulary.
    dtype : torch.dtype
        Compute dtype.
    streams : int
        Number of hidden-state tensors that cover all samples.
    """

    blocks: int
    loaded: int
    weights: int
    largest: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    hidden: int
    widest: int
    source: float
    rest: int
    embedding: int
    vocabulary: int
    dtype: torch.dtype
    streams: int = 2


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Bytes required in addition to those that the process already holds.

    Attributes
    ----------
    phases : mapping of name to bytes
        Bytes of each phase; phases follow one another.
    hidden : int
        Bytes of the hidden states of all samples, in memory or in files.
    beside : int
        Bytes of the prefetched next block and of the previous block that is still being written. Both are given up if
        memory is short.
    """

    phases: Mapping[str, int]
    hidden: int
    beside: int = 0

    @property
    def phase(self) -> str:
        """Phase with the highest demand."""
        return max(self.phases, key=lambda name: self.phases[name])

    def peak(self, *, in_files: bool = False, overlapping: bool = False) -> int:
        """Return the peak in bytes; `overlapping` adds prefetching and background writing."""
        beside = self.beside if overlapping else 0
        return self.phases[self.phase] + _ROOM + beside + (0 if in_files else self.hidden)


def larger(first: Demand, second: Demand) -> Demand:
    """Return the demand of two parts of a command that follow one another."""
    return Demand(
        phases={**first.phases, **second.phases},
        hidden=max(first.hidden, second.hidden),
        beside=max(first.beside, second.beside),
    )


def shape(decoder: Decoder, segments: Sequence[Segment]) -> Shape:
    """Return the dimensions of the window with the most weights, of a decoder whose blocks need not be loaded."""
    sized = [(segment, window) for segment in segments for window in segment.windows]
    counts = list(windows.sizes(segments))
    segment, window = sized[counts.index(max(counts))]
    linears = [(int(linear.out_features), int(linear.in_features)) for linear in window.linears.values()]
    loaded = sum(parameter.numel() for index in segment.blocks for parameter in decoder.blocks[index].parameters())
    stored = sum(decoder.weights.nbytes(decoder.stored_names(index)) for index in segment.blocks)
    text = decoder.config.get_text_config()
    return Shape(
        blocks=len(segment.blocks),
        loaded=loaded,
        weights=max(counts),
        largest=max(rows * cols for rows, cols in linears),
        rows=tuple(rows for rows, _ in linears),
        columns=tuple(cols for _, cols in linears),
        hidden=int(text.hidden_size),
        widest=max(max(rows, cols) for rows, cols in linears),
        source=stored / loaded,
        rest=decoder.weights.nbytes(decoder.rest_names()),
        embedding=decoder.embedding_bytes(),
        vocabulary=int(text.vocab_size),
        dtype=decoder.dtype,
        streams=2 if len(segment.windows) == 1 else 4,
    )


def prune_demand(
    shape: Shape, use: MemoryUse, *, tokens: int, passing: int, learning: int = 0, held_out: int = 0, head: int = 0
) -> Demand:
    """Return the memory demand of a prune or quantize command.

    Parameters
    ----------
    shape : Shape
    use : MemoryUse
        Extra memory of the method.
    tokens : int
        Tokens of all calibration samples.
    passing, learning : int
        Tokens in a pass without gradients, and in a learning step.
    held_out : int
        Tokens of the samples on which the result is checked.
    head : int
        Bytes of the head, which only that check loads.
    """
    compute = shape.dtype.itemsize
    block = round(shape.loaded * (compute + shape.source))
    state, learned = round(shape.weights * use.state), round(shape.weights * (use.learned or 0))
    stored = round(shape.weights * (shape.source + 1))  # weights in the stored dtype, and boolean masks
    if use.ranks:
        ranks = sum(rows * cols * (2 if cols < _SHORT else 4) for rows, cols in _pairs(shape))
        state, learned = state + ranks, learned + ranks + _MIXTURES * 4 * use.candidates * sum(shape.rows)
    grams = 4 * sum(cols * cols for cols in _inputs(shape)) if use.grams else 0
    factors = 4 * 4 * max(shape.columns) ** 2 if use.grams else 0
    widths = _NARROW * shape.hidden + _WIDE * shape.widest
    passes = passing * widths * compute + passing * shape.widest * 4
    changed = shape.weights * (4 * use.changes + use.codes + use.uniform)
    phases = {
        "embeddings": max(shape.rest, block),  # blocks are loaded one by one beside the embedding, to verify the model
        "statistics": block + grams + passes,
        "deciding": block + grams + state + factors + _SCRATCH * shape.largest,
        "propagation": block + stored + changed + passes,
    }
    if use.learned is not None:
        kept = round(windows.kept_blocks(shape.blocks) * widths * _KEPT) + shape.blocks * shape.hidden
        scores = windows.kept_blocks(shape.blocks) * attention.KEPT
        gradients = compute * (shape.weights + shape.largest)  # autograd turns to them when it is through the block
        phases["learning"] = block + learned + learning * kept * compute + scores + gradients
    if held_out:
        phases["propagation"] += round(shape.weights * shape.source)  # the block's weights under the uniform masks
        phases["check"] = head + CHECK_TOKENS * shape.vocabulary * 3 * compute
    freed = {name: 0 if name in ("embeddings", "check") else shape.embedding for name in phases}
    streams = _CHECKED * held_out * shape.hidden * compute
    phases = {name: max(needed - freed[name], 0) + streams for name, needed in phases.items()}
    hidden = shape.streams * tokens * shape.hidden * compute
    return Demand(phases=phases, hidden=hidden, beside=round(2 * shape.loaded * shape.source))


def effects_demand(shape: Shape, *, blocks: int, tokens: int, passing: int, seqlen: int, head: int) -> Demand:
    """Return the memory demand of measuring the effect of every block, see `besa_cli.stream.effects`.

    Parameters
    ----------
    shape : Shape
    blocks : int
        Blocks of the model, the inputs of all of which are kept.
    tokens, passing : int
        Tokens of the measured samples, and in a pass without gradients.
    seqlen : int
        Tokens of one sample, which pass with gradients.
    head : int
        Bytes of the head if it is not loaded yet.
    """
    compute = shape.dtype.itemsize
    block = round(shape.loaded * (compute + shape.source))
    widths = _NARROW * shape.hidden + _WIDE * shape.widest
    ranks = sum(rows * cols * (2 if cols < _SHORT else 4) for rows, cols in _pairs(shape))
    pruning = ranks + shape.weights * compute + _SCRATCH * shape.largest + passing * widths * compute
    learning = round(seqlen * widths * _KEPT * compute) + attention.KEPT
    phases = {
        "budget": max(block + max(pruning, learning) - shape.embedding, 0),
        "head": head + min(HEAD_TOKENS, seqlen) * shape.vocabulary * 3 * compute,
    }
    return Demand(phases=phases, hidden=(blocks + 3) * tokens * shape.hidden * compute)


def experts_demand(shape: Shape, *, tokens: int, passing: int) -> Demand:
    """Return the memory demand of measuring the scores of whole experts, see `besa_cli.stream.expert_scores`.

    Parameters
    ----------
    shape : Shape
        Of the largest block of the whole model.
    tokens, passing : int
        Tokens of all samples, and in a pass.
    """
    compute = shape.dtype.itemsize
    block = round(shape.loaded * (compute + shape.source))
    widths = _NARROW * shape.hidden + _WIDE * shape.widest
    return Demand(
        phases={"experts": max(shape.rest, block + passing * widths * compute)},
        hidden=tokens * shape.hidden * compute,
    )


def global_demand(shape: Shape, blocks: int, *, tokens: int, passing: int, seqlen: int, resident: bool) -> Demand:
    """Return the memory demand of the passes in which the whole model learns its rates.

    Parameters
    ----------
    shape : Shape
        Of the window with the most weights.
    blocks : int
        Blocks of the model.
    tokens : int
        Tokens of all calibration samples.
    passing : int
        Tokens in a pass without gradients.
    seqlen : int
        Tokens of a sample, and so of a learning step.
    resident : bool
        All blocks stay loaded.
    """
    compute = shape.dtype.itemsize
    loaded, weights = shape.loaded // shape.blocks, shape.weights // shape.blocks
    widths = _NARROW * shape.hidden + _WIDE * shape.widest
    block = round(loaded * (compute + shape.source)) + 2 * weights * compute  # masked weights and their gradient
    learning = round(seqlen * widths * _KEPT) * compute + attention.KEPT + 2 * blocks * seqlen * shape.hidden * compute
    logits = min(HEAD_TOKENS, seqlen) * shape.vocabulary * 4 * compute
    rows = 8 * 4 * blocks * sum(shape.rows)  # logits, moments, gradient and counts of every row
    kept = loaded * compute * (blocks - 1) if resident else 0
    wide = max(cols for cols in shape.columns) >= _SHORT
    return Demand(
        phases={
            "whole model": kept + shape.rest + rows + max(block + learning, logits, block + passing * widths * compute)
        },
        hidden=(tokens + 2 * seqlen) * shape.hidden * compute + weights * blocks * (4 if wide else 2),
    )


def tune_demand(
    shape: Shape, blocks: int, *, kept: int, tokens: int, passing: int, seqlen: int, resident: bool
) -> Demand:
    """Return the memory demand of learning the kept weights of the whole model, see `besa_cli.stream.tuning`.

    Parameters
    ----------
    shape : Shape
        Of the largest block.
    blocks : int
        Blocks of the model.
    kept : int
        Kept weights of all linears.
    tokens, passing, seqlen : int
        Tokens of all samples, in a pass without gradients, and of one sample, which is a learning step.
    resident : bool
        All blocks stay loaded.
    """
    compute = shape.dtype.itemsize
    widths = _NARROW * shape.hidden + _WIDE * shape.widest
    block = round(shape.loaded * (compute + shape.source)) + shape.weights * compute  # and the gradient
    own = min(shape.weights, kept) * LEARNED_BYTES + _SCRATCH * shape.largest
    learning = round(seqlen * widths * _KEPT) * compute + attention.KEPT + 2 * blocks * seqlen * shape.hidden * compute
    logits = min(HEAD_TOKENS, seqlen) * shape.vocabulary * 4 * compute
    loaded = shape.loaded * compute * (blocks - 1) if resident else 0
    work = max(block + own + learning, logits, block + passing * widths * compute)
    return Demand(
        phases={"tuning": loaded + shape.rest + work},
        hidden=(tokens + 2 * seqlen) * shape.hidden * compute + kept * LEARNED_BYTES,
    )


def with_sensitivity(demand: Demand, shape: Shape, *, blocks: int, tokens: int, seqlen: int, head: int) -> Demand:
    """Return the demand of a command that measures the sensitivity of the channels first, sample by sample.

    Parameters
    ----------
    demand : Demand
        Memory demand of the rest.
    shape : Shape
    blocks : int
        Blocks of the model.
    tokens, seqlen : int
        Tokens of all samples that are measured, and of one.
    head : int
        Bytes of the head, which is not loaded yet.
    """
    compute, count = shape.dtype.itemsize, max(shape.blocks, 1)
    block = round(shape.loaded * (compute + shape.source) / count)
    kept = round((_NARROW * shape.hidden + _WIDE * shape.widest) * _KEPT) * compute
    logits = min(HEAD_TOKENS, seqlen) * shape.vocabulary * 3 * compute
    measuring = max(block + seqlen * kept + attention.KEPT, head + logits)
    hidden = (blocks + 3) * tokens * shape.hidden * compute  # inputs of all blocks, last outputs, gradient and its copy
    return replace(demand, phases={**demand.phases, "sensitivity": measuring}, hidden=max(demand.hidden, hidden))


def eval_demand(
    shape: Shape,
    *,
    tokens: int,
    passing: int,
    seqlen: int,
    head: int = 0,
    portions: int = 1,
    compared: bool = False,
) -> Demand:
    """Return the memory demand of `eval ppl`.

    Parameters
    ----------
    shape : Shape
    tokens, passing : int
        Tokens in a portion, and in one pass.
    seqlen : int
        Tokens in a window of the text.
    head : int
        Bytes of the heads that are not loaded yet; they are loaded after the first portion has passed all blocks.
    portions : int
        Number of portions.
    compared : bool
        True if every portion passes through two models whose predictions are compared.
    """
    compute = shape.dtype.itemsize
    widths = _NARROW * shape.hidden + _WIDE * shape.widest
    logits = min(HEAD_TOKENS, seqlen) * shape.vocabulary * (compute + 4 + 4 + (4 if compared else 0))
    return Demand(
        phases={
            "blocks": round(shape.loaded * (compute + shape.source))
            + passing * widths * compute
            + (head if portions > 1 else 0),
            "head": head + logits,
        },
        hidden=(2 if compared else 1) * tokens * shape.hidden * compute,
    )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Settings with which a command stays within `--max-memory`.

    Attributes
    ----------
    batch : int
        Samples in a pass without gradients.
    in_files : bool
        True if the hidden states are kept in files.
    peak : int
        Estimated peak bytes of the process.
    phase : str
        Phase in which the peak occurs.
    overlapping : bool
        True if the next block is read, and the previous one written, while a block is computed.
    """

    batch: int
    in_files: bool
    peak: int
    phase: str
    overlapping: bool = False


def plan(
    limit: int | None,
    resident: int,
    batch: int,
    demand: Callable[[int], Demand],
    *,
    fixed: bool = False,
    overlapping: bool = False,
    windows: bool = False,
) -> MemoryPlan:
    """Choose the first settings that fit: unchanged, without overlapping, hidden states in files, smaller batches.

    Parameters
    ----------
    limit : int, optional
        Maximum bytes of the process.
    resident : int
        Bytes that the process already holds.
    batch : int
        Maximum samples in a pass.
    demand : function of a batch size returning a Demand
    fixed : bool
        True if the batch must not change, because it determines the order of summation.
    overlapping : bool
        True if prefetching and background writing are worth their memory.
    windows : bool
        True if the command has ``--window``, which the hint then names.

    Raises
    ------
    UsageError
        No settings fit; the hint names the memory required.
    """
    candidates = [(batch, False, True)] if overlapping else []
    candidates += [(batch, False, False), (batch, True, False)]
    while batch > 1 and not fixed:
        batch = (batch + 1) // 2
        candidates.append((batch, True, False))
    for samples, in_files, overlap in candidates:
        needed = demand(samples)
        peak = resident + needed.peak(in_files=in_files, overlapping=overlap)
        if limit is None or peak <= limit:
            return MemoryPlan(batch=samples, in_files=in_files, peak=peak, phase=needed.phase, overlapping=overlap)
    smaller = "a narrower --window or a shorter --seqlen" if windows else "or a shorter --seqlen"
    raise UsageError(
        f"--max-memory {(limit or 0) / 1e9:.1f}GB is too little: with one window of the model the process needs "
        f"about {peak / 1e9:.1f} GB",
        f"give at least {peak / 1e9 + 0.1:.1f}GB, {smaller}",
    )


def _pairs(shape: Shape) -> list[tuple[int, int]]:
    return list(zip(shape.rows, shape.columns, strict=True))


def _inputs(shape: Shape) -> list[int]:
    """Return the width of each distinct input; consecutive linears of equal width (q, k and v) share one input."""
    return [cols for number, cols in enumerate(shape.columns) if not number or cols != shape.columns[number - 1]]
