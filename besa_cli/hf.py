"""Lets transformers load a sparse checkpoint of besa: ``import besa_cli.hf``, then ``from_pretrained`` as always.

The weights are expanded while they are loaded; the model is then an ordinary dense one with zeros. Without the import,
loading fails: ``config.json`` names a weights file that is not there, and only the quantizer registered here puts the
real one in its place. (An unknown ``quant_method`` alone would make transformers warn and leave weights random.)
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from besa_cli import compression, disk, sparse
from besa_cli.errors import BesaError


@register_quantization_config(sparse.METHOD)
class SparseConfig(QuantizationConfigMixin):
    """What ``config.json`` says of a sparse checkpoint: the version of its format and the name of its index."""

    def __init__(self, *, format: int = sparse.FORMAT, index: str = sparse.INDEX, **unknown: object) -> None:
        self.quant_method = sparse.METHOD  # type: ignore[assignment]  # transformers' own enumeration is closed
        if format > sparse.FORMAT:
            raise BesaError(
                f"the checkpoint has sparse format {format}, this besa knows {sparse.FORMAT}", "install a newer besa"
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
        dense = parts.get(sparse.WEIGHT)
        if dense is None:
            device = parts[sparse.VALUES].device
            own = {name: part.cpu() for name, part in parts.items()}
            dense = sparse.weight(own, name).to(device)
        return {name: [dense.to(model.get_parameter_or_buffer(name).dtype)]}

    @property
    def reverse_op(self) -> ConversionOps:
        """What `save_pretrained` does with the weight: nothing, it is dense."""
        return AsItIs()


class AsItIs(ConversionOps):
    """Leaves tensors as they are."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        """The tensors that were given."""
        return input_dict


@register_quantizer(sparse.METHOD)
class SparseQuantizer(HfQuantizer):
    """Expands a sparse checkpoint while it is loaded, after checking its files against their digests."""

    requires_calibration = True
    quantization_config: SparseConfig
    _expanded: "TemporaryDirectory[str] | None" = None
    serialized_names = {sparse.WEIGHT: [sparse.WEIGHT, *sparse.PARTS]}  # noqa: RUF012 - read by transformers as it is

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Put the index's real name into the configuration; asked before transformers looks for the weights."""
        if getattr(config, "transformers_weights", None) == sparse.NEEDS_IMPORT:
            config.transformers_weights = self.quantization_config.index
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: object
    ) -> None:
        if not checkpoint_files:
            return
        files = [Path(file) for file in checkpoint_files]
        check_files(files[0].parent, files, self.quantization_config.index)
        if files[0].suffix == compression.SUFFIX:
            self._expanded = TemporaryDirectory(prefix="besa-")
            place = Path(self._expanded.name)
            checkpoint_files[:] = [str(compression.expand(file, place)) for file in files]  # the list that is read next

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        if self._expanded is not None:
            self._expanded.cleanup()

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


def check_files(directory: Path, files: Sequence[Path], index: str = sparse.INDEX) -> None:
    """Compare files of a sparse checkpoint with the digests in its index.

    Raises
    ------
    BesaError
        One of them differs (named), or the index lists none.
    """
    digests = disk.read_json(directory / index).get("metadata", {}).get("sha256", {})
    for file in files:
        if digests.get(file.name) != disk.sha256_file(file):
            raise BesaError(f"{file} is damaged: its SHA-256 is not the one in {index}", "fetch the file again")
