"""Mapping of a checkpoint's tensors to the model's; mismatches are refused, unused tensors are named."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from besa_cli.checkpoint.tensor_places import TensorPlace
from besa_cli.checkpoint.weights import Weights
from besa_cli.errors import BesaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

_REMEDY = "config.json and the weights do not belong together: fetch the model again"
_CODED = re.compile(
    r"^(weight[._])?((input_|output_|global_)?scales?|scale_inv|scale_\d|zeros?|zero_point|shape|packed|absmax|SCB)$"
    r"|^(q?weight|qzeros|scale_weight|g_idx|input_scale_ub)$|^(weight[._])?(global_scale|g_idx|format|(nested_)?quant.*)$"
)
_SHOWN = 3  # names in a note
_EXPERTS = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])  # how transformers fuses experts


class Names:
    """Mapping between the names of a checkpoint's tensors and the model's, by transformers' own loading rules.

    Some architectures were renamed after their checkpoints were written (GPT-NeoX calls its head ``embed_out`` on
    disk), and a base model alone is stored without the prefix that it has in the whole model: for each name, the prefix
    is added or removed if the model then has such a tensor. Some tensors of the model are joined from several.

    Parameters
    ----------
    model : PreTrainedModel
    stored : sequence of str
        The names in the checkpoint.

    Raises
    ------
    BesaError
        Two tensors of the checkpoint map to the same tensor of the model, or transformers converts some in a way that
        besa does not know.
    """

    def __init__(self, model: "PreTrainedModel", stored: Sequence[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        own = model.state_dict()
        self.own = own.keys()
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        prefix = model.base_model_prefix
        self._place: dict[str, str] = {}
        self._origin: dict[str, TensorPlace] = {}
        self._joined: dict[str, list[list[str]]] = {}
        joined: dict[str, dict[str, list[str]]] = {}
        for name in sorted(stored, key=dot_natural_key):
            place, pattern = rename_source_key(name, renamings, converters, prefix, own)
            if place not in own and name in own:  # as transformers: a name that should not have been changed
                place, pattern = rename_source_key(name, [], [], prefix, own)
            self._place[name] = place
            if pattern is not None and place in own:
                joined.setdefault(place, {}).setdefault(pattern, []).append(name)
                continue
            other = self._origin.setdefault(place, TensorPlace(tensors=(name,))).tensor
            if other != name and place in own:
                raise BesaError(f"the checkpoint stores {place} of the model twice, as {other} and as {name}", _REMEDY)
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        for place, parts in joined.items():
            self._join(place, by_pattern[next(iter(parts))], parts, type(model).__name__)

    def _join(self, place: str, converter: "WeightConverter", parts: Mapping[str, list[str]], model: str) -> None:
        """Note from which tensors transformers joins one tensor of the model; `parts` are their names by pattern."""
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
        ordered = [parts[pattern] for pattern in converter.source_patterns if pattern in parts]
        if steps in _EXPERTS:
            self._joined[place] = ordered
        elif steps == [("Concatenate", 0)]:
            self._origin[place] = TensorPlace(tensors=tuple(name for names in ordered for name in names))
        else:
            raise BesaError(
                f"{model} computes {place} from {ordered[0][0]} of its checkpoint by "
                f"{', '.join(step for step, _ in steps)}",
                "use another model: besa cannot write tensors that transformers converts in this way",
            )

    def joined(self, name: str, experts: int) -> list[list[str]] | None:
        """Return the checkpoint names of the experts' matrices that transformers stacks to one tensor of the model.

        One list for each matrix that an expert's part is concatenated from, with a name for each expert; None if the
        model's tensor `name` is not made so.

        Raises
        ------
        BesaError
            The checkpoint lacks the matrix of one of so many `experts`.
        """
        parts = self._joined.get(name)
        for names in parts or []:
            if len(names) < experts:
                raise BesaError(
                    f"the checkpoint has {len(names)} tensors as {names[0]}, one an expert, for {experts} experts",
                    "the checkpoint is incomplete or of another architecture: fetch it again",
                )
        return parts

    def origin(self, name: str) -> TensorPlace:
        """Return the place of the model's tensor `name`; that of the same name if the checkpoint lacks it."""
        return self._origin.get(name, TensorPlace(tensors=(name,)))

    def set_origin(self, name: str, place: TensorPlace) -> None:
        """Set the place of a tensor of the model that its code does not have."""
        self._origin[name] = place

    def holds(self, name: str) -> bool:
        """Return True if the checkpoint has the model's tensor `name` or a substitute set by `substitute`."""
        return name in self._origin

    def substitute(self, name: str, other: str) -> None:
        """Use the checkpoint's tensor for `other` also for `name`."""
        self._origin[name] = self._origin[other]

    def below(self, prefix: str) -> list[str]:
        """Return the sorted checkpoint names of all tensors whose name in the model starts with `prefix`."""
        return sorted(name for name, place in self._place.items() if place.startswith(prefix))

    def places(self) -> Iterator[tuple[str, str]]:
        """Yield each checkpoint name with the tensor's name in the code of the model."""
        yield from self._place.items()


