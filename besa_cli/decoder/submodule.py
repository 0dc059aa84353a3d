"""A part of a block alone: what it is given and what it gives, with nothing computed after it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from besa_cli.decoder.decoder import Caught, Decoder, states_of
from besa_cli.errors import BesaError


def forward_to(
    decoder: Decoder, index: int, part: str, hidden: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The output of the module `part` of block `index` for what enters the block; nothing after it is computed.

    `hidden`, `tokens` and `weights` are as for `Decoder.forward`.
    """

    def catch(_module: nn.Module, _args: object, output: Any) -> None:
        raise Caught(states_of(output))

    return _caught(decoder, index, part, hidden, tokens, weights, "register_forward_hook", catch)


def inputs_of(decoder: Decoder, index: int, part: str, hidden: Tensor, tokens: Tensor) -> Tensor:
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
                f"{type(decoder.model).__name__} hands more than hidden states to {part} of block {index}",
                "--window block reconstructs the whole block",
            )
        raise Caught(given[0])

    return _caught(decoder, index, part, hidden, tokens, None, "register_forward_pre_hook", catch, with_kwargs=True)


def _caught(
    decoder: Decoder,
    index: int,
    part: str,
    hidden: Tensor,
    tokens: Tensor,
    weights: Mapping[str, Tensor] | None,
    register: str,
    catch: Callable[..., None],
    **how: bool,
) -> Tensor:
    handle = getattr(decoder.blocks[index].get_submodule(part), register)(catch, **how)
    try:
        decoder.forward(index, hidden, tokens, weights)
    except Caught as caught:
        return caught.hidden
    finally:
        handle.remove()
    raise BesaError(f"block {index} does not call its {part}", "--window block reconstructs the whole block")


def forward_part(
    decoder: Decoder, index: int, part: str, inputs: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The output of the module `part` of block `index` alone, for its own inputs.

    Parameters
    ----------
    inputs : Tensor of shape (samples, seqlen, hidden)
        As from `inputs_of`.
    weights : mapping, optional
        As for `Decoder.forward`, by name inside the block.
    """
    module = decoder.blocks[index].get_submodule(part)
    named = {name.removeprefix(f"{part}."): weight for name, weight in (weights or {}).items()}
    return states_of(torch.func.functional_call(module, named, (inputs,)) if named else module(inputs))
