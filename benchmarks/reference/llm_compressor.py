"""One model through llm-compressor, which lives in an environment of its own, written as an ordinary checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer


def compress(source: Path, tokens: Path, modifier: Any, out: Path) -> None:
    """Let a modifier work on the rows of a file of token ids, in fp32 and in their order; write the source's dtype."""
    rows = [json.loads(line)["input_ids"] for line in tokens.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=[modifier],
        processor=tokenizer,
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )
    plain = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    made = model.state_dict()
    plain.load_state_dict({name: made[name] for name in plain.state_dict()})
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