def reconcile(model: "PreTrainedModel", names: Names, weights: Weights) -> list[str]:
    """Match model and checkpoint as transformers does during loading: check shapes and resolve tied tensors.

    Tied tensors are untied if the checkpoint stores two different ones; if it stores only one, both use that one.

    Returns
    -------
    list of str
        Notes for the user: tensors that were untied, and tensors that are not used.

    Raises
    ------
    BesaError
        A tensor's shape differs from the configuration, or the checkpoint is quantized.
    """
    _refuse_quantized(names, weights)
    for place, tensor in model.state_dict().items():
        if names.holds(place):
            stored = names.origin(place).shape(weights.shape)
            if stored != tuple(tensor.shape):
                raise BesaError(
                    f"{names.origin(place).tensor} in {weights.directory} has the shape {list(stored)}, "
                    f"its {type(model).__name__} needs {list(tensor.shape)}",
                    _REMEDY,
                )
    return [*_resolve_ties(model, names, weights), *_unused(model, names, weights)]


def _resolve_ties(model: "PreTrainedModel", names: Names, weights: Weights) -> Iterator[str]:
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in list(ties.items()):
        if not names.holds(target):
            continue
        if not names.holds(source):
            names.substitute(source, target)
        elif not weights.equal(names.origin(target).tensor, names.origin(source).tensor):
            del ties[target]
            _untie(model, target)
            yield (
                f"config.json ties {target} to {source}, but the checkpoint stores two different tensors: they are not "
                "tied, as in transformers (set tie_word_embeddings: false to make it explicit)"
            )


def _untie(model: nn.Module, name: str) -> None:
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    tied = owner.get_parameter(last)
    owner.register_parameter(last, nn.Parameter(torch.empty_like(tied), requires_grad=False))


def _refuse_quantized(names: Names, weights: Weights) -> None:
    """Refuse scales and codes stored beside a module's weight: without them the weight has other values."""
    own = names.own
    modules = {name.removesuffix(".weight") for name in own if name.endswith(".weight")}
    for name, place in names.places():
        parts = place.split(".")
        cuts = (cut for cut in range(1, len(parts)) if ".".join(parts[:cut]) in modules)
        if place not in own and any(_CODED.search(".".join(parts[cut:])) for cut in cuts):
            raise BesaError(
                f"{weights.directory} is already compressed: it stores {name} beside the weights",
                "use the dense model that it was made from",
            )


def _unused(model: "PreTrainedModel", names: Names, weights: Weights) -> Iterator[str]:
    """Yield the note that tensors are not used, except those that transformers ignores silently."""
    silent = set(model._keys_to_ignore_on_load_unexpected or ()) | {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    own = names.own | {name for name, _ in model.named_buffers()}
    unused = sorted(
        name
        for name, place in names.places()
        if place not in own and not any(re.search(pattern, place) for pattern in silent)
    )
    if unused:
        more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
        yield (
            f"{type(model).__name__} does not use {len(unused)} of the {len(weights.names)} tensors in "
            f"{weights.directory}: {', '.join(unused[:_SHOWN])}{more}"
        )
