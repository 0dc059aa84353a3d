"""Loader of sparse checkpoints for transformers: ``import besa_cli.hf``, then call ``from_pretrained`` as usual.

The weights are expanded while they are loaded; the resulting model is an ordinary dense one with zeros. Without the
import, loading fails: ``config.json`` names a weights file that does not exist, and only the quantizer registered here
replaces it by the real one. (With an unknown ``quant_method`` alone, transformers would only warn and leave the weights
random.)
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from besa_cli.checkpoint import sparse_format, sparse_index, zstd
from besa_cli.checkpoint.sparse_index import Index
from besa_cli.errors import BesaError

_problems: "WeakKeyDictionary[PreTrainedModel, BesaError]" = WeakKeyDictionary()  # model → its first damaged weight


@register_quantization_config(sparse_format.METHOD)
class SparseConfig(QuantizationConfigMixin):
    """The quantization config of a sparse checkpoint: the version of its format and the name of its index."""

    def __init__(
        self, *, format: int = sparse_format.FORMAT, index: str = sparse_format.INDEX, **unknown: object
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
        self.dequantize = True  # transformers then runs the operation `dequantize` and drops this configuration


Parts = dict[str, Any]  # stored tensors by name, or lists of one


class Expand(ConversionOps):
    """Conversion of the stored parts of a weight to the dense weight."""

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

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        if self._expanded is not None:
            self._expanded.cleanup()
        problem = _problems.pop(model, None)
        if problem is not None:
            raise problem

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Return the conversion that transformers runs on the collected parts of each weight."""
        return {"dequantize": Expand}

    def is_serializable(self) -> bool:
        """Return True: the loaded model is dense and is saved as such."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the loaded model is an ordinary dense one."""
        return True


def _check(directory: Path) -> Index:
    """Compare every file of a sparse checkpoint with its digest and return the index."""
    index = sparse_index.read(directory)
    for file in index.digests:
        index.check(file)
    return index
