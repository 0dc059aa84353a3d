"""Refusal of a model by its config.json alone, before anything is fetched, drawn or read."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from besa_cli.decoder import architecture, experts
from besa_cli.errors import BesaError
from besa_cli.models.config_json import SUITED

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LOOKED_UP = "its blocks are given something for every token beside the hidden states"
_SHARED = "its blocks share weights with one another"
_STREAMS = "its blocks pass on several streams of hidden states"
_EARLIER = "its blocks need what earlier blocks computed, beside the hidden states"

# Types whose code does not compute block after block from hidden states alone: what it does instead. Each is refused by
# the checks of `Decoder` and `verify` too, once weights are there.
REASONS: dict[str, str] = {
    "blt": "it groups bytes to patches and passes them through several stacks of blocks",
    "cpmant": "it is not causal: a token changes the hidden states of earlier tokens",
    "deepseek_v4": _LOOKED_UP,
    "gemma3n": _LOOKED_UP,
    "gemma3n_text": _LOOKED_UP,
    "hrm_text": "it passes through its blocks several times",
    "hy_v4": _EARLIER,
    "inkling2_text": _LOOKED_UP,
    "mllama": "it skips the blocks that attend to an image where there is none",
    "prophetnet": _STREAMS,
    "reformer": _STREAMS,
    "xlnet": "it is not causal: a token changes the hidden states of earlier tokens",
    "zamba": _SHARED,
    "zamba2": _SHARED,
    "zaya": _EARLIER,
}


def require(directory: Path, removed_experts: float | None = None) -> None:
    """Refuse a model that cannot be pruned block by block, by the ``config.json`` in a directory.

    The model is built without weights, as transformers does, to see that it has a list of blocks.

    Parameters
    ----------
    directory : Path
    removed_experts : float, optional
        Share of each block's experts that is to be removed.

    Raises
    ------
    BesaError
        The model is of another kind than `architecture.config_of` takes, or its code does not compute block by block,
        or such a share of experts cannot be removed.
    """
    config = architecture.config_of(directory)
    reason = REASONS.get(config.model_type) or _by_fields(config)
    if reason:
        raise BesaError(f"{directory} is of the type {config.model_type}, which is not supported: {reason}", SUITED)
    architecture.block_list(architecture.skeleton(config, torch.bfloat16))
    if removed_experts is not None:
        experts.require(config, removed_experts)


def _by_fields(config: "PretrainedConfig") -> str | None:
    """Return why a model is not supported that others of its type are like; None if it is."""
    text = config.get_text_config()
    if text.model_type.startswith("gemma4") and getattr(text, "hidden_size_per_layer_input", None):
        return _LOOKED_UP
    return None
