"""Lets transformers load a sparse checkpoint of besa: ``import besa_cli.hf``, then ``from_pretrained`` as always.

The weights are expanded while they are loaded; the model is then an ordinary dense one with zeros. Without the import,
loading fails: ``config.json`` names a weights file that is not there, and only the quantizer registered here puts the
real one in its place. (An unknown ``quant_method`` alone would make transformers warn and leave weights random.)
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

_problems: "WeakKeyDictionary[PreTrainedModel, BesaError]" = WeakKeyDictionary()  # the first weight not to be expanded


@register_quantization_config(sparse_format.METHOD)
class SparseConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a sparse checkpoint: the version of its format and the name of its index."""

    def __init__(
        self, *, format: int = sparse_format.FORMAT, index: str = sparse_format.INDEX, **unknown: object
    ) -> None:
        self.quant_method = sparse_format.METHOD  # type: ignore[assignment]  # transformers' own enumeration is closed
        if type(format) is not int or format != sparse_format.FORMAT:
            raise BesaError(
                f"the checkpoint has sparse format {format!r}, this besa knows {sparse_format.FORMAT}",
                "install a newer besa",
            )
        if index != sparse_format.INDEX:
            raise BesaError(
                f"the checkpoint's config.json names the index {index!r}, not {sparse_format.INDEX}",
                "fetch the checkpoint again",
            )
        self.format = format
        self.index = index
        self.dequantize = True  # transformers then asks for the operation `dequantize`, and forgets this configuration


class Expand(ConversionOps):
    """Makes the dense weight out of the parts that transformers has collected for it."""

    def __init__(self, quantizer: HfQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **context: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """One parameter, in the dtype that it has in the model."""
        name, model = str(context["full_layer_name"]), context["model"]
        parts = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        wanted = model.get_parameter_or_buffer(name)
        try:
            dense = _dense(parts, name)
        except BesaError as error:  # one that is raised in here would be buried in a report of transformers'
            _problems.setdefault(model, error)
            dense = torch.zeros(wanted.shape)
        return {name: [dense.to(wanted.dtype)]}

    @property
    def reverse_op(self) -> ConversionOps:
        """What `save_pretrained` does with the weight: nothing, it is dense."""
        return AsItIs()


def _dense(parts: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A weight, whole, out of what a file holds of it."""
    if len(parts) == 1 and sparse_format.WEIGHT in parts:
        return parts[sparse_format.WEIGHT]
    if sparse_format.WEIGHT in parts:
        raise BesaError(f"{name} is damaged: it is there both whole and in parts", "fetch the checkpoint again")
    device = next(iter(parts.values())).device
    return sparse_format.weight({part: tensor.cpu() for part, tensor in parts.items()}, name).to(device)


class AsItIs(ConversionOps):
    """Leaves tensors as they are."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        """The tensors that were given."""
        return input_dict


@register_quantizer(sparse_format.METHOD)
class SparseQuantizer(HfQuantizer):
    """Expands a sparse checkpoint while it is loaded, after checking its files against their digests."""

    requires_calibration = True
    quantization_config: SparseConfig
    _expanded: "TemporaryDirectory[str] | None" = None
    _checked: Index | None = None
    serialized_names = {sparse_format.WEIGHT: [sparse_format.WEIGHT, *sparse_format.PARTS]}  # noqa: RUF012 - read by transformers as it is

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Put the index's real name into the configuration; asked before transformers looks for the weights."""
        named = getattr(config, "transformers_weights", None)
        if named == sparse_format.NEEDS_IMPORT:
            config.transformers_weights = sparse_format.INDEX
        elif named not in (None, sparse_format.INDEX):
            raise BesaError(
                f"the checkpoint's config.json names as its weights {named!r}, not {sparse_format.NEEDS_IMPORT}",
                "fetch the checkpoint again",
            )
        directory = Path(str(config._name_or_path))
        if (directory / sparse_format.INDEX).is_file():  # a local one: before transformers opens any file of it
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
            place = Path(self._expanded.name)
            checkpoint_files[:] = [str(index.expand(file, place)) for file in files]  # the list that is read next
        for plain, file in zip(checkpoint_files, files, strict=True):
            index.require_names(Path(plain), file.name)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        if self._expanded is not None:
            self._expanded.cleanup()
        problem = _problems.pop(model, None)
        if problem is not None:
            raise problem

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """What transformers runs on the collected parts of each weight."""
        return {"dequantize": Expand}

    def is_serializable(self) -> bool:
        """The loaded model is dense and is saved as such."""
        return True

    @property
    def is_trainable(self) -> bool:
        """It is an ordinary dense model."""
        return True


def _check(directory: Path) -> Index:
    """The index of a sparse checkpoint, after comparing every file with its digest."""
    index = sparse_index.read(directory)
    for file in index.digests:
        index.check(file)
    return index
