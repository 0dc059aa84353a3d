"""Which tensor of a checkpoint goes where in the model; what does not fit is refused, what is left over is named."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from besa_cli.checkpoint.weights import Weights
from besa_cli.errors import BesaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMEDY = "config.json and the weights do not belong together: fetch the model again"
_CODED = re.compile(
    r"^(weight[._])?((input_|output_|global_)?scales?|scale_inv|scale_\d|zeros?|zero_point|shape|packed|absmax|SCB)$"
    r"|^(q?weight|qzeros|scale_weight|g_idx|input_scale_ub)$|^(weight[._])?(global_scale|g_idx|format|(nested_)?quant.*)$"
)
_SHOWN = 3  # names in a note


class Names:
    """Which tensor of a checkpoint goes where in the model, by the rules of transformers' own loading.

    Some architectures were renamed since their checkpoints were written (GPT-NeoX calls its head ``embed_out`` on
    disk), and a base model alone is stored without the prefix that it has in the whole model: name by name, the prefix
    is added or taken away where the model then has such a tensor.

    Parameters
    ----------
    model : PreTrainedModel
    stored : sequence of str
        The names in the checkpoint.

    Raises
    ------
    BesaError
        Two tensors of the checkpoint stand for the same one of the model.
    """

    def __init__(self, model: "PreTrainedModel", stored: Sequence[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

        own = model.state_dict()
        rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
        prefix = model.base_model_prefix
        self._place = {
            name: rename_source_key(name, rules, [], prefix, own)[0] for name in sorted(stored, key=dot_natural_key)
        }
        self._origin: dict[str, str] = {}
        for name, place in self._place.items():
            other = self._origin.setdefault(place, name)
            if other != name and place in own:
                raise BesaError(f"the checkpoint holds {place} of the model twice, as {other} and as {name}", _REMEDY)

    def origin(self, name: str) -> str:
        """The checkpoint's name of the model's tensor `name`; `name` itself where the checkpoint lacks it."""
        return self._origin.get(name, name)

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has the model's tensor `name`, or another one that takes its place."""
        return name in self._origin

    def take_for(self, name: str, other: str) -> None:
        """Let the checkpoint's tensor for `other` be the one for `name`, too."""
        self._origin[name] = self._origin[other]

    def below(self, prefix: str) -> list[str]:
        """The checkpoint's names of all tensors whose name in the model begins with `prefix`, sorted."""
        return sorted(name for name, place in self._place.items() if place.startswith(prefix))

    def places(self) -> Iterator[tuple[str, str]]:
        """The checkpoint's names, each with the one that the tensor would have in the model."""
        yield from self._place.items()


def fit(model: "PreTrainedModel", names: Names, weights: Weights) -> list[str]:
    """Make model and checkpoint agree as transformers does when it loads one into the other.

    A tied tensor of which the checkpoint holds another one is not tied; where only one of two tied tensors is there, it
    is the one for both.

    Returns
    -------
    list of str
        What the user should know: tensors that are not tied, or not used.

    Raises
    ------
    BesaError
        A tensor has another shape than the configuration says, or is one of a quantized model.
    """
    _refuse_codes(model, names, weights)
    for place, tensor in model.state_dict().items():
        if names.holds(place):
            stored = weights.shape(names.origin(place))
            if stored != tuple(tensor.shape):
                raise BesaError(
                    f"{names.origin(place)} in {weights.directory} has the shape {list(stored)}, "
                    f"its {type(model).__name__} needs {list(tensor.shape)}",
                    _REMEDY,
                )
    return [*_settle_ties(model, names, weights), *_unused(model, names, weights)]


def _settle_ties(model: "PreTrainedModel", names: Names, weights: Weights) -> Iterator[str]:
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in list(ties.items()):
        if not names.holds(target):
            continue
        if not names.holds(source):
            names.take_for(source, target)
        elif not weights.equal(names.origin(target), names.origin(source)):
            del ties[target]
            _untie(model, target)
            yield (
                f"config.json ties {target} to {source}, but the checkpoint holds two different tensors: they are not "
                "tied, as in transformers (tie_word_embeddings: false would say so)"
            )


def _untie(model: nn.Module, name: str) -> None:
    parent, _, own = name.rpartition(".")
    owner = model.get_submodule(parent)
    tied = owner.get_parameter(own)
    owner.register_parameter(own, nn.Parameter(torch.empty_like(tied), requires_grad=False))


def _refuse_codes(model: "PreTrainedModel", names: Names, weights: Weights) -> None:
    """Refuse scales and codes beside a module's weight: read without them, it is another weight."""
    own = model.state_dict().keys()
    weighed = {name.removesuffix(".weight") for name in own if name.endswith(".weight")}
    for name, place in names.places():
        parts = place.split(".")
        cuts = (cut for cut in range(1, len(parts)) if ".".join(parts[:cut]) in weighed)
        if place not in own and any(_CODED.search(".".join(parts[cut:])) for cut in cuts):
            raise BesaError(
                f"{weights.directory} is already compressed: it holds {name} beside the weights",
                "name the dense model that it was made from",
            )


def _unused(model: "PreTrainedModel", names: Names, weights: Weights) -> Iterator[str]:
    """The note that tensors are not used, but for those that transformers passes over in silence, too."""
    silent = set(model._keys_to_ignore_on_load_unexpected or ()) | {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    own = model.state_dict().keys() | {name for name, _ in model.named_buffers()}
    left = sorted(
        name
        for name, place in names.places()
        if place not in own and not any(re.search(pattern, place) for pattern in silent)
    )
    if left:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        yield (
            f"{type(model).__name__} does not use {len(left)} of the {len(weights.names)} tensors in "
            f"{weights.directory}: {', '.join(left[:_SHOWN])}{more}"
        )
