"""Whole experts of a model: their numbers in the configuration, and the same model with fewer of them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from besa_cli.checkpoint.fewer_experts import ExpertTensors, FewerExperts
from besa_cli.checkpoint.weights import Weights
from besa_cli.decoder import architecture, linears
from besa_cli.decoder.tensor_names import Names
from besa_cli.errors import BesaError, UsageError
from besa_cli.models import config_json
from besa_cli.ops import experts as counting
from besa_cli.system import disk
from besa_cli.system.disk import JsonObject

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_GROUPS = ("n_group", "num_expert_group")
_CHOSEN_GROUPS = ("topk_group",)
_IN_GROUP = 2  # experts by which code with groups scores each of them
_REMEDY = "leave --experts out"


@dataclass(frozen=True, kw_only=True)
class ExpertNumbers:
    """Numbers of experts in a configuration.

    Attributes
    ----------
    key : str
        Field with the number of experts in a block.
    experts : int
        Its value.
    chosen : int
        Experts that a token reaches, in the block where these are most.
    groups, chosen_groups : int
        Groups of consecutive experts, and how many of them a token may reach; 1 without groups.
    smallest : int
        Fewest experts of a group.
    """

    key: str
    experts: int
    chosen: int
    groups: int
    chosen_groups: int
    smallest: int


def numbers_of(config: "PretrainedConfig") -> ExpertNumbers:
    """Return the numbers of experts that a configuration states.

    Raises
    ------
    UsageError
        The model has no experts, or does not say how many a token reaches.
    """
    text, kind = config.get_text_config(), config.model_type
    stated = {own: getattr(text, own) for name in linears.EXPERT_KEYS if (own := _own(text, name))}
    counts = {own: value for own, value in stated.items() if isinstance(value, int) and value > 1}
    if not counts:
        raise UsageError(f"--experts: {kind} has no experts that could be removed", _REMEDY)
    (key, experts), *others = counts.items()
    chosen, groups = _count(text, _CHOSEN), _count(text, _GROUPS)
    if others or chosen is None:
        raise UsageError(f"--experts: {kind} does not say how many experts a token reaches, and of how many", _REMEDY)
    return ExpertNumbers(
        key=key,
        experts=experts,
        chosen=chosen,
        groups=groups or 1,
        chosen_groups=(groups and _count(text, _CHOSEN_GROUPS)) or groups or 1,
        smallest=_IN_GROUP if groups else 1,
    )


def _count(text: "PretrainedConfig", names: Sequence[str]) -> int | None:
    """Return the value of the first of some fields that states a number, or the highest of a number for each block."""
    for name in names:
        value = getattr(text, name, None)
        values = value if isinstance(value, list) else [value]
        numbers = [number for number in values if isinstance(number, int) and number > 0]
        if numbers:
            return max(numbers)
    return None


def _own(text: "PretrainedConfig", name: str) -> str | None:
    """Return the architecture's own name of a field; None if it has no such field."""
    own = text.attribute_map.get(name, name)
    return own if own in vars(text) else None


