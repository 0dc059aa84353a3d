"""Write a checkpoint of random weights, LLaMA-shaped or of experts as Qwen3, a shard a block, drawn tensor by tensor.

    python -m benchmarks.shared.random_checkpoint DIR --shape 7b                # 32 blocks, 13 GB
    python -m benchmarks.shared.random_checkpoint DIR --shape 70b --blocks 3
    python -m benchmarks.shared.random_checkpoint DIR --shape 30b-a3b --blocks 2

The numbers are drawn block by block from generators of their own, so that a cut checkpoint holds the first blocks of
the whole one. A tokenizer of made-up words, rows of token ids to calibrate on (`rows.jsonl`) and a text to measure
(`text.txt`) lie beside the shards.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder: LLaMA's, or with experts Qwen3's of mixtures.

    Attributes
    ----------
    hidden, intermediate, vocabulary : int
        Widths of the hidden states, of the MLP, and the number of tokens.
    heads, key_heads : int
        Heads of the queries, and of keys and values.
    blocks : int
    longest : int
        Tokens that the model takes.
    tied : bool
        Whether the head is the embedding.
    experts, routed : int
        Experts of a block, each an MLP of `intermediate`, and how many a token is sent to.
    head : int, optional
        Width of a head, where it is not that of the hidden states divided by the heads.
    """

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    blocks: int
    vocabulary: int = 32_000
    longest: int = 4096
    tied: bool = False
    experts: int = 0
    routed: int = 0
    head: int | None = None

    def linears(self) -> dict[str, tuple[int, int]]:
        """Shape (rows, cols) of every linear of a block."""
        width = self.head or self.hidden // self.heads
        queries, keys = width * self.heads, width * self.key_heads
        mlps = [f"mlp.experts.{number}" for number in range(self.experts)] or ["mlp"]
        made = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
        }
        for name in mlps:
            made |= {
                f"{name}.gate_proj": (self.intermediate, self.hidden),
                f"{name}.up_proj": (self.intermediate, self.hidden),
                f"{name}.down_proj": (self.hidden, self.intermediate),
            }
        return made

    def norms(self) -> dict[str, int]:
        """Width of every norm of a block."""
        made = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), self.hidden)
        return made | (dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), self.head) if self.head else {})

    def config(self, dtype: torch.dtype) -> PretrainedConfig:
        """What stock transformers loads it by."""
        sizes: dict[str, Any] = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": self.longest,
            "tie_word_embeddings": self.tied,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if self.head:
            sizes["head_dim"] = self.head
        if not self.experts:
            return LlamaConfig(**sizes, intermediate_size=self.intermediate, architectures=["LlamaForCausalLM"])
        return Qwen3MoeConfig(
            **sizes,
            architectures=["Qwen3MoeForCausalLM"],
            moe_intermediate_size=self.intermediate,
            num_experts=self.experts,
            num_experts_per_tok=self.routed,
        )


SHAPES = {  # of TinyLlama-1.1B, the LLaMA-2 models (arXiv 2307.09288) and Qwen3-30B-A3B by their config.json
    "1b": Shape(hidden=2048, intermediate=5632, heads=32, key_heads=4, blocks=22, longest=2048),
    "7b": Shape(hidden=4096, intermediate=11_008, heads=32, key_heads=32, blocks=32),
    "13b": Shape(hidden=5120, intermediate=13_824, heads=40, key_heads=40, blocks=40),
    "70b": Shape(hidden=8192, intermediate=28_672, heads=64, key_heads=8, blocks=80),
    "30b-a3b": Shape(
        hidden=2048, intermediate=768, heads=32, key_heads=4, blocks=48, vocabulary=151_936, longest=40_960,
        experts=128, routed=8, head=128,
    ),
}  # fmt: skip


def checkpoint(directory: Path, shape: Shape, dtype: torch.dtype) -> int:
    """Write the checkpoint; returns the bytes of one block."""
    shape.config(dtype).save_pretrained(directory)
    table: dict[str, str] = {}
    size = 0
    for index in range(shape.blocks):
        generator = torch.Generator().manual_seed(index)
        tensors = {
            f"model.layers.{index}.{name}.weight": _normal(rows, cols, dtype, generator)
            for name, (rows, cols) in shape.linears().items()
        }
        if shape.experts:
            router = _normal(shape.experts, shape.hidden, dtype, generator)
            tensors[f"model.layers.{index}.mlp.gate.weight"] = router
        for name, width in shape.norms().items():
            tensors[f"model.layers.{index}.{name}.weight"] = torch.ones(width, dtype=dtype)
        size = sum(tensor.nbytes for tensor in tensors.values())
        table |= _shard(directory, f"block-{index}.safetensors", tensors)
        del tensors
    generator = torch.Generator().manual_seed(shape.blocks)
    tables = ["model.embed_tokens"] if shape.tied else ["model.embed_tokens", "lm_head"]
    rest = {f"{name}.weight": _normal(shape.vocabulary, shape.hidden, dtype, generator) for name in tables}
    rest["model.norm.weight"] = torch.ones(shape.hidden, dtype=dtype)
    table |= _shard(directory, "rest.safetensors", rest)
    index_file = {"metadata": {}, "weight_map": dict(sorted(table.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return size


def _normal(rows: int, cols: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers that keep the size of the hidden states, drawn and rounded a few rows at a time."""
    made = torch.empty(rows, cols, dtype=dtype)
    for part in torch.split(made, 1024):
        part.copy_(torch.randn(part.shape, generator=generator) / cols**0.5)
    return made


def _shard(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    save_file(dict(tensors), directory / name, metadata={"format": "pt"})
    return dict.fromkeys(tensors, name)


def texts(directory: Path, vocabulary: int, samples: int, seqlen: int) -> None:
    """Write a tokenizer of the words w0, w1, …, random rows of token ids, and a text of `samples` windows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (samples, seqlen), generator=generator).tolist()
    (directory / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    (directory / "text.txt").write_text(" ".join(f"w{number}" for row in rows for number in row))
    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")
    tokenizer.save_pretrained(directory)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write one checkpoint and rows of token ids for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, help="the first so many blocks; all by default")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--samples", type=int, default=8, help="rows of token ids")
    parser.add_argument("--seqlen", type=int, default=256)
    options = parser.parse_args(arguments)
    whole = SHAPES[options.shape]
    shape = Shape(**{**vars(whole), "blocks": options.blocks or whole.blocks})
    checkpoint(options.directory, shape, getattr(torch, options.dtype))
    texts(options.directory, shape.vocabulary, options.samples, options.seqlen)


if __name__ == "__main__":
    main()
