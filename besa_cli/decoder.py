"""A stock transformers decoder of which only the parts in use have weights.

The real model's own code runs everywhere: its embedding and masks before the first block, its norm and head after the
last, and each block with the very keyword arguments that the model hands to it.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from besa_cli import anatomy, compute
from besa_cli.errors import BesaError
from besa_cli.weights import Names, Weights

Keywords = Mapping[str, Any]

_CHECK_TOKENS = 32  # length of the sample on which stream and whole model are compared


class _Caught(Exception):
    """The hidden states that entered the first block, or that a module inside a block was given or gave."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Decoder:
    """The model of a checkpoint directory, its blocks loaded one at a time.

    Parameters
    ----------
    directory : Path
        A Hugging Face checkpoint with safetensors.
    device, dtype : torch.device, torch.dtype
        Where and in which dtype to compute.

    Raises
    ------
    BesaError
        The model cannot be handled, or a weight is missing.
    """

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype) -> None:
        compute.map_large_tensors()
        self.config = anatomy.config_of(directory)
        self.weights = Weights(directory)
        self.device, self.dtype = device, dtype
        self.model = anatomy.skeleton(self.config, dtype)
        self.prefix, self.blocks = anatomy.block_list(self.model)
        self._names = Names(self.model, self.weights.names)
        self._keywords: dict[tuple[int, int], list[tuple[tuple[Any, ...], Keywords]]] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._outputs = 0  # how many values a block returns in a tuple; 0 where it returns the hidden states alone
        for index in range(len(self.blocks)):
            self._require(self.block_names(index), f"block {index}")
        self._load_rest()
        self._find_output_form()

    def __len__(self) -> int:
        return len(self.blocks)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of block `index` by their name inside it."""
        return anatomy.linears(self.blocks[index], self.config)

    def block_names(self, index: int) -> dict[str, str]:
        """State-dict name inside block `index` → name of the tensor in the checkpoint."""
        names = self.blocks[index].state_dict().keys()
        return {name: self._names.origin(f"{self.prefix}.{index}.{name}") for name in names}

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

    def load(self, index: int, source: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Give block `index` its weights and return all its tensors in their own dtype, by checkpoint name.

        Parameters
        ----------
        index : int
        source : mapping of checkpoint name to Tensor, optional
            Take the tensors from here instead of from the checkpoint.
        """
        block = self.blocks[index]
        tensors = dict(source) if source is not None else self.weights.read(self.source_names(index))
        block.to_empty(device=self.device)
        self._restore_buffers(block)
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
        head: nn.Module | None = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        own = {name for name, module in self.model.named_modules() if module is head}
        self._head = {name: origin for name, origin in wanted.items() if name.rpartition(".")[0] in own}
        now = {name: origin for name, origin in wanted.items() if name not in self._head}
        tensors = self.weights.read(list(now.values()))
        for module in _outside(self.model, self.blocks):
            if module is not head:
                _to_empty(module, self.device)
        self._restore_buffers(self.model, skip=self.blocks)
        self._fill(self.model.state_dict(), now, tensors)
        self.model.tie_weights()
        self.model.requires_grad_(False)

    def head_bytes(self) -> int:
        """Bytes that the head will take in memory, where it has weights of its own that are not loaded yet."""
        return sum(self.model.get_parameter(name).numel() * self.dtype.itemsize for name in self._head)

    def load_head(self) -> None:
        """Give the head its weights, where it has any of its own; only logits need them."""
        if self._head:
            _to_empty(self.model.get_output_embeddings(), self.device)  # type: ignore[no-untyped-call]
            self._fill(self.model.state_dict(), self._head, self.weights.read(list(self._head.values())))
            self._head = {}

    def _restore_buffers(self, root: nn.Module, skip: nn.Module | None = None) -> None:
        """Compute the buffers that no checkpoint holds (rotary frequencies, embedding scales), as transformers does."""
        skipped = set(skip.modules()) if skip is not None else set()
        with torch.no_grad():
            for module in root.modules():
                if module not in skipped and module._non_persistent_buffers_set:
                    self.model._init_weights(module)  # type: ignore[no-untyped-call]

    def keywords(self, index: int, tokens: Tensor) -> tuple[tuple[Any, ...], Keywords]:
        """The positional (after the hidden states) and keyword arguments that the model hands to block `index`.

        They are recorded once for every shape of `tokens` (samples, seqlen) by running the real model over blocks that
        only note what they are given and pass the hidden states on.
        """
        shape = (tokens.shape[0], tokens.shape[1])
        if shape not in self._keywords:
            records: list[tuple[tuple[Any, ...], Keywords]] = []

            def note(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                records.append((args, _without_cache(kwargs)))
                return self._as_block_output(hidden)

            self._run(tokens, note)
            if len(records) != len(self):
                raise BesaError(
                    f"{type(self.model).__name__} calls {len(records)} blocks where it has {len(self)}",
                    "a decoder that skips or repeats blocks cannot be pruned block by block",
                )
            self._keywords[shape] = records
        return self._keywords[shape][index]

    def _as_block_output(self, hidden: Tensor) -> Any:
        return hidden if not self._outputs else (hidden, *[None] * (self._outputs - 1))

    def _find_output_form(self) -> None:
        """Whether blocks return a tensor or a tuple: from the real first block on two tokens."""
        call: list[tuple[tuple[Any, ...], Keywords]] = []

        def catch(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            call.append((args, _without_cache(kwargs)))
            raise _Caught(hidden)

        try:
            self._run(torch.zeros(1, 2, dtype=torch.long), catch)
        except _Caught as caught:
            hidden = caught.hidden
        self.load(0)
        with torch.no_grad():
            output = self.blocks[0](hidden, *call[0][0], **call[0][1])
        self.drop(0)
        self._outputs = len(output) if isinstance(output, tuple) else 0

    def _run(self, tokens: Tensor, stand_in: Callable[..., Any], *, whole: bool = False, **options: Any) -> Any:
        """Run the real model with `stand_in(number, hidden, ...)` in place of every block."""
        with contextlib.ExitStack() as stack, torch.no_grad():
            for number, block in enumerate(self.blocks):
                stack.enter_context(_replaced_forward(block, number, stand_in))
            model = self.model if whole else self.model.base_model
            return model(input_ids=tokens.to(self.device), use_cache=False, **options)

    def embed(self, tokens: Tensor) -> Tensor:
        """The hidden states that enter the first block, of shape (samples, seqlen, hidden)."""

        def catch(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise _Caught(hidden)

        try:
            self._run(tokens, catch)
        except _Caught as caught:
            return caught.hidden
        raise BesaError(
            f"{type(self.model).__name__} did not call its blocks", "this decoder cannot be pruned block by block"
        )

    def finish(self, hidden: Tensor, tokens: Tensor, part: slice | None = None) -> Tensor:
        """Logits from the hidden states that left the last block.

        Parameters
        ----------
        hidden : Tensor of shape (samples, seqlen, hidden)
        tokens : Tensor of shape (samples, seqlen)
        part : slice, optional
            Positions to give logits for; all by default.

        Returns
        -------
        Tensor of shape (samples, positions, vocabulary)
        """
        self.load_head()
        last = len(self) - 1

        def inject(number: int, states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._as_block_output(hidden if number == last else states)

        if part is None or not self._keeps_logits:
            logits: Tensor = self._run(tokens, inject, whole=True).logits
            return logits if part is None else logits[:, part]
        positions = torch.arange(part.start, part.stop, device=self.device)
        logits = self._run(tokens, inject, whole=True, logits_to_keep=positions).logits
        return logits

    def forward(
        self, index: int, hidden: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The output of the (loaded) block `index` for hidden states of shape (samples, seqlen, hidden).

        Parameters
        ----------
        tokens : Tensor of shape (samples, seqlen)
            The token ids of these samples; only their shape matters.
        weights : mapping, optional
            Weights to use instead of the block's own, by name inside the block; gradients reach them.
        """
        args, kwargs = self.keywords(index, tokens)
        block = self.blocks[index]
        if weights is None:
            output = block(hidden, *args, **kwargs)
        else:
            output = torch.func.functional_call(block, dict(weights), (hidden, *args), dict(kwargs))
        return _states(output)

    def forward_to(
        self, index: int, part: str, hidden: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The output of the module `part` of block `index` for what enters the block; nothing after it is computed.

        `hidden`, `tokens` and `weights` are as for `forward`.
        """

        def catch(_module: nn.Module, _args: object, output: Any) -> None:
            raise _Caught(_states(output))

        return self._caught(index, part, hidden, tokens, weights, "register_forward_hook", catch)

    def inputs_of(self, index: int, part: str, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What the module `part` of block `index` is given for what enters the block.

        Raises
        ------
        BesaError
            The module is given more than one tensor.
        """

        def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            if len(given) != 1 or not isinstance(given[0], Tensor):
                raise BesaError(
                    f"{type(self.model).__name__} hands more than hidden states to {part} of block {index}",
                    "--window block reconstructs the whole block",
                )
            raise _Caught(given[0])

        return self._caught(index, part, hidden, tokens, None, "register_forward_pre_hook", catch, with_kwargs=True)

    def _caught(
        self,
        index: int,
        part: str,
        hidden: Tensor,
        tokens: Tensor,
        weights: Mapping[str, Tensor] | None,
        register: str,
        catch: Callable[..., None],
        **how: bool,
    ) -> Tensor:
        handle = getattr(self.blocks[index].get_submodule(part), register)(catch, **how)
        try:
            self.forward(index, hidden, tokens, weights)
        except _Caught as caught:
            return caught.hidden
        finally:
            handle.remove()
        raise BesaError(f"block {index} does not call its {part}", "--window block reconstructs the whole block")

    def forward_part(
        self, index: int, part: str, inputs: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The output of the module `part` of block `index` alone, for its own inputs.

        Parameters
        ----------
        inputs : Tensor of shape (samples, seqlen, hidden)
            As from `inputs_of`.
        weights : mapping, optional
            As for `forward`, by name inside the block.
        """
        module = self.blocks[index].get_submodule(part)
        named = {name.removeprefix(f"{part}."): weight for name, weight in (weights or {}).items()}
        return _states(torch.func.functional_call(module, named, (inputs,)) if named else module(inputs))

    def verify(self, tokens: Tensor) -> None:
        """Compare stream and whole model on one short sample; the whole model's blocks are loaded as they are called.

        Raises
        ------
        BesaError
            They differ: the blocks depend on more than the hidden states before them.
        """
        sample = tokens[:1, :_CHECK_TOKENS]
        with self._lazily_loaded():
            expected = self.model.base_model(input_ids=sample.to(self.device), use_cache=False)[0]
        hidden = self.embed(sample)
        for index in range(len(self)):
            self.load(index)
            with torch.no_grad():
                hidden = self.forward(index, hidden, sample)
            self.drop(index)
        last = len(self) - 1
        found = self._run(
            sample, lambda number, states, *_, **__: self._as_block_output(hidden if number == last else states)
        )[0]
        error = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))
        if not error < 1e-3:
            raise BesaError(
                f"{type(self.model).__name__} gives other hidden states block by block than as a whole ({error:.2g})",
                "its blocks depend on each other in a way that besa cannot follow",
            )

    @contextlib.contextmanager
    def _lazily_loaded(self) -> Iterator[None]:
        handles = []
        with torch.no_grad():
            for number, block in enumerate(self.blocks):
                handles.append(block.register_forward_pre_hook(lambda *_, number=number: self.load(number) and None))
                handles.append(block.register_forward_hook(lambda *_, number=number: self.drop(number)))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()


def _states(output: Any) -> Tensor:
    """The hidden states in what a block or one of its modules returns."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded arguments with no cache among them: blocks see whole sequences."""
    return {
        name: value for name, value in kwargs.items() if name not in ("past_key_values", "past_key_value", "layer_past")
    }


def _outside(model: nn.Module, blocks: nn.Module) -> Sequence[nn.Module]:
    inside = set(blocks.modules())
    return [module for module in model.modules() if module not in inside]


def _to_empty(module: nn.Module, device: torch.device) -> None:
    """`Module.to_empty` for one module's own tensors."""
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
    for name, buffer in list(module._buffers.items()):
        if buffer is not None:
            module._buffers[name] = torch.empty_like(buffer, device=device)


@contextlib.contextmanager
def _replaced_forward(block: nn.Module, number: int, stand_in: Callable[..., Any]) -> Iterator[None]:
    def forward(hidden: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        states = hidden if hidden is not None else kwargs.pop("hidden_states")
        return stand_in(number, states, *args, **kwargs)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
