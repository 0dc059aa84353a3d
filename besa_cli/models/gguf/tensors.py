"""The tensors of a GGUF file by their names in transformers, dequantized and in transformers' order."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from besa_cli.errors import BesaError, reading
from besa_cli.models.gguf.file_header import Header, refuse

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PretrainedConfig, PreTrainedModel

    Array = npt.NDArray[np.float32]

_USE_SAFETENSORS = "use the same model in the safetensors format"
_TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # GPT-2's


def values(header: Header, name: str) -> "Array":
    """Dequantize a tensor to float32, in the shape that the file states.

    Raises
    ------
    BesaError
        The gguf package cannot dequantize its type.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape, quants

    tensor = header.tensors[name]
    kind = GGMLQuantizationType[tensor.kind]
    with reading(header.path, _USE_SAFETENSORS), np.errstate(all="ignore"):  # the caller refuses non-finite values
        data = np.fromfile(header.path, np.uint8, tensor.size, offset=tensor.place)
        dequantized = quants.dequantize(data.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind)
        return np.ascontiguousarray(dequantized, dtype=np.float32).reshape(tensor.shape)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight of the model in transformers.

    Attributes
    ----------
    stored : str or None
        Name in the file; None stands for zeros: a bias that the file has in no block.
    shape : tuple of int
    """

    stored: str | None
    shape: tuple[int, ...]


def weights(header: Header, config: "PretrainedConfig", read: Collection[str]) -> dict[str, Weight]:
    """Map all weights of the model to tensors of the file, sorted by their names in transformers.

    Parameters
    ----------
    header : Header
    config : PretrainedConfig
    read : collection of str
        Names of the tensors that the configuration used.

    Raises
    ------
    BesaError
        A weight is missing or of another shape, or a tensor of the file is not part of the model.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    (kind,) = (MODEL_ARCH(number) for number, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    name_map = get_tensor_name_map(kind, header.fields[f"{header.architecture}.block_count"])  # type: ignore[arg-type]
    mapping: dict[str, Weight] = {}
    for key, shape in sorted(_shapes(header, config).items()):
        candidates = (name_map.get_name(at, try_suffixes=(".weight", ".bias")) for at in (key, key.partition(".")[2]))
        name = next(filter(None, candidates), None)  # some names are known without their first part
        if name is None:
            raise BesaError(f"{header.path}: {key} of {config.model_type} has no name in GGUF", _USE_SAFETENSORS)
        tensor = header.tensors.get(name)
        if tensor is None and not _is_omitted_bias(header, name):
            raise BesaError(f"{header.path} lacks {key} ({name})", _USE_SAFETENSORS)
        transposed = header.architecture == "gpt2" and name.endswith(_TRANSPOSED)
        if tensor is not None and _squeezed(tensor.shape) != _squeezed(shape[::-1] if transposed else shape):
            refuse(header, name, f"has the shape {tensor.shape}, but {key} of the model has {shape}")
        mapping[key] = Weight(stored=None if tensor is None else name, shape=shape)
    _refuse_unused(header, {*read, *(weight.stored for weight in mapping.values() if weight.stored)})
    return mapping


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without dimensions of size one, which the file leaves out of convolutions."""
    return tuple(size for size in shape if size != 1)


def _shapes(header: Header, config: "PretrainedConfig") -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of stock transformers' model, without weights tied to others."""
    import torch
    from transformers import AutoModelForCausalLM

    with reading(header.path), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def _is_omitted_bias(header: Header, name: str) -> bool:
    """Check for a bias that no block has, in a model that has other biases."""
    parts = name.split(".")
    biases = [other for other in header.tensors if other.startswith("blk.") and other.endswith(".bias")]
    kinds = {other.split(".", 2)[2] for other in biases}
    return parts[0] == "blk" and parts[-1] == "bias" and bool(kinds) and ".".join(parts[2:]) not in kinds


def _refuse_unused(header: Header, used: Collection[str]) -> None:
    for name in header.tensors:
        if name not in used:
            refuse(header, name, "is a tensor that besa does not know in this architecture")


def restore(header: Header, name: str, config: "PretrainedConfig") -> "Array":
    """Dequantize a tensor in transformers' order and offset; dimensions of size one may be missing.

    Raises
    ------
    BesaError
        The gguf package cannot dequantize its type.
    """
    undo = _UNDO.get(header.architecture)
    array = values(header, name)
    return array if undo is None else undo(name, array, config)


Undo = Callable[[str, "Array", "PretrainedConfig"], "Array"]


def _split_pairs(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    """Reorder the rotary channels: pairs are adjacent in llama.cpp, and half a head apart in transformers."""
    for part, heads in ((".attn_q.", config.num_attention_heads), (".attn_k.", config.num_key_value_heads)):
        if part in name:
            return value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return value


def _subtract_one(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    """Subtract the 1 that llama.cpp adds to the norms and transformers adds itself."""
    return value - 1 if name.endswith("norm.weight") else value


def _transpose(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    return value.T if name.endswith(_TRANSPOSED) else value


def _bloom(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    """Reorder queries, keys and values: head by head in transformers, all queries first in llama.cpp."""
    if ".attn_qkv." not in name:
        return value
    return value.reshape(3, config.n_head, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)


def _falcon(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    """Reorder queries, keys and values by groups of heads that share keys and values."""
    import numpy as np

    if ".attn_qkv." not in name:
        return value
    groups, heads = config.num_kv_heads, config.num_attention_heads
    width = value.shape[0] // (heads + 2 * groups)
    parts = np.split(value, [heads * width, (heads + groups) * width])
    grouped = [part.reshape(groups, -1, width, *value.shape[1:]) for part in parts]
    return np.concatenate(grouped, axis=1).reshape(value.shape)


def _mamba(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    """Convert the decay to transformers' form, the logarithm of its negative."""
    import numpy as np

    with np.errstate(all="ignore"):  # the caller refuses the NaN of a non-negative decay
        return np.log(-value) if name.endswith(".ssm_a") else value


_UNDO: Mapping[str, Undo] = {
    "llama": _split_pairs,
    "gemma2": _subtract_one,
    "gemma3": _subtract_one,
    "mamba": _mamba,
    "nemotron": _subtract_one,
    "gpt2": _transpose,
    "bloom": _bloom,
    "falcon": _falcon,
}
