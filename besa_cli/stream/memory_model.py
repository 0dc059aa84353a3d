"""The one model of memory: what is held at a time while a window is compressed or a text measured, in bytes.

`besa prune --dry-run` shows what it says, and a real run refuses by it what cannot fit. `docs/scale.md` has the same in
words, beside measured points.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import UsageError
from besa_cli.ops import attention
from besa_cli.stream import windows
from besa_cli.stream.windows import Segment

_NARROW, _WIDE = 8, 4  # tensors of the hidden width, and of the widest linear, that a pass over a block holds
_KEPT = 2.5  # times as many are held for the backward pass
_MIXTURES = 7  # tensors of one number a candidate and group: logits, gradient, two moments, and three that come and go
_SCRATCH = 12  # bytes for each weight of the linear in work: scores, ranks, their order
_SHORT = 1 << 15  # columns up to which a rank takes two bytes
HEAD_TOKENS = 512  # positions whose logits exist at a time
_ROOM = 80 << 20  # the allocator's holes, buffers of the matrix products, what libraries load on first use


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What a method holds beside the block and its source. Every method says it of its options: `memory_use(options)`.

    Attributes
    ----------
    state : float
        Bytes for each weight of a window when it has decided, whatever the dtype of computation.
    learned : float, optional
        The same while it learns; None where it passes no gradients through the block.
    batch : int
        Samples in a learning step.
    ranks : bool
        Whether it holds the order of every row's weights.
    candidates : int
        Candidate sparsities of the mixtures that it learns, as many mixtures as rows at most.
    grams : bool
        Whether it holds the second-order statistics of every input.
    changes : bool
        Whether it changes weights: they are held in fp32 until they are stored.
    codes : bool
        Whether it puts weights on a grid: a byte each until they are stored.
    """

    state: float
    learned: float | None = None
    batch: int = 1
    ranks: bool = False
    candidates: int = 0
    grams: bool = False
    changes: bool = False
    codes: bool = False


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What memory depends on, of a model's largest window.

    Attributes
    ----------
    blocks : int
        Blocks that the window lies in.
    loaded : int
        Their parameters.
    weights : int
        Weights of its linears.
    largest : int
        Weights of the largest linear.
    rows, columns : tuple of int
        Of each linear.
    hidden, widest : int
        Width of the hidden states, and of the widest input or output of a linear.
    source : float
        Bytes that a parameter takes on disk.
    rest : int
        Bytes on disk of what belongs to no block.
    embedding : int
        Bytes in memory of the token embedding, held until all samples have passed it.
    vocabulary : int
    dtype : torch.dtype
        Of computation.
    streams : int
        Tensors of hidden states of all samples.
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
    """Bytes beside what the process holds already.

    Attributes
    ----------
    phases : mapping of name to bytes
        What each phase holds; no two of them hold it at the same time.
    hidden : int
        Hidden states of all samples, in memory or in files.
    beside : int
        The next block, read ahead, and the last one, still being written; given up where there is no room for them.
    """

    phases: Mapping[str, int]
    hidden: int
    beside: int = 0

    @property
    def phase(self) -> str:
        """The phase that holds most."""
        return max(self.phases, key=lambda name: self.phases[name])

    def peak(self, *, in_files: bool = False, overlapping: bool = False) -> int:
        """The most that is held at a time."""
        beside = self.beside if overlapping else 0
        return self.phases[self.phase] + _ROOM + beside + (0 if in_files else self.hidden)


def shape(decoder: Decoder, segments: Sequence[Segment]) -> Shape:
    """The sizes of the window with most weights, of a decoder whose blocks are not loaded."""
    sized = [(segment, window) for segment in segments for window in segment.windows]
    counts = list(windows.sizes(segments))
    segment, window = sized[counts.index(max(counts))]
    linears = [(int(each.out_features), int(each.in_features)) for each in window.linears.values()]
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
        widest=max(max(each) for each in linears),
        source=stored / loaded,
        rest=decoder.weights.nbytes(decoder.rest_names()),
        embedding=decoder.embedding_bytes(),
        vocabulary=int(text.vocab_size),
        dtype=decoder.dtype,
        streams=2 if len(segment.windows) == 1 else 4,
    )


