"""Chunked causal attention (`ops.attention`) in decoders whose code lets transformers choose the implementation."""

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from besa_cli.ops import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "besa_chunks"
_LARGEST = 128.0  # largest bound on the scores at which bf16 is precise enough; the demo model's blocks have 53 to 110
_SPECIAL = ("position_bias", "softcap", "cache")  # arguments that change the result


def use_chunked_attention(model: "PreTrainedModel") -> bool:
    """Make the model compute causal attention with `ops.attention.causal` if it can; return True if it does.

    It can if it calls PyTorch's scaled_dot_product_attention through transformers' common interface and its code never
    compares the name of the implementation. Calls that are not plainly causal (a mask, a bias, dropout) still use
    PyTorch's, and so do calls that would lose precision when scores are rounded: fp16, and bf16 with large scores.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    code = sys.modules[type(model).__module__]
    common = getattr(code, "ALL_ATTENTION_FUNCTIONS", None) is ALL_ATTENTION_FUNCTIONS
    source = inspect.getsource(code)
    compares_name = any(f"_attn_implementation {word} " in source for word in ("==", "!=", "in", "not in"))
    if not common or compares_name or model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    return bool(model.config._attn_implementation == _NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Compute attention by transformers' interface: (batch, heads, seqlen, width) → (batch, seqlen, heads, width)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = attention_mask is not None or dropout or any(other.get(name) is not None for name in _SPECIAL)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    suitable = causal and query.shape[2] == key.shape[2] and query.device.type == "cpu"
    if not special and suitable and _is_precise(query, key, scale):
        return attention.causal(query, key, value, scale).transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **other
    )
    return result


def _is_precise(query: Tensor, key: Tensor, scale: float) -> bool:
    """Check that scores can be rounded to the dtype of the queries, bounding them by |q·k| ≤ ‖q‖·‖k‖."""
    if query.dtype != torch.bfloat16:
        return query.dtype in (torch.float32, torch.float64)
    longest_query, longest_key = (
        float(torch.linalg.vector_norm(vectors.detach(), dim=3).max()) for vectors in (query, key)
    )
    return scale * longest_query * longest_key <= _LARGEST
