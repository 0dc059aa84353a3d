"""Loader of sparse checkpoints for transformers: ``import besa_cli.hf``, then call ``from_pretrained`` as usual.

The weights are expanded while they are loaded; the resulting model is an ordinary dense one with zeros. With
``quantization_config=SparseConfig(packed=True)`` they stay packed, and the CPU multiplies them so.

Without the import, loading fails: ``config.json`` names a weights file that does not exist, and only the quantizer
registered here replaces it by the real one. (With an unknown ``quant_method`` alone, transformers would only warn and
leave the weights random.)
"""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from besa_cli.checkpoint import sparse_format, sparse_index, zstd
from besa_cli.checkpoint.sparse_index import Index
from besa_cli.errors import BesaError
from besa_cli.models import headers
from besa_cli.ops.kernels import native_tiles
from besa_cli.runtime.linear import PackedLinear, StreamedLinear

logger = logging.getLogger(__name__)

_PACKABLE = ("BF16", "F16")  # dtypes of values, as headers name them

_problems: "WeakKeyDictionary[PreTrainedModel, BesaError]" = WeakKeyDictionary()  # model → its first damaged weight


@register_quantization_config(sparse_format.METHOD)
class SparseConfig(QuantizationConfigMixin):
    """The quantization config of a sparse checkpoint.

    Parameters
    ----------
    format : int
        Version of the checkpoint's format.
    index : str
        Name of its index.
    packed : bool
        Keep the linears packed in memory instead of expanding them. The model then runs on the CPU, without gradients,
        and cannot be saved. Given to ``from_pretrained``, not stored in checkpoints.
    """

    def __init__(
        self,
        *,
        format: int = sparse_format.FORMAT,
        index: str = sparse_format.INDEX,
        packed: bool = False,
        **unknown: object,
    ) -> None:
        self.quant_method = sparse_format.METHOD  # type: ignore[assignment]  # transformers' own enumeration is closed
        if type(format) is not int or format != sparse_format.FORMAT:
            raise BesaError(
                f"the checkpoint has sparse format {format!r}, this version of besa reads {sparse_format.FORMAT}",
                "install a newer besa",
            )
        if index != sparse_format.INDEX:
            raise BesaError(
                f"the checkpoint's config.json names the index {index!r}, not {sparse_format.INDEX}",
                "fetch the checkpoint again",
            )
        self.format = format
        self.index = index
        self.packed = packed

    @property
    def dequantize(self) -> bool:
        """Return whether the model becomes an ordinary dense one; transformers then drops this configuration."""
        return not self.packed

    def get_loading_attributes(self) -> dict[str, bool]:
        """Return what an argument of ``from_pretrained`` may change about the checkpoint's own configuration."""
        return {"packed": self.packed}


# transformers looks for loading attributes in the configurations of its own methods only.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, SparseConfig)  # type: ignore[assignment]


Parts = dict[str, Any]  # stored tensors by name, or lists of one


