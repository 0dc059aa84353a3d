"""Causal attention by matrix products over chunks of queries; on a CPU much faster than PyTorch's own kernel.

That kernel (`torch.nn.functional.scaled_dot_product_attention`) stores no scores, and so works on tiles too small for
fast products: it took two fifths of a block's pass over 512 tokens in bf16. Here each chunk of queries is multiplied
with all keys up to its own end in one product; at most half of the scores are computed needlessly. One chunk's scores
are in memory at a time, and while learning up to 32 MiB of all. Scores are rounded to the dtype of computation, as in
transformers' ``eager`` attention.
"""

from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 256  # queries
KEPT = 32 << 20  # most bytes of probabilities kept for the backward pass; beyond it, they are recomputed


def causal(
    query: Float[Tensor, "batch heads seqlen width"],
    key: Float[Tensor, "batch groups seqlen width"],
    value: Float[Tensor, "batch groups seqlen value_width"],
    scale: float,
) -> Float[Tensor, "batch heads seqlen value_width"]:
    """Compute softmax(scale · Q·Kᵀ + causal mask) · V; heads / groups consecutive heads share a key and a value."""
    output: Tensor = _Causal.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return output


class _Heads:
    """Queries, keys and values as one matrix per group of heads, so that a chunk of queries is contiguous.

    Query rows are ordered by token, then by head in the group.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.batch, self.count, self.seqlen, _ = query.shape
        self.groups, self.scale = key.shape[1], scale
        self.heads_per_group = self.count // self.groups
        self.query, self.key, self.value = self.to_groups(query), key.flatten(0, 1), value.flatten(0, 1)
        self.future = _future(_CHUNK, query.dtype, query.device)

    def to_groups(self, tensor: Tensor) -> Tensor:
        """Reshape (batch, heads, seqlen, width) to (batch·groups, seqlen·heads in a group, width)."""
        split = tensor.reshape(self.batch, self.groups, self.heads_per_group, self.seqlen, -1)
        return split.transpose(2, 3).reshape(self.batch * self.groups, -1, tensor.shape[3])

    def from_groups(self, rows: Tensor) -> Tensor:
        """Reshape back to (batch, heads, seqlen, width): the inverse of `to_groups`."""
        split = rows.view(self.batch, self.groups, self.seqlen, self.heads_per_group, rows.shape[2])
        return split.permute(0, 2, 1, 3, 4).reshape(self.batch, self.seqlen, self.count, -1).transpose(1, 2)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Yield the rows of each chunk of queries, and the keys that its last query sees."""
        for start in range(0, self.seqlen, _CHUNK):
            stop = min(start + _CHUNK, self.seqlen)
            yield slice(start * self.heads_per_group, stop * self.heads_per_group), slice(0, stop)

    def probabilities(self, rows: slice, seen: slice) -> Tensor:
        """Compute the softmax of a chunk's scores, of shape (batch·groups, rows, keys)."""
        query, key = self.query[:, rows], self.key[:, seen].transpose(1, 2)
        scores = query.new_empty(len(query), query.shape[1], seen.stop)
        scores = torch.baddbmm(scores, query, key, beta=0, alpha=self.scale)
        size = query.shape[1] // self.heads_per_group
        diagonal = scores.view(len(query), size, self.heads_per_group, seen.stop)[..., -size:]
        diagonal.add_(self.future[:size, None, :size])
        return scores.softmax(2)


class _Causal(torch.autograd.Function):
    """Autograd function of `causal`; dS = P∘(dP − Σ P∘dP) with dP = dO·Vᵀ, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        heads = _Heads(query, key, value, scale)
        output = query.new_empty(*heads.query.shape[:2], value.shape[3])
        scores = sum((rows.stop - rows.start) * seen.stop for rows, seen in heads.chunks())
        fits = len(heads.query) * scores * query.itemsize <= KEPT
        needs_gradient = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        stored: list[Tensor] = []
        for rows, seen in heads.chunks():
            probabilities = heads.probabilities(rows, seen)
            output[:, rows] = probabilities @ heads.value[:, seen]
            if fits and needs_gradient:
                stored.append(probabilities)
        ctx.save_for_backward(query, key, value, *stored)
        ctx.scale = scale  # type: ignore[attr-defined]
        return heads.from_groups(output)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *stored = ctx.saved_tensors  # type: ignore[attr-defined]
        heads = _Heads(query, key, value, ctx.scale)  # type: ignore[attr-defined]
        output_gradient, query_gradient = heads.to_groups(gradient), torch.empty_like(heads.query)
        key_gradient, value_gradient = torch.zeros_like(heads.key), torch.zeros_like(heads.value)
        for number, (rows, seen) in enumerate(heads.chunks()):
            probabilities = stored[number] if stored else heads.probabilities(rows, seen)
            slopes = output_gradient[:, rows] @ heads.value[:, seen].transpose(1, 2)
            slopes = torch._softmax_backward_data(slopes, probabilities, 2, slopes.dtype)
            query_gradient[:, rows] = slopes @ heads.key[:, seen]
            key_gradient[:, seen] += slopes.transpose(1, 2) @ heads.query[:, rows]
            value_gradient[:, seen] += probabilities.transpose(1, 2) @ output_gradient[:, rows]
        scale = ctx.scale  # type: ignore[attr-defined]
        return (
            heads.from_groups(query_gradient.mul_(scale)),
            key_gradient.mul_(scale).view_as(key),
            value_gradient.view_as(value),
            None,
        )


@cache
def _future(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a mask of shape (size, size): −∞ where a query would see a later key of its chunk, else 0."""
    return torch.full((size, size), -torch.inf, dtype=dtype, device=device).triu(1)
