"""Tiny models, and a cache of their own for every test."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_cache() -> Path:
    """The cache that the user's own commands work on."""
    from besa_cli.models import cache as module

    return module.root()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("BESA_CACHE", str(path))
    monkeypatch.delenv("BESA_DEMO_WHEEL", raising=False)
    return path


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with grouped-query attention, saved as transformers does it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("tiny") / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    return path
