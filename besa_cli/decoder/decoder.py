"""A decoder run block by block.

The real model's own code runs everywhere: its embedding and masks before the first block, its norm and head after the
last, and each block with the very keyword arguments that the model hands to it.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from besa_cli.decoder import architecture, attention
from besa_cli.decoder.conduct import TOLERANCE, following, not_causal, relative_error
from besa_cli.decoder.partial import PartialModel, tensors_of
from besa_cli.errors import BesaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keywords = Mapping[str, Any]

_TRIED = 4  # tokens in the trial of the first block


class Caught(Exception):
    """The hidden states that entered the first block, or that a module inside a block was given or gave."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Decoder(PartialModel):
    """A partial model that runs: from tokens to hidden states, through loaded blocks, to logits; see `PartialModel`.

    Parameters
    ----------
    quick : bool
        Compute causal attention on a CPU with `besa_cli.ops.attention`, whose scores are rounded to the dtype. By
        default everything is computed as stock transformers does.
    """

    def __init__(self, directory: Path, device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> None:
        super().__init__(directory, device, dtype)
        self._body = _body(self.model, self.blocks)
        if quick and device.type == "cpu":
            attention.in_chunks(self.model)
        self._keywords: dict[tuple[int, int], list[tuple[tuple[Any, ...], Keywords]]] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._outputs = 0  # how many values a block returns in a tuple; 0 where it returns the hidden states alone
        self._try_first_block()

    def keywords(self, index: int, tokens: Tensor) -> tuple[tuple[Any, ...], Keywords]:
        """The positional (after the hidden states) and keyword arguments that the model hands to block `index`.

        They are recorded once for every shape of `tokens` (samples, seqlen) by running the real model over blocks that
        only note what they are given and pass the hidden states on; these are zeros where the embedding was dropped.

        Raises
        ------
        BesaError
            They depend on which tokens there are, or the model skips or repeats blocks.
        """
        shape = (tokens.shape[0], tokens.shape[1])
        if shape not in self._keywords:
            records = self._recorded(tokens)
            if not self._keywords:
                for others in (tokens.flip(1), self.with_special_tokens(tokens)):
                    if not _alike(records, self._recorded(others)):
                        raise BesaError(
                            f"{type(self.model).__name__} hands its blocks arguments that depend on the tokens "
                            "themselves",
                            "besa passes hidden states from block to block; this decoder cannot be followed that way",
                        )
            self._keywords[shape] = records
        return self._keywords[shape][index]

    def with_special_tokens(self, tokens: Tensor) -> Tensor:
        """The same with a special token of the model (padding, begin, end, ...) in the place of every other one.

        Parameters
        ----------
        tokens : Tensor of shape (samples, seqlen)
        """
        special = torch.tensor(architecture.special_tokens(self.config))
        changed = tokens.clone()
        places = torch.arange(0, tokens.shape[1], 2)
        changed[:, places] = special[(places // 2) % len(special)]
        return changed

    def _recorded(self, tokens: Tensor) -> list[tuple[tuple[Any, ...], Keywords]]:
        """What every block is given besides the hidden states."""
        records: list[tuple[tuple[Any, ...], Keywords]] = []

        def note(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            records.append((args, _without_cache(kwargs)))
            return self._as_block_output(hidden)

        with _blank(self.embedding):
            self._run(tokens, note)
        if len(records) != len(self):
            raise BesaError(
                f"{type(self.model).__name__} calls {len(records)} blocks where it has {len(self)}",
                "a decoder that skips or repeats blocks cannot be pruned block by block",
            )
        return records

    def _as_block_output(self, hidden: Tensor) -> Any:
        return hidden if not self._outputs else (hidden, *[None] * (self._outputs - 1))

    def _try_first_block(self) -> None:
        """Find out from the real first block whether blocks return a tuple; refuse one that looks ahead."""
        call: list[tuple[tuple[Any, ...], Keywords]] = []

        def catch(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            call.append((args, _without_cache(kwargs)))
            raise Caught(hidden)

        with following(self.model):
            hidden = self._entering(torch.arange(_TRIED)[None] % self.vocabulary, catch)
            self.load(0)
            with torch.no_grad():
                output = self.blocks[0](hidden, *call[0][0], **call[0][1])
                other = hidden.clone()
                other[:, -1] = hidden.abs().amax() * torch.linspace(-1, 1, hidden.shape[-1]).to(hidden)
                changed = self.blocks[0](other, *call[0][0], **call[0][1])
            self.drop(0)
            self._outputs = len(output) if isinstance(output, tuple) else 0
            change = relative_error(states_of(changed)[:, :-1], states_of(output)[:, :-1])
        if change > TOLERANCE[self.dtype] / 10:  # the same products in the same order: rounding hardly differs
            raise not_causal(self.model)

    def _entering(self, tokens: Tensor, catch: Callable[..., Any]) -> Tensor:
        """The hidden states that enter the first block, where `catch` stands in for all and raises `Caught`."""
        try:
            self._run(tokens, catch)
        except Caught as caught:
            return caught.hidden
        raise BesaError(
            f"{type(self.model).__name__} did not call its blocks", "this decoder cannot be pruned block by block"
        )

    def _run(self, tokens: Tensor, stand_in: Callable[..., Any], *, whole: bool = False, **options: Any) -> Any:
        """Run the real model with `stand_in(number, hidden, ...)` in place of every block."""
        with contextlib.ExitStack() as stack, torch.no_grad():
            for number, block in enumerate(self.blocks):
                stack.enter_context(_replaced_forward(block, number, stand_in))
            return self._ready(whole=whole)(input_ids=tokens.to(self.device), use_cache=False, **options)

    def _ready(self, *, whole: bool) -> nn.Module:
        """The whole model or the part of it that gives hidden states, with values in every tensor outside the blocks.

        Some of torch's products give garbage, and no error, for a tensor on the meta device.
        """
        model = self.model if whole else self._body
        if model is self.model:
            self.load_embedding()
            self.load_head()
        inside = set(model.modules())
        for module in self._outside:
            used = module in inside and "forward" not in vars(module)  # an embedding that gives zeros
            if used and any(tensor.is_meta for _, tensor in tensors_of(module)):
                raise BesaError(
                    f"{type(self.model).__name__} computes with a {type(module).__name__} whose values are nowhere",
                    "this decoder cannot be pruned block by block",
                )
        return model

    def embed(self, tokens: Tensor) -> Tensor:
        """The hidden states that enter the first block, of shape (samples, seqlen, hidden)."""

        def catch(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise Caught(hidden)

        self.load_embedding()
        return self._entering(tokens, catch)

    def _injecting(self, hidden: Tensor) -> Callable[..., Any]:
        """A stand-in for the blocks of which the last gives `hidden`."""
        last = len(self) - 1

        def inject(number: int, states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._as_block_output(hidden if number == last else states)

        return inject

    def whole(self, tokens: Tensor) -> Tensor:
        """What the model itself gives to its head, by its own calls of its blocks: (samples, seqlen, hidden)."""
        self.load_embedding()
        states: Tensor = self._ready(whole=False)(input_ids=tokens.to(self.device), use_cache=False)[0]
        return states

    def normed(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What the head is given for the hidden states that left the last block: (samples, seqlen, hidden) as well."""
        self.load_embedding()
        states: Tensor = self._run(tokens, self._injecting(hidden))[0]
        return states

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
        self.load_embedding()
        self.load_head()
        inject = self._injecting(hidden)
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
        if next(block.parameters()).is_meta:
            raise RuntimeError(f"block {index} is computed before its weights are loaded")
        if weights is None:
            output = block(hidden, *args, **kwargs)
        else:
            output = torch.func.functional_call(block, dict(weights), (hidden, *args), dict(kwargs))
        return states_of(output)


def _body(model: "PreTrainedModel", blocks: nn.Module) -> nn.Module:
    """The part of a model that gives hidden states, without the head: the model itself where it has no such part."""
    from transformers import PreTrainedModel

    base: nn.Module = model.base_model
    if base is not model:
        return base
    inner = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model)
    return next((module for module in inner if blocks in set(module.modules())), model)


def states_of(output: Any) -> Tensor:
    """The hidden states in what a block or one of its modules returns."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _alike(one: Any, other: Any) -> bool:
    """Whether arguments hold the same tensors; what is neither tensor nor container counts as the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_alike(*pair) for pair in zip(one, other, strict=True))
    return isinstance(one, Tensor) == isinstance(other, Tensor)


def _without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded arguments with no cache among them: blocks see whole sequences."""
    return {
        name: value for name, value in kwargs.items() if name not in ("past_key_values", "past_key_value", "layer_past")
    }


@contextlib.contextmanager
def _blank(embedding: nn.Embedding | None) -> Iterator[None]:
    """Within, an embedding that was dropped gives zeros."""
    if embedding is None or not embedding.weight.is_meta:
        yield
        return
    module: nn.Module = embedding
    dtype, width = embedding.weight.dtype, embedding.embedding_dim

    def forward(tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, width, device=tokens.device, dtype=dtype)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


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
