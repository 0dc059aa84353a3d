"""Names and metadata of a LLaMA-architecture model in llama.cpp, and its order of rows."""

import numpy as np
import numpy.typing as npt
import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor

from besa_cli.decoder import architecture
from besa_cli.errors import BesaError
from besa_cli.exporters.source import StageSource
from besa_cli.system.disk import JsonObject

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"
_KNOWN = ("llama",)  # model types of transformers
_ACTIVATIONS = ("silu", "swish")  # two names of one function
_ROPES = ("default", "linear", "llama3")
_REMEDY = "export as hf, and convert that with llama.cpp's own script"


def check(source: StageSource) -> None:
    """Refuse models that this export cannot write.

    Raises
    ------
    BesaError
        The model has another architecture, activation or rotary embedding, or a tensor without a name in llama.cpp.
    """
    kind = source.config.get("model_type")
    if kind not in _KNOWN:
        raise BesaError(
            f"{source.directory} is a '{kind}' model; GGUF is written for {', '.join(_KNOWN)} models only", _REMEDY
        )
    rope = _rope(source)
    if rope["rope_type"] not in _ROPES:
        raise BesaError(
            f"{source.directory} has rotary embeddings of type '{rope['rope_type']}'; GGUF is written for "
            f"{', '.join(_ROPES)}",
            _REMEDY,
        )
    activation = architecture.config_of(source.directory).hidden_act
    if activation not in _ACTIVATIONS:
        raise BesaError(
            f"{source.directory} has hidden_act '{activation}'; llama.cpp computes SiLU in every '{ARCHITECTURE}' "
            "model",
            _REMEDY,
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise BesaError(
            f"{source.directory} rotates a part of each head (partial_rotary_factor); llama.cpp rotates all of it",
            _REMEDY,
        )
    for name in source.names:
        tensor_name(source, name)


def _rope(source: StageSource) -> JsonObject:
    config = architecture.config_of(source.directory)
    return {"rope_type": "default", **(config.rope_parameters or {})}


def _sizes(source: StageSource) -> tuple[int, int, int]:
    """Return the number of heads, the number of key-value heads, and the channels per head."""
    config = architecture.config_of(source.directory)
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, int(config.num_key_value_heads or heads), int(width)


def tensor_name(source: StageSource, name: str) -> str:
    """Return the name of a tensor in llama.cpp.

    Raises
    ------
    BesaError
        llama.cpp has no name for the tensor.
    """
    gguf_name: str | None = get_tensor_name_map(MODEL_ARCH.LLAMA, source.stage.blocks).get_name(
        name, try_suffixes=(".weight", ".bias")
    )
    if gguf_name is None:
        raise BesaError(f"llama.cpp has no name for {name} in {source.directory}", _REMEDY)
    return gguf_name


def add_metadata(writer: GGUFWriter, source: StageSource) -> None:
    """Write the model's name, sizes, rotary embedding and norm epsilon."""
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


def rope_factors(source: StageSource) -> "npt.NDArray[np.float32] | None":
    """Return the divisor of each rotary frequency, shape (channels / 2,), as in transformers; None if not "llama3"."""
    if _rope(source)["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = architecture.config_of(source.directory)
    width = _sizes(source)[2]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = float(_rope(source)["rope_theta"]) ** -(torch.arange(0, width, 2).float() / width)
    return np.ascontiguousarray((plain / scaled).float().numpy())


def arranged(source: StageSource, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor with its rows in llama.cpp's order.

    llama.cpp puts the two channels that a rotary embedding rotates together side by side; in transformers they are half
    a head apart. Therefore the rows of queries and keys are permuted within each head.
    """
    heads, key_value_heads, _ = _sizes(source)
    for projection, count in (("q_proj", heads), ("k_proj", key_value_heads)):
        if f".self_attn.{projection}." in name:
            pairs = tensor.reshape(count, 2, -1, *tensor.shape[1:])  # head, half, index in the half, columns
            return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()
    return tensor
