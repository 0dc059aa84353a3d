"""Decoders that are unlike most: tied heads with a bias, buffers of a parent's, deep towers; and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny_models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from besa_cli.checkpoint.tensor_places import TensorPlace
from besa_cli.decoder import conduct
from besa_cli.decoder.decoder import Decoder
from besa_cli.decoder.verify import verify
from besa_cli.errors import BesaError
from besa_cli.stream import propagation

CPU = torch.device("cpu")

_SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_INNER: dict[str, Any] = {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
_TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
TIED_WITH_BIAS = {
    "gptj": transformers.GPTJConfig(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, tie_word_embeddings=True
    ),
    "phi": transformers.PhiConfig(**_INNER, tie_word_embeddings=True),
    "ctrl": transformers.CTRLConfig(vocab_size=128, n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=64),
    "electra": transformers.ElectraConfig(**_INNER, embedding_size=24, is_decoder=True),
    "modernbert": transformers.ModernBertDecoderConfig(
        **_INNER, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
}


def saved(directory: Path, config: transformers.PretrainedConfig) -> Path:
    tiny_models.built(config).save_pretrained(directory)
    return directory


def stock_logits(directory: Path, rows: Tensor) -> Tensor:
    """Those of the whole model as transformers alone loads it."""
    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(directory)(rows, use_cache=False).logits
    return logits


def streamed_logits(decoder: Decoder, rows: Tensor) -> Tensor:
    hidden = propagation.embed(decoder, rows, 2)
    for index in range(len(decoder)):
        decoder.load(index)
        propagation.advance(decoder, index, hidden, rows, 2)
        decoder.drop(index)
    with torch.no_grad():
        return decoder.finish(hidden, rows)


@pytest.fixture
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not initialized is NaN."""
    empty = torch.empty_like

    def dirty(tensor: Tensor, **options: Any) -> Tensor:
        made = empty(tensor, **options)
        return made.fill_(torch.nan) if made.is_floating_point() and not made.is_meta else made

    monkeypatch.setattr(torch, "empty_like", dirty)


@pytest.mark.usefixtures("dirty_memory")
@pytest.mark.parametrize("name", TIED_WITH_BIAS)
def test_a_tied_head_with_a_bias_of_its_own_gives_stocks_logits(name: str, tmp_path: Path) -> None:
    directory, rows = saved(tmp_path / "model", TIED_WITH_BIAS[name]), tiny_models.tokens(2, 12)
    expected = stock_logits(directory, rows)
    decoder = Decoder(directory, CPU, torch.float32)
    torch.testing.assert_close(streamed_logits(decoder, rows), expected, rtol=1e-4, atol=1e-5)
    decoder.drop_embedding()  # the weight goes, the bias stays
    torch.testing.assert_close(streamed_logits(decoder, rows), expected, rtol=1e-4, atol=1e-5)
    decoder.drop_head()
    torch.testing.assert_close(streamed_logits(decoder, rows), expected, rtol=1e-4, atol=1e-5)
    verify(decoder, rows)


def test_nothing_is_computed_with_a_tensor_that_has_no_values(tmp_path: Path) -> None:
    decoder, rows = Decoder(tiny_models.checkpoint(tmp_path / "model"), CPU, torch.float32), tiny_models.tokens(1, 8)
    hidden = decoder.embed(rows)
    with pytest.raises(RuntimeError, match="block 1 is run before its weights are loaded"):
        decoder.forward(1, hidden, rows)
    decoder.model.base_model.norm.to("meta")
    with pytest.raises(BesaError, match="LlamaForCausalLM uses a LlamaRMSNorm whose tensors have no values"):
        decoder.finish(hidden, rows)


@pytest.mark.usefixtures("dirty_memory")
def test_buffers_that_a_parent_computes_are_stocks(tmp_path: Path) -> None:
    """Falcon H1's mixers hold a vector that only the model around them knows."""
    config = transformers.FalconH1Config(
        **_INNER, num_key_value_heads=2, mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, mamba_d_state=8,
        mamba_chunk_size=8, ssm_multipliers=[0.5, 2.0, 3.0, 0.7, 1.5],
    )  # fmt: skip
    directory, rows = saved(tmp_path / "model", config), tiny_models.tokens(2, 12)
    expected = stock_logits(directory, rows)
    decoder = Decoder(directory, CPU, torch.float32)
    torch.testing.assert_close(streamed_logits(decoder, rows), expected, rtol=1e-4, atol=1e-5)
    verify(decoder, rows)


def test_a_model_inside_a_model_computes_its_own_buffers(tmp_path: Path) -> None:
    """Gemma 3n's buffers need the text model's fields; then it is refused, for it looks tokens up in every block.

    It has three projections beside its two blocks, which are not taken for blocks.
    """
    config = transformers.Gemma3nTextConfig(
        **_INNER, num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=128,
        laurel_rank=4, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0], pad_token_id=0, sliding_window=8, altup_num_inputs=4,
    )  # fmt: skip
    decoder = Decoder(saved(tmp_path / "model", config), CPU, torch.float32)
    with pytest.raises(BesaError, match="Gemma3nForCausalLM passes its blocks arguments that depend on the tokens"):
        verify(decoder, tiny_models.tokens(1, 12))


