"""One `nn.Linear` for every matrix of a block that multiplies hidden states: Conv1D and fused experts are taken apart.

Everything after this sees linears alone: a name inside the block, a weight of shape (rows, cols), and inputs, which a
hook shows. What the stored tensors look like is known to the `TensorPlace` of each weight.
"""

import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from besa_cli.checkpoint.tensor_places import TensorPlace
from besa_cli.choices import ROUTERS
from besa_cli.decoder.tensor_names import Names

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in configurations


def linears(block: nn.Module, config: "PretrainedConfig") -> dict[str, nn.Linear]:
    """Return the linears of one block by their name inside it, without routers and gates with a single output."""
    text = config.get_text_config()
    experts = {getattr(text, key, None) for key in _EXPERTS} - {None}
    by_name = {}
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear) or module.out_features == 1:
            continue
        if module.out_features in experts and not set(ROUTERS).isdisjoint(name.split(".")):
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
            elif _takes_experts_apart(module, place, names):
                _separate_experts(module, place, names)


def _transposed(module: Any, place: str, names: Names) -> nn.Linear:
    """Return the linear that computes what a Conv1D does, whose weight has the shape (cols, rows)."""
    weight = f"{place}.weight"
    names.set_origin(weight, TensorPlace(tensors=names.origin(weight).tensors, transposed=True))
    cols, rows = module.weight.shape
    return _linear(rows, cols, module.weight, bias=True)


def _linear(rows: int, cols: int, like: Tensor, *, bias: bool) -> nn.Linear:
    linear = nn.Linear(cols, rows, bias=bias, device=like.device, dtype=like.dtype)
    return linear.requires_grad_(False)


def _takes_experts_apart(module: nn.Module, place: str, names: Names) -> bool:
    """Return True if a module computes by transformers' interface of experts and its checkpoint has their matrices."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_gate"):
        return False
    return all(
        names.holds(f"{place}.{key}") or names.joined(f"{place}.{key}") is not None for key in _matrices_of(module)
    )


def _matrices_of(module: Any) -> tuple[str, str]:
    """Return the names of a module's two fused parameters."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _separate_experts(module: Any, place: str, names: Names) -> None:
    """Give a module of fused experts a submodule for each expert, with its linears, instead of the parameters."""
    first = getattr(module, _matrices_of(module)[0])
    for number in range(len(first)):
        module.add_module(str(number), nn.Module())
    for key in _matrices_of(module):
        fused = getattr(module, key)
        rows, cols = fused.shape[:0:-1] if module.is_transposed else fused.shape[1:]
        parts = names.joined(f"{place}.{key}")
        own = (key,) if parts is None or len(parts) == 1 else ("gate_proj", "up_proj")
        for number in range(len(fused)):
            for part, inner in enumerate(own):
                linear = _linear(rows // len(own), cols, fused, bias=module.has_bias)
                module.get_submodule(str(number)).add_module(inner, linear)
                where = f"{place}.{number}.{inner}"
                if parts is not None:
                    names.set_origin(f"{where}.weight", TensorPlace(tensors=(parts[part][number],)))
                    continue
                stored = names.origin(f"{place}.{key}").tensors
                names.set_origin(
                    f"{where}.weight", TensorPlace(tensors=stored, expert=number, transposed=module.is_transposed)
                )
                if module.has_bias:
                    bias = names.origin(f"{place}.{key}_bias").tensors
                    names.set_origin(f"{where}.bias", TensorPlace(tensors=bias, expert=number))
        delattr(module, key)
        if module.has_bias:
            delattr(module, f"{key}_bias")
    module.forward = types.MethodType(_forward, module)


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the output of separated experts, as transformers' interface of experts defines it.

    Every expert is called, also with no token, so that all ranks gather the same statistics.

    Parameters
    ----------
    hidden_states : Tensor of shape (tokens, hidden)
    top_k_index, top_k_weights : Tensors of shape (tokens, experts per token)
    """
    output = torch.zeros_like(hidden_states)
    for number, expert in self.named_children():
        if not number.isdecimal():
            continue
        tokens, places = torch.where(top_k_index == int(number))
        states = hidden_states[tokens]
        result = expert.down_proj(_activated(self, expert, states))
        if self.has_post_expert_norm:
            result = self.post_expert_norm(result)
        output.index_add_(0, tokens, (result * top_k_weights[tokens, places, None]).to(output.dtype))
    return output


def _activated(experts: Any, expert: Any, states: Tensor) -> Tensor:
    """Return the inputs of an expert's last linear."""
    if not experts.has_gate:
        return experts.act_fn(expert.up_proj(states))  # type: ignore[no-any-return]
    fused = hasattr(expert, "gate_up_proj")
    gate_up = (
        expert.gate_up_proj(states) if fused else torch.cat([expert.gate_proj(states), expert.up_proj(states)], -1)
    )
    return experts._apply_gate(gate_up)  # type: ignore[no-any-return]
