"""Names, ties and shapes: a checkpoint fits its model as in stock transformers, and what is left over is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_models
from torch import Tensor

from besa_cli.checkpoint.runs import Run
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.jobs.stage import StageJob

CPU = torch.device("cpu")


def rewrite(model: Path, change: Callable[[dict[str, Tensor]], object], **config: object) -> Path:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(told | config))
    return model


def stock(model: Path, rows: Tensor) -> Tensor:
    """The logits of stock transformers."""
    with torch.no_grad():
        logits: Tensor = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(rows).logits
    return logits


def ours(decoder: Decoder, rows: Tensor) -> Tensor:
    """The logits, block by block."""
    hidden = decoder.embed(rows)
    with torch.no_grad():
        for index in range(len(decoder)):
            decoder.load(index)
            hidden = decoder.forward(index, hidden, rows)
    return decoder.finish(hidden, rows)


def agree(model: Path) -> Decoder:
    rows = tiny_models.tokens(2, 8)
    decoder = Decoder(model, CPU, torch.float32)
    torch.testing.assert_close(ours(decoder, rows), stock(model, rows))
    return decoder


def test_a_head_of_its_own_is_not_tied_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = rewrite(tiny_models.checkpoint(tmp_path / "m"), lambda tensors: None, tie_word_embeddings=True)
    (note,) = agree(model).notes
    assert "lm_head.weight" in note
    assert "they are not tied" in note


def test_a_head_that_equals_the_embedding_is_tied(tmp_path: Path) -> None:
    def copy(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    decoder = agree(rewrite(tiny_models.checkpoint(tmp_path / "m"), copy, tie_word_embeddings=True))
    assert decoder.notes == []
    assert decoder.model.get_output_embeddings().weight is decoder.model.get_input_embeddings().weight


def test_of_two_tied_tensors_one_is_enough_whichever_it_is(tmp_path: Path) -> None:
    def only_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    assert agree(rewrite(tiny_models.checkpoint(tmp_path / "m", tied=True), only_head)).notes == []


def test_the_base_models_prefix_is_added_name_by_name(tmp_path: Path) -> None:
    def some(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name or name == "model.norm.weight"]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert agree(rewrite(tiny_models.checkpoint(tmp_path / "m"), some)).notes == []


def test_a_tensor_under_two_names_is_refused_with_both(tmp_path: Path) -> None:
    model = rewrite(
        tiny_models.checkpoint(tmp_path / "m"),
        lambda tensors: tensors.update({"norm.weight": torch.ones(tiny_models.HIDDEN)}),
    )
    with pytest.raises(BesaError, match=r"model\.norm\.weight of the model twice, as .*norm\.weight and as .*norm"):
        Decoder(model, CPU, torch.float32)


def test_tensors_that_the_model_does_not_use_are_named(tmp_path: Path) -> None:
    more = {"zzz": torch.ones(2), "model.layers.1.mlp.up_proj.bias": torch.ones(54)}
    silent = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}  # of which stock says nothing, either
    model = rewrite(tiny_models.checkpoint(tmp_path / "m"), lambda tensors: tensors.update(more | silent))
    notes: list[str] = []
    StageJob(
        Run(tmp_path / "r"),
        tiny_models.local(model),
        tiny_models.calibration_set(tiny_models.tokens()),
        tiny_models.request(),
        notify=notes.append,
    )
    assert any("does not use 2 of the" in note and "up_proj.bias, zzz" in note for note in notes), notes


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "zero_point", "qweight", "scales", "g_idx"])
def test_scales_beside_a_weight_are_refused_and_not_left_out(name: str, tmp_path: Path) -> None:
    place = f"model.layers.0.mlp.up_proj.{name}"
    model = rewrite(tiny_models.checkpoint(tmp_path / "m"), lambda tensors: tensors.update({place: torch.ones(1)}))
    with pytest.raises(BesaError, match=rf"is already compressed: it stores {place}"):
        Decoder(model, CPU, torch.float32)


def test_weights_of_8_bits_are_not_pruned(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = rewrite(
        tiny_models.checkpoint(tmp_path / "m"),
        lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}),
    )
    with pytest.raises(BesaError, match=rf"{name} in .* is stored as F8_E4M3"):
        StageJob(
            Run(tmp_path / "r"),
            tiny_models.local(model),
            tiny_models.calibration_set(tiny_models.tokens()),
            tiny_models.request(),
        )
    assert not (tmp_path / "r" / "pruned").exists()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_another_size_outside_the_blocks_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    model = rewrite(
        tiny_models.checkpoint(tmp_path / "m"), lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()})
    )
    with pytest.raises(BesaError, match=rf"{name} in .* has the shape"):
        StageJob(
            Run(tmp_path / "r"),
            tiny_models.local(model),
            tiny_models.calibration_set(tiny_models.tokens()),
            tiny_models.request(),
        )
    assert not (tmp_path / "r" / "pruned").exists()
