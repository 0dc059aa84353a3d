"""The mixture of experts that a dense model becomes: without noise it computes what the dense model does."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from support import tiny_models

from benchmarks.shared import upcycled_checkpoint

BLOCKS, EXPERTS = 2, 3
ROWS = tiny_models.tokens(2, 10)


def mixture(place: Path, noise: float) -> tuple[Any, Any]:
    """The dense model, and a mixture of its MLPs."""
    dense: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_models.checkpoint(place / "dense", blocks=BLOCKS)
    )
    stored = tiny_models.weights(place / "dense")
    tensors = {name: tensor for name, tensor in stored.items() if ".layers." not in name}
    for index in range(BLOCKS):
        own = {name: tensor for name, tensor in stored.items() if f".layers.{index}." in name}
        tensors |= upcycled_checkpoint.block_tensors(own, index, EXPERTS, noise)
    config: Any = transformers.MixtralConfig(
        **{name: value for name, value in dense.config.to_dict().items() if name not in upcycled_checkpoint.OF_LLAMA},
        num_local_experts=EXPERTS, num_experts_per_tok=2,
    )  # fmt: skip
    config.save_pretrained(place)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return dense, transformers.AutoModelForCausalLM.from_pretrained(place, experts_implementation="eager")


def test_without_noise_it_is_the_dense_model(tmp_path: Path) -> None:
    dense, made = mixture(tmp_path, 0.0)
    with torch.no_grad():
        torch.testing.assert_close(made(ROWS).logits, dense(ROWS).logits, rtol=1e-4, atol=1e-4)


def test_noise_tells_its_experts_apart(tmp_path: Path) -> None:
    _, made = mixture(tmp_path, 0.1)
    first, second, *_ = made.model.layers[1].mlp.experts.down_proj
    difference = ((first - second).std() / first.std()).detach()
    assert 0.12 < float(difference) < 0.16  # two independent noises of a tenth
