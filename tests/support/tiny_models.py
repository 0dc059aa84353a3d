"""Tiny random checkpoints of many architectures, calibration sets without text, and what a finished stage must hold."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from besa_cli.calibration.calibration_set import CalibrationSet, tokens_digest
from besa_cli.checkpoint.manifests import StageManifest
from besa_cli.jobs import prune
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.stage import StageJob
from besa_cli.models import Model

VOCABULARY = 128
HIDDEN = 32
LONGEST = 64  # tokens that every tiny model takes

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 54,  # not a multiple of 4: the last window of an N:M pattern is ragged
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 12}  # queries of 48: rows != cols everywhere

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", {**_COMMON, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", _GROUPED),
    "gemma2": (
        "Gemma2Config",
        {**_GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 12, "layer_types": ["sliding", "full"]},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**_GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 12, "layer_types": ["sliding", "full"]},
    ),
    "phi3": ("Phi3Config", {**_COMMON, "num_key_value_heads": 2, "original_max_position_embeddings": LONGEST}),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": 54, "word_embed_proj_dim": HIDDEN}),
    "gpt_neox": ("GPTNeoXConfig", _COMMON),
}
FAMILIES = tuple(CONFIGS)


def config(family: str, *, blocks: int = 2, tied: bool = False) -> transformers.PretrainedConfig:
    """The configuration of a tiny model of one family."""
    name, values = CONFIGS[family]
    own = {**values, "num_hidden_layers": blocks, "tie_word_embeddings": tied}
    if "layer_types" in own:
        own["layer_types"] = [f"{own['layer_types'][index % 2]}_attention" for index in range(blocks)]
    made: transformers.PretrainedConfig = getattr(transformers, name)(**own)
    return made


def built(described: transformers.PretrainedConfig, *, seed: int = 0) -> transformers.PreTrainedModel:
    """A model with random weights in fp32: also its norms and biases differ from one value to the next."""
    torch.manual_seed(seed)
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(described, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.eval()
    return model


def cast(model: transformers.PreTrainedModel, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model, its weights in another dtype."""
    torch.nn.Module.to(model, dtype)
    return model


def checkpoint(
    directory: Path,
    family: str = "llama",
    *,
    blocks: int = 2,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    seed: int = 0,
) -> Path:
    """A checkpoint directory of a tiny random model."""
    model = built(config(family, blocks=blocks, tied=tied), seed=seed)
    cast(model, dtype).save_pretrained(directory, max_shard_size=shard_size)
    return directory


def add_tokenizer(directory: Path) -> Path:
    """Give a checkpoint a tokenizer: words w3 ... w127, everything else is unknown (token 0)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


def tokens(samples: int = 4, seqlen: int = 16, *, seed: int = 1) -> Tensor:
    """Random token ids of shape (samples, seqlen)."""
    return torch.randint(3, VOCABULARY, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def rows_file(path: Path, rows: Tensor) -> Path:
    """Token rows as a JSON-lines file that `--data` takes."""
    path.write_text("".join(f'{{"input_ids": {row}}}\n' for row in rows.tolist()))
    return path


def calibration_set(rows: Tensor, held_out: Tensor | None = None) -> CalibrationSet:
    """A calibration set of these token rows, and of others that are held out."""
    drawn = {"data": ["rows.jsonl"], "samples": len(rows), "seqlen": rows.shape[1], "seed": 0, "pack": None}
    manifest: Any = {"options": drawn, "sources": [], "tokens_digest": tokens_digest(rows)}  # jobs read no more
    return CalibrationSet(tokens=rows, manifest=manifest, held_out=held_out)


def stock(directory: Path, dtype: torch.dtype | str = "auto", **options: Any) -> Any:
    """The checkpoint as transformers alone loads it; missing, unexpected or misshapen tensors are an error."""
    load: Any = transformers.AutoModelForCausalLM.from_pretrained  # its type tells nothing of the second result
    model, information = load(directory, dtype=dtype, output_loading_info=True, **options)
    assert not any(information.values()), information
    return model.eval()


def local(directory: Path) -> Model:
    """A checkpoint directory as a model."""
    return Model(name=str(directory), kind="local", directory=directory, revision=None)


def request(
    method: str = "wanda",
    *,
    sparsity: float = 0.5,
    nm: tuple[int, int] | None = None,
    device: str = "cpu",
    **options: Any,
) -> StageRequest:
    """What to ask for, computed in fp32."""
    return prune.request(method=method, sparsity=sparsity, nm=nm, options=options, device=device, dtype="float32")


def run(job: StageJob) -> StageManifest:
    """Do a job to its end; returns the manifest."""
    list(job.blocks())
    return job.finish()


def weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory."""
    merged: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


def shard_of_names(directory: Path) -> dict[str, list[str]]:
    """File name -> names of the tensors in it."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found[file.name] = sorted(opened.keys())
    return found


def linear_names(model: torch.nn.Module, blocks: str) -> list[list[str]]:
    """The names of the weights of each block's linears, found with plain torch."""
    names: list[list[str]] = []
    for block_name, block in model.get_submodule(blocks).named_children():
        found = [name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
        names.append([f"{blocks}.{block_name}.{name}.weight" for name in found])
    return names


def blocks_of(family: str) -> str:
    """Where a family's blocks are in the stock model."""
    return {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}.get(family, "model.layers")


def prefix_counts(sparsity: float, sizes: Sequence[int]) -> list[int]:
    """Weights pruned in the first i blocks, for each i: the nearest whole number to their share."""
    return [round(Fraction(str(sparsity)) * sum(sizes[: index + 1])) for index in range(len(sizes))]


def files(directory: Path, *, without: Sequence[str] = ("timing.jsonl",)) -> dict[str, bytes]:
    """The bytes of every file below a directory, by relative path, but for those named."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in without
    }
