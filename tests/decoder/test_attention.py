"""A decoder that computes attention in chunks against the same decoder as stock transformers computes it."""

from pathlib import Path

import pytest
import torch
import transformers
from support import tiny_models
from torch import Tensor

from besa_cli.checkpoint.runs import Run
from besa_cli.decoder.attention import _attention, use_chunked_attention
from besa_cli.decoder.decoder import Decoder
from besa_cli.jobs.stage import StageJob
from besa_cli.ops import attention

CPU = torch.device("cpu")
BLOCKS = 4
FEWER = {  # blocks in chunks, of 4, where 5 tokens are exceeded
    "gemma2": 0,  # it caps its scores, for which transformers has its eager attention alone
    "gemma3": 2,  # a window of 5 tokens slides over half of the blocks
    "mistral": 0,  # and over all
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that are computed in chunks."""
    seen: list[tuple[int, ...]] = []
    own = attention.causal

    def noted(query: Tensor, *others: Tensor) -> Tensor:
        seen.append(tuple(query.shape))
        return own(query, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "causal", noted)
    return seen


def through(decoder: Decoder, tokens: Tensor) -> list[Tensor]:
    """The hidden states after every block."""
    hidden, found = decoder.embed(tokens), []
    for index in range(len(decoder)):
        decoder.load(index)
        with torch.no_grad():
            hidden = decoder.forward(index, hidden, tokens)
        found.append(hidden)
    return found


@pytest.mark.parametrize("seqlen", [3, 40])  # within a window that slides, and beyond
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_blocks_give_what_they_give_in_stock_transformers(
    family: str, seqlen: int, tmp_path: Path, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_CHUNK", 16)
    directory, tokens = tiny_models.checkpoint(tmp_path / "model", family, blocks=BLOCKS), tiny_models.tokens(3, seqlen)
    expected = through(Decoder(directory, CPU, torch.float32), tokens)
    assert not calls
    quick = through(Decoder(directory, CPU, torch.float32, quick=True), tokens)
    for one, other in zip(quick, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    fewer = seqlen > 5 or family == "gemma2"
    assert [shape[2] for shape in calls].count(seqlen) == (FEWER.get(family, BLOCKS) if fewer else BLOCKS)


@pytest.mark.parametrize(("kind", "heads"), [("FalconConfig", "num_attention_heads"), ("GPTJConfig", "n_head")])
def test_a_model_with_attention_of_its_own_keeps_it(kind: str, heads: str) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, heads: 4}
    model = tiny_models.built(getattr(transformers, kind)(**sizes))
    before = model.config._attn_implementation
    assert not use_chunked_attention(model)
    assert model.config._attn_implementation == before


def test_pruning_computes_in_chunks_and_says_nothing_of_it_in_the_model(
    tmp_path: Path, calls: list[tuple[int, ...]]
) -> None:
    model = tiny_models.checkpoint(tmp_path / "model")
    job = StageJob(
        Run(tmp_path / "run"),
        tiny_models.local(model),
        tiny_models.calibration_set(tiny_models.tokens(2, 12)),
        tiny_models.request("besa"),
    )
    tiny_models.run(job)
    assert calls
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "pruned")
    assert loaded.config._attn_implementation == "sdpa"
    assert "besa" not in (tmp_path / "run" / "pruned" / "config.json").read_text()


@pytest.mark.parametrize(("dtype", "size", "count"), [
    (torch.float32, 40.0, 1), (torch.bfloat16, 1.0, 1), (torch.bfloat16, 40.0, 0), (torch.float16, 1.0, 0)
])  # fmt: skip
def test_scores_that_rounding_would_spoil_go_the_stock_way(
    dtype: torch.dtype, size: float, count: int, calls: list[tuple[int, ...]]
) -> None:
    """A bias of queries and keys makes all scores large, and alike but for their last bits."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 8, generator=generator) for _ in range(3))
    query, key, value = (query + size).to(dtype), (key + size).to(dtype), value.to(dtype)
    found, _ = _attention(torch.nn.Module(), query, key, value, None)
    assert len(calls) == count
    query, key, value = query.double(), key.double(), value.double()
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    error = (found.transpose(1, 2).double() - exact).norm() / exact.norm()
    assert float(error) < (1e-4 if dtype == torch.float32 else 0.006)