def test_another_buffer_than_stocks_is_refused(tmp_path: Path) -> None:
    """Stream and own whole agree on it; only stock's model tells."""
    decoder = Decoder(tiny_models.checkpoint(tmp_path / "model"), CPU, torch.float32)
    verify(decoder, tiny_models.tokens(1, 12))
    decoder._keywords.clear()
    decoder.model.get_buffer("model.rotary_emb.inv_freq").mul_(1.5)
    with pytest.raises(BesaError, match=r"gives other logits than stock transformers \(relative error 0"):
        verify(decoder, tiny_models.tokens(1, 12))
    verify(decoder, tiny_models.tokens(1, 12), room=0)  # where there is no room for stock's


def test_another_head_than_stocks_is_refused(tmp_path: Path) -> None:
    decoder = Decoder(tiny_models.checkpoint(tmp_path / "model"), CPU, torch.float32)
    decoder._own_head = decoder._head = {"lm_head.weight": TensorPlace(tensors=("model.embed_tokens.weight",))}
    with pytest.raises(BesaError, match="gives other logits than stock transformers"):
        verify(decoder, tiny_models.tokens(1, 12))
    assert decoder.model.get_output_embeddings().weight.is_meta


def test_a_decoder_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = transformers.CpmAntConfig(
        vocab_size=128, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2,
        prompt_length=4, segment_types=4,
    )  # fmt: skip
    with pytest.raises(BesaError, match="CpmAntForCausalLM is not causal: a token changes the hidden states"):
        Decoder(saved(tmp_path / "model", config), CPU, torch.float32)


def test_arguments_that_a_padding_token_changes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPM-Ant's mask leaves token 0 out; a sample without any would not tell."""
    config = transformers.CpmAntConfig(
        vocab_size=128, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2,
        prompt_length=4, segment_types=4,
    )  # fmt: skip
    directory = saved(tmp_path / "model", config)
    monkeypatch.setitem(conduct.TOLERANCE, torch.float32, torch.inf)  # let it look ahead
    decoder = Decoder(directory, CPU, torch.float32)
    with pytest.raises(BesaError, match="CpmAntForCausalLM passes its blocks arguments that depend on the tokens"):
        decoder.keywords(0, tiny_models.tokens(1, 12))


def test_a_later_block_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    """The whole model and the stream agree on it, for they share their blocks."""
    decoder = Decoder(tiny_models.checkpoint(tmp_path / "model", blocks=3), CPU, torch.float32)

    def look_ahead(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output + output.mean(dim=1, keepdim=True)

    decoder.blocks[2].get_submodule("mlp").register_forward_hook(look_ahead)
    with pytest.raises(BesaError, match="LlamaForCausalLM is not causal"):
        verify(decoder, tiny_models.tokens(1, 12))


@pytest.mark.parametrize("name", ["git", "gemma3"])
def test_a_deep_tower_is_not_taken_for_the_language_model(name: str, tmp_path: Path) -> None:
    tower = {**_TOWER, "num_hidden_layers": 5}
    config: transformers.PretrainedConfig = transformers.GitConfig(**_INNER, vision_config=tower)
    if name == "gemma3":
        text = {**_INNER, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "pad_token_id": 0}
        config = transformers.Gemma3Config(
            text_config=text, vision_config={**tower, "model_type": "siglip_vision_model"}, mm_tokens_per_image=4,
            image_token_index=9, boi_token_index=10, eoi_token_index=11,
        )  # fmt: skip
    decoder = Decoder(saved(tmp_path / "model", config), CPU, torch.float32)
    expected = {"git": "git.encoder.layer", "gemma3": "model.language_model.layers"}
    assert (decoder.prefix, len(decoder)) == (expected[name], 2)
    verify(decoder, tiny_models.tokens(1, 12))


def test_a_model_whose_own_code_fails_is_refused_in_one_line(tmp_path: Path) -> None:
    config = transformers.ReformerConfig(
        vocab_size=128, hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=48,
        attn_layers=["local", "local"], is_decoder=True, axial_pos_embds=False, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(BesaError, match="ReformerModelWithLMHead cannot be run block by block: TypeError: ") as caught:
        Decoder(saved(tmp_path / "model", config), CPU, torch.float32)
    assert "\n" not in caught.value.message


def test_what_the_dtype_cannot_hold_is_not_taken_for_blocks_that_depend_on_each_other(tmp_path: Path) -> None:
    model = tiny_models.built(tiny_models.config("llama"))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "model")
    verify(Decoder(tmp_path / "model", CPU, torch.float32), tiny_models.tokens(1, 12))
    narrow = Decoder(tmp_path / "model", CPU, torch.float16)
    with pytest.raises(BesaError, match="gives hidden states that are NaN or infinite in float16") as caught:
        verify(narrow, tiny_models.tokens(1, 12))
    assert caught.value.hint == "compute with --dtype float32"
