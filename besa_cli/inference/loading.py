"""Whole models of transformers: dense checkpoints as they are, sparse exports from their packed weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from besa_cli import hf  # registers the loader of sparse exports
from besa_cli.checkpoint import sparse_index
from besa_cli.decoder import architecture
from besa_cli.system import compute

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def config_of(directory: Path, *, packed: bool = True) -> "PretrainedConfig":
    """Return the configuration with which transformers loads a directory; that of a sparse export may keep it packed.

    Raises
    ------
    BesaError
        `besa_cli.decoder.architecture.config_of` refuses the model.
    """
    config = architecture.config_of(directory)
    if sparse_index.is_sparse(directory):
        config.quantization_config = hf.SparseConfig(packed=packed).to_dict()
    return config


def load(
    directory: Path, dtype: torch.dtype, device: torch.device | None = None, *, packed: bool = True
) -> "PreTrainedModel":
    """Load a whole model for inference; the linears of a sparse export stay packed, on the CPU, or are expanded.

    Raises
    ------
    BesaError
        The model is not supported, or a file is damaged.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = architecture.load_stock(directory, dtype, config_of(directory, packed=packed))
    compute.give_back_memory()
    return model if device is None else model.to(device)  # type: ignore[arg-type]


def weights_read(model: "PreTrainedModel") -> int | None:
    """Return the bytes of weights that are read to generate a token; None if that depends on the token.

    They are all parameters but an embedding that is not the head, too: only one of its rows is read.
    """
    text = model.config.get_text_config()
    if text is not model.config or getattr(text, "num_experts_per_tok", None):
        return None
    tables: Any = model.get_input_embeddings()
    head = model.get_output_embeddings()
    everything = sum(parameter.nbytes for parameter in model.parameters())
    if head is not None and head.weight is tables.weight:
        return everything
    return everything - int(tables.weight.nbytes)
