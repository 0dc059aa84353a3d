"""A decoder's attention by `ops.attention`, where its code leaves the choice to transformers."""

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from besa_cli.ops import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "besa_chunks"
_LARGEST = 128.0  # a bound on the scores up to which bf16 carries them; the demo model's blocks have 53 to 110
_SPECIAL = ("position_bias", "softcap", "cache")  # arguments that change what transformers computes


def in_chunks(model: "PreTrainedModel") -> bool:
    """Let the model compute causal attention with `ops.attention.causal`; says whether it does.

    It does where it would call PyTorch's scaled_dot_product_attention through transformers' common interface, and asks
    nowhere for the name of what it calls. What is not plainly causal (a mask, a bias, dropout) still goes there, and
    what would be lost when scores are rounded: fp16, and bf16 where scores may be large.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    code = sys.modules[type(model).__module__]
    common = getattr(code, "ALL_ATTENTION_FUNCTIONS", None) is ALL_ATTENTION_FUNCTIONS
    source = inspect.getsource(code)
    asks = any(f"_attn_implementation {word} " in source for word in ("==", "!=", "in", "not in"))
    if not common or asks or model.config._attn_implementation != "sdpa":
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
    """transformers' interface: (batch, heads, seqlen, width) → (batch, seqlen, heads, width)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    asked = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = attention_mask is not None or dropout or any(other.get(name) is not None for name in _SPECIAL)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    suited = asked and query.shape[2] == key.shape[2] and query.device.type == "cpu"
    if not special and suited and _carried(query, key, scale):
        return attention.causal(query, key, value, scale).transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **other
    )
    return result


def _carried(query: Tensor, key: Tensor, scale: float) -> bool:
    """Whether scores may be rounded to the dtype: by |q·k| ≤ ‖q‖·‖k‖."""
    if query.dtype != torch.bfloat16:
        return query.dtype in (torch.float32, torch.float64)
    longest = [float(torch.linalg.vector_norm(each.detach(), dim=3).max()) for each in (query, key)]
    return scale * longest[0] * longest[1] <= _LARGEST
