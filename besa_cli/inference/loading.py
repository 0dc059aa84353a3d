"""Whole models of transformers: dense checkpoints as they are, sparse exports from their packed weights."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from besa_cli import hf  # registers the loader of sparse exports
from besa_cli.checkpoint import sparse_index
from besa_cli.decoder import architecture
from besa_cli.system import compute

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def config_of(directory: Path) -> "PretrainedConfig":
    """Return the configuration with which transformers loads a directory; that of a sparse export keeps it packed.

    Raises
    ------
    BesaError
        `besa_cli.decoder.architecture.config_of` refuses the model.
    """
    config = architecture.config_of(directory)
    if sparse_index.is_sparse(directory):
        config.quantization_config = hf.SparseConfig(packed=True).to_dict()
    return config


def load(directory: Path, dtype: torch.dtype, device: torch.device | None = None) -> "PreTrainedModel":
    """Load a whole model for inference; the linears of a sparse export stay packed, on the CPU.

    Raises
    ------
    BesaError
        The model is not supported, or a file is damaged.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = architecture.load_stock(directory, dtype, config_of(directory))
    compute.give_back_memory()
    return model if device is None else model.to(device)  # type: ignore[arg-type]
