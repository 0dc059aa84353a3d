"""Causal attention by matrix products over chunks of the queries: on a CPU much faster than PyTorch's own kernel.

That kernel (`torch.nn.functional.scaled_dot_product_attention`) keeps no scores, for which it works on tiles too small
for fast products: of a block's pass over 512 tokens it was two fifths in bf16. Here each chunk of queries meets all
keys up to its own end in one product; no more than half of the scores are computed in vain, and those of one chunk are
in memory at a time. Scores are rounded to the dtype of computation, as in transformers' ``eager`` attention.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK = 128  # queries
_KEPT = 32 << 20  # bytes of probabilities that wait for the backward pass; more are computed again


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
    """Keys and values as matrices, one a group of heads; and what a chunk of the queries makes of them."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        self.query, self.scale = query, scale
        self.key, self.value = key.flatten(0, 1), value.flatten(0, 1)
        self.future = torch.full((_CHUNK, _CHUNK), -torch.inf, dtype=query.dtype, device=query.device).triu(1)

    def chunks(self) -> Iterator[slice]:
        """The positions of each chunk of queries."""
        seqlen = self.query.shape[2]
        return (slice(start, min(start + _CHUNK, seqlen)) for start in range(0, seqlen, _CHUNK))

    def rows(self, each: Tensor, chunk: slice) -> Tensor:
        """A chunk of what every head has, those of a group below each other: (batch·groups, heads·chunk, width)."""
        return each[:, :, chunk].reshape(len(self.key), -1, each.shape[3])

    def probabilities(self, chunk: slice) -> Tensor:
        """Softmax of a chunk's scores over the keys up to its end: (batch·groups, heads·chunk, keys)."""
        rows, keys = self.rows(self.query, chunk), self.key[:, : chunk.stop].transpose(1, 2)
        scores = rows.new_empty(len(rows), rows.shape[1], chunk.stop)
        scores = torch.baddbmm(scores, rows, keys, beta=0, alpha=self.scale)
        size = chunk.stop - chunk.start
        scores.view(len(rows), -1, size, chunk.stop)[..., chunk].add_(self.future[:size, :size])
        return scores.softmax(2)


class _Causal(torch.autograd.Function):
    """See `causal`; dS = P∘(dP − Σ P∘dP) with dP = dO·Vᵀ, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        heads = _Heads(query, key, value, scale)
        batch, count, seqlen, _ = query.shape
        output = query.new_empty(batch, seqlen, count, value.shape[3]).transpose(1, 2)
        fits = batch * count * seqlen * seqlen // 2 * query.itemsize <= _KEPT
        waits = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        kept: list[Tensor] | None = [] if fits and waits else None
        for chunk in heads.chunks():
            found = heads.probabilities(chunk)
            output[:, :, chunk] = (found @ heads.value[:, : chunk.stop]).view_as(output[:, :, chunk])
            if kept is not None:
                kept.append(found)
        ctx.save_for_backward(query, key, value, *(kept or []))
        ctx.scale = scale  # type: ignore[attr-defined]
        return output

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        heads = _Heads(query, key, value, ctx.scale)  # type: ignore[attr-defined]
        of_query = torch.empty_like(query)
        of_key, of_value = torch.zeros_like(heads.key), torch.zeros_like(heads.value)
        for number, chunk in enumerate(heads.chunks()):
            found = kept[number] if kept else heads.probabilities(chunk)
            rows, seen = heads.rows(gradient, chunk), slice(0, chunk.stop)
            of_value[:, seen] += found.transpose(1, 2) @ rows
            slopes = rows @ heads.value[:, seen].transpose(1, 2)
            slopes = torch._softmax_backward_data(slopes, found, 2, slopes.dtype)
            of_query[:, :, chunk] = (slopes @ heads.key[:, seen]).view_as(of_query[:, :, chunk])
            of_key[:, seen] += slopes.transpose(1, 2) @ heads.rows(query, chunk)
        scale = ctx.scale  # type: ignore[attr-defined]
        return of_query.mul_(scale), of_key.mul_(scale).view_as(key), of_value.view_as(value), None
