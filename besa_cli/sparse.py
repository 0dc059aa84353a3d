"""How a sparse checkpoint stores a pruned weight: a mask of bits and the values that are left, back to back.

`docs/export.md` specifies the format.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from besa_cli.errors import BesaError
from besa_cli.ops import bitmask

METHOD = "besa"  # the quant_method of config.json
FORMAT = 1
INDEX = "sparse.safetensors.index.json"
NEEDS_IMPORT = "import-besa_cli.hf-to-load-this.safetensors.index.json"  # no such file: see hf.py
WEIGHT, MASK, VALUES, SHAPE = "weight", "weight_mask", "weight_values", "weight_shape"
PARTS = (MASK, VALUES, SHAPE)


def encoded(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor in as few bytes as its zeros allow, by name: the three parts of a matrix, or the tensor itself.

    Parameters
    ----------
    name : str
        The tensor's name in the checkpoint.
    tensor : Tensor
        A matrix of shape (rows, cols) whose name ends in ``.weight`` may become parts; everything else stays.
    """
    prefix, _, last = name.rpartition(".")
    if last != WEIGHT or tensor.dim() != 2:
        return {name: tensor}
    mask = bitmask.stored(tensor)
    parts = {
        MASK: bitmask.packed(mask),
        VALUES: tensor[mask],
        SHAPE: torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if sum(part.nbytes for part in parts.values()) >= tensor.nbytes:
        return {name: tensor}
    return {f"{prefix}.{part}": value for part, value in parts.items()}


def decoded(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The inverse of `encoded`, for all tensors of one file.

    Raises
    ------
    BesaError
        Parts are missing, or do not belong together; names the tensor and `place`, the file they are from.
    """
    found = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == MASK:
            own = {part: tensors[f"{prefix}.{part}"] for part in PARTS if f"{prefix}.{part}" in tensors}
            found[f"{prefix}.{WEIGHT}"] = weight(own, f"{prefix}.{WEIGHT} in {place}")
        elif last not in PARTS:
            found[name] = tensor
        elif f"{prefix}.{MASK}" not in tensors:
            raise _damaged(f"{name} in {place}", f"there is no {MASK} with it")
    return found


def weight(parts: Mapping[str, Tensor], place: str) -> Tensor:
    """The matrix of shape (rows, cols) whose parts these are.

    Raises
    ------
    BesaError
        They do not belong together; `place` names the weight and its file.
    """
    missing = [part for part in PARTS if part not in parts]
    if missing:
        raise _damaged(place, f"{missing[0]} is missing")
    bits, values, shape = parts[MASK], parts[VALUES], parts[SHAPE]
    if shape.shape != (2,) or shape.dtype != torch.int64 or bool((shape < 0).any()):
        raise _damaged(place, f"{SHAPE} is not two sizes")
    rows, cols = shape.tolist()
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, -(-cols // 8)):
        raise _damaged(place, f"{MASK} has not a bit for each of {rows} x {cols} weights")
    mask = bitmask.unpacked(bits, cols)
    count = int(mask.sum())
    if values.shape != (count,):
        raise _damaged(place, f"{MASK} has {count} bits set, but {VALUES} has the shape {list(values.shape)}")
    return bitmask.expanded(mask, values)


def _damaged(place: str, reason: str) -> BesaError:
    return BesaError(f"{place} is damaged: {reason}", "fetch the checkpoint again, or export it anew")