class Expand(ConversionOps):
    """Conversion of the stored parts of a weight to the dense weight, or to the packed one of a `PackedLinear`."""

    def __init__(self, quantizer: HfQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(
        self,
        input_dict: Parts,
        source_patterns: list[str],
        target_patterns: list[str],
        **context: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Return one parameter by name, in its dtype in the model."""
        name, model = str(context["full_layer_name"]), context["model"]
        parts = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, PackedLinear):
            return {name: [_packed(module, parts, name, model)]}
        parameter = model.get_parameter_or_buffer(name)
        try:
            dense = _dense(parts, name)
        except BesaError as error:  # raised after loading: transformers would bury it in a report of its own
            _problems.setdefault(model, error)
            dense = torch.zeros(parameter.shape)
        return {name: [dense.to(parameter.dtype)]}

    @property
    def reverse_op(self) -> ConversionOps:
        """The inverse that `save_pretrained` applies: none, since the weight is dense."""
        return Unchanged()


def _packed(module: PackedLinear, parts: dict[str, torch.Tensor], name: str, model: PreTrainedModel) -> torch.Tensor:
    """Pack the parts of a weight into its module and return the new parameter."""
    try:
        module.pack({part: tensor.cpu() for part, tensor in parts.items()}, name)
    except BesaError as error:
        _problems.setdefault(model, error)
        return torch.nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
    return module.weight


def _dense(parts: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the dense weight for the tensors that a file holds of it."""
    if len(parts) == 1 and sparse_format.WEIGHT in parts:
        return parts[sparse_format.WEIGHT]
    if sparse_format.WEIGHT in parts:
        raise BesaError(f"{name} is damaged: it is stored both dense and in parts", "fetch the checkpoint again")
    device = next(iter(parts.values())).device
    return sparse_format.weight({part: tensor.cpu() for part, tensor in parts.items()}, name).to(device)


class Unchanged(ConversionOps):
    """Conversion that leaves tensors unchanged."""

    def convert(
        self, input_dict: Parts, source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> Parts:
        """Return the input tensors."""
        return input_dict


@register_quantizer(sparse_format.METHOD)
class SparseQuantizer(HfQuantizer):
    """Quantizer that expands a sparse checkpoint during loading, after checking the digests of its files."""

    requires_calibration = True
    quantization_config: SparseConfig
    _expanded: "TemporaryDirectory[str] | None" = None
    _checked: Index | None = None
    serialized_names = {sparse_format.WEIGHT: [sparse_format.WEIGHT, *sparse_format.PARTS]}  # noqa: RUF012 - transformers reads it from the class

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Set the real name of the index in the config; transformers calls this before it looks for the weights."""
        weights_name = getattr(config, "transformers_weights", None)
        if weights_name == sparse_format.NEEDS_IMPORT:
            config.transformers_weights = sparse_format.INDEX
        elif weights_name not in (None, sparse_format.INDEX):
            raise BesaError(
                f"the checkpoint's config.json names the weights {weights_name!r}, not {sparse_format.NEEDS_IMPORT}",
                "fetch the checkpoint again",
            )
        directory = Path(str(config._name_or_path))
        if (directory / sparse_format.INDEX).is_file():  # local: check it before transformers opens any of its files
            self._checked = _check(directory)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: object
    ) -> None:
        if not checkpoint_files:
            return
        files = [Path(file) for file in checkpoint_files]
        if self._checked is None or self._checked.directory.absolute() != files[0].parent.absolute():
            self._checked = _check(files[0].parent)
        index = self._checked
        if {file.name for file in files} != set(index.digests):
            raise BesaError(f"{index.directory / sparse_format.INDEX} lists files without tensors", "fetch it again")
        if files[0].suffix == zstd.SUFFIX:
            self._expanded = TemporaryDirectory(prefix="besa-")
            directory = Path(self._expanded.name)
            checkpoint_files[:] = [str(index.expand(file, directory)) for file in files]  # transformers reads this list
        for plain, file in zip(checkpoint_files, files, strict=True):
            index.require_names(Path(plain), file.name)
        if self.quantization_config.packed:
            _replace_linears(model, [Path(file) for file in checkpoint_files])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        if self._expanded is not None:
            self._expanded.cleanup()
        problem = _problems.pop(model, None)
        if problem is not None:
            raise problem
        if self.quantization_config.packed:
            _leave_files(model)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Return the conversion that transformers runs on the collected parts of each weight."""
        return {"dequantize": Expand, "deserialize": Expand}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: object) -> bool:
        """Return whether a parameter holds packed bytes: transformers then does not compare shapes."""
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), PackedLinear)

    def is_serializable(self) -> bool:
        """Return whether the loaded model is dense and can be saved."""
        return not self.quantization_config.packed

    @property
    def is_trainable(self) -> bool:
        """Return whether the loaded model is an ordinary dense one."""
        return not self.quantization_config.packed


def _replace_linears(model: PreTrainedModel, files: list[Path]) -> None:
    """Replace the linears that files hold in parts by packed ones, and the head by one for single vectors."""
    dtypes = {name: entry["dtype"] for file in files for name, entry in headers.entries(file).items()}
    linears = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    for name, linear in linears.items():
        if dtypes.get(f"{name}.{sparse_format.VALUES}") in _PACKABLE:
            model.set_submodule(name, PackedLinear(linear))
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        streamed = StreamedLinear(head.in_features, head.out_features, head.bias is not None, "meta", head.weight.dtype)
        model.set_output_embeddings(streamed)
    if native_tiles.level() in (native_tiles.TORCH, "plain"):
        logger.warning("packed weights run slowly here: %s", native_tiles.reason())


def _leave_files(model: PreTrainedModel) -> None:
    """Copy the dense parameters of a packed model out of the files that transformers maps.

    A single one that stays would keep its file mapped, whose pages were read while the weights were packed and count as
    the memory of the process.
    """
    for module in model.modules():
        if not isinstance(module, PackedLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()


def _check(directory: Path) -> Index:
    """Compare every file of a sparse checkpoint with its digest and return the index."""
    index = sparse_index.read(directory)
    for file in index.digests:
        index.check(file)
    return index
