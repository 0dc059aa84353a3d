"""Roles of linears (q, k, v, o, gate, up, down) from their names, across architectures."""

from typing import Literal

Group = Literal["attn", "mlp"]

ROLES: dict[str, Group] = {
    "q": "attn",
    "k": "attn",
    "v": "attn",
    "qkv": "attn",
    "o": "attn",
    "gate": "mlp",
    "up": "mlp",
    "gate_up": "mlp",
    "down": "mlp",
}

_ANYWHERE = {
    "q": ("q_proj", "q_lin", "query", "wq"),
    "k": ("k_proj", "k_lin", "key", "wk"),
    "v": ("v_proj", "v_lin", "value", "wv"),
    "qkv": ("qkv_proj", "query_key_value", "qkv", "wqkv", "c_attn", "w_pack"),
    "o": ("o_proj", "out_proj", "out_lin", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "lin1", "w3"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "lin2", "w2"),
}
_ROLE_OF = {name: role for role, names in _ANYWHERE.items() for name in names}
_BY_PLACE: dict[str, dict[Group, str]] = {"c_proj": {"attn": "o", "mlp": "down"}, "dense": {"attn": "o"}}
_PLACES: dict[Group, tuple[str, ...]] = {"attn": ("att",), "mlp": ("mlp", "ffn", "feed_forward", "expert", "moe")}


def role(linear: str) -> str | None:
    """Return the role of a linear by its name inside the block; None if the name is not known.

    Names used in both attention and MLP (``c_proj``, ``dense``) are resolved by the name of the parent module.
    """
    last = linear.rpartition(".")[2].lower()
    place = _place(linear)
    if last in _BY_PLACE and place is not None:
        return _BY_PLACE[last].get(place)
    return _ROLE_OF.get(last)


def group(linear: str) -> Group | None:
    """Return "attn" or "mlp" for a linear by its role, else by its parent module; None if neither is known."""
    known_role = role(linear)
    return ROLES[known_role] if known_role else _place(linear)


def _place(linear: str) -> Group | None:
    path = linear.rpartition(".")[0].lower()
    for name, marks in _PLACES.items():
        if any(mark in path for mark in marks):
            return name
    return None
