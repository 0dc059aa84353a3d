"""Transformers configurations from GGUF metadata, architecture by architecture.

Only architectures are supported whose logits were compared with llama.cpp's, on the models of
tests/support/gguf_files.py.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from besa_cli.errors import BesaError, reading
from besa_cli.models.gguf.file_header import Header, refuse
from besa_cli.models.gguf.metadata import LONGEST_CONTEXT, Metadata
from besa_cli.models.gguf.rotary import Read, parameters
from besa_cli.system.disk import JsonObject

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Config = JsonObject  # keyword arguments of transformers' own classes
_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def config_of(header: Header, read: Read) -> "PretrainedConfig":
    """Build the configuration with which stock transformers computes the same as llama.cpp does from the file.

    Parameters
    ----------
    header : Header
    read : callable
        Returns the values of a tensor by its name.

    Raises
    ------
    BesaError
        The architecture is unknown, or a key is missing, damaged, unknown, or has no counterpart in transformers.
    """
    from transformers import AutoConfig

    if header.architecture not in _ARCHITECTURES:
        supported = ", ".join(sorted(_ARCHITECTURES))
        raise BesaError(
            f"{header.path} holds a '{header.architecture}' model, which cannot be read from GGUF",
            f"supported: {supported}",
        )
    kind, make = _ARCHITECTURES[header.architecture]
    metadata = Metadata(header)
    options = _common(metadata) | make(metadata, read)
    metadata.finish()
    with reading(header.path):
        return AutoConfig.for_model(kind, **options)


def _common(metadata: Metadata) -> Config:
    """Read the sizes that all architectures share, checked against the tensors."""
    header = metadata.header
    blocks = metadata.integer("block_count")
    present = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if present != {str(index) for index in range(min(blocks, len(present) + 1))}:
        metadata.refuse("block_count", f"is {blocks}, but the tensors belong to {len(present)} blocks")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        refuse(header, "token_embd.weight", "is missing")
    width = metadata.integer("embedding_length")
    if embedding.shape[1] != width:
        metadata.refuse("embedding_length", f"is {width}, but token_embd.weight has {embedding.shape[1]} columns")
    vocab_size = embedding.shape[0]
    metadata.expect("vocab_size", vocab_size, f"is not {vocab_size}, the number of rows of token_embd.weight")
    return {
        "num_hidden_layers": blocks,
        "hidden_size": width,
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "unk_token_id": _token(header, "unknown", vocab_size),
        **{name: _token(header, key, vocab_size) for name, key in _SPECIAL.items()},
    }


def _token(header: Header, key: str, vocab_size: int) -> int | None:
    name = f"tokenizer.ggml.{key}_token_id"
    value = header.fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
        refuse(header, name, f"is {value!r:.80}, not one of {vocab_size} tokens")
    return value


def _heads(
    metadata: Metadata, read: Read, *, partly: bool = False, rotary: bool = True, grouped: int | None = None
) -> Config:
    """Read the sizes of attention and MLP, and the rotary embedding.

    Parameters
    ----------
    partly : bool
        The rotary embedding may cover only a part of each head.
    rotary : bool
        The architecture has a rotary embedding.
    grouped : int, optional
        Number of key and value heads, if known already.
    """
    width, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    grouped = grouped or metadata.integer("attention.head_count_kv", heads)
    if heads % grouped:
        metadata.refuse("attention.head_count_kv", f"is {grouped}, which does not divide {heads} heads")
    if width % heads and not metadata.has("attention.key_length"):
        metadata.refuse("attention.head_count", f"is {heads}, which does not divide {width} channels")
    channels = metadata.integer("attention.key_length", width // heads, most=1 << 20)
    metadata.expect("attention.value_length", channels, f"is not {channels}, the key length")
    metadata.expect("attention.scale", channels**-0.5)
    config: Config = {
        "num_attention_heads": heads,
        "num_key_value_heads": grouped,
        "head_dim": channels,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "max_position_embeddings": metadata.integer("context_length", most=LONGEST_CONTEXT),
    }
    if not rotary:
        return config
    rotated = metadata.integer("rope.dimension_count", channels)
    if rotated > channels or rotated % 2 or (rotated != channels and not partly):
        metadata.refuse("rope.dimension_count", f"is {rotated}, which does not fit heads of {channels} channels")
    rope: Config = dict(parameters(metadata, rotated, read))
    if partly:
        rope["partial_rotary_factor"] = rotated / channels
    return config | {"rope_parameters": rope}


def _refuse_window(metadata: Metadata) -> None:
    """Refuse a sliding window shorter than the context, for architectures without one in llama.cpp."""
    context = metadata.integer("context_length", most=LONGEST_CONTEXT)
    window = metadata.integer("attention.sliding_window", 0, least=0)
    if 0 < window < context:
        metadata.refuse(
            "attention.sliding_window", f"is {window}; besa reads '{metadata.header.architecture}' models without one"
        )


def _llama(metadata: Metadata, read: Read) -> Config:
    _refuse_window(metadata)
    return _heads(metadata, read) | {
        "rms_norm_eps": metadata.real(_RMS),
        "attention_bias": metadata.any_tensor("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
        "mlp_bias": metadata.any_tensor("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
    }


def _qwen2(metadata: Metadata, read: Read) -> Config:
    _refuse_window(metadata)
    return _heads(metadata, read) | {"rms_norm_eps": metadata.real(_RMS), "use_sliding_window": False}


def _qwen3(metadata: Metadata, read: Read) -> Config:
    return _qwen2(metadata, read) | {
        "attention_bias": metadata.any_tensor("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
    }


_GEMMA_27B = 46, 62  # block counts of Gemma 2 and 3 27B, which do not scale queries by the head width


def _gemma(metadata: Metadata, read: Read) -> Config:
    config = _heads(metadata, read)
    large = _block_count(metadata) in _GEMMA_27B
    width = metadata.integer("embedding_length") // config["num_attention_heads"] if large else config["head_dim"]
    return config | {
        "rms_norm_eps": metadata.real(_RMS),
        "query_pre_attn_scalar": width,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def _block_count(metadata: Metadata) -> int:
    """Read the number of blocks."""
    return metadata.integer("block_count")


def _layer_types(metadata: Metadata, every: int) -> list[str]:
    """Read the attention type of each block; by default every `every`-th is full attention, the others sliding."""
    blocks = _block_count(metadata)
    sliding_blocks = metadata.pattern("attention.sliding_window_pattern", blocks, every)
    return ["sliding_attention" if sliding else "full_attention" for sliding in sliding_blocks]


def _gemma2(metadata: Metadata, read: Read) -> Config:
    return _gemma(metadata, read) | {
        "sliding_window": metadata.integer("attention.sliding_window", 4096),
        "layer_types": _layer_types(metadata, 2),
        "attn_logit_softcapping": metadata.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.real("final_logit_softcapping", 30.0),
    }


def _gemma3(metadata: Metadata, read: Read) -> Config:
    config = _gemma(metadata, read)
    local = {"rope_type": "default", "rope_theta": metadata.real("rope.freq_base_swa", 10000.0)}
    return config | {
        "sliding_window": metadata.integer("attention.sliding_window", 512),
        "layer_types": _layer_types(metadata, 6),
        "rope_parameters": {"sliding_attention": local, "full_attention": config["rope_parameters"]},
        "final_logit_softcapping": metadata.real("final_logit_softcapping")
        if metadata.has("final_logit_softcapping")
        else None,
        "attn_logit_softcapping": None,
    }


def _phi3(metadata: Metadata, read: Read) -> Config:
    config = _heads(metadata, read, partly=True)
    rope = config["rope_parameters"]
    return config | {
        "rms_norm_eps": metadata.real(_RMS),
        "sliding_window": metadata.integer("attention.sliding_window", 0, least=0) or None,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings")
        or config["max_position_embeddings"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
    }


def _starcoder2(metadata: Metadata, read: Read) -> Config:
    _refuse_window(metadata)
    return _heads(metadata, read) | {
        "norm_epsilon": metadata.real(_LAYER),
        "sliding_window": None,
        "use_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
    }


def _stablelm(metadata: Metadata, read: Read) -> Config:
    parallel = not metadata.any_tensor("ffn_norm.weight")
    metadata.expect("use_parallel_residual", parallel, "contradicts the tensors: ffn_norm decides it")
    return _heads(metadata, read, partly=True) | {
        "layer_norm_eps": metadata.real(_LAYER),
        "use_parallel_residual": parallel,
        "use_qkv_bias": metadata.any_tensor("attn_q.bias", "attn_k.bias", "attn_v.bias"),
        "qk_layernorm": False,
    }


def _nemotron(metadata: Metadata, read: Read) -> Config:
    return _heads(metadata, read, partly=True) | {
        "norm_eps": metadata.real(_LAYER),
        "hidden_act": "relu2",
        "attention_bias": metadata.any_tensor("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
        "mlp_bias": metadata.any_tensor("ffn_up.bias", "ffn_down.bias"),
    }


def _falcon(metadata: Metadata, read: Read) -> Config:
    config = _heads(metadata, read)
    grouped = config.pop("num_key_value_heads")
    metadata.expect("attention.key_length", metadata.integer("embedding_length") // config["num_attention_heads"])
    del config["head_dim"]
    separate = metadata.any_tensor("attn_norm_2.weight")
    if not separate and grouped not in (1, config["num_attention_heads"]):
        metadata.refuse("attention.head_count_kv", f"is {grouped}, which a Falcon with one norm per block cannot have")
    return config | {
        "ffn_hidden_size": config.pop("intermediate_size"),
        "layer_norm_epsilon": metadata.real(_LAYER),
        "new_decoder_architecture": separate,
        "num_kv_heads": grouped,
        "multi_query": grouped == 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": metadata.any_tensor("attn_qkv.bias", "attn_output.bias", "ffn_up.bias", "ffn_down.bias"),
    }


def _bloom(metadata: Metadata, read: Read) -> Config:
    config = _heads(metadata, read, rotary=False)
    metadata.expect("feed_forward_length", 4 * metadata.integer("embedding_length"))
    return {
        "n_head": config["num_attention_heads"],
        "n_layer": _block_count(metadata),
        "seq_length": config["max_position_embeddings"],
        "layer_norm_epsilon": metadata.real(_LAYER),
    }


def _gpt2(metadata: Metadata, read: Read) -> Config:
    config = _heads(metadata, read, rotary=False)
    return {
        "n_head": config["num_attention_heads"],
        "n_layer": _block_count(metadata),
        "n_embd": metadata.integer("embedding_length"),
        "n_positions": config["max_position_embeddings"],
        "n_inner": config["intermediate_size"],
        "layer_norm_epsilon": metadata.real(_LAYER),
        "activation_function": "gelu_new",
    }


def _lfm2(metadata: Metadata, read: Read) -> Config:
    """Read an LFM2 model; blocks without key and value heads are convolutions."""
    grouped = metadata.integers("attention.head_count_kv", _block_count(metadata))
    config = _heads(metadata, read, grouped=max(grouped))
    return config | {
        "norm_eps": metadata.real(_RMS),
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["full_attention" if heads else "conv" for heads in grouped],
        "conv_L_cache": metadata.integer("shortconv.l_cache"),
        "conv_bias": metadata.any_tensor("shortconv.conv.bias", "shortconv.in_proj.bias", "shortconv.out_proj.bias"),
    }


def _mamba(metadata: Metadata, read: Read) -> Config:
    metadata.integer("context_length", most=LONGEST_CONTEXT)  # mark as known: the model has no use for it
    for key in ("feed_forward_length", "attention.head_count", "ssm.dt_b_c_rms"):
        metadata.expect(key, 0)
    return {
        "intermediate_size": metadata.integer("ssm.inner_size"),
        "conv_kernel": metadata.integer("ssm.conv_kernel"),
        "state_size": metadata.integer("ssm.state_size"),
        "time_step_rank": metadata.integer("ssm.time_step_rank"),
        "layer_norm_epsilon": metadata.real(_RMS),
        "use_bias": metadata.any_tensor("ssm_in.bias", "ssm_out.bias"),
        "use_conv_bias": metadata.any_tensor("ssm_conv1d.bias"),
    }


_ARCHITECTURES: Mapping[str, tuple[str, Callable[[Metadata, Read], Config]]] = {
    "bloom": ("bloom", _bloom),
    "falcon": ("falcon", _falcon),
    "gemma2": ("gemma2", _gemma2),
    "gemma3": ("gemma3_text", _gemma3),
    "gpt2": ("gpt2", _gpt2),
    "lfm2": ("lfm2", _lfm2),
    "llama": ("llama", _llama),
    "mamba": ("mamba", _mamba),
    "nemotron": ("nemotron", _nemotron),
    "phi3": ("phi3", _phi3),
    "qwen2": ("qwen2", _qwen2),
    "qwen3": ("qwen3", _qwen3),
    "stablelm": ("stablelm", _stablelm),
    "starcoder2": ("starcoder2", _starcoder2),
}
