"""Write a real mixture of experts: the demo model, each MLP of which becomes the experts of a Mixtral block.

    python -m benchmarks.shared.upcycled_checkpoint DIR                 # 4 experts, 2 for every token
    python -m benchmarks.shared.upcycled_checkpoint DIR --experts 8 --noise 0.1

Every expert is the MLP with noise of its own, and routers are random, so that the mixture predicts nearly what the demo
model does, and its experts can be told apart. Shards are written one block after the other.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MixtralConfig

from besa_cli import models
from besa_cli.checkpoint.copying import copy_small_files
from besa_cli.checkpoint.weights import Weights
from besa_cli.system import disk

_MATRICES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # of an MLP of LLaMA, and of an expert of Mixtral
OF_LLAMA = ("architectures", "model_type", "mlp_bias", "attention_bias", "pretraining_tp", "transformers_version")


def block_tensors(tensors: dict[str, Tensor], index: int, experts: int, noise: float) -> dict[str, Tensor]:
    """The tensors of a block with `experts` noisy copies of its MLP; the noise is relative to each matrix."""
    generator = torch.Generator().manual_seed(index)
    made = {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}
    place = f"model.layers.{index}.block_sparse_moe"
    for number in range(experts):
        for ours, theirs in _MATRICES.items():
            matrix = tensors[f"model.layers.{index}.mlp.{ours}.weight"]
            own = torch.randn(matrix.shape, generator=generator) * noise * matrix.float().std()
            made[f"{place}.experts.{number}.{theirs}.weight"] = (matrix.float() + own).to(matrix.dtype)
    hidden = tensors[f"model.layers.{index}.mlp.gate_proj.weight"]
    router = torch.randn(experts, hidden.shape[1], generator=generator) / hidden.shape[1] ** 0.5
    made[f"{place}.gate.weight"] = router.to(hidden.dtype)
    return made


def write(directory: Path, *, experts: int, chosen: int, noise: float) -> None:
    """Write the checkpoint with its tokenizer."""
    source = models.resolve("smollm2-135m", notify=print).directory
    fields = disk.read_json(source / "config.json")
    own = {name: value for name, value in fields.items() if name not in OF_LLAMA}
    config = MixtralConfig(**own, num_local_experts=experts, num_experts_per_tok=chosen)
    config.architectures = ["MixtralForCausalLM"]
    directory.mkdir(parents=True)
    copy_small_files(source, directory)
    config.save_pretrained(directory)
    weights, table, total = Weights(source), dict[str, str](), 0
    blocks = int(config.num_hidden_layers)
    inside = [f"model.layers.{index}." for index in range(blocks)]
    rest = weights.read([name for name in weights.names if not name.startswith(tuple(inside))])
    for number in range(blocks + 1):
        part = rest
        if number:
            names = [name for name in weights.names if name.startswith(inside[number - 1])]
            part = block_tensors(weights.read(names), number - 1, experts, noise)
        file = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(part, directory / file, {"format": "pt"})
        table |= dict.fromkeys(part, file)
        total += sum(tensor.nbytes for tensor in part.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": table}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--chosen", type=int, default=2, help="experts for every token")
    parser.add_argument("--noise", type=float, default=0.3, help="relative to each matrix")
    given = parser.parse_args(arguments)
    write(given.directory, experts=given.experts, chosen=given.chosen, noise=given.noise)


if __name__ == "__main__":
    main()
