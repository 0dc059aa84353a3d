"""LLaMA-architecture stages with a byte-level tokenizer, as GGUF needs them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from support import tiny_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from besa_cli.checkpoint.runs import Run
from besa_cli.jobs.stage import StageJob as Pruning

VOCABULARY = 272
MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "ab"), ("1", "2")]
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def byte_tokenizer(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in MERGES)]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(
        directory
    )


def stage(place: Path, *, tied: bool = False, rope: str = "default", **changes: Any) -> Run:
    """A LLaMA-architecture stage of grouped queries whose columns divide by 32 (hidden 64) and do not (54)."""
    values = {**tiny_models.CONFIGS["llama"][1], "hidden_size": 64, "vocab_size": VOCABULARY, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**{**values, "rope_parameters": ROPES[rope], **changes}, tie_word_embeddings=tied)
    source = place / "dense"
    tiny_models.cast(tiny_models.built(config), torch.bfloat16).save_pretrained(source)
    byte_tokenizer(source)
    run = Run(place / "run")
    tiny_models.run(
        Pruning(
            run,
            tiny_models.local(source),
            tiny_models.calibration_set(tiny_models.tokens()),
            tiny_models.request("magnitude"),
        )
    )
    return run
