"""Places of a model's tensors in its checkpoint: a stored tensor, its transpose, a part of it, or several joined."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Place of one tensor of the model in its checkpoint.

    Attributes
    ----------
    tensors : tuple of str
        Names of the stored tensors. Several are joined along their first axis; only one can be replaced.
    expert : int, optional
        Number of the part along the first axis, of a stored tensor that holds a part for each expert.
    transposed : bool
        True if the matrix is stored as (cols, rows).
    """

    tensors: tuple[str, ...]
    expert: int | None = None
    transposed: bool = False

    @property
    def tensor(self) -> str:
        """Name of the stored tensor, or of the first of several."""
        return self.tensors[0]

    @property
    def linear(self) -> str:
        """Prefix of the names of what is stored for this linear beside the checkpoint, as its codes."""
        name = self.tensor.removesuffix(".weight")
        return name if self.expert is None else f"{name}.{self.expert}"

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the model's tensor, contiguous, from stored tensors by name; it may share their memory."""
        stored = tensors[self.tensor] if len(self.tensors) == 1 else torch.cat([tensors[name] for name in self.tensors])
        part = stored if self.expert is None else stored[self.expert]
        return part.T.contiguous() if self.transposed else part

    def shape(self, stored: Callable[[str], tuple[int, ...]]) -> tuple[int, ...]:
        """Return the shape of the model's tensor, from the shapes of stored tensors by name."""
        first, *others = (stored(name) for name in self.tensors)
        shape = (first[0] + sum(other[0] for other in others), *first[1:]) if others else first
        part = shape if self.expert is None else shape[1:]
        return part[::-1] if self.transposed else part


def replaced(tensors: Mapping[str, Tensor], matrices: Iterable[tuple[TensorPlace, Tensor]]) -> dict[str, Tensor]:
    """Return stored tensors by name with some of the model's matrices replaced; `tensors` stay as they are."""
    changed, copied = dict(tensors), set[str]()
    for place, matrix in matrices:
        stored = matrix.T.contiguous() if place.transposed else matrix
        if place.expert is None:
            changed[place.tensor] = stored
            continue
        if place.tensor not in copied:
            changed[place.tensor] = tensors[place.tensor].clone()
            copied.add(place.tensor)
        changed[place.tensor][place.expert] = stored
    return changed
