"""What the model of memory says of larger models than were measured: the table of `docs/scale.md`.

    python -m benchmarks.speed.larger_models

Nothing runs: sizes go into `besa_cli.stream.memory_model.compressing`. The 180B is Falcon's (arXiv 2311.16867): q, k
and v are one linear, and there is no gate.
"""

from dataclasses import dataclass

import torch

from benchmarks.shared.random_checkpoint import SHAPES
from besa_cli.jobs import prune
from besa_cli.stream import memory_model

SAMPLES, SEQLEN, PASSING = 128, 2048, 4096
LIBRARIES = 0.5e9  # bytes that the imports hold
SOURCE = 2  # bytes of a stored number
CASES = (
    ("besa", torch.float32),
    ("besa", torch.bfloat16),
    ("wanda", torch.float32),
    ("sparsegpt", torch.float32),
    ("sparsegpt", torch.bfloat16),
)


@dataclass(frozen=True)
class Sizes:
    """Of a model: rows and columns of a block's linears, and what lies outside the blocks."""

    hidden: int
    vocabulary: int
    linears: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> int:
        """Of the linears of one block."""
        return sum(rows * cols for rows, cols in self.linears)


def llama(name: str) -> Sizes:
    """A LLaMA-2 model."""
    shape = SHAPES[name]
    return Sizes(shape.hidden, shape.vocabulary, tuple(shape.linears().values()))


MODELS = {
    "7B": llama("7b"),
    "13B": llama("13b"),
    "70B": llama("70b"),
    "180B": Sizes(14_848, 65_024, ((15_872, 14_848), (14_848, 14_848), (59_392, 14_848), (14_848, 59_392))),
}


def peak(sizes: Sizes, method: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes in memory, and those of the hidden states in files."""
    embedding = sizes.vocabulary * sizes.hidden
    shape = memory_model.Shape(
        blocks=1,
        loaded=sizes.weights,
        weights=sizes.weights,
        largest=max(rows * cols for rows, cols in sizes.linears),
        rows=tuple(rows for rows, _ in sizes.linears),
        columns=tuple(cols for _, cols in sizes.linears),
        hidden=sizes.hidden,
        widest=max(max(each) for each in sizes.linears),
        source=SOURCE,
        rest=2 * embedding * SOURCE,
        embedding=embedding * dtype.itemsize,
        vocabulary=sizes.vocabulary,
        dtype=dtype,
    )
    held = prune.request(method=method, options={}).method.options.memory_use()
    demand = memory_model.prune_demand(shape, held, tokens=SAMPLES * SEQLEN, passing=PASSING, learning=SEQLEN)
    return LIBRARIES + shape.embedding + demand.peak(in_files=True), demand.hidden


def table() -> str:
    """In Markdown, GB."""
    names = [f"{method}, {'fp32' if dtype == torch.float32 else 'bf16'}" for method, dtype in CASES]
    lines = [f"| shape | weights of a block | {' | '.join(names)} | hidden states, fp32 / bf16 |"]
    lines.append("|---" * (len(CASES) + 3) + "|")
    for name, sizes in MODELS.items():
        found = [peak(sizes, method, dtype) for method, dtype in CASES]
        held = " | ".join(f"{bytes_held / 1e9:.1f}" for bytes_held, _ in found)
        lines.append(
            f"| {name} | {sizes.weights / 1e6:,.0f} M | {held} | {found[0][1] / 1e9:.1f} / {found[1][1] / 1e9:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
