"""Encoding of pruned weights in a sparse checkpoint: a bit mask and the remaining values, row after row.

`docs/export.md` specifies the format.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from besa_cli.errors import BesaError
from besa_cli.ops import affine, packing
from besa_cli.ops.affine import Grid, Quantized

METHOD = "besa"  # the quant_method of config.json
FORMAT = 1
INDEX = "sparse.safetensors.index.json"
NEEDS_IMPORT = "import-besa_cli.hf-to-load-this.safetensors.index.json"  # never exists, see hf.py
WEIGHT, MASK, VALUES, SHAPE = "weight", "weight_mask", "weight_values", "weight_shape"
CODES, SCALE, ZERO, GRID = "weight_codes", "weight_scale", "weight_zero", "weight_grid"  # of quantized weights
PARTS = (MASK, VALUES, SHAPE, CODES, SCALE, ZERO, GRID)
_NEEDED = (MASK, VALUES, SHAPE)


def encoded(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Encode a tensor in the smaller form: the three parts of a sparse matrix, or the tensor itself; by name.

    Parameters
    ----------
    name : str
        The tensor's name in the checkpoint.
    tensor : Tensor
        Only a matrix of shape (rows, cols) whose name ends in ``.weight`` may become parts.
    """
    prefix, _, last = name.rpartition(".")
    if last != WEIGHT or tensor.dim() != 2:
        return {name: tensor}
    mask = packing.stored_mask(tensor)
    parts = {
        MASK: packing.pack_mask(mask),
        VALUES: tensor[mask],
        SHAPE: torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if sum(part.nbytes for part in parts.values()) >= tensor.nbytes:
        return {name: tensor}
    return {f"{prefix}.{part}": value for part, value in parts.items()}


def encoded_bytes(rows: int, cols: int, kept: int, itemsize: int) -> int:
    """Return the bytes of what `encoded` makes of a matrix with `kept` weights that are not zero.

    Parameters
    ----------
    rows, cols, kept : int
    itemsize : int
        Bytes of a weight.
    """
    mask, shape = rows * -(-cols // 8), 2 * 8
    return min(mask + kept * itemsize + shape, rows * cols * itemsize)


def encoded_codes(name: str, tensor: Tensor, quantized: Quantized) -> dict[str, Tensor]:
    """Encode a quantized weight as its mask, the codes that do not stand for zero, and its grid; by name.

    Parameters
    ----------
    name : str
        The weight's name in the checkpoint.
    tensor : Tensor
        The dequantized weight, in the checkpoint's dtype, of shape (rows, cols).
    quantized : Quantized

    Raises
    ------
    BesaError
        The dequantized codes differ from `tensor`.
    """
    grid, cols = quantized.grid, tensor.shape[1]
    if not torch.equal(affine.dequantize(quantized).to(tensor.dtype), tensor):
        raise BesaError(f"{name} differs from its codes", "make the stage again with --restart")
    mask = quantized.codes != affine.per_column(quantized.zeros, grid, cols)
    parts = {
        MASK: packing.pack_mask(mask),
        VALUES: torch.empty(0, dtype=tensor.dtype),  # stores only the dtype
        SHAPE: torch.tensor(tensor.shape, dtype=torch.int64),
        CODES: packing.pack_codes(quantized.codes[mask].unsqueeze(0), grid.bits)[0],
        SCALE: quantized.scales,
        GRID: torch.tensor([grid.bits, grid.width(cols)], dtype=torch.int64),
    }
    if not grid.symmetric:
        parts[ZERO] = quantized.zeros
    prefix = name.rpartition(".")[0]
    return {f"{prefix}.{part}": value for part, value in parts.items()}


def codes(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Decode the codes, scales and zero points of one file, by their names in a quantized stage.

    Raises
    ------
    BesaError
        Parts are missing or inconsistent.
    """
    decoded_codes: dict[str, Tensor] = {}
    for name in tensors:
        prefix, _, last = name.rpartition(".")
        if last == CODES:
            quantized = _quantized(_parts(tensors, prefix), f"{prefix}.{WEIGHT} in {place}")
            decoded_codes |= affine.to_tensors(quantized, prefix)
    return decoded_codes


def decoded(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Decode all tensors of one file: the inverse of `encoded`.

    Raises
    ------
    BesaError
        Parts are missing or inconsistent; names the tensor and its file `place`.
    """
    dense = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == MASK:
            if f"{prefix}.{WEIGHT}" in tensors:
                raise _damaged(f"{prefix}.{WEIGHT} in {place}", "it is stored both dense and in parts")
            dense[f"{prefix}.{WEIGHT}"] = weight(_parts(tensors, prefix), f"{prefix}.{WEIGHT} in {place}")
        elif last not in PARTS:
            dense[name] = tensor
        elif f"{prefix}.{MASK}" not in tensors:
            raise _damaged(f"{name} in {place}", f"its {MASK} is missing")
    return dense


def _parts(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {part: tensors[f"{prefix}.{part}"] for part in PARTS if f"{prefix}.{part}" in tensors}


def dense_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of the result of `decoded`, from the stored shapes; invalid shapes count 0."""
    total = 0
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        values = tensors.get(f"{prefix}.{VALUES}")
        if last == SHAPE and values is not None and tensor.dtype == torch.int64 and tensor.dim() == 1:
            total += values.element_size() * math.prod(tensor.tolist())
        elif last not in PARTS:
            total += tensor.nbytes
    return total


def weight(parts: Mapping[str, Tensor], place: str) -> Tensor:
    """Decode the parts of one weight; returns the matrix of shape (rows, cols).

    Raises
    ------
    BesaError
        The parts are inconsistent; `place` names the weight and its file.
    """
    if CODES not in parts:
        mask, values = kept(parts, place)
        return packing.expand(mask, values)
    quantized, dtype = coded(parts, place)
    return affine.dequantize(quantized).to(dtype)


def coded(parts: Mapping[str, Tensor], place: str) -> tuple[Quantized, torch.dtype]:
    """Validate the parts of a weight with codes; returns them, and the dtype that the weights are rounded to.

    Raises
    ------
    BesaError
        The parts are inconsistent; `place` names the weight and its file.
    """
    values = _values(parts, place)
    if values.numel():
        raise _damaged(place, f"it has both {VALUES} and {CODES}")
    return _quantized(parts, place), values.dtype


def kept(parts: Mapping[str, Tensor], place: str) -> tuple[Tensor, Tensor]:
    """Validate the parts of a weight without codes; returns its mask, bool of shape (rows, cols), and its values.

    Raises
    ------
    BesaError
        The parts are inconsistent; `place` names the weight and its file.
    """
    mask = _mask(parts, place)
    values, count = _values(parts, place), int(mask.sum())
    strangers = [part for part in (SCALE, ZERO, GRID) if part in parts]
    if strangers:
        raise _damaged(place, f"it has {strangers[0]} but no {CODES}")
    if values.shape != (count,):
        raise _damaged(place, f"{MASK} has {count} bits set, but {VALUES} has the shape {list(values.shape)}")
    if not bool(packing.stored_mask(values.unsqueeze(0)).all()) or not bool(torch.isfinite(values.float()).all()):
        raise _damaged(place, f"{VALUES} holds zeros, NaN or infinity")
    return mask, values


def _values(parts: Mapping[str, Tensor], place: str) -> Tensor:
    if VALUES not in parts:
        raise _damaged(place, f"{VALUES} is missing")
    if not parts[VALUES].is_floating_point():
        raise _damaged(place, f"{VALUES} has the dtype {parts[VALUES].dtype}")
    return parts[VALUES]


def _mask(parts: Mapping[str, Tensor], place: str) -> Tensor:
    missing = [part for part in _NEEDED if part not in parts]
    if missing:
        raise _damaged(place, f"{missing[0]} is missing")
    bits, shape = parts[MASK], parts[SHAPE]
    if shape.shape != (2,) or shape.dtype != torch.int64 or bool((shape < 0).any()):
        raise _damaged(place, f"{SHAPE} is not two sizes")
    rows, cols = shape.tolist()
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, -(-cols // 8)):
        raise _damaged(place, f"{MASK} does not have one bit for each of {rows} x {cols} weights")
    if cols % 8 and bool((bits[:, -1] >> (cols % 8)).any()):
        raise _damaged(place, f"{MASK} has bits set beyond the last of {cols} columns")
    return packing.unpack_mask(bits, cols)


def _quantized(parts: Mapping[str, Tensor], place: str) -> Quantized:
    """Decode the parts of a quantized weight; codes that are not stored are those of zero."""
    mask = _mask(parts, place)
    missing = [part for part in (SCALE, GRID) if part not in parts]
    if missing:
        raise _damaged(place, f"{missing[0]} is missing")
    grid, data = _grid(parts[GRID], mask.shape[1], place, symmetric=ZERO not in parts), parts[CODES]
    scales, zeros = _scales(parts, grid, tuple(mask.shape), place)
    count, bits, cols = int(mask.sum()), grid.bits, mask.shape[1]
    if data.dtype != torch.uint8 or tuple(data.shape) != (-(-count * bits // 8),):
        raise _damaged(place, f"{MASK} has {count} bits set, but {CODES} has the shape {list(data.shape)}")
    if count * bits % 8 and int(data[-1]) >> count * bits % 8:
        raise _damaged(place, f"{CODES} has bits set beyond the last of {count} codes")
    zero_codes = affine.per_column(zeros, grid, cols)
    codes = zero_codes.clone()
    codes[mask] = packing.unpack_codes(data.unsqueeze(0), bits, count)[0]
    if bool((codes == zero_codes)[mask].any()):
        raise _damaged(place, f"{CODES} holds codes that stand for zero")
    return Quantized(codes=codes, scales=scales, zeros=zeros, grid=grid)


def _grid(stored: Tensor, cols: int, place: str, *, symmetric: bool) -> Grid:
    well_formed = stored.dtype == torch.int64 and stored.shape == (2,)
    bits, width = stored.tolist() if well_formed else (0, 0)
    if bits not in affine.BITS or not 1 <= width <= cols:
        raise _damaged(place, f"{GRID} is not the bits and the columns per group")
    return Grid(bits=bits, group_size=width, symmetric=symmetric)


def _scales(parts: Mapping[str, Tensor], grid: Grid, shape: tuple[int, ...], place: str) -> tuple[Tensor, Tensor]:
    """Return scales and zero points, both of shape (rows, groups)."""
    rows, cols = shape
    groups = (rows, grid.groups(cols))
    scales = parts[SCALE]
    zeros = parts.get(ZERO, torch.full(groups, grid.middle, dtype=torch.uint8))
    if tuple(scales.shape) != groups or tuple(zeros.shape) != groups:
        raise _damaged(place, f"{SCALE} does not have one number for each of {groups[0]} x {groups[1]} groups")
    if scales.dtype != torch.float16 or not bool((scales.isfinite() & (scales > 0)).all()):
        raise _damaged(place, f"{SCALE} holds numbers that are not positive fp16 scales")
    if zeros.dtype != torch.uint8 or bool((zeros > grid.top).any()):
        raise _damaged(place, f"{ZERO} holds numbers that are not codes of {grid.bits} bits")
    return scales, zeros


def _damaged(place: str, reason: str) -> BesaError:
    return BesaError(f"{place} is damaged: {reason}", "fetch the checkpoint again, or make the export again")
