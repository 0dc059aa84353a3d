"""A stock transformers decoder in which only the parts in use have their weights in memory."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from besa_cli.checkpoint.fewer_experts import FewerExperts
from besa_cli.checkpoint.tensor_places import TensorPlace
from besa_cli.checkpoint.weights import Weights
from besa_cli.decoder import architecture, experts, linears
from besa_cli.decoder.prefetch import Prefetcher
from besa_cli.decoder.tensor_names import Names, reconcile
from besa_cli.errors import BesaError
from besa_cli.system import compute

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NOT_COMPUTED = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


class PartialModel:
    """The model of a checkpoint directory, with blocks loaded one at a time.

    Parameters
    ----------
    directory : Path
        A Hugging Face checkpoint with safetensors.
    device, dtype : torch.device, torch.dtype
        Device and dtype of the computation.
    removed_experts : float, optional
        Share of each block's experts that the model is run without: the last ones, until `keep_experts` is called.

    Attributes
    ----------
    notes : list of str
        Notes for the user on tensors that are untied or not used, from `besa_cli.decoder.tensor_names.reconcile`.

    Raises
    ------
    BesaError
        The model cannot be handled, or a weight is missing or of another shape.
    """

    def __init__(
        self, directory: Path, device: torch.device, dtype: torch.dtype, *, removed_experts: float | None = None
    ) -> None:
        compute.map_large_tensors()
        compute.bound_primitives()
        self.config = architecture.config_of(directory)
        self.weights = Weights(directory)
        if removed_experts is not None:
            self.config, self.weights = experts.without(self.config, self.weights, removed_experts)
        self.device, self.dtype = device, dtype
        _require_sizes(self.config, directory)
        self.model = architecture.skeleton(self.config, dtype)
        self.prefix, self.blocks = architecture.block_list(self.model)
        self._names = Names(self.model, self.weights.names)
        linears.separate(self.prefix, self.blocks, self._names)
        self._outside = _outside(self.model, self.blocks)
        self._buffered = _buffered(self.model)
        self._above = [module for module in self._outside if self.blocks in set(module.modules())]
        self.notes = reconcile(self.model, self._names, self.weights)
        self._ahead = Prefetcher(
            lambda index: self.weights.read(self.stored_names(index)), pinned=device.type == "cuda"
        )
        for index in range(len(self.blocks)):
            self._require(self.tensor_places(index), f"block {index}")
        self._load_rest()

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary: rows of the embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.config.get_text_config().hidden_size)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the linears of block `index` by their name inside it."""
        return linears.linears(self.blocks[index], self.config)

    def tensor_places(self, index: int) -> dict[str, TensorPlace]:
        """Map each state-dict name inside block `index` to the tensor's place in the checkpoint."""
        names = self.blocks[index].state_dict().keys()
        return {name: self._names.origin(f"{self.prefix}.{index}.{name}") for name in names}

    def linear_tensors(self) -> list[str]:
        """List the checkpoint names of the weights of all linears, each tensor once."""
        places = [(self.tensor_places(index), name) for index in range(len(self)) for name in self.linears(index)]
        return list(dict.fromkeys(origins[f"{name}.weight"].tensor for origins, name in places))

    def stored_names(self, index: int) -> list[str]:
        """List the checkpoint names of all tensors of block `index`, including those that the model does not use."""
        return self._names.below(f"{self.prefix}.{index}.")

    def rest_names(self) -> list[str]:
        """List the checkpoint names of all tensors that belong to no block."""
        inside = {name for index in range(len(self)) for name in self.stored_names(index)}
        return [name for name in self.weights.names if name not in inside]

    def has_same_outside(self, directory: Path) -> bool:
        """Return whether a checkpoint differs in nothing but its blocks: same configuration, names and other tensors.

        The files are compared, so nothing need be loaded.
        """
        other = Weights(directory)
        same = _described(self.config) == _described(architecture.config_of(directory))
        return (
            same
            and self.weights.names == other.names
            and all(_same_tensor(self.weights, other, name) for name in self.rest_names())
        )

    def _require(self, places: Mapping[str, TensorPlace], where: str) -> None:
        for name in (name for place in places.values() for name in place.tensors):
            if name not in self.weights:
                raise BesaError(
                    f"{self.weights.directory} lacks the tensor {name} ({where} of {type(self.model).__name__})",
                    "the checkpoint is incomplete or of another architecture: fetch it again",
                )

    def keep_experts(self, numbers: Sequence[Sequence[int]]) -> None:
        """Set the experts of each block that the model is run with, by their numbers in the checkpoint.

        Raises
        ------
        ValueError
            They are not as many as `removed_experts` leaves.
        """
        if not isinstance(self.weights, FewerExperts):
            raise ValueError("the model is run with all of its experts")
        self.weights.keep(numbers)

    def prefetch(self, index: int) -> None:
        """Start to read block `index` in the background; it occupies its size on disk in memory until it is loaded."""
        self._ahead.prefetch(index)

    def load(self, index: int, source: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Load the weights of block `index` and return all its tensors in their stored dtype, by checkpoint name.

        Parameters
        ----------
        index : int
        source : mapping of checkpoint name to Tensor, optional
            Tensors to use instead of those in the checkpoint.
        """
        block = self.blocks[index]
        tensors = dict(source) if source is not None else self._ahead.take(index)
        block.to_empty(device=self.device)
        if not self._buffered.isdisjoint(block.modules()):
            self._restore_buffers([*block.modules(), *self._above])
        self._fill(block.state_dict(), self.tensor_places(index), tensors)
        return tensors

    def _fill(
        self, state: Mapping[str, Tensor], origins: Mapping[str, TensorPlace], tensors: Mapping[str, Tensor]
    ) -> None:
        with torch.no_grad():
            for name, origin in origins.items():
                tensor = origin.of(tensors)
                if tensor.shape != state[name].shape:
                    raise BesaError(
                        f"{origin.tensor} in {self.weights.directory} has the shape {list(tensor.shape)}, "
                        f"its {type(self.model).__name__} needs {list(state[name].shape)}",
                        "config.json and the weights do not belong together: fetch the model again",
                    )
                state[name].copy_(tensor)

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

    def _belonging(self, origins: Mapping[str, TensorPlace], owner: nn.Module | None) -> dict[str, TensorPlace]:
        """Select the tensors that belong directly to the module `owner`."""
        own = {name for name, module in self.model.named_modules() if module is owner}
        return {name: origin for name, origin in origins.items() if name.rpartition(".")[0] in own}

    def _fill_outside(self, modules: Sequence[nn.Module], origins: Mapping[str, TensorPlace]) -> None:
        """Load the weights and buffers of modules outside the blocks, and tie the weights tied to them."""
        tensors = self.weights.read(_stored(origins))
        for module in modules:
            _to_empty(module, self.device)
        self._restore_buffers(modules)
        self._fill(self.model.state_dict(), origins, tensors)
        self.model.tie_weights(recompute_mapping=False)
        self.model.requires_grad_(False)

    @property
    def embedding(self) -> nn.Embedding | None:
        """The token embedding; None if the model computes its inputs in another way."""
        module = self.model.get_input_embeddings()
        return module if isinstance(module, nn.Embedding) else None

    def embedding_bytes(self) -> int:
        """Return the bytes that `drop_embedding` would free; 0 if the embedding is not loaded."""
        loaded = self.embedding is not None and not self.embedding.weight.is_meta
        return sum(self.model.get_parameter(name).nbytes for name in self._embedding) if loaded else 0

    def drop_embedding(self) -> None:
        """Free the token embedding and a head's weight tied to it; they are read again when needed."""
        if self.embedding is None or not self._embedding:
            return
        weight = self.embedding.weight
        for module in self.model.modules():
            for name in [name for name, parameter in module._parameters.items() if parameter is weight]:
                _empty(module, name, torch.device("meta"))
        compute.give_back_memory()

    def load_embedding(self) -> None:
        """Read the token embedding again if it was dropped."""
        if self.embedding is not None and self.embedding.weight.is_meta:
            self._fill_outside([self.embedding], self._embedding)

    def head_bytes(self) -> int:
        """Return the bytes that the head's own weights will occupy in memory; 0 if they are loaded already."""
        return sum(self.model.get_parameter(name).numel() * self.dtype.itemsize for name in self._head)

    def load_head(self) -> None:
        """Load the head's own weights, if any; only logits need them.

        A weight tied to the embedding is not touched: the head's own may be only a bias.
        """
        if not self._head:
            return
        for name in self._head:
            owner, _, last = name.rpartition(".")
            _empty(self.model.get_submodule(owner), last, self.device)
        self._fill(self.model.state_dict(), self._head, self.weights.read(_stored(self._head)))
        self._head = {}

    def drop_head(self) -> None:
        """Free the weights that `load_head` has read; they are read again when logits are needed."""
        for name in self._own_head:
            owner, _, last = name.rpartition(".")
            _empty(self.model.get_submodule(owner), last, torch.device("meta"))
        self._head = self._own_head
        compute.give_back_memory()

    def weight_bytes(self) -> int:
        """Return the peak bytes of loading the whole model: all weights in the computation dtype and as stored."""
        loaded = sum(parameter.numel() for parameter in self.model.parameters()) * self.dtype.itemsize
        return loaded + self.weights.nbytes(self.weights.names)

    def _restore_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Compute the buffers that no checkpoint stores (rotary frequencies, embedding scales), as transformers does.

        transformers' own `initialize_weights` computes them: it uses the model that each module belongs to, and visits
        inner modules before outer ones, which may overwrite their buffers. Weights are marked as initialized and kept.
        """
        chosen = self._buffered.intersection(modules)
        if not chosen:
            return
        for module in self.model.modules():
            module._is_hf_initialized = module not in chosen  # type: ignore[assignment]
            for name, tensor in tensors_of(module):
                tensor._is_hf_initialized = name not in module._non_persistent_buffers_set  # type: ignore[attr-defined]
        self.model.initialize_weights()


def _stored(origins: Mapping[str, TensorPlace]) -> list[str]:
    """List the names of the stored tensors of some places."""
    return [name for place in origins.values() for name in place.tensors]


def _require_sizes(config: "PretrainedConfig", directory: Path) -> None:
    text = config.get_text_config()
    for name in ("hidden_size", "vocab_size"):
        if not isinstance(getattr(text, name, None), int):
            raise BesaError(
                f"{directory / 'config.json'} has no {name} for the decoder ({config.model_type})",
                "use another model: besa needs a decoder with one vocabulary and one hidden width",
            )


def _described(config: "PretrainedConfig") -> dict[str, object]:
    """Return a configuration without what changes no computation in a given dtype."""
    return {name: value for name, value in config.to_dict().items() if name not in _NOT_COMPUTED}


def _same_tensor(first: Weights, second: Weights, name: str) -> bool:
    one, other = first.read([name])[name], second.read([name])[name]
    return one.dtype == other.dtype and torch.equal(one, other)


def _outside(model: nn.Module, blocks: nn.Module) -> Sequence[nn.Module]:
    inside = set(blocks.modules())
    return [module for module in model.modules() if module not in inside]


def _buffered(model: nn.Module) -> set[nn.Module]:
    """Return the modules with a buffer that no checkpoint stores, in themselves or in a submodule."""
    return {
        module for module in model.modules() if any(inner._non_persistent_buffers_set for inner in module.modules())
    }


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own parameters and buffers, with their names in the module."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield name, tensor


def _to_empty(module: nn.Module, device: torch.device) -> None:
    """Apply `Module.to_empty` to a module's own tensors, without its submodules."""
    for name, _ in tensors_of(module):
        _empty(module, name, device)


def _empty(module: nn.Module, name: str, device: torch.device) -> None:
    """Replace one of a module's own tensors by an uninitialized one on the device."""
    parameter = module._parameters.get(name)
    if parameter is not None:
        module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
        return
    buffer = module._buffers[name]
    module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device=device)
