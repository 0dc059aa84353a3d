"""One `nn.Linear` for every matrix of a block that multiplies hidden states: Conv1D and fused experts are taken apart.

Everything after this sees linears alone: a name inside the block, a weight of shape (rows, cols), and inputs, which a
hook shows. What the stored tensors look like is known to the `TensorPlace` of each weight.
"""

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from besa_cli.checkpoint.tensor_places import TensorPlace
from besa_cli.choices import ROUTERS
from besa_cli.decoder.tensor_names import Names

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONTRIBUTION = "contribution"  # submodule of an expert that is passed what the expert adds to the output, unchanged
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in configurations


def linears(block: nn.Module, config: "PretrainedConfig") -> dict[str, nn.Linear]:
    """Return the linears of one block by their name inside it, without routers and gates with a single output."""
    text = config.get_text_config()
    experts = {getattr(text, key, None) for key in EXPERT_KEYS} - {None}
    by_name = {}
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear) or module.out_features == 1:
            continue
        words = name.split(".")
        if "router" in words or (module.out_features in experts and not set(ROUTERS).isdisjoint(words)):
            continue
        by_name[name] = module
    return by_name


def separate(prefix: str, blocks: nn.ModuleList, names: Names) -> None:
    """Replace every Conv1D and every fused matrix of experts in the blocks of a model by linears.

    Parameters
    ----------
    prefix : str
        Name of `blocks` in the model.
    blocks : ModuleList
        Blocks of a model on the meta device.
    names : Names
        Learns where the weights of the new linears are stored.
    """
    for index, block in enumerate(blocks):
        for name, module in list(block.named_modules()):
            place = f"{prefix}.{index}.{name}"
            if type(module).__name__ == "Conv1D":
                parent, _, last = name.rpartition(".")
                setattr(block.get_submodule(parent), last, _transposed(module, place, names))
            elif (fused := _fused(module)) is not None:
                _separate_experts(module, fused, place, names)


def _transposed(module: Any, place: str, names: Names) -> nn.Linear:
    """Return the linear that computes what a Conv1D does, whose weight has the shape (cols, rows)."""
    weight = f"{place}.weight"
    names.set_origin(weight, TensorPlace(tensors=names.origin(weight).tensors, transposed=True))
    cols, rows = module.weight.shape
    return _linear(rows, cols, module.weight, bias=True)


def _linear(rows: int, cols: int, like: Tensor, *, bias: bool) -> nn.Linear:
    linear = nn.Linear(cols, rows, bias=bias, device=like.device, dtype=like.dtype)
    return linear.requires_grad_(False)


