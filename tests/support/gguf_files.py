"""Tiny models written as GGUF by hand, each architecture as llama.cpp's own converter writes it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers
from support import tiny_models

CONTEXT = 256
WORDS = 272  # 256 bytes, the merges of llamas.py, and what fills up
_SIZES = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT, "bos_token_id": 260, "eos_token_id": 261, "pad_token_id": None,
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_FALCON = {key: value for key, value in _SIZES.items() if key != "intermediate_size"}
_GEMMA = {**_GROUPED, "num_hidden_layers": 3, "head_dim": 32, "query_pre_attn_scalar": 32}
_ROPE = "rope_parameters"
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + 0.1 * index for index in range(6)],
    "long_factor": [2.0 + 0.5 * index for index in range(6)], "original_max_position_embeddings": 64,
    "attention_factor": 1.25, "factor": 4.0, "partial_rotary_factor": 0.75,
}  # fmt: skip
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}

# A case -> transformers' configuration, and llama.cpp's name.
CASES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", _GROUPED),
    "llama-tied": ("llama", "LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}),
    "llama-wide": ("llama", "LlamaConfig", {**_GROUPED, "head_dim": 32, "rms_norm_eps": 1e-3}),
    "llama-biased": ("llama", "LlamaConfig", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "llama", "LlamaConfig", {**_GROUPED, _ROPE: {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}},
    ),
    "llama-llama3": ("llama", "LlamaConfig", {**_GROUPED, _ROPE: _LLAMA3}),
    "llama-yarn": ("llama", "LlamaConfig", {**_GROUPED, _ROPE: _YARN}),
    "qwen2": ("qwen2", "Qwen2Config", _GROUPED),
    "qwen2-yarn": ("qwen2", "Qwen2Config", {**_GROUPED, _ROPE: _YARN}),
    "qwen3": ("qwen3", "Qwen3Config", {**_GROUPED, "head_dim": 32}),
    "gemma2": ("gemma2", "Gemma2Config", {
        **_GEMMA, "sliding_window": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    }),
    "gemma3": ("gemma3", "Gemma3TextConfig", {**_GEMMA, "num_hidden_layers": 7, "sliding_window": 16}),
    "gemma3-linear": ("gemma3", "Gemma3TextConfig", {
        **_GEMMA, "num_hidden_layers": 7, "sliding_window": 16, _ROPE: _GEMMA3_ROPE,
    }),
    "phi3": ("phi3", "Phi3Config", {**_GROUPED, "original_max_position_embeddings": CONTEXT}),
    "phi3-longrope": ("phi3", "Phi3Config", {
        **_GROUPED, "original_max_position_embeddings": 64, _ROPE: _LONG,
    }),
    "starcoder2": ("starcoder2", "Starcoder2Config", {
        **_GROUPED, "sliding_window": None, _ROPE: {"rope_type": "default", "rope_theta": 1e5},
    }),
    "stablelm": ("stablelm", "StableLmConfig", {**_GROUPED, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", "StableLmConfig", {
        **_GROUPED, "use_parallel_residual": True,
        _ROPE: {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    }),
    "nemotron": ("nemotron", "NemotronConfig", {**_GROUPED, "norm_eps": 1e-3}),
    "falcon": ("falcon", "FalconConfig", {**_FALCON, "multi_query": True, "layer_norm_epsilon": 1e-3}),
    "falcon-grouped": ("falcon", "FalconConfig", {
        **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False,
    }),
    "gpt2": ("gpt2", "GPT2Config", {
        "vocab_size": WORDS, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT, "bos_token_id": 260,
        "eos_token_id": 261,
    }),
    "bloom": ("bloom", "BloomConfig", {
        "vocab_size": WORDS, "hidden_size": 64, "n_head": 4, "n_layer": 2, "bos_token_id": 260, "eos_token_id": 261,
        "pad_token_id": None,
    }),
    "lfm2": ("lfm2", "Lfm2Config", {
        **_GROUPED, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False, "norm_eps": 1e-3,
    }),
    "mamba": ("mamba", "MambaConfig", {
        "vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "bos_token_id": 260,
        "eos_token_id": 261, "layer_norm_epsilon": 1e-3,
    }),
}  # fmt: skip

Change = Callable[[gguf.GGUFWriter], None]


def model(case: str) -> transformers.PreTrainedModel:
    """The random model of a case, in fp32."""
    _, kind, values = CASES[case]
    return tiny_models.built(getattr(transformers, kind)(**values))


def write(path: Path, case: str, made: transformers.PreTrainedModel, *, change: Change = lambda _: None) -> Path:
    """The model as a GGUF file of fp32 tensors, with a tokenizer of bytes."""
    name = CASES[case][0]
    writer = gguf.GGUFWriter(path, name)
    config = made.config
    _facts(writer, name, config)
    byte_vocabulary(writer)
    change(writer)
    (arch,) = (gguf.MODEL_ARCH(key) for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    mapped = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, config.hidden_size // config.num_attention_heads))
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    for own, value in made.state_dict().items():
        if own not in made.all_tied_weights_keys:
            endings = (".weight", ".bias")
            stored = mapped.get_name(own, endings) or mapped.get_name(own.removeprefix("transformer."), endings)
            assert stored is not None
            writer.add_tensor(stored, np.ascontiguousarray(_converted(name, stored, value.float().numpy(), config)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(rope: Mapping[str, Any], width: int) -> np.ndarray:
    """As llama.cpp's converter computes `rope_freqs`: one branch for each band of wavelengths."""
    found = []
    for index in range(0, width, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (index / width)
        original = rope["original_max_position_embeddings"]
        if wavelength < original / rope["high_freq_factor"]:
            found.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            found.append(rope["factor"])
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, dtype=np.float32)


