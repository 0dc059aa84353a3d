"""Models of images and text: the language model is pruned on text, everything else keeps its bytes."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from support import tiny_models

from besa_cli.checkpoint.runs import Run
from besa_cli.decoder.decoder import Decoder
from besa_cli.decoder.verify import verify
from besa_cli.jobs.stage import StageJob

_TEXT = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 54, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TOWER = {
    "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def test_the_language_model_alone_is_pruned(tmp_path: Path) -> None:
    """The tower has more blocks than the language model, and the processor's file goes along."""
    config = transformers.LlavaConfig(text_config=_TEXT, vision_config=_TOWER, image_token_index=9)
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model, rows = tmp_path / "model", tiny_models.tokens(4, 16)
    whole.save_pretrained(model)
    (model / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    decoder = Decoder(model, torch.device("cpu"), torch.float32)
    assert (len(decoder), decoder.prefix) == (2, "model.language_model.layers")
    verify(decoder, rows)
    job = StageJob(
        Run(tmp_path / "run"), tiny_models.local(model), tiny_models.calibration_set(rows), tiny_models.request()
    )
    counts = tiny_models.run(job)["counts"]
    stage = tmp_path / "run" / "pruned"
    before, after = tiny_models.weights(model), tiny_models.weights(stage)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 2 * 7
    assert all("language_model" in name and name.endswith("proj.weight") for name in changed)
    assert sum(int((after[name] == 0).sum()) for name in changed) == counts["pruned"]
    load: Any = transformers.AutoModelForImageTextToText.from_pretrained  # its type tells nothing of the second result
    loaded, information = load(stage, output_loading_info=True)
    assert type(loaded) is type(whole)
    assert not any(information.values())
    kept = json.loads((stage / "preprocessor_config.json").read_text())
    assert kept == {"image_processor_type": "CLIPImageProcessor"}
