"""Shares of experts that a model allows, by its configuration alone."""

import json
from pathlib import Path

import pytest
import transformers

from benchmarks.checks import architectures
from besa_cli.decoder import experts, supported
from besa_cli.errors import BesaError, UsageError


def grouped(
    experts: int = 12, groups: int = 3, chosen_groups: int = 2, chosen: int = 4
) -> transformers.PretrainedConfig:
    return transformers.DeepseekV3Config(
        n_routed_experts=experts, n_group=groups, topk_group=chosen_groups, num_experts_per_tok=chosen
    )


def plain(experts: int = 8, chosen: int = 2) -> transformers.PretrainedConfig:
    return transformers.MixtralConfig(num_local_experts=experts, num_experts_per_tok=chosen)


@pytest.mark.parametrize(("share", "left"), [(0.125, 7), (0.25, 6), (0.75, 2)])
def test_what_stays(share: float, left: int) -> None:
    assert experts.remaining(plain(), share) == left


@pytest.mark.parametrize(
    ("share", "told", "hint"),
    [
        (0.05, "--experts 0.05 removes none of the 8 experts", "one of them is a share of 0.125"),
        (
            0.8,
            "removes 6 of the 8 experts of a block, but a token reaches 3",
            "remove 5 experts or fewer: a share of 0.6",
        ),
    ],
)
def test_a_share_that_routing_does_not_allow(share: float, told: str, hint: str) -> None:
    with pytest.raises(UsageError, match=told) as raised:
        experts.remaining(plain(chosen=3), share)
    assert hint in raised.value.hint


def test_groups_lose_as_many_experts_each() -> None:
    assert experts.remaining(grouped(), 0.25) == 9
    with pytest.raises(UsageError, match="which are in 3 groups of the same size") as raised:
        experts.remaining(grouped(), 0.34)
    assert raised.value.hint == "remove a multiple of 3: 3 experts are a share of 0.25"


@pytest.mark.parametrize(("chosen", "most"), [(4, 6), (6, 3)])
def test_as_many_experts_stay_in_the_chosen_groups_as_a_token_reaches(chosen: int, most: int) -> None:
    """Two of the groups are chosen: with 4 experts for a token, each needs 2 at least, with 6, it needs 3."""
    assert experts.remaining(grouped(chosen=chosen), most / 12) == 12 - most
    with pytest.raises(UsageError, match=f"a token reaches {chosen} in 2 of 3 groups") as raised:
        experts.remaining(grouped(chosen=chosen), (most + 3) / 12)
    assert f"remove {most} experts or fewer" in raised.value.hint


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(UsageError, match="--experts: llama has no experts"):
        experts.remaining(transformers.LlamaConfig(), 0.25)


def test_a_number_for_each_block_counts_by_the_highest() -> None:
    config = transformers.HunYuanMoEV1Config(num_experts=8, moe_topk=[1, 3, 2])
    assert experts.numbers_of(config).chosen == 3


def test_a_model_that_does_not_say_how_many_experts_a_token_reaches_is_refused() -> None:
    config = plain()
    config.num_experts_per_tok = 0
    with pytest.raises(UsageError, match="mixtral does not say how many experts a token reaches"):
        experts.remaining(config, 0.25)


def test_an_unknown_computation_is_refused_by_the_configuration_alone(tmp_path: Path) -> None:
    architectures.configuration("jetmoe").save_pretrained(tmp_path)
    supported.require(tmp_path)
    with pytest.raises(BesaError, match="JetMoeForCausalLM holds or computes its experts in a way"):
        supported.require(tmp_path, removed_experts=0.25)


@pytest.mark.parametrize(
    ("kind", "field", "section"),
    [
        ("mixtral", "num_local_experts", None),
        ("qwen3_moe", "num_local_experts", None),
        ("deepseek_v3", "n_routed_experts", None),
        ("qwen3_5_moe", "num_experts", "text_config"),
    ],
)
def test_the_configuration_changes_in_one_number(kind: str, field: str, section: str | None, tmp_path: Path) -> None:
    architectures.configuration(kind).save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    after = dict(experts.config_file(tmp_path, 0.25))
    if section is not None:
        assert {**before, section: None} == {**after, section: None}
        before, after = before[section], after[section]
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {field}
    assert (before[field], after[field]) == (4, 3)


def test_the_field_keeps_the_name_that_the_file_has(tmp_path: Path) -> None:
    """On the hub Qwen3-MoE calls it `num_experts`; transformers writes `num_local_experts`."""
    architectures.configuration("qwen3_moe").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("num_local_experts", "num_experts"))
    after = experts.config_file(tmp_path, 0.25)
    assert after["num_experts"] == 3
    assert "num_local_experts" not in after
    assert after["num_experts_per_tok"] == 2
