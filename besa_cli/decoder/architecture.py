"""Where the blocks and linears of a decoder are, found by looking; what cannot be handled is refused by name."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from besa_cli.errors import BesaError, reading
from besa_cli.models import config_json
from besa_cli.models.config_json import SUITED as _SUITED
from besa_cli.models.headers import INDEX
from besa_cli.system.disk import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_ROUTERS = ("router", "gate")


def config_of(directory: Path) -> "PretrainedConfig":
    """The configuration of a checkpoint directory, refused where it is no dense decoder that stock transformers knows.

    Raises
    ------
    BesaError
        A file that cannot be read or asks for code of its own, an unknown model type, an encoder-decoder, no causal
        language model, or a quantized checkpoint.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    config = config_json.read(directory)
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise BesaError(f"{directory} is an encoder-decoder ({kind})", _SUITED)
    if kind in ENCODERS and not getattr(config, "is_decoder", False):
        raise BesaError(f"{directory} is an encoder ({kind}): its tokens see those after them", _SUITED)
    if kind not in DECODERS:
        raise BesaError(
            f"{directory} is not a decoder: transformers has no causal language model for '{kind}'", _SUITED
        )
    if getattr(config, "quantization_config", None):
        raise BesaError(
            f"{directory} is quantized ({kind} with a quantization_config)", "give the dense model it was made from"
        )
    return config


def skeleton(config: "PretrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """The stock transformers model without weights: every tensor on the meta device.

    Raises
    ------
    BesaError
        The configuration holds values that no model can be built with.
    """
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    with reading(Path(str(config.name_or_path)) / config_json.FILE), torch.device("meta"):
        model: PreTrainedModel = build(config, dtype=dtype, trust_remote_code=False)
    model.train(False).requires_grad_(False)
    return model


def whole(directory: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """The stock transformers model with all its weights in memory; no code that the directory brings along runs.

    Raises
    ------
    BesaError
        The model cannot be handled, or transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(directory)
    config_json.check_generation(directory)
    index = directory / INDEX
    if index.exists() and not isinstance(read_json(index).get("metadata"), dict):
        raise BesaError(f"{index} has no metadata: stock transformers cannot load it", 'add "metadata": {} to it')
    load: Any = AutoModelForCausalLM.from_pretrained
    with reading(directory):
        model: PreTrainedModel = load(
            directory, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    return model


def block_list(model: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its name, e.g. ``model.layers``.

    It is a list of modules that all hold linears: below the model's own decoder where that holds any, never in a tower
    that reads images or sounds, with as many modules as the configuration says, else the longest; the outermost of
    equals.

    Raises
    ------
    BesaError
        There is no such list, or its modules hold weights in a form that cannot be pruned.
    """
    lists = _block_lists(model)
    decoder = model.get_decoder()
    below = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    inside = [each for each in lists if each[1] in below] or lists
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    as_deep = [each for each in inside if len(each[1]) == depth]
    found = max(as_deep or inside, key=lambda each: len(each[1]), default=None)  # the first of equals
    if found is None:
        raise BesaError(f"{type(model).__name__} has no list of blocks that hold weight matrices", _SUITED)
    for index, block in enumerate(found[1]):
        _refuse_unsuited(type(model).__name__, f"{found[0]}.{index}", block)
    return found


def _block_lists(model: "PreTrainedModel") -> list[tuple[str, nn.ModuleList]]:
    """All lists of modules that all hold matrices, the outermost first; those in towers where there are no others."""
    towers = tuple(f"{name}." for name, module in model.named_modules() if name and not _reads_text(module, model))
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_matrices(block) for block in module)
    ]
    return [each for each in lists if not each[0].startswith(towers)] or lists


def _reads_text(module: nn.Module, model: "PreTrainedModel") -> bool:
    """Whether a part of a model can be what reads its text: no model of its own that is made for anything else."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return True
    known = {type(model.config), type(model.config.get_text_config())}
    return "text" in module.input_modalities and module.main_input_name == "input_ids" and type(module.config) in known


def _matrices(block: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in block.parameters())


def _refuse_unsuited(model: str, where: str, block: nn.Module) -> None:
    linears = {name for name, module in block.named_modules() if type(module) is nn.Linear}
    for name, module in block.named_modules():
        place = f"{where}.{name} of {model}"
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or name in linears:
                continue
            if type(module).__name__ == "Conv1D":
                raise BesaError(f"{place} is a Conv1D, not an nn.Linear", _SUITED)
            if parameter.dim() == 3 and "expert" in (name + type(module).__name__).lower():
                raise BesaError(f"{place} holds its experts fused in one parameter ({key})", _SUITED)
            raise BesaError(f"{place} ({type(module).__name__}) holds the weight '{key}' outside an nn.Linear", _SUITED)
    if not linears:
        raise BesaError(f"{where} of {model} holds no nn.Linear", _SUITED)


def linears(block: nn.Module, config: "PretrainedConfig") -> dict[str, nn.Linear]:
    """The linears of one block by their name inside it; routers of expert models are left out."""
    text = config.get_text_config()
    experts = {getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")} - {None}
    found = {}
    for name, module in block.named_modules():
        if type(module) is not nn.Linear:
            continue
        if module.out_features in experts and name.rsplit(".", 1)[-1] in _ROUTERS:
            continue
        found[name] = module
    return found


def maximum_length(config: "PretrainedConfig") -> int | None:
    """The longest sequence the model was made for, in tokens; None where its configuration does not say."""
    value: Any = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(value) if isinstance(value, int) and value > 0 else None


def special_tokens(config: "PretrainedConfig") -> list[int]:
    """The ids that a model's code may treat in a way of its own: those its configuration names, and the first three."""
    text = config.get_text_config()
    kinds = ("pad", "bos", "eos", "unk", "sep", "cls", "mask")
    named: list[Any] = [getattr(each, f"{kind}_token_id", None) for each in (config, text) for kind in kinds]
    ids = [0, 1, 2]
    for each in named:
        ids += each if isinstance(each, list) else [each]
    return sorted({each for each in ids if isinstance(each, int) and 0 <= each < text.vocab_size})
