"""``config.json`` of strangers: no code of theirs runs, and values that no model can have are refused by name."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_models

from besa_cli.checkpoint.runs import Run
from besa_cli.decoder import architecture
from besa_cli.errors import BesaError
from besa_cli.jobs.stage import StageJob
from besa_cli.models import config_json


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.checkpoint(tmp_path / "m")


def change(model: Path, **values: Any) -> None:
    told = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(told | values))


def evil(model: Path, module: str, **classes: str) -> Path:
    """A module of the model's that leaves a mark when it runs; returns the mark's place."""
    mark = model / "mark"
    lines = [f"open({str(mark)!r}, 'w').close()", "import transformers"]
    lines += [f"class {name}(transformers.{base}): model_type = 'evil'" for name, base in classes.items()]
    (model / f"{module}.py").write_text("\n".join(lines))
    return mark


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody answers every question with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.mark.usefixtures("yes")
@pytest.mark.parametrize("trusted", [{}, {"trust_remote_code": True}], ids=["asked", "trusted by itself"])
def test_code_of_a_model_never_runs(trusted: dict[str, bool], model: Path) -> None:
    mark = evil(model, "configuration_evil", EvilConfig="PretrainedConfig")
    change(model, model_type="evil", auto_map={"AutoConfig": "configuration_evil.EvilConfig"}, **trusted)
    with pytest.raises(BesaError, match=r"m/config\.json needs Python code .*configuration_evil\.EvilConfig"):
        config_json.read(model)
    assert not mark.exists()


@pytest.mark.usefixtures("yes")
def test_a_type_that_transformers_knows_goes_on_working_beside_code_of_the_models(model: Path) -> None:
    mark = evil(model, "modeling_evil", EvilLM="LlamaForCausalLM", EvilConfig="LlamaConfig")
    change(model, auto_map={"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilLM"})
    built = architecture.skeleton(architecture.config_of(model), torch.float32)
    assert type(built).__name__ == type(architecture.load_stock(model, torch.float32)).__name__ == "LlamaForCausalLM"
    assert not mark.exists()


@pytest.mark.parametrize("way", ["somebody/kernel", "flash_attention_2", "nothing", 7])
def test_attention_is_computed_by_what_is_installed(way: object, model: Path) -> None:
    change(model, attn_implementation=way, _attn_implementation=way)
    built = architecture.skeleton(architecture.config_of(model), torch.float32)
    assert built.config._attn_implementation in ("sdpa", "eager")


def test_nothing_that_a_prune_loads_asks_for_attention_by_another_package(model: Path, tmp_path: Path) -> None:
    change(model, attn_implementation="somebody/kernel", _attn_implementation="somebody/kernel")
    tiny_models.run(
        StageJob(
            Run(tmp_path / "r"),
            tiny_models.local(model),
            tiny_models.calibration_set(tiny_models.tokens()),
            tiny_models.request(),
        )
    )


COUNTS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")


@pytest.mark.parametrize("name", [*COUNTS, "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -3, "abc", 48.5, [1], {}, float("nan"), 10**300, 1 << 62], ids=str)
def test_a_size_that_no_model_can_have_is_refused_by_its_name(name: str, value: Any, model: Path) -> None:
    change(model, **{name: value})
    with pytest.raises(BesaError, match=name) as refused:
        config_json.read(model)
    assert str(model / "config.json") in refused.value.message
    assert len(refused.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    "values",
    [
        {"rms_norm_eps": float("inf")},
        {"rms_norm_eps": None},
        {"hidden_act": "evil"},
        {"rope_parameters": {"rope_type": "evil", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1e4}},
        {"rope_parameters": {"rope_type": "\x1b]0;title\x07", "rope_theta": 1e4}},
        {"rope_parameters": 5},
        {"layer_types": ["evil", "evil"]},
        {"pad_token_id": 10**6},
        {"tie_word_embeddings": "no"},
        {"dtype": "evil"},
        {"text_config": "x"},
        {"num_labels": 10**9},
        {"hidden_size": 10**12},
    ],
    ids=str,
)
def test_what_nothing_can_be_built_from_is_one_line_with_the_files_name(values: dict[str, Any], model: Path) -> None:
    change(model, **values)
    with pytest.raises(BesaError, match=f"{model / 'config.json'}|{model}"):
        tiny_forward(model)


def tiny_forward(model: Path) -> None:
    from besa_cli.decoder.decoder import Decoder

    Decoder(model, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("blocks", [257, 9_999, 10**6, 10**9])
def test_more_blocks_than_there_are_tensors_are_refused_before_any_is_built(blocks: int, model: Path) -> None:
    change(model, num_hidden_layers=blocks)
    began = time.perf_counter()
    with pytest.raises(BesaError, match=rf"{blocks} blocks|num_hidden_layers: {blocks}"):
        config_json.read(model)
    assert time.perf_counter() - began < 5


def test_a_limit_that_is_open_to_one_side_is_a_value(model: Path) -> None:
    change(model, time_step_limit=[0.0, float("inf")])  # as state-space models have it
    config_json.read(model)


def test_nothing_else_changes_what_a_configuration_says(model: Path) -> None:
    stock = type(tiny_models.config("llama")).from_pretrained(model).to_dict()
    found = config_json.read(model).to_dict()
    assert {**found, "_name_or_path": ""} == {**stock, "_name_or_path": ""}


@pytest.mark.parametrize("kind", ["pipe", "directory", "deep", "not UTF-8"])
def test_what_is_no_configuration_at_all_is_refused_at_once(kind: str, model: Path) -> None:
    (model / "config.json").unlink()
    if kind == "pipe":
        os.mkfifo(model / "config.json")
    elif kind == "directory":
        (model / "config.json").mkdir()
    else:
        (model / "config.json").write_bytes(b'{"a": ' + b"[" * 100_000 if kind == "deep" else b'{"model_type": "\xff"}')
    with pytest.raises(BesaError, match=f"{model / 'config.json'}"):
        config_json.read(model)


@pytest.mark.parametrize("told", [{}, {"metadata": None}, {"metadata": []}], ids=str)
def test_an_index_that_stock_does_not_load_is_named(told: dict[str, Any], model: Path) -> None:
    names = [*load_file(model / "model.safetensors")]
    (model / "model.safetensors").rename(model / "part.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({**told, "weight_map": dict.fromkeys(names, "part.safetensors")}))
    with pytest.raises(BesaError, match=f"{index} has no metadata"):
        architecture.load_stock(model, torch.float32)
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}))
    assert architecture.load_stock(model, torch.float32).num_parameters() > 0


@pytest.mark.parametrize(
    "values",
    [
        {"eos_token_id": "x"},
        {"eos_token_id": float("nan")},
        {"eos_token_id": {}},
        {"eos_token_id": [1, "\x1b[31m"]},
        {"pad_token_id": [0]},
        {"bos_token_id": True},
        {"cache_implementation": "evil"},
        {"compile_config": 5},
        [],
    ],
    ids=str,
)
def test_settings_of_generation_that_cannot_be_are_refused_by_their_file(values: object, model: Path) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(BesaError, match=str(path)):
        architecture.load_stock(model, torch.float32)


@pytest.mark.parametrize("values", [{}, {"eos_token_id": [1, 2], "pad_token_id": None}, {"do_sample": True}], ids=str)
def test_settings_of_generation_that_can_be_are_taken(values: dict[str, Any], model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps(values))
    found = architecture.load_stock(model, torch.float32).generation_config.to_dict()
    assert {name: found[name] for name in values} == values