def remaining(config: "PretrainedConfig", share: float) -> int:
    """Return how many experts of each block stay when a share of them is removed.

    Raises
    ------
    UsageError
        The model has no experts, or the share is none that its routing allows.
    """
    numbers = numbers_of(config)
    removed = counting.removed_count(share, numbers.experts)
    left = numbers.experts - removed
    told = f"--experts {share} removes {removed} of the {numbers.experts} experts of a block"
    if removed == 0:
        raise UsageError(
            f"--experts {share} removes none of the {numbers.experts} experts of a block",
            f"one of them is a share of {1 / numbers.experts:.3g}",
        )
    if removed % numbers.groups:
        raise UsageError(
            f"{told}, which are in {numbers.groups} groups of the same size",
            f"remove a multiple of {numbers.groups}: {numbers.groups} experts are a share of "
            f"{numbers.groups / numbers.experts:.3g}",
        )
    fewest = max(numbers.smallest * numbers.groups, -(-numbers.chosen // numbers.chosen_groups) * numbers.groups)
    if left < fewest:
        raise UsageError(
            f"{told}, but a token reaches {numbers.chosen}"
            + (f" in {numbers.chosen_groups} of {numbers.groups} groups" if numbers.groups > 1 else ""),
            f"remove {numbers.experts - fewest} experts or fewer"
            + (f": a share of {(numbers.experts - fewest) / numbers.experts:.3g}" if numbers.experts > fewest else ""),
        )
    return left


def smaller(config: "PretrainedConfig", experts: int) -> "PretrainedConfig":
    """Return the configuration of the same model with so many experts in a block."""
    changed = copy.deepcopy(config)
    setattr(changed.get_text_config(), numbers_of(config).key, experts)
    return changed


def config_file(directory: Path, share: float) -> JsonObject:
    """Return the contents of a model's ``config.json`` once a share of its experts is removed."""
    config = architecture.config_of(directory)
    text, numbers = config.get_text_config(), numbers_of(config)
    fields = dict(disk.read_json(directory / config_json.FILE))
    name = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    section = dict(fields.get(name, {})) if name is not None else fields
    stated = [key for key in section if text.attribute_map.get(key, key) == numbers.key] or [numbers.key]
    section.update(dict.fromkeys(stated, remaining(config, share)))
    return {**fields, name: section} if name is not None else section


def without(config: "PretrainedConfig", weights: Weights, share: float) -> tuple["PretrainedConfig", FewerExperts]:
    """Return the configuration and the tensors of a model without a share of the experts of each block.

    Raises
    ------
    BesaError
        A tensor holds the experts in a way that is not known, or they are computed in such a way.
    """
    numbers, left = numbers_of(config), remaining(config, share)
    model = architecture.skeleton(config, torch.bfloat16)
    axes = _expert_axes(model, smaller(config, left), numbers.experts - left)
    names = Names(model, weights.names)
    held: list[ExpertTensors] = []
    for name, (block, axis) in axes.items():
        separate = names.joined(name, numbers.experts)
        if separate is not None:
            held += [ExpertTensors(block=block, tensors=tuple(tensors)) for tensors in separate]
            continue
        tensors = names.origin(name).tensors
        if len(tensors) != 1:
            raise _unknown(model, name)
        held.append(ExpertTensors(block=block, tensors=tensors, axis=axis))
    fewer = FewerExperts(weights.directory, held, experts=numbers.experts, remaining=left)
    return smaller(config, left), fewer


def require(config: "PretrainedConfig", share: float) -> None:
    """Refuse a share of experts that cannot be removed from a model, by its configuration alone.

    Raises
    ------
    BesaError
        The model has no experts, or routes to them in a way that is not known; or the share is too large or too small.
    """
    left = remaining(config, share)
    model = architecture.skeleton(config, torch.bfloat16)
    _expert_axes(model, smaller(config, left), numbers_of(config).experts - left)


def _expert_axes(model: "PreTrainedModel", config: "PretrainedConfig", removed: int) -> dict[str, tuple[int, int]]:
    """Map each tensor of a model that holds something for every expert to its block, and its axis of the experts.

    These are the tensors whose shape is another one in a model of fewer experts, `removed` fewer in a block, as
    `config` describes it.
    """
    prefix, blocks = architecture.block_list(model)
    others = architecture.skeleton(config, torch.bfloat16).state_dict()
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in model.state_dict().items():
        other = others.get(name)
        if other is not None and other.shape == tensor.shape:
            continue
        block = name.removeprefix(f"{prefix}.").partition(".")[0]
        axis = None if other is None else _shorter_axis(tensor.shape, other.shape, removed)
        if axis is None or not block.isdecimal():
            raise _unknown(model, name)
        found[name] = (int(block), axis)
    for index in sorted({block for block, _ in found.values()}):
        _require_followed(model, prefix, index, blocks[index])
    return found


def _shorter_axis(shape: torch.Size, other: torch.Size, removed: int) -> int | None:
    """Return the one axis along which another shape is shorter, by the removed experts; None if there is none such."""
    if len(shape) != len(other):
        return None
    axes = [axis for axis, (size, less) in enumerate(zip(shape, other, strict=True)) if size != less]
    return axes[0] if len(axes) == 1 and shape[axes[0]] - other[axes[0]] == removed else None


def _require_followed(model: "PreTrainedModel", prefix: str, index: int, block: nn.Module) -> None:
    """Refuse a block with experts that do not lie in one module whose computation is known."""
    if len(list(linears.fused_experts(block))) != 1:
        raise _unknown(model, f"{prefix}.{index}")


def _unknown(model: "PreTrainedModel", name: str) -> BesaError:
    return BesaError(
        f"--experts: {type(model).__name__} holds or computes its experts in a way that besa does not know ({name})",
        _REMEDY,
    )
