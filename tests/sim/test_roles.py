"""Roles: what linears are called across architectures."""

import pytest

from besa_cli.sim import roles

NAMES = {
    # LLaMA, Mistral, Qwen, Gemma
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    # OPT
    "self_attn.out_proj": "o",
    "fc1": "up",
    "fc2": "down",
    # Phi-3
    "self_attn.qkv_proj": "qkv",
    "mlp.gate_up_proj": "gate_up",
    # GPT-NeoX, Falcon, BLOOM
    "attention.query_key_value": "qkv",
    "attention.dense": "o",
    "self_attention.dense": "o",
    "mlp.dense_h_to_4h": "up",
    "mlp.dense_4h_to_h": "down",
    # GPT-2, GPT-J, MPT, Baichuan
    "attn.c_attn": "qkv",
    "attn.c_proj": "o",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
    "mlp.fc_in": "up",
    "mlp.fc_out": "down",
    "attn.Wqkv": "qkv",
    "self_attn.W_pack": "qkv",
    # Mixtral, InternLM2
    "block_sparse_moe.experts.3.w1": "gate",
    "block_sparse_moe.experts.3.w2": "down",
    "block_sparse_moe.experts.3.w3": "up",
    "attention.wqkv": "qkv",
    "attention.wo": "o",
    # none: the name says nothing, or not here
    "self_attn.kv_a_proj_with_mqa": None,
    "mixer.in_proj": None,
    "c_proj": None,
    "mlp.dense": None,
    "dense": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_linears_have_the_role_that_their_architecture_gives_them(name: str) -> None:
    assert roles.role(name) == NAMES[name]


def test_groups_go_by_role_and_then_by_place() -> None:
    for name, role in NAMES.items():
        if role:
            assert roles.group(name) == ("attn" if role in ("q", "k", "v", "qkv", "o") else "mlp"), name
    assert roles.group("self_attn.kv_a_proj_with_mqa") == "attn"
    assert roles.group("mlp.shared_expert.other") == "mlp"
    assert roles.group("mixer.in_proj") is None