def fused_experts(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a block that hold fused experts of a known form, before `separate` takes them apart."""
    return (module for module in block.modules() if _fused(module) is not None)


def contributions(block: nn.Module) -> list[nn.Module]:
    """Return the submodule of each separated expert of a block that is passed what the expert adds, in order.

    Inputs of such a submodule have the shape (tokens, hidden), with the tokens that reached the expert. Empty for a
    block without experts.
    """
    return [module for name, module in block.named_modules() if name.rpartition(".")[2] == CONTRIBUTION]


@dataclass(frozen=True, kw_only=True)
class _Fused:
    """Form of a module's fused experts: its two parameters, and the function that computes with separated ones.

    Attributes
    ----------
    first : str
        Parameter of the matrices whose inputs are hidden states; ``down_proj`` has the others.
    transposed : bool
        True if a parameter has the shape (experts, cols, rows).
    bias : bool
        True if there is a bias for each expert, in a parameter with the suffix ``_bias``.
    """

    first: str = "gate_up_proj"
    transposed: bool = False
    bias: bool = False
    forward: Callable[..., Tensor]


def _fused(module: Any) -> _Fused | None:
    """Return the form of a module of fused experts; None for any other module, or for experts of an unknown form.

    Modules that compute by transformers' interface of experts say what form they have.
    """
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        first = "gate_up_proj" if module.has_gate else "up_proj"
        return _Fused(first=first, transposed=module.is_transposed, bias=module.has_bias, forward=_routed)
    return _WITHOUT_INTERFACE.get(type(module).__name__)


def _separate_experts(module: Any, fused: _Fused, place: str, names: Names) -> None:
    """Give a module of fused experts a submodule for each expert, with its linears, instead of the parameters."""
    experts = len(module.down_proj)
    for number in range(experts):
        module.add_module(str(number), nn.Module())
        module.get_submodule(str(number)).add_module(CONTRIBUTION, nn.Identity())
    for key in (fused.first, "down_proj"):
        parameter = getattr(module, key)
        rows, cols = parameter.shape[:0:-1] if fused.transposed else parameter.shape[1:]
        parts = names.joined(f"{place}.{key}", experts)
        own = (key,) if parts is None or len(parts) == 1 else ("gate_proj", "up_proj")
        for number in range(experts):
            for part, inner in enumerate(own):
                linear = _linear(rows // len(own), cols, parameter, bias=fused.bias)
                module.get_submodule(str(number)).add_module(inner, linear)
                where = f"{place}.{number}.{inner}"
                if parts is not None:
                    names.set_origin(f"{where}.weight", TensorPlace(tensors=(parts[part][number],)))
                    continue
                stored = names.origin(f"{place}.{key}").tensors
                names.set_origin(
                    f"{where}.weight", TensorPlace(tensors=stored, expert=number, transposed=fused.transposed)
                )
                if fused.bias:
                    bias = names.origin(f"{place}.{key}_bias").tensors
                    names.set_origin(f"{where}.bias", TensorPlace(tensors=bias, expert=number))
        delattr(module, key)
        if fused.bias:
            delattr(module, f"{key}_bias")
    module.forward = types.MethodType(fused.forward, module)


def _experts(module: nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield the number and the submodule of every separated expert."""
    return ((int(name), expert) for name, expert in module.named_children() if name.isdecimal())


def _routed(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the output of separated experts, as transformers' interface of experts defines it.

    Every expert is called, also with no token, so that all ranks gather the same statistics.

    Parameters
    ----------
    hidden_states : Tensor of shape (tokens, hidden)
    top_k_index, top_k_weights : Tensors of shape (tokens, experts per token)
    """
    output = torch.zeros_like(hidden_states)
    for number, expert in _experts(self):
        tokens, places = torch.where(top_k_index == number)
        result = _computed(self, expert, hidden_states[tokens]) * top_k_weights[tokens, places, None]
        output.index_add_(0, tokens, expert.contribution(result).to(output.dtype))
    return output


def _routed_or_kept(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute `_routed` where experts of the highest numbers return their inputs, as in LongCat-Flash."""
    kept = (top_k_weights * (top_k_index >= self.num_routed_experts)).sum(1, keepdim=True)
    output = _routed(self, hidden_states, top_k_index, top_k_weights)
    return output.add_((hidden_states * kept).to(output.dtype))


def _sorted(self: Any, hidden_states: Tensor) -> Tensor:
    """Compute the output of separated experts that each get all tokens, as in Llama 4.

    Tokens that are not for an expert are zero, and so is its output for them.

    Parameters
    ----------
    hidden_states : Tensor of shape (experts · tokens, hidden)
        All tokens for the first expert, then all for the second, and so on.
    """
    output = torch.zeros_like(hidden_states)
    each = len(hidden_states) // sum(1 for _ in _experts(self))
    for number, expert in _experts(self):
        tokens = number * each + hidden_states[number * each : (number + 1) * each].any(1).nonzero()[:, 0]
        output.index_add_(0, tokens, expert.contribution(_computed(self, expert, hidden_states[tokens])))
    return output


_WITHOUT_INTERFACE = {
    "Llama4TextExperts": _Fused(transposed=True, forward=_sorted),
    "LongcatFlashExperts": _Fused(forward=_routed_or_kept),
}


def _computed(experts: Any, expert: Any, states: Tensor) -> Tensor:
    """Return the output of one expert for its tokens."""
    if hasattr(expert, "gate_up_proj"):
        inner = _gated(experts, expert.gate_up_proj(states))
    elif hasattr(expert, "gate_proj"):
        inner = _gated(experts, torch.cat([expert.gate_proj(states), expert.up_proj(states)], -1))
    else:
        inner = experts.act_fn(expert.up_proj(states))
    result: Tensor = expert.down_proj(inner)
    if getattr(experts, "has_post_expert_norm", False):
        result = experts.post_expert_norm(result)
    return result


def _gated(experts: Any, gate_up: Tensor) -> Tensor:
    """Return the product of the activated gate and the other half, as the model's code defines it."""
    if hasattr(experts, "_apply_gate"):
        gated: Tensor = experts._apply_gate(gate_up)
        return gated
    gate, up = gate_up.chunk(2, -1)
    gated = experts.act_fn(gate) * up
    return gated
