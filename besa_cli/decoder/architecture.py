"""Detection of a decoder's blocks in its module tree; unsupported models are refused by name."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from besa_cli.checkpoint import sparse_format
from besa_cli.errors import BesaError, reading
from besa_cli.models import config_json
from besa_cli.models.config_json import SUITED as _SUITED
from besa_cli.models.headers import INDEX
from besa_cli.system.disk import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def config_of(directory: Path) -> "PretrainedConfig":
    """Return the configuration of a checkpoint directory that must hold a decoder known to stock transformers.

    Models that read images beside text count, too: their language model is a decoder. So do sparse exports, which
    transformers loads as a whole with `besa_cli.hf`.

    Raises
    ------
    BesaError
        A file cannot be read or requires custom code, or the model is of an unknown type, an encoder, an
        encoder-decoder, not a causal language model, or quantized.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    config = config_json.read(directory)
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise BesaError(f"{directory} is an encoder-decoder ({kind})", _SUITED)
    if kind in ENCODERS and not getattr(config, "is_decoder", False):
        raise BesaError(f"{directory} is an encoder ({kind}): each token attends to later tokens", _SUITED)
    if kind not in DECODERS and not _reads_images(config):
        raise BesaError(
            f"{directory} is not a decoder: transformers has no causal language model for '{kind}'", _SUITED
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization and not _is_sparse(quantization):
        raise BesaError(
            f"{directory} is quantized ({kind} with a quantization_config)", "use the dense model it was made from"
        )
    return config


def _is_sparse(quantization: object) -> bool:
    """Return True for the settings in the configuration of a sparse export."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == sparse_format.METHOD


def _reads_images(config: "PretrainedConfig") -> bool:
    """Return True for a type that transformers has as a model of images and text alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL

    return config.model_type in MULTIMODAL and config.model_type not in DECODERS


def _auto_class(config: "PretrainedConfig") -> Any:
    """Return transformers' class that builds the model of a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if _reads_images(config) else AutoModelForCausalLM


def skeleton(config: "PretrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """Build the stock transformers model without weights: every tensor is on the meta device.

    Raises
    ------
    BesaError
        transformers cannot build a model from the configuration.
    """
    build: Any = _auto_class(config).from_config
    with reading(Path(str(config.name_or_path)) / config_json.FILE), torch.device("meta"):
        model: PreTrainedModel = build(config, dtype=dtype, trust_remote_code=False)
    model.train(False).requires_grad_(False)
    return model


def load_stock(directory: Path, dtype: torch.dtype, config: "PretrainedConfig | None" = None) -> "PreTrainedModel":
    """Load the stock transformers model with all its weights; code in the directory is never run.

    Parameters
    ----------
    directory : Path
    dtype : dtype
    config : PretrainedConfig, optional
        Configuration to load it with, in place of the directory's own.

    Raises
    ------
    BesaError
        The model is not supported, or transformers cannot load it.
    """
    config = config or config_of(directory)
    config_json.check_generation(directory)
    index = directory / INDEX
    if index.exists() and not isinstance(read_json(index).get("metadata"), dict):
        raise BesaError(f"{index} has no metadata: stock transformers cannot load it", 'add "metadata": {} to it')
    load: Any = _auto_class(config).from_pretrained
    with reading(directory):
        model: PreTrainedModel = load(
            directory, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    return model


def block_list(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """Find the list of decoder blocks and its name, e.g. ``model.layers``.

    Candidates are the module lists whose modules all hold matrices. Those below the model's own decoder are preferred;
    lists in image or audio towers are used only if there are no others. Of the remaining lists, the first whose length
    is the configured number of layers is returned, else the longest; the outermost list wins a tie.

    Raises
    ------
    BesaError
        There is no such list.
    """
    lists = _block_lists(model)
    decoder = model.get_decoder()
    below = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    candidates = [(name, modules) for name, modules in lists if modules in below] or lists
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    of_depth = [(name, modules) for name, modules in candidates if len(modules) == depth]
    chosen = max(of_depth or candidates, key=lambda candidate: len(candidate[1]), default=None)  # the first of a tie
    if chosen is None:
        raise BesaError(f"{type(model).__name__} has no list of blocks that hold weight matrices", _SUITED)
    return chosen


def _block_lists(model: "PreTrainedModel") -> list[tuple[str, nn.ModuleList]]:
    """List the module lists whose modules all hold matrices, outermost first; those in towers only if no others."""
    towers = tuple(f"{name}." for name, module in model.named_modules() if name and not _reads_text(module, model))
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_matrices(block) for block in module)
    ]
    return [(name, modules) for name, modules in lists if not name.startswith(towers)] or lists


def _reads_text(module: nn.Module, model: "PreTrainedModel") -> bool:
    """Return False if a submodule is a complete model for other inputs than the text, as an image tower."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return True
    known = {type(model.config), type(model.config.get_text_config())}
    return "text" in module.input_modalities and module.main_input_name == "input_ids" and type(module.config) in known


def _matrices(block: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in block.parameters())


def maximum_length(config: "PretrainedConfig") -> int | None:
    """Return the longest sequence that the model supports, in tokens; None if its configuration does not say."""
    value: object = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(value) if isinstance(value, int) and value > 0 else None


def special_tokens(config: "PretrainedConfig") -> list[int]:
    """Return the ids that the model's code may treat specially: those in its configuration, and 0, 1 and 2; sorted."""
    text = config.get_text_config()
    kinds = ("pad", "bos", "eos", "unk", "sep", "cls", "mask")
    values: list[object] = [getattr(source, f"{kind}_token_id", None) for source in (config, text) for kind in kinds]
    ids: list[object] = [0, 1, 2]
    for value in values:
        ids += value if isinstance(value, list) else [value]
    return sorted({token for token in ids if isinstance(token, int) and 0 <= token < text.vocab_size})
