"""Refusals by config.json alone, before anything is fetched, drawn or read."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from support import tiny_models
from support.hub_server import Hub, serve

from besa_cli.decoder import supported
from besa_cli.errors import BesaError


def config_alone(directory: Path, kind: str, **fields: Any) -> Path:
    """A directory with nothing but the configuration of a model of released size."""
    directory.mkdir()
    transformers.CONFIG_MAPPING[kind](**fields).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", supported.REASONS)
def test_a_type_that_does_not_compute_block_by_block_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    decodes = {"is_decoder": True, "is_encoder_decoder": False} if kind in ("prophetnet", "reformer") else {}
    with pytest.raises(BesaError, match=rf"type {kind}, which is not supported: {supported.REASONS[kind][:20]}"):
        supported.require(config_alone(tmp_path / "model", kind, **decodes))


def test_a_field_can_decide(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match="type gemma4_text, which is not supported: its blocks are given something"):
        supported.require(config_alone(tmp_path / "small", "gemma4_text", hidden_size_per_layer_input=256))
    supported.require(config_alone(tmp_path / "large", "gemma4_text", hidden_size_per_layer_input=0))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "deepseek_v3", "mamba2", "qwen3_next"])
def test_a_model_of_released_size_is_let_through_within_a_second(kind: str, tmp_path: Path) -> None:
    directory = config_alone(tmp_path / "model", kind)
    supported.require(directory)  # imports the code of the type
    began = time.process_time()
    supported.require(directory)
    assert time.process_time() - began < 1


def besa(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """`besa prune` in a process of its own."""
    command = [sys.executable, "-m", "besa_cli", "prune", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)


def test_nothing_is_written_for_a_model_that_is_refused(tmp_path: Path) -> None:
    """There are no weights in the directory: nobody looks for them."""
    done = besa("--model", config_alone(tmp_path / "model", "zamba"), "--run", tmp_path / "run")
    assert done.returncode == 1
    assert "is of the type zamba, which is not supported: its blocks share weights" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_configuration_alone_is_fetched_of_a_model_that_is_refused(tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model")
    config = json.loads((config_alone(tmp_path / "xlnet", "xlnet") / "config.json").read_text())
    files = {path.name: path.read_bytes() for path in model.iterdir()} | {"config.json": json.dumps(config).encode()}
    with serve(Hub(files)) as hub:
        own = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        done = besa("--model", "org/tiny", "--run", tmp_path / "run", **own)
        assert "is of the type xlnet, which is not supported: it is not causal" in done.stderr
        assert [name for name, _ in hub.bodies()] == ["config.json"]
    assert done.returncode == 1
