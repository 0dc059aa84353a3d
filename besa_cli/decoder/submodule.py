"""Inputs and outputs of one submodule of a block, without computing the rest of the block."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from besa_cli.decoder.decoder import Caught, Decoder, states_of
from besa_cli.errors import BesaError

_REMEDY = "give --window block, which reconstructs whole blocks"


def forward_to(
    decoder: Decoder, index: int, part: str, hidden: Tensor, tokens: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Run block `index` up to the submodule `part` and return its output; nothing after it is computed.

    `hidden`, `tokens` and `weights` are the parameters of `Decoder.forward`.
    """

    def catch(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        raise Caught(states_of(output))

    return _caught(decoder, index, part, hidden, tokens, weights, "register_forward_hook", catch)


def inputs_of(decoder: Decoder, index: int, part: str, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Run block `index` up to the submodule `part` and return the submodule's input.

    `hidden` and `tokens` are the parameters of `Decoder.forward`.

    Raises
    ------
    BesaError
        The submodule receives anything else than one tensor.
    """

    def catch(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        inputs = [*args, *kwargs.values()]
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise BesaError(
                f"{type(decoder.model).__name__} passes more than hidden states to {part} of block {index}", _REMEDY
            )
        raise Caught(inputs[0])

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
    **options: bool,
) -> Tensor:
    """Run block `index` with the hook `catch` on its submodule `part`, and return the tensor that the hook raises."""
    handle = getattr(decoder.blocks[index].get_submodule(part), register)(catch, **options)
    try:
        decoder.forward(index, hidden, tokens, weights)
    except Caught as caught:
        return caught.hidden
    finally:
        handle.remove()
    raise BesaError(f"block {index} does not call its {part}", _REMEDY)


def forward_part(
    decoder: Decoder, index: int, part: str, inputs: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Run the submodule `part` of block `index` alone and return its output.

    Parameters
    ----------
    inputs : Tensor of shape (samples, seqlen, hidden)
        The submodule's inputs, as returned by `inputs_of`.
    weights : mapping, optional
        Weights to use instead of the submodule's own, by name inside the block.
    """
    module = decoder.blocks[index].get_submodule(part)
    own = {name.removeprefix(f"{part}."): weight for name, weight in (weights or {}).items()}
    return states_of(torch.func.functional_call(module, own, (inputs,)) if own else module(inputs))
