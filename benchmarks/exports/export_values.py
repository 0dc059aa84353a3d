"""The linears of a stage as each export holds them, read by the other program: are its pruned positions zero there?"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from safetensors.torch import load_file
from torch import Tensor

Read = Callable[[str], Tensor]

_LLAMA_CPP = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def from_gguf(file: Path, config: Mapping[str, int]) -> Read:
    """Reads a linear by its name in transformers with gguf's own reader, rows back in their order."""
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}

    def read(name: str) -> Tensor:
        _, _, block, own = name.removesuffix(".weight").split(".", 3)
        tensor = stored[f"blk.{block}.{_LLAMA_CPP[own]}.weight"]
        kind = GGMLQuantizationType(tensor.tensor_type)
        whole = torch.from_numpy(np.array(quants.dequantize(np.array(tensor.data), kind), dtype=np.float32))
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(_LLAMA_CPP[own])
        if heads is None:
            return whole
        rows, cols = whole.shape
        pairs = whole.reshape(config[heads], -1, 2, cols)
        return pairs.transpose(1, 2).reshape(rows, cols)  # row 2 i + j is j half + i

    return read


def zeros(stage: Path, read: Read) -> dict[str, int]:
    """What became of the stage's pruned positions and of the weights that it keeps, over all linears of its blocks."""
    found = {"weights": 0, "pruned": 0, "pruned_not_zero": 0, "kept_now_zero": 0, "same_in_bf16": 0}
    for report in sorted(stage.glob("model-*.json")):
        linears = [linear["name"] for linear in json.loads(report.read_text())["linears"]]
        for name, tensor in load_file(report.with_suffix(".safetensors")).items():
            if not any(name.endswith(f".{linear}.weight") for linear in linears):
                continue
            there = read(name)
            found["weights"] += tensor.numel()
            found["pruned"] += int((tensor == 0).sum())
            found["pruned_not_zero"] += int((there[tensor == 0] != 0).sum())
            found["kept_now_zero"] += int((there[tensor != 0] == 0).sum())
            found["same_in_bf16"] += int((there.bfloat16() == tensor).sum())
    return found
