"""A stock transformers decoder of which only the parts in use have weights."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from besa_cli.checkpoint.weights import Weights
from besa_cli.decoder import architecture
from besa_cli.decoder.prefetch import Prefetcher
from besa_cli.decoder.tensor_names import Names, fit
from besa_cli.errors import BesaError
from besa_cli.system import compute

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PartialModel:
    """The model of a checkpoint directory, its blocks loaded one at a time.

    Parameters
    ----------
    directory : Path
        A Hugging Face checkpoint with safetensors.
    device, dtype : torch.device, torch.dtype
        Where and in which dtype to compute.

    Attributes
    ----------
    notes : list of str
        What the user should know of how the checkpoint fits the model, see `besa_cli.decoder.tensor_names.fit`.

    Raises
    ------
    BesaError
        The model cannot be handled, or a weight is missing or of another shape.
    """

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        compute.map_large_tensors()
        self.config = architecture.config_of(directory)
        self.weights = Weights(directory)
        self.device, self.dtype = device, dtype
        _require_sizes(self.config, directory)
        self.model = architecture.skeleton(self.config, dtype)
        self.prefix, self.blocks = architecture.block_list(self.model)
        self._outside = _outside(self.model, self.blocks)
        self._buffered = _buffered(self.model)
        self._above = [module for module in self._outside if self.blocks in set(module.modules())]
        self._names = Names(self.model, self.weights.names)
        self.notes = fit(self.model, self._names, self.weights)
        self._ahead = Prefetcher(
            lambda index: self.weights.read(self.source_names(index)), pinned=device.type == "cuda"
        )
        for index in range(len(self.blocks)):
            self._require(self.block_names(index), f"block {index}")
        self._load_rest()

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return int(self.config.get_text_config().vocab_size)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of block `index` by their name inside it."""
        return architecture.linears(self.blocks[index], self.config)

    def block_names(self, index: int) -> dict[str, str]:
        """State-dict name inside block `index` → name of the tensor in the checkpoint."""
        names = self.blocks[index].state_dict().keys()
        return {name: self._names.origin(f"{self.prefix}.{index}.{name}") for name in names}

    def linear_tensors(self) -> list[str]:
        """The names in the checkpoint of the weights of all linears."""
        places = [(self.block_names(index), name) for index in range(len(self)) for name in self.linears(index)]
        return [origins[f"{name}.weight"] for origins, name in places]

    def source_names(self, index: int) -> list[str]:
        """All tensors of the checkpoint that belong to block `index`, also those the model does not use."""
        return self._names.below(f"{self.prefix}.{index}.")

    def rest_names(self) -> list[str]:
        """All tensors of the checkpoint that belong to no block."""
        inside = {name for index in range(len(self)) for name in self.source_names(index)}
        return [name for name in self.weights.names if name not in inside]

    def _require(self, names: Mapping[str, str], place: str) -> None:
        for name in names.values():
            if name not in self.weights:
                raise BesaError(
                    f"{self.weights.directory} lacks the tensor {name} ({place} of {type(self.model).__name__})",
                    "the checkpoint is incomplete or of another architecture: fetch it again",
                )

    def prefetch(self, index: int) -> None:
        """Begin to read block `index`, which will be loaded soon; that takes as much memory as it has on disk."""
        self._ahead.prefetch(index)

    def load(self, index: int, source: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Give block `index` its weights and return all its tensors in their own dtype, by checkpoint name.

        Parameters
        ----------
        index : int
        source : mapping of checkpoint name to Tensor, optional
            Take the tensors from here instead of from the checkpoint.
        """
        block = self.blocks[index]
        tensors = dict(source) if source is not None else self._ahead.take(index)
        block.to_empty(device=self.device)
        if not self._buffered.isdisjoint(block.modules()):
            self._restore_buffers([*block.modules(), *self._above])
        self._fill(block.state_dict(), self.block_names(index), tensors)
        return tensors

    def _fill(self, state: Mapping[str, Tensor], origins: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, origin in origins.items():
                if tensors[origin].shape != state[name].shape:
                    raise BesaError(
                        f"{origin} in {self.weights.directory} has the shape {list(tensors[origin].shape)}, "
                        f"its {type(self.model).__name__} needs {list(state[name].shape)}",
                        "config.json and the weights do not belong together: fetch the model again",
                    )
                state[name].copy_(tensors[origin])

    def drop(self, index: int) -> None:
        """Free the weights of block `index`."""
        self.blocks[index].to("meta")
        compute.give_back_memory()

    def _load_rest(self) -> None:
        inside = f"{self.prefix}."
        tied = set(getattr(self.model, "all_tied_weights_keys", {}) or {})
        names = [name for name in self.model.state_dict() if not name.startswith(inside)]
        wanted = {name: self._names.origin(name) for name in names if name not in tied}
        self._require(wanted, "outside the blocks")
        head: nn.Module | None = self.model.get_output_embeddings()
        self._head = self._own_head = self._belonging(wanted, head)
        now = {name: origin for name, origin in wanted.items() if name not in self._head}
        self._fill_outside([module for module in self._outside if module is not head], now)
        self._embedding = self._belonging(now, self.embedding)

    def _belonging(self, origins: Mapping[str, str], owner: nn.Module | None) -> dict[str, str]:
        """Those of the tensors that are the own ones of a module."""
        own = {name for name, module in self.model.named_modules() if module is owner}
        return {name: origin for name, origin in origins.items() if name.rpartition(".")[0] in own}

    def _fill_outside(self, modules: Sequence[nn.Module], origins: Mapping[str, str]) -> None:
        """Give modules outside the blocks their weights and buffers, and those that are tied to them theirs."""
        tensors = self.weights.read(list(origins.values()))
        for module in modules:
            _to_empty(module, self.device)
        self._restore_buffers(modules)
        self._fill(self.model.state_dict(), origins, tensors)
        self.model.tie_weights(recompute_mapping=False)
        self.model.requires_grad_(False)

    @property
    def embedding(self) -> nn.Embedding | None:
        """The module that gives each token its hidden state; None where the model makes them in another way."""
        found = self.model.get_input_embeddings()
        return found if isinstance(found, nn.Embedding) else None

    def embedding_bytes(self) -> int:
        """Bytes of the token embedding, which `drop_embedding` would free; 0 where it is not held."""
        held = self.embedding is not None and not self.embedding.weight.is_meta
        return sum(self.model.get_parameter(name).nbytes for name in self._embedding) if held else 0

    def drop_embedding(self) -> None:
        """Free the token embedding, and a head's weight that is tied to it; whatever needs it next reads it again."""
        if self.embedding is None or not self._embedding:
            return
        weight = self.embedding.weight
        for module in self.model.modules():
            for name in [name for name, parameter in module._parameters.items() if parameter is weight]:
                _empty(module, name, torch.device("meta"))
        compute.give_back_memory()

    def load_embedding(self) -> None:
        """Read the token embedding where it was dropped."""
        if self.embedding is not None and self.embedding.weight.is_meta:
            self._fill_outside([self.embedding], self._embedding)

    def head_bytes(self) -> int:
        """Bytes that the head will take in memory, where it has weights of its own that are not loaded yet."""
        return sum(self.model.get_parameter(name).numel() * self.dtype.itemsize for name in self._head)

    def load_head(self) -> None:
        """Give the head its weights, where it has any of its own; only logits need them.

        A weight that is tied to the embedding stays as it is: a bias alone may be the head's own.
        """
        if not self._head:
            return
        for name in self._head:
            owner, _, own = name.rpartition(".")
            _empty(self.model.get_submodule(owner), own, self.device)
        self._fill(self.model.state_dict(), self._head, self.weights.read(list(self._head.values())))
        self._head = {}

    def drop_head(self) -> None:
        """Free what `load_head` has read; it is read again when logits are wanted."""
        for name in self._own_head:
            owner, _, own = name.rpartition(".")
            _empty(self.model.get_submodule(owner), own, torch.device("meta"))
        self._head = self._own_head
        compute.give_back_memory()

    def weight_bytes(self) -> int:
        """Bytes of all weights in the dtype of computation and as they are stored: what loading them may take."""
        loaded = sum(parameter.numel() for parameter in self.model.parameters()) * self.dtype.itemsize
        return loaded + self.weights.nbytes(self.weights.names)

    def _restore_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Compute the buffers that no checkpoint holds (rotary frequencies, embedding scales), as transformers does.

        Its own initialization does it, which asks the model that each module belongs to, and after the modules
        inside those around them, which may compute buffers of theirs. Weights count as initialized, and stay.
        """
        chosen = self._buffered.intersection(modules)
        if not chosen:
            return
        for module in self.model.modules():
            module._is_hf_initialized = module not in chosen  # type: ignore[assignment]
            for name, tensor in tensors_of(module):
                tensor._is_hf_initialized = name not in module._non_persistent_buffers_set  # type: ignore[attr-defined]
        self.model.initialize_weights()


def _require_sizes(config: "PretrainedConfig", directory: Path) -> None:
    text = config.get_text_config()
    for name in ("hidden_size", "vocab_size"):
        if not isinstance(getattr(text, name, None), int):
            raise BesaError(
                f"{directory / 'config.json'} gives no {name} of the decoder ({config.model_type})",
                "besa passes hidden states of one width from block to block; this model has no such width",
            )


def _outside(model: nn.Module, blocks: nn.Module) -> Sequence[nn.Module]:
    inside = set(blocks.modules())
    return [module for module in model.modules() if module not in inside]


def _buffered(model: nn.Module) -> set[nn.Module]:
    """The modules that hold a buffer that no checkpoint holds, or have one inside."""
    return {
        module for module in model.modules() if any(inner._non_persistent_buffers_set for inner in module.modules())
    }


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers by their name in it."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield name, tensor


def _to_empty(module: nn.Module, device: torch.device) -> None:
    """`Module.to_empty` for one module's own tensors."""
    for name, _ in tensors_of(module):
        _empty(module, name, device)


def _empty(module: nn.Module, name: str, device: torch.device) -> None:
    """Put a tensor without values in the place of one of a module's own tensors."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
        return
    buffer = module._buffers[name]
    module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=device)