def prune_demand(shape: Shape, held: MemoryUse, *, tokens: int, passing: int, learning: int = 0) -> Demand:
    """What a prune or quantize command holds.

    Parameters
    ----------
    shape : Shape
    held : MemoryUse
        By the method.
    tokens : int
        Of all calibration samples.
    passing, learning : int
        Tokens in a pass without gradients, and in a learning step.
    """
    compute = shape.dtype.itemsize
    block = round(shape.loaded * (compute + shape.source))
    state, learned = round(shape.weights * held.state), round(shape.weights * (held.learned or 0))
    stored = round(shape.weights * (shape.source + 1))  # as they will be stored, and the masks
    if held.ranks:
        ranks = sum(rows * cols * (2 if cols < _SHORT else 4) for rows, cols in _pairs(shape))
        state, learned = state + ranks, learned + ranks + _MIXTURES * 4 * held.candidates * sum(shape.rows)
    grams = 4 * sum(cols * cols for cols in _inputs(shape)) if held.grams else 0
    factors = 4 * 4 * max(shape.columns) ** 2 if held.grams else 0
    widths = _NARROW * shape.hidden + _WIDE * shape.widest
    passes = passing * widths * compute + passing * shape.widest * 4
    changed = shape.weights * (4 * held.changes + held.codes)
    phases = {
        "embeddings": max(shape.rest, block),  # one block after the other is loaded beside it, to verify the model
        "statistics": block + grams + passes,
        "deciding": block + grams + state + factors + _SCRATCH * shape.largest,
        "propagation": block + stored + changed + passes,
    }
    if held.learned is not None:
        kept = round(windows.kept(shape.blocks) * widths * _KEPT) + shape.blocks * shape.hidden
        scores = windows.kept(shape.blocks) * attention.KEPT
        phases["learning"] = block + learned + learning * kept * compute + scores + 2 * compute * shape.largest
    freed = {name: 0 if name == "embeddings" else shape.embedding for name in phases}
    phases = {name: max(needed - freed[name], 0) for name, needed in phases.items()}
    hidden = shape.streams * tokens * shape.hidden * compute
    return Demand(phases=phases, hidden=hidden, beside=round(2 * shape.loaded * shape.source))


def eval_demand(shape: Shape, *, tokens: int, passing: int, seqlen: int, head: int = 0, portions: int = 1) -> Demand:
    """What `eval ppl` holds for portions of `tokens` tokens, `passing` of them in a pass, in windows of `seqlen`.

    A head of `head` bytes that is not loaded yet is, once the first portion has passed all blocks.
    """
    compute = shape.dtype.itemsize
    widths = _NARROW * shape.hidden + _WIDE * shape.widest
    logits = min(HEAD_TOKENS, seqlen) * shape.vocabulary * (compute + 4 + 4)
    return Demand(
        phases={
            "blocks": round(shape.loaded * (compute + shape.source))
            + passing * widths * compute
            + (head if portions > 1 else 0),
            "head": head + logits,
        },
        hidden=tokens * shape.hidden * compute,
    )


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a command keeps within `--max-memory`.

    Attributes
    ----------
    batch : int
        Samples in a pass without gradients.
    in_files : bool
        Whether the hidden states lie in files.
    peak : int
        Bytes that the process will hold.
    phase : str
        Where it holds most.
    overlapping : bool
        Whether the next block is read, and the last one written, while one is computed.
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
) -> MemoryPlan:
    """The first way that fits: as it is, without overlapping, the hidden states in files, fewer samples in a pass.

    Parameters
    ----------
    limit : int, optional
        Bytes that the process is to stay within.
    resident : int
        Bytes that it holds already.
    batch : int
        Samples in a pass, the most.
    demand : function of a batch to a Demand
    fixed : bool
        The batch has to stay as it is: it decides in which order sums are taken.
    overlapping : bool
        Whether reading and writing beside the computing is worth its memory.

    Raises
    ------
    UsageError
        Nothing fits; the hint names what would.
    """
    ways = [(batch, False, True)] if overlapping else []
    ways += [(batch, False, False), (batch, True, False)]
    while batch > 1 and not fixed:
        batch = (batch + 1) // 2
        ways.append((batch, True, False))
    for samples, in_files, both in ways:
        found = demand(samples)
        peak = resident + found.peak(in_files=in_files, overlapping=both)
        if limit is None or peak <= limit:
            return MemoryPlan(batch=samples, in_files=in_files, peak=peak, phase=found.phase, overlapping=both)
    raise UsageError(
        f"--max-memory {(limit or 0) / 1e9:.1f}GB is too little: with one window of the model the process needs "
        f"about {peak / 1e9:.1f} GB",
        f"give at least {peak / 1e9 + 0.1:.1f}GB, a narrower --window or a shorter --seqlen",
    )


def _pairs(shape: Shape) -> list[tuple[int, int]]:
    return list(zip(shape.rows, shape.columns, strict=True))


def _inputs(shape: Shape) -> list[int]:
    """Columns of the inputs, those of neighbours with equally many counted once: q, k and v share theirs."""
    return [cols for number, cols in enumerate(shape.columns) if not number or cols != shape.columns[number - 1]]
