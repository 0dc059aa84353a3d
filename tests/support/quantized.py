"""Quantized stages made by hand from pruned ones: round to nearest, codes beside the weights, as the format says."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from support import written
from torch import Tensor

from besa_cli.checkpoint.runs import Run


def rounded(weight: Tensor, bits: int, group: int | None, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, fp16 scales, zero points and the weights in the dtype of `weight`, a row and a group at a time."""
    rows, cols = weight.shape
    width = min(group or cols, cols)
    top = (1 << bits) - 1
    codes, made = torch.zeros(rows, cols, dtype=torch.uint8), torch.zeros(rows, cols)
    scales, zeros = [], []
    for start in range(0, cols, width):
        part = weight[:, start : start + width].float()
        high, low = part.amax(1, keepdim=True).clamp_min(0), part.amin(1, keepdim=True).clamp_max(0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / top).half()
        scale[scale == 0] = 1.0
        middle = float(1 << (bits - 1))
        zero = torch.full_like(low, middle) if symmetric else (-low / scale.float()).round().clamp(0, top)
        code = ((part / scale.float()).round() + zero).clamp(0, top)
        codes[:, start : start + width] = code.to(torch.uint8)
        made[:, start : start + width] = (code - zero) * scale.float()
        scales.append(scale)
        zeros.append(zero.to(torch.uint8))
    return codes, torch.cat(scales, 1), torch.cat(zeros, 1), made.to(weight.dtype)


def stage(run: Run, *, bits: int = 4, group: int | None = 32, symmetric: bool = True) -> Run:
    """Give a run directory with a pruned stage a quantized one."""
    pruned, target = run.stage("pruned"), run.path / "quantized"
    shutil.copytree(pruned, target)
    for file in sorted(target.glob("model-*.safetensors")):
        if not file.with_suffix(".json").exists():
            continue
        names = [linear["name"] for linear in json.loads(file.with_suffix(".json").read_text())["linears"]]
        tensors = load_file(file)
        codes: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if any(name.endswith(f".{linear}.weight") for linear in names):
                prefix = name.removesuffix(".weight")
                code, scale, zero, tensors[name] = rounded(tensor, bits, group, symmetric)
                codes |= {f"{prefix}.codes": code, f"{prefix}.scales": scale}
                if not symmetric:
                    codes[f"{prefix}.zeros"] = zero
        (target / "codes").mkdir(exist_ok=True)
        save_file(codes, target / "codes" / file.name, metadata={"format": "pt"})
        save_file(tensors, file, metadata={"format": "pt"})
    grid = {"bits": bits, "group_size": group, "symmetric": symmetric}
    written.settle(target, stage="quantized", command="quantize", quantization=grid)
    return run
