"""A decoder that runs block by block.

Only the model's own code computes: its embedding and masks before the first block, its norm and head after the last,
and each block with exactly the keyword arguments that the model passes to it.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from besa_cli.decoder import architecture, attention
from besa_cli.decoder.conduct import TOLERANCE, following, not_causal, relative_error
from besa_cli.decoder.partial import PartialModel, tensors_of
from besa_cli.errors import BesaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keywords = Mapping[str, Any]
Arguments = tuple[tuple[object, ...], Keywords]  # of a block, but for the hidden states
StandIn = Callable[..., object]  # in place of a block: called with its number and all its arguments

_TRIAL_TOKENS = 4  # length of the sample on which the first block is tried
_NOT_SUPPORTED = "use another model: this decoder cannot be pruned block by block"


class Caught(Exception):
    """Exception that ends a forward pass early and carries the hidden states caught there."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Decoder(PartialModel):
    """A partial model that computes: tokens to hidden states, through loaded blocks, to logits.

    Parameters
    ----------
    directory, device, dtype, removed_experts
        The parameters of `PartialModel`.
    quick : bool
        Compute causal attention on a CPU with `besa_cli.ops.attention`, which rounds scores to the dtype. By default
        everything is computed as in stock transformers.
    """

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        quick: bool = False,
        removed_experts: float | None = None,
    ) -> None:
        super().__init__(directory, device, dtype, removed_experts=removed_experts)
        self._body = _body(self.model, self.blocks)
        if quick and device.type == "cpu":
            attention.use_chunked_attention(self.model)
        self._keywords: dict[tuple[int, int], list[Arguments]] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._outputs = 0  # length of the tuple or list that a block returns; 0 if it returns the hidden states alone
        self._called: dict[object, set[str]] = {}  # names of the linears that blocks of a kind call
        self._try_blocks()

    def keywords(self, index: int, tokens: Tensor) -> Arguments:
        """Return the positional (after the hidden states) and keyword arguments that the model passes to block `index`.

        They are recorded once for each shape of `tokens` (samples, seqlen): the model runs over stand-ins for its
        blocks, which record their arguments and return the hidden states unchanged (zeros if the embedding was
        dropped).

        Raises
        ------
        BesaError
            The arguments depend on the values of the tokens, or the model skips or repeats blocks.
        """
        shape = (tokens.shape[0], tokens.shape[1])
        if shape not in self._keywords:
            records = self._recorded(tokens)
            if not self._keywords:
                for others in (tokens.flip(1), self.with_special_tokens(tokens)):
                    if not _same_tensors(records, self._recorded(others)):
                        raise BesaError(
                            f"{type(self.model).__name__} passes its blocks arguments that depend on the tokens",
                            _NOT_SUPPORTED,
                        )
            self._keywords[shape] = records
        return self._keywords[shape][index]

    def with_special_tokens(self, tokens: Tensor) -> Tensor:
        """Return a copy of the tokens in which every second one is a special token (padding, begin, end, ...).

        Parameters
        ----------
        tokens : Tensor of shape (samples, seqlen)
        """
        special = torch.tensor(architecture.special_tokens(self.config))
        changed = tokens.clone()
        places = torch.arange(0, tokens.shape[1], 2)
        changed[:, places] = special[(places // 2) % len(special)]
        return changed

    def _recorded(self, tokens: Tensor) -> list[Arguments]:
        """Run the model over stand-ins and return the arguments of each block other than the hidden states."""
        records: list[Arguments] = []

        def note(number: int, hidden: Tensor, *args: object, **kwargs: object) -> object:
            records.append((args, _without_cache(kwargs)))
            return self._as_block_output(hidden)

        with _zero_embedding(self.embedding, self.device):
            self._run(tokens, note)
        if len(records) != len(self):
            raise BesaError(
                f"{type(self.model).__name__} calls {len(records)} blocks but has {len(self)}",
                "use another model: a decoder that skips or repeats blocks cannot be pruned block by block",
            )
        return records

    def _as_block_output(self, hidden: Tensor) -> object:
        return hidden if not self._outputs else (hidden, *[None] * (self._outputs - 1))

    def _try_blocks(self) -> None:
        """Run the first block, to see if it returns a tuple and to refuse one in which tokens attend to later tokens.

        Then run the first block of every other kind. A linear that its block does not call is left as it is: the code
        may never use it, or read its weight alone.
        """
        call: list[Arguments] = []

        def catch(number: int, hidden: Tensor, *args: object, **kwargs: object) -> object:
            call.append((args, _without_cache(kwargs)))
            raise Caught(hidden)

        with following(self.model):
            tokens = torch.arange(_TRIAL_TOKENS)[None] % self.vocabulary
            hidden = self._first_inputs(tokens, catch)
            self.load(0)
            with torch.no_grad():
                output = self._observed(0, hidden, call[0])
                other = hidden.clone()
                other[:, -1] = hidden.abs().amax() * torch.linspace(-1, 1, hidden.shape[-1]).to(hidden)
                changed = self.blocks[0](other, *call[0][0], **call[0][1])
            self.drop(0)
            self._outputs = len(output) if isinstance(output, tuple | list) else 0
            change = relative_error(states_of(changed)[:, :-1], states_of(output)[:, :-1])
            if change > TOLERANCE[self.dtype] / 10:  # the same products in the same order: rounding differs little
                raise not_causal(self.model)
            others = {_kind(block): index for index, block in reversed(list(enumerate(self.blocks))) if index}
            arguments = self._recorded(tokens) if others.keys() - self._called.keys() else []
            for kind, index in others.items():
                if kind not in self._called:
                    self.load(index)
                    with torch.no_grad():
                        self._observed(index, hidden, arguments[index])
                    self.drop(index)
        if not any(self._called.values()):
            raise BesaError(f"{type(self.model).__name__} calls no linear in its blocks", _NOT_SUPPORTED)

    def _observed(self, index: int, hidden: Tensor, arguments: Arguments) -> Any:
        """Run a loaded block, note which linears it calls with inputs of their own width, and return its output."""
        called = set()

        def note(name: str, linear: nn.Linear, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape[-1] == linear.in_features:
                called.add(name)

        handles = [
            linear.register_forward_pre_hook(lambda linear, args, name=name: note(name, linear, args))
            for name, linear in super().linears(index).items()
        ]
        try:
            output = self.blocks[index](hidden, *arguments[0], **arguments[1])
        finally:
            for handle in handles:
                handle.remove()
        self._called[_kind(self.blocks[index])] = called
        return output

    @override
    def linears(self, index: int) -> dict[str, nn.Linear]:
        called = self._called[_kind(self.blocks[index])]
        return {name: linear for name, linear in super().linears(index).items() if name in called}

    def _first_inputs(self, tokens: Tensor, catch: StandIn) -> Tensor:
        """Return the inputs of the first block; `catch` replaces every block's forward and raises `Caught`."""
        try:
            self._run(tokens, catch)
        except Caught as caught:
            return caught.hidden
        raise BesaError(f"{type(self.model).__name__} did not call its blocks", _NOT_SUPPORTED)

    def _run(
        self, tokens: Tensor, stand_in: StandIn, *, with_head: bool = False, gradients: bool = False, **options: Tensor
    ) -> Any:
        """Run the model with `stand_in(number, hidden, ...)` in place of each block's forward."""
        with contextlib.ExitStack() as stack, torch.set_grad_enabled(gradients):
            for number, block in enumerate(self.blocks):
                stack.enter_context(_replaced_forward(block, number, stand_in))
            return self._ready(with_head=with_head)(input_ids=tokens.to(self.device), use_cache=False, **options)

    def _ready(self, *, with_head: bool) -> nn.Module:
        """Return the whole model, or its part without the head, after checking that all tensors it uses have values.

        The check is needed since some of torch's products return garbage, not an error, for tensors on the meta device.
        """
        model = self.model if with_head else self._body
        if model is self.model:
            self.load_embedding()
            self.load_head()
        inside = set(model.modules())
        for module in self._outside:
            used = module in inside and "forward" not in vars(module)  # `_zero_embedding` replaces it
            if used and any(tensor.is_meta for _, tensor in tensors_of(module)):
                raise BesaError(
                    f"{type(self.model).__name__} uses a {type(module).__name__} whose tensors have no values",
                    _NOT_SUPPORTED,
                )
        return model

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the hidden states that enter the first block, of shape (samples, seqlen, hidden)."""

        def catch(number: int, hidden: Tensor, *args: object, **kwargs: object) -> object:
            raise Caught(hidden)

        self.load_embedding()
        return self._first_inputs(tokens, catch)

    def _injecting(self, hidden: Tensor) -> StandIn:
        """Return a stand-in for the blocks: the last returns `hidden`, the others their inputs."""
        last = len(self) - 1

        def inject(number: int, states: Tensor, *args: object, **kwargs: object) -> object:
            return self._as_block_output(hidden if number == last else states)

        return inject

    def head_inputs(self, tokens: Tensor) -> Tensor:
        """Run the whole model and return the inputs of its head, of shape (samples, seqlen, hidden)."""
        self.load_embedding()
        states: Tensor = self._ready(with_head=False)(input_ids=tokens.to(self.device), use_cache=False)[0]
        return states

    def head_inputs_from(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the inputs of the head for outputs of the last block; both have shape (samples, seqlen, hidden)."""
        self.load_embedding()
        states: Tensor = self._run(tokens, self._injecting(hidden))[0]
        return states

    def finish(self, hidden: Tensor, tokens: Tensor, part: slice | None = None, *, gradients: bool = False) -> Tensor:
        """Compute the logits from the outputs of the last block.

        Parameters
        ----------
        hidden : Tensor of shape (samples, seqlen, hidden)
        tokens : Tensor of shape (samples, seqlen)
        part : slice, optional
            Positions to compute logits for; all by default.
        gradients : bool
            Let gradients of the logits reach `hidden`.

        Returns
        -------
        Tensor of shape (samples, positions, vocabulary)
        """
        self.load_embedding()
        self.load_head()
        inject = self._injecting(hidden)
        if part is None or not self._keeps_logits:
            logits: Tensor = self._run(tokens, inject, with_head=True, gradients=gradients).logits
            return logits if part is None else logits[:, part]
        positions = torch.arange(part.start, part.stop, device=self.device)
        logits = self._run(tokens, inject, with_head=True, gradients=gradients, logits_to_keep=positions).logits
        return logits

    def forward(
        self, index: int, hidden: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Run the loaded block `index` on hidden states and return its output, both (samples, seqlen, hidden).

        Parameters
        ----------
        tokens : Tensor of shape (samples, seqlen)
            The token ids of these samples; only their shape matters.
        weights : mapping, optional
            Weights to use instead of the block's own, by name inside the block; gradients reach them.
        """
        args, kwargs = self.keywords(index, tokens)
        block = self.blocks[index]
        if next(block.parameters()).is_meta:
            raise RuntimeError(f"block {index} is run before its weights are loaded")
        if weights is None:
            output = block(hidden, *args, **kwargs)
        else:
            output = torch.func.functional_call(block, dict(weights), (hidden, *args), dict(kwargs))
        return states_of(output)

    def left_out(self) -> dict[str, int]:
        """Count the weights of the blocks in tensors of two or more dimensions that are no linear's, by name.

        Names are those inside a block, with ``*`` for numbers: kernels of convolutions, routers, and linears that no
        forward pass calls.
        """
        counts: dict[str, int] = {}
        for index, block in enumerate(self.blocks):
            linears = {f"{name}.weight" for name in self.linears(index)}
            for name, parameter in block.named_parameters():
                if parameter.dim() >= 2 and name not in linears:
                    label = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
                    counts[label] = counts.get(label, 0) + parameter.numel()
        return counts


def _kind(block: nn.Module) -> object:
    """Return what blocks of the same kind share: the types of their modules, and the shapes of their parameters."""
    return tuple(
        (name, type(module), *(tuple(parameter.shape) for parameter in module.parameters(recurse=False)))
        for name, module in block.named_modules()
    )


def _body(model: "PreTrainedModel", blocks: nn.Module) -> nn.Module:
    """Return the part of a model without the head; the model itself if it has no such part."""
    from transformers import PreTrainedModel

    base: nn.Module = model.base_model
    if base is not model:
        return base
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model)
    return next((module for module in inner if blocks in set(module.modules())), model)


def states_of(output: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the hidden states in the output of a block or of one of its modules."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


def _same_tensors(first: object, second: object) -> bool:
    """Check that nested arguments hold equal tensors; other values than tensors and containers are not compared."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same_tensors(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(_same_tensors(*pair) for pair in zip(first, second, strict=True))
    return isinstance(first, Tensor) == isinstance(second, Tensor)


def _without_cache(kwargs: Keywords) -> dict[str, object]:
    """Return the arguments without the key-value cache, which whole sequences do not need."""
    return {
        name: value for name, value in kwargs.items() if name not in ("past_key_values", "past_key_value", "layer_past")
    }


@contextlib.contextmanager
def _zero_embedding(embedding: nn.Embedding | None, device: torch.device) -> Iterator[None]:
    """Make a dropped embedding return zeros on the device within the context, wherever it is asked to look up."""
    if embedding is None or not embedding.weight.is_meta:
        yield
        return
    module: nn.Module = embedding
    dtype, width = embedding.weight.dtype, embedding.embedding_dim

    def forward(tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, width, device=device, dtype=dtype)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def _replaced_forward(block: nn.Module, number: int, stand_in: StandIn) -> Iterator[None]:
    """Replace a block's forward by `stand_in(number, hidden, ...)` within the context."""

    def forward(hidden: Tensor | None = None, *args: object, **kwargs: object) -> object:
        states = hidden if hidden is not None else kwargs.pop("hidden_states")
        return stand_in(number, states, *args, **kwargs)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