def byte_vocabulary(writer: gguf.GGUFWriter, pre: str = "gpt-2") -> None:
    """The tokenizer of llamas.py."""
    from support.llamas import MERGES
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES), "<s>", "</s>"]
    filled = [*tokens, *(f"[PAD{number}]" for number in range(len(tokens), WORDS))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(filled)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 5 if token[:4] == "[PAD" else 1 for token in filled])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(260)
    writer.add_eos_token_id(261)
    writer.add_add_bos_token(False)


def _facts(writer: gguf.GGUFWriter, name: str, config: Any) -> None:
    if name == "mamba":
        _mamba_facts(writer, config)
        return
    heads, hidden = config.num_attention_heads, config.hidden_size
    width = getattr(config, "head_dim", None) or hidden // heads
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(_feed_forward(config, hidden))
    writer.add_head_count(heads)
    grouped = getattr(config, "num_key_value_heads", None) or heads
    if name == "falcon":
        grouped = config.num_kv_heads if config.new_decoder_architecture else 1
    if name == "lfm2":
        writer.add_head_count_kv([grouped if kind == "full_attention" else 0 for kind in config.layer_types])
        writer.add_shortconv_l_cache(config.conv_L_cache)
        writer.add_layer_norm_rms_eps(config.norm_eps)
    elif name not in ("gpt2", "bloom"):
        writer.add_head_count_kv(grouped)
    if width != hidden // heads or name.startswith("gemma"):
        writer.add_key_length(width)
        writer.add_value_length(width)
    _details(writer, name, config)
    _rope(writer, name, getattr(config, "rope_parameters", None) or {}, width)


def _details(writer: gguf.GGUFWriter, name: str, config: Any) -> None:
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key in ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"):
        if hasattr(config, key) and name != "lfm2":
            writer.add_layer_norm_eps(getattr(config, key))
    if name.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if name == "stablelm":
        writer.add_parallel_residual(config.use_parallel_residual)


def _mamba_facts(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.time_step_rank)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)


def _feed_forward(config: Any, hidden: int) -> int:
    for key in ("intermediate_size", "ffn_hidden_size", "n_inner"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return 4 * hidden


def _rope(writer: gguf.GGUFWriter, name: str, rope: Mapping[str, Any], width: int) -> None:
    if not rope:
        return
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])


def _converted(name: str, stored: str, value: np.ndarray, config: Any) -> np.ndarray:
    """What llama.cpp's converter does to the values of a tensor."""
    if name == "mamba":
        return -np.exp(value) if stored.endswith(".ssm_a") else value.squeeze()
    heads = config.num_attention_heads
    if name == "lfm2":
        return value.squeeze()
    if name == "llama" and (".attn_q." in stored or ".attn_k." in stored):
        count = heads if ".attn_q." in stored else config.num_key_value_heads
        rows = value.shape[0] // count
        order = [head * rows + index // 2 + (index % 2) * (rows // 2) for head in range(count) for index in range(rows)]
        return value[order]
    if name in ("gemma2", "gemma3", "nemotron") and stored.endswith("norm.weight"):
        return value + 1
    if (
        name == "gpt2"
        and value.ndim == 2
        and stored.split(".")[-2] in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    ):
        return value.T
    if ".attn_qkv." in stored and name == "bloom":
        return _in_turn(value, heads, 1)
    if ".attn_qkv." in stored and name == "falcon":
        groups = config.num_kv_heads if config.new_decoder_architecture else 1
        return _in_turn(value, groups, heads // groups)
    return value


def _in_turn(value: np.ndarray, groups: int, queries: int) -> np.ndarray:
    """Rows of groups of `queries` queries, a key and a value: all queries, then all keys, then all values."""
    each = value.shape[0] // groups // (queries + 2)
    starts = [group * (queries + 2) * each for group in range(groups)]
    spans: Sequence[tuple[int, int]] = ((0, queries), (queries, queries + 1), (queries + 1, queries + 2))
    return np.concatenate([value[at + low * each : at + high * each] for low, high in spans for at in starts])
