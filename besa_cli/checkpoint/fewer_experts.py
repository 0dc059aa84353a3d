"""A checkpoint seen without some of its experts: the same names, with fewer numbers or shorter tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from besa_cli.checkpoint.weights import Weights


@dataclass(frozen=True, kw_only=True)
class ExpertTensors:
    """Stored tensors of one block that hold something for each of its experts.

    Attributes
    ----------
    block : int
    tensors : tuple of str
        Their names: one for each expert, in order, or a single one with a part for each.
    axis : int, optional
        Axis along which a single tensor has the experts' parts; None where each expert has a tensor.
    """

    block: int
    tensors: tuple[str, ...]
    axis: int | None = None


class FewerExperts(Weights):
    """The tensors of a checkpoint directory with fewer experts; those that stay are numbered anew, in order.

    What follows the experts in a tensor, or in a list of tensors, stays after them. Names, shapes and sizes follow from
    the number of experts that stay. Which of them stay can be said later, by `keep`; until then it is the first ones.

    Parameters
    ----------
    directory : Path
        A checkpoint of the whole model.
    held : sequence of ExpertTensors
        All tensors that hold something for each expert.
    experts, remaining : int
        Experts in a block of the whole model, and those that stay.
    """

    def __init__(self, directory: Path, held: Sequence[ExpertTensors], *, experts: int, remaining: int) -> None:
        super().__init__(directory)
        self._experts, self._remaining = experts, remaining
        self._sliced = {part.tensors[0]: part for part in held if part.axis is not None}
        separate = [part for part in held if part.axis is None]
        lost = experts - remaining
        self._numbered = {name: (part, number) for part in separate for number, name in enumerate(part.tensors[:-lost])}
        gone = {name for part in separate for name in part.tensors[-lost:]}
        self._names = [name for name in super().names if name not in gone]
        self._listed = set(self._names)
        self.blocks = sorted({part.block for part in held})
        self._kept = {block: list(range(remaining)) for block in self.blocks}

    def keep(self, numbers: Sequence[Sequence[int]]) -> None:
        """Set the experts that stay in each block, by their numbers in the whole model; blocks without any have none.

        Raises
        ------
        ValueError
            The numbers are not those of so many experts in ascending order.
        """
        for block in self.blocks:
            kept = list(numbers[block])
            if len(kept) != self._remaining or kept != sorted(set(kept).intersection(range(self._experts))):
                raise ValueError(f"{kept} are not {self._remaining} of {self._experts} experts (block {block})")
            self._kept[block] = kept

    @property
    @override
    def names(self) -> list[str]:
        return list(self._names)

    @override
    def __contains__(self, name: str) -> bool:
        return name in self._listed

    @override
    def nbytes(self, names: Iterable[str]) -> int:
        return sum(self._size(name) for name in names)

    def _size(self, name: str) -> int:
        whole = super().nbytes([name])
        part = self._sliced.get(name)
        if part is None or part.axis is None:
            return whole
        return whole // super().shape(name)[part.axis] * self.shape(name)[part.axis]

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        whole, part = super().shape(name), self._sliced.get(name)
        if part is None or part.axis is None:
            return whole
        shorter = list(whole)
        shorter[part.axis] -= self._experts - self._remaining
        return tuple(shorter)

    @override
    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        places = {name: self._place(name) for name in names}
        stored = super().read(list(dict.fromkeys(places.values())))
        return {name: self._part(name, stored[place]) for name, place in places.items()}

    def _place(self, name: str) -> str:
        """Return the name under which the whole model has what is called `name` here."""
        if name not in self._numbered:
            return name
        part, number = self._numbered[name]
        return part.tensors[self._numbers(part, len(part.tensors))[number]]

    def _numbers(self, part: ExpertTensors, size: int) -> list[int]:
        """Return the places of what stays, of `size` in all."""
        return [*self._kept[part.block], *range(self._experts, size)]

    def _part(self, name: str, tensor: Tensor) -> Tensor:
        """Return what stays of a stored tensor."""
        part = self._sliced.get(name)
        if part is None or part.axis is None:
            return tensor
        numbers = torch.tensor(self._numbers(part, tensor.shape[part.axis]))
        return tensor.index_select(part.axis, numbers).contiguous()
