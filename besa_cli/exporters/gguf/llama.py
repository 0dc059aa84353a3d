"""What llama.cpp calls the parts of a LLaMA-architecture model, and what it wants to know of it."""

from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor

from besa_cli.decoder import architecture
from besa_cli.errors import BesaError
from besa_cli.exporters.source import StageSource

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"
_KNOWN = ("llama",)  # model types of transformers
_ACTS = ("silu", "swish")  # two names of one function
_ROPES = ("default", "linear", "llama3")
_ELSEWISE = "export as hf, and convert that with llama.cpp's own script"


def check(source: StageSource) -> None:
    """Refuse what this export cannot write.

    Raises
    ------
    BesaError
        Another architecture, another kind of rotary embedding, or a tensor that llama.cpp has no name for.
    """
    kind = source.config.get("model_type")
    if kind not in _KNOWN:
        raise BesaError(
            f"{source.directory} is a '{kind}' model; GGUF is written for {', '.join(_KNOWN)} models only", _ELSEWISE
        )
    rope = _rope(source)
    if rope["rope_type"] not in _ROPES:
        raise BesaError(
            f"{source.directory} has rotary embeddings of type '{rope['rope_type']}'; GGUF is written for "
            f"{', '.join(_ROPES)}",
            _ELSEWISE,
        )
    act = architecture.config_of(source.directory).hidden_act
    if act not in _ACTS:
        raise BesaError(
            f"{source.directory} has hidden_act '{act}'; llama.cpp computes SiLU in every '{ARCHITECTURE}' model",
            _ELSEWISE,
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise BesaError(
            f"{source.directory} turns a part of each head (partial_rotary_factor); llama.cpp turns all of it",
            _ELSEWISE,
        )
    for name in source.names:
        tensor_name(source, name)


def _rope(source: StageSource) -> dict[str, Any]:
    config = architecture.config_of(source.directory)
    return {"rope_type": "default", **(config.rope_parameters or {})}


def _sizes(source: StageSource) -> tuple[int, int, int]:
    """Heads, key and value heads, channels of a head."""
    config = architecture.config_of(source.directory)
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(config.num_key_value_heads or heads), int(width)


def tensor_name(source: StageSource, name: str) -> str:
    """What llama.cpp calls a tensor.

    Raises
    ------
    BesaError
        It has no name for it.
    """
    found: str | None = get_tensor_name_map(MODEL_ARCH.LLAMA, source.stage.blocks).get_name(
        name, try_suffixes=(".weight", ".bias")
    )
    if found is None:
        raise BesaError(f"llama.cpp has no name for {name} in {source.directory}", _ELSEWISE)
    return found


def add_facts(writer: GGUFWriter, source: StageSource) -> None:
    """Sizes, rotary embedding and norm of the model, and its name."""
    config = architecture.config_of(source.directory)
    heads, key_value_heads, width = _sizes(source)
    rope = _rope(source)
    writer.add_type("model")
    writer.add_name(str(source.manifest["model"]["name"]).rstrip("/").rpartition("/")[2])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(source.stage.blocks)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_quantization_version(2)


def rope_factors(source: StageSource) -> "np.ndarray[Any, Any] | None":
    """What each rotary frequency is divided by, shape (channels / 2,), as transformers computes it; None for none."""
    if _rope(source)["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = architecture.config_of(source.directory)
    width = _sizes(source)[2]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = float(_rope(source)["rope_theta"]) ** -(torch.arange(0, width, 2).float() / width)
    return np.ascontiguousarray((plain / scaled).float().numpy())


def arranged(source: StageSource, name: str, tensor: Tensor) -> Tensor:
    """A tensor with its rows in llama.cpp's order.

    There the two channels that a rotary embedding turns together lie side by side; in transformers they are half a head
    apart. So the rows of queries and keys change places within each head.
    """
    heads, key_value_heads, _ = _sizes(source)
    for projection, count in (("q_proj", heads), ("k_proj", key_value_heads)):
        if f".self_attn.{projection}." in name:
            pairs = tensor.reshape(count, 2, -1, *tensor.shape[1:])  # head, half, place in the half, columns
            return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()
    return tensor
