"""The tensors of a GGUF file by their names in transformers, dequantized, and in transformers' order."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from besa_cli.errors import BesaError, reading
from besa_cli.models.gguf.file_header import Header, refuse

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig, PreTrainedModel

    Array = np.ndarray[Any, np.dtype[np.float32]]

_ELSEWISE = "try the same model in the safetensors format"
_TURNED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # of GPT-2: columns are outputs


def values(header: Header, name: str) -> "Array":
    """A tensor as float32, of the shape that the file states.

    Raises
    ------
    BesaError
        The gguf package cannot dequantize its type.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape, quants

    tensor = header.tensors[name]
    kind = GGMLQuantizationType[tensor.kind]
    with reading(header.path, _ELSEWISE), np.errstate(all="ignore"):  # what is not finite is refused by the caller
        data = np.fromfile(header.path, np.uint8, tensor.size, offset=tensor.place)
        whole = quants.dequantize(data.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind)
        return np.ascontiguousarray(whole, dtype=np.float32).reshape(tensor.shape)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight of the model in transformers.

    Attributes
    ----------
    stored : str or None
        Its name in the file; None stands for zeros: a bias that the file has in no block.
    shape : tuple of int
    """

    stored: str | None
    shape: tuple[int, ...]


def weights(header: Header, config: "PretrainedConfig", read: Collection[str]) -> dict[str, Weight]:
    """All weights of the model, sorted by their names in transformers.

    Parameters
    ----------
    header : Header
    config : PretrainedConfig
    read : collection of str
        Tensors of the file that have found their way into the configuration.

    Raises
    ------
    BesaError
        A weight is missing or of another shape, or a tensor of the file is no part of the model.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    (kind,) = (MODEL_ARCH(key) for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    mapped = get_tensor_name_map(kind, header.fields[f"{header.architecture}.block_count"])  # type: ignore[arg-type]
    found: dict[str, Weight] = {}
    for own, shape in sorted(_shapes(header, config).items()):
        named = (mapped.get_name(at, try_suffixes=(".weight", ".bias")) for at in (own, own.partition(".")[2]))
        name = next(filter(None, named), None)  # of some models the package knows the names without the first part
        if name is None:
            raise BesaError(f"{header.path}: {own} of {config.model_type} has no name in GGUF", _ELSEWISE)
        tensor = header.tensors.get(name)
        if tensor is None and not _left_out(header, name):
            raise BesaError(f"{header.path} lacks {own} ({name})", _ELSEWISE)
        turned = header.architecture == "gpt2" and name.endswith(_TURNED)
        if tensor is not None and _bare(tensor.shape) != _bare(shape[::-1] if turned else shape):
            refuse(header, name, f"is of shape {tensor.shape}, the model's {own} of {shape}")
        found[own] = Weight(stored=None if tensor is None else name, shape=shape)
    _refuse_unused(header, {*read, *(weight.stored for weight in found.values() if weight.stored)})
    return found


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the dimensions of one, which the file leaves out of convolutions."""
    return tuple(size for size in shape if size != 1)


def _shapes(header: Header, config: "PretrainedConfig") -> dict[str, tuple[int, ...]]:
    """What stock transformers' model holds, without the weights that are tied to others."""
    import torch
    from transformers import AutoModelForCausalLM

    with reading(header.path), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def _left_out(header: Header, name: str) -> bool:
    """Whether it is a bias that no block has, in a model that has others."""
    words = name.split(".")
    there = [other for other in header.tensors if other.startswith("blk.") and other.endswith(".bias")]
    kinds = {other.split(".", 2)[2] for other in there}
    return words[0] == "blk" and words[-1] == "bias" and bool(kinds) and ".".join(words[2:]) not in kinds


def _refuse_unused(header: Header, used: Collection[str]) -> None:
    for name in header.tensors:
        if name not in used:
            refuse(header, name, "is a tensor that besa does not know in such a model")


def restored(header: Header, name: str, config: "PretrainedConfig") -> "Array":
    """A tensor's values in transformers' order and offset; the shape may lack dimensions of one.

    Raises
    ------
    BesaError
        See `values`.
    """
    undo = _UNDO.get(header.architecture)
    found = values(header, name)
    return found if undo is None else undo(name, found, config)


Undo = Callable[[str, "Array", "PretrainedConfig"], "Array"]


def _halves(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    """Channels that turn together lie side by side in llama.cpp, and half a head apart in transformers."""
    for part, heads in ((".attn_q.", config.num_attention_heads), (".attn_k.", config.num_key_value_heads)):
        if part in name:
            return value.reshape(heads, -1, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    return value


def _less_one(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    """Norms that transformers adds 1 to are stored with it added."""
    return value - 1 if name.endswith("norm.weight") else value


def _turned(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    return value.T if name.endswith(_TURNED) else value


def _bloom(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    """Queries, keys and values: head after head in transformers, one after the other in llama.cpp."""
    if ".attn_qkv." not in name:
        return value
    return value.reshape(3, config.n_head, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)


def _falcon(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    """The same, by groups of heads that share keys and values."""
    import numpy as np

    if ".attn_qkv." not in name:
        return value
    groups, heads = config.num_kv_heads, config.num_attention_heads
    width = value.shape[0] // (heads + 2 * groups)
    parts = np.split(value, [heads * width, (heads + groups) * width])
    grouped = [part.reshape(groups, -1, width, *value.shape[1:]) for part in parts]
    return np.concatenate(grouped, axis=1).reshape(value.shape)


def _mamba(name: str, value: "Array", config: "PretrainedConfig") -> "Array":
    """The decay, which transformers holds as the logarithm of its negative."""
    import numpy as np

    with np.errstate(all="ignore"):  # a decay that is not negative: not a number, which the caller refuses
        return np.log(-value) if name.endswith(".ssm_a") else value


_UNDO: Mapping[str, Undo] = {
    "llama": _halves,
    "gemma2": _less_one,
    "gemma3": _less_one,
    "mamba": _mamba,
    "nemotron": _less_one,
    "gpt2": _turned,
    "bloom": _bloom,
    "falcon": _falcon,
}
