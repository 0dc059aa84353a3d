"""What a GGUF file's metadata means as a configuration of transformers, architecture by architecture.

Only architectures are here whose logits were compared with llama.cpp's, on the models of tests/gguf_files.py.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from besa_cli.errors import BesaError, reading
from besa_cli.models.gguf.file_header import Header, refuse
from besa_cli.models.gguf.metadata import LONGEST_CONTEXT, Metadata
from besa_cli.models.gguf.rotary import Read, parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Config = dict[str, Any]  # keyword arguments of transformers' own classes
_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def config_of(header: Header, read: Read) -> "PretrainedConfig":
    """The configuration that stock transformers needs to compute what the file means.

    Parameters
    ----------
    header : Header
    read : callable
        Gives the values of a tensor by its name.

    Raises
    ------
    BesaError
        The architecture is unknown, or a key is missing, damaged, unknown, or has no counterpart in transformers.
    """
    from transformers import AutoConfig

    if header.architecture not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise BesaError(
            f"{header.path} holds a '{header.architecture}' model, which cannot be read from GGUF",
            f"supported: {known}",
        )
    kind, make = _ARCHITECTURES[header.architecture]
    facts = Metadata(header)
    wanted = _common(facts) | make(facts, read)
    facts.finish()
    with reading(header.path):
        return AutoConfig.for_model(kind, **wanted)


def _common(facts: Metadata) -> Config:
    """Sizes that all have, compared with the tensors that are there."""
    header = facts.header
    blocks = facts.whole("block_count")
    there = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if there != {str(index) for index in range(min(blocks, len(there) + 1))}:
        facts.refuse("block_count", f"is {blocks}; the tensors are those of {len(there)} blocks")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        refuse(header, "token_embd.weight", "is missing")
    width = facts.whole("embedding_length")
    if embedding.shape[1] != width:
        facts.refuse("embedding_length", f"is {width}; token_embd.weight has {embedding.shape[1]} columns")
    words = embedding.shape[0]
    facts.expect("vocab_size", words, f"is not {words}, the rows of token_embd.weight")
    return {
        "num_hidden_layers": blocks,
        "hidden_size": width,
        "vocab_size": words,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "unk_token_id": _token(header, "unknown", words),
        **{name: _token(header, key, words) for name, key in _SPECIAL.items()},
    }


def _token(header: Header, key: str, words: int) -> int | None:
    name = f"tokenizer.ggml.{key}_token_id"
    value = header.fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < words:
        refuse(header, name, f"is {value!r:.80}, not one of {words} tokens")
    return value


def _heads(
    facts: Metadata, read: Read, *, partly: bool = False, rotary: bool = True, grouped: int | None = None
) -> Config:
    """Sizes of attention and MLP, and the rotary embedding; `partly` where it may turn a part of each head.

    `grouped` are the heads of keys and values, if they are known already.
    """
    width, heads = facts.whole("embedding_length"), facts.whole("attention.head_count")
    grouped = grouped or facts.whole("attention.head_count_kv", heads)
    if heads % grouped:
        facts.refuse("attention.head_count_kv", f"is {grouped}; {heads} heads cannot share them")
    if width % heads and not facts.has("attention.key_length"):
        facts.refuse("attention.head_count", f"is {heads}; {width} channels cannot be divided among them")
    channels = facts.whole("attention.key_length", width // heads, most=1 << 20)
    facts.expect("attention.value_length", channels, f"is not {channels}, the length of keys")
    facts.expect("attention.scale", channels**-0.5)
    found: Config = {
        "num_attention_heads": heads,
        "num_key_value_heads": grouped,
        "head_dim": channels,
        "intermediate_size": facts.whole("feed_forward_length"),
        "max_position_embeddings": facts.whole("context_length", most=LONGEST_CONTEXT),
    }
    if not rotary:
        return found
    turned = facts.whole("rope.dimension_count", channels)
    if turned > channels or turned % 2 or (turned != channels and not partly):
        facts.refuse("rope.dimension_count", f"is {turned} of {channels} channels")
    rope: Config = dict(parameters(facts, turned, read))
    if partly:
        rope["partial_rotary_factor"] = turned / channels
    return found | {"rope_parameters": rope}


def _window(facts: Metadata) -> int | None:
    """The sliding window where llama.cpp has none: only one that hides nothing."""
    context = facts.whole("context_length", most=LONGEST_CONTEXT)
    window = facts.whole("attention.sliding_window", 0, least=0)
    if 0 < window < context:
        facts.refuse("attention.sliding_window", f"is {window}; a '{facts.header.architecture}' model has none here")
    return None


def _llama(facts: Metadata, read: Read) -> Config:
    _window(facts)
    return _heads(facts, read) | {
        "rms_norm_eps": facts.real(_RMS),
        "attention_bias": facts.any_tensor("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
        "mlp_bias": facts.any_tensor("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
    }


def _qwen2(facts: Metadata, read: Read) -> Config:
    _window(facts)
    return _heads(facts, read) | {"rms_norm_eps": facts.real(_RMS), "use_sliding_window": False}


def _qwen3(facts: Metadata, read: Read) -> Config:
    return _qwen2(facts, read) | {
        "attention_bias": facts.any_tensor("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
    }


_GEMMA_27B = 46, 62  # the blocks of Gemma 2 and of Gemma 3 that scale queries by another width than the heads'


def _gemma(facts: Metadata, read: Read) -> Config:
    found = _heads(facts, read)
    large = _blocks(facts) in _GEMMA_27B
    width = facts.whole("embedding_length") // found["num_attention_heads"] if large else found["head_dim"]
    return found | {
        "rms_norm_eps": facts.real(_RMS),
        "query_pre_attn_scalar": width,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
    }


def _blocks(facts: Metadata) -> int:
    """How many blocks the model has."""
    return facts.whole("block_count")


def _layers(facts: Metadata, every: int) -> list[str]:
    """The kind of each block; by default each `every`-th sees all tokens, those before it a window."""
    blocks = _blocks(facts)
    given = facts.pattern("attention.sliding_window_pattern", blocks, every)
    return ["sliding_attention" if sliding else "full_attention" for sliding in given]


def _gemma2(facts: Metadata, read: Read) -> Config:
    return _gemma(facts, read) | {
        "sliding_window": facts.whole("attention.sliding_window", 4096),
        "layer_types": _layers(facts, 2),
        "attn_logit_softcapping": facts.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": facts.real("final_logit_softcapping", 30.0),
    }


def _gemma3(facts: Metadata, read: Read) -> Config:
    found = _gemma(facts, read)
    local = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base_swa", 10000.0)}
    return found | {
        "sliding_window": facts.whole("attention.sliding_window", 512),
        "layer_types": _layers(facts, 6),
        "rope_parameters": {"sliding_attention": local, "full_attention": found["rope_parameters"]},
        "final_logit_softcapping": facts.real("final_logit_softcapping")
        if facts.has("final_logit_softcapping")
        else None,
        "attn_logit_softcapping": None,
    }


def _phi3(facts: Metadata, read: Read) -> Config:
    found = _heads(facts, read, partly=True)
    rope = found["rope_parameters"]
    return found | {
        "rms_norm_eps": facts.real(_RMS),
        "sliding_window": facts.whole("attention.sliding_window", 0, least=0) or None,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings")
        or found["max_position_embeddings"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
    }


def _starcoder2(facts: Metadata, read: Read) -> Config:
    _window(facts)
    return _heads(facts, read) | {
        "norm_epsilon": facts.real(_LAYER),
        "sliding_window": None,
        "use_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
    }


def _stablelm(facts: Metadata, read: Read) -> Config:
    parallel = not facts.any_tensor("ffn_norm.weight")
    facts.expect("use_parallel_residual", parallel, "contradicts the tensors, of which ffn_norm decides it")
    return _heads(facts, read, partly=True) | {
        "layer_norm_eps": facts.real(_LAYER),
        "use_parallel_residual": parallel,
        "use_qkv_bias": facts.any_tensor("attn_q.bias", "attn_k.bias", "attn_v.bias"),
        "qk_layernorm": False,
    }


def _nemotron(facts: Metadata, read: Read) -> Config:
    return _heads(facts, read, partly=True) | {
        "norm_eps": facts.real(_LAYER),
        "hidden_act": "relu2",
        "attention_bias": facts.any_tensor("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
        "mlp_bias": facts.any_tensor("ffn_up.bias", "ffn_down.bias"),
    }


def _falcon(facts: Metadata, read: Read) -> Config:
    found = _heads(facts, read)
    grouped = found.pop("num_key_value_heads")
    facts.expect("attention.key_length", facts.whole("embedding_length") // found["num_attention_heads"])
    del found["head_dim"]
    separate = facts.any_tensor("attn_norm_2.weight")
    if not separate and grouped not in (1, found["num_attention_heads"]):
        facts.refuse("attention.head_count_kv", f"is {grouped}, which a Falcon with one norm a block cannot have")
    return found | {
        "ffn_hidden_size": found.pop("intermediate_size"),
        "layer_norm_epsilon": facts.real(_LAYER),
        "new_decoder_architecture": separate,
        "num_kv_heads": grouped,
        "multi_query": grouped == 1,
        "parallel_attn": True,
        "alibi": False,
        "bias": facts.any_tensor("attn_qkv.bias", "attn_output.bias", "ffn_up.bias", "ffn_down.bias"),
    }


def _bloom(facts: Metadata, read: Read) -> Config:
    found = _heads(facts, read, rotary=False)
    facts.expect("feed_forward_length", 4 * facts.whole("embedding_length"))
    return {
        "n_head": found["num_attention_heads"],
        "n_layer": _blocks(facts),
        "seq_length": found["max_position_embeddings"],
        "layer_norm_epsilon": facts.real(_LAYER),
    }


def _gpt2(facts: Metadata, read: Read) -> Config:
    found = _heads(facts, read, rotary=False)
    return {
        "n_head": found["num_attention_heads"],
        "n_layer": _blocks(facts),
        "n_embd": facts.whole("embedding_length"),
        "n_positions": found["max_position_embeddings"],
        "n_inner": found["intermediate_size"],
        "layer_norm_epsilon": facts.real(_LAYER),
        "activation_function": "gelu_new",
    }


def _lfm2(facts: Metadata, read: Read) -> Config:
    """Blocks without keys and values are convolutions."""
    grouped = facts.each("attention.head_count_kv", _blocks(facts))
    found = _heads(facts, read, grouped=max(grouped))
    return found | {
        "norm_eps": facts.real(_RMS),
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["full_attention" if heads else "conv" for heads in grouped],
        "conv_L_cache": facts.whole("shortconv.l_cache"),
        "conv_bias": facts.any_tensor("shortconv.conv.bias", "shortconv.in_proj.bias", "shortconv.out_proj.bias"),
    }


def _mamba(facts: Metadata, read: Read) -> Config:
    facts.whole("context_length", most=LONGEST_CONTEXT)  # it has none
    for key in ("feed_forward_length", "attention.head_count", "ssm.dt_b_c_rms"):
        facts.expect(key, 0)
    return {
        "intermediate_size": facts.whole("ssm.inner_size"),
        "conv_kernel": facts.whole("ssm.conv_kernel"),
        "state_size": facts.whole("ssm.state_size"),
        "time_step_rank": facts.whole("ssm.time_step_rank"),
        "layer_norm_epsilon": facts.real(_RMS),
        "use_bias": facts.any_tensor("ssm_in.bias", "ssm_out.bias"),
        "use_conv_bias": facts.any_tensor("ssm_conv1d.bias"),
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
