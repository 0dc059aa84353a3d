"""A decoder's attention by `ops.attention`, where its code leaves the choice to transformers."""

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from besa_cli.ops import attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "besa_chunks"
_SPECIAL = ("position_bias", "softcap", "cache")  # arguments that change what transformers computes


def in_chunks(model: "PreTrainedModel") -> bool:
    """Let the model compute causal attention with `ops.attention.causal`; says whether it does.

    It does where it would call PyTorch's scaled_dot_product_attention through transformers' common interface. What is
    not plainly causal (a mask, a bias, dropout) still goes there.
    """
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    common = getattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS", None) is ALL_ATTENTION_FUNCTIONS
    if not common or model.config._attn_implementation != "sdpa":
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
    if not special and asked and query.shape[2] == key.shape[2] and query.device.type == "cpu":
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        return attention.causal(query, key, value, scale).transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **other
    )
    return result
