"""Causal attention by matrix products over chunks of the queries: on a CPU much faster than PyTorch's own kernel.

That kernel (`torch.nn.functional.scaled_dot_product_attention`) keeps no scores, for which it works on tiles too small
for fast products: of a block's pass over 512 tokens it was two fifths in bf16. Here each chunk of queries meets all
keys up to its own end in one product; no more than half of the scores are computed in vain. Those of one chunk are in
memory at a time, while something is learned up to 32 MiB of all. Scores are rounded to the dtype of computation, as in
transformers' ``eager`` attention.
"""

from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 256  # queries
KEPT = 32 << 20  # bytes of probabilities that wait for the backward pass; more are computed again


def causal(
    query: Float[Tensor, "batch heads seqlen width"],
    key: Float[Tensor, "batch groups seqlen width"],
    value: Float[Tensor, "batch groups seqlen value_width"],
    scale: float,
) -> Float[Tensor, "batch heads seqlen value_width"]:
    """softmax(scale · Q·Kᵀ + causal mask) · V, where heads / groups consecutive heads share a key and a value."""
    found: Tensor = _Causal.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return found


class _Heads:
    """Queries, keys and values as matrices, one a group of heads: what a chunk of the queries needs lies together.

    Rows of queries are ordered by token, then by head in the group.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.batch, self.count, self.seqlen, _ = query.shape
        self.groups, self.scale = key.shape[1], scale
        self.each = self.count // self.groups
        self.query, self.key, self.value = self.together(query), key.flatten(0, 1), value.flatten(0, 1)
        self.future = _future(_CHUNK, query.dtype, query.device)

    def together(self, each: Tensor) -> Tensor:
        """(batch, heads, seqlen, width) → (batch·groups, seqlen·heads in a group, width)."""
        split = each.reshape(self.batch, self.groups, self.each, self.seqlen, -1)
        return split.transpose(2, 3).reshape(self.batch * self.groups, -1, each.shape[3])

    def apart(self, rows: Tensor) -> Tensor:
        """The inverse of `together`."""
        split = rows.view(self.batch, self.groups, self.seqlen, self.each, rows.shape[2])
        return split.permute(0, 2, 1, 3, 4).reshape(self.batch, self.seqlen, self.count, -1).transpose(1, 2)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Rows of each chunk of queries, and the keys that the last of them sees."""
        for start in range(0, self.seqlen, _CHUNK):
            stop = min(start + _CHUNK, self.seqlen)
            yield slice(start * self.each, stop * self.each), slice(0, stop)

    def probabilities(self, rows: slice, seen: slice) -> Tensor:
        """Softmax of a chunk's scores: (batch·groups, rows, keys)."""
        query, key = self.query[:, rows], self.key[:, seen].transpose(1, 2)
        scores = query.new_empty(len(query), query.shape[1], seen.stop)
        scores = torch.baddbmm(scores, query, key, beta=0, alpha=self.scale)
        size = query.shape[1] // self.each
        own = scores.view(len(query), size, self.each, seen.stop)[..., -size:]
        own.add_(self.future[:size, None, :size])
        return scores.softmax(2)


class _Causal(torch.autograd.Function):
    """See `causal`; dS = P∘(dP − Σ P∘dP) with dP = dO·Vᵀ, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        heads = _Heads(query, key, value, scale)
        output = query.new_empty(*heads.query.shape[:2], value.shape[3])
        scores = sum((rows.stop - rows.start) * seen.stop for rows, seen in heads.chunks())
        fits = len(heads.query) * scores * query.itemsize <= KEPT
        waits = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        kept: list[Tensor] = []
        for rows, seen in heads.chunks():
            found = heads.probabilities(rows, seen)
            output[:, rows] = found @ heads.value[:, seen]
            if fits and waits:
                kept.append(found)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale  # type: ignore[attr-defined]
        return heads.apart(output)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        heads = _Heads(query, key, value, ctx.scale)  # type: ignore[attr-defined]
        of_output, of_query = heads.together(gradient), torch.empty_like(heads.query)
        of_key, of_value = torch.zeros_like(heads.key), torch.zeros_like(heads.value)
        for number, (rows, seen) in enumerate(heads.chunks()):
            found = kept[number] if kept else heads.probabilities(rows, seen)
            slopes = of_output[:, rows] @ heads.value[:, seen].transpose(1, 2)
            slopes = torch._softmax_backward_data(slopes, found, 2, slopes.dtype)
            of_query[:, rows] = slopes @ heads.key[:, seen]
            of_key[:, seen] += slopes.transpose(1, 2) @ heads.query[:, rows]
            of_value[:, seen] += found.transpose(1, 2) @ of_output[:, rows]
        scale = ctx.scale  # type: ignore[attr-defined]
        return heads.apart(of_query.mul_(scale)), of_key.mul_(scale).view_as(key), of_value.view_as(value), None


@cache
def _future(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """−∞ where a query of a chunk of so many would see a key after its own."""
    return torch.full((size, size), -torch.inf, dtype=dtype, device=device).triu(1)
