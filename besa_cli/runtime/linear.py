"""Linears of a model that run from packed weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from besa_cli.checkpoint import sparse_format
from besa_cli.errors import BesaError
from besa_cli.ops import packing
from besa_cli.ops.kernels import native_tiles
from besa_cli.runtime import matrix
from besa_cli.runtime.matrix import PackedMatrix


class PackedLinear(nn.Module):
    """A linear without gradients whose weight stays packed; `weight` holds its bytes.

    Parameters
    ----------
    linear : nn.Linear
        The linear that this one replaces; its bias is taken over, its weight may be on the meta device.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = linear.bias
        self.matrix: PackedMatrix | None = None

    def pack(self, parts: Mapping[str, Tensor], place: str) -> None:
        """Take over a weight from the tensors that a sparse checkpoint stores of it.

        Parameters
        ----------
        parts : mapping
            By the last part of their names, on the CPU; or the dense weight alone.
        place : str
            Name of the weight, for errors.

        Raises
        ------
        BesaError
            The parts are inconsistent, or do not have the shape of this linear; names `place`.
        """
        made = _matrix(parts, place)
        expected = (self.out_features, self.in_features)
        if (made.rows, made.cols) != expected:
            raise BesaError(
                f"{place} has the shape {(made.rows, made.cols)}, the model's is {expected}", "fetch it again"
            )
        self.matrix = made
        self.weight = nn.Parameter(self.matrix.data, requires_grad=False)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Compute inputs·Wᵀ + bias, as `nn.Linear` does: (…, in_features) → (…, out_features)."""
        assert self.matrix is not None  # packed when the checkpoint was loaded
        if inputs.device.type != "cpu" or inputs.dtype not in native_tiles.INPUTS:
            raise BesaError(
                f"packed weights run on the CPU in bf16, fp16 or fp32, not on {inputs.device} in {inputs.dtype}",
                "load the checkpoint without packed=True",
            )
        outputs = self.matrix.multiply(inputs.reshape(-1, self.in_features))
        if self.bias is not None:
            outputs += self.bias
        return outputs.view(*inputs.shape[:-1], self.out_features)

    @override
    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _matrix(parts: Mapping[str, Tensor], place: str) -> PackedMatrix:
    """Validate the stored parts of a weight and pack them: codes as codes, else the values that are not zero."""
    if sparse_format.CODES in parts:
        return matrix.pack_codes(*sparse_format.coded(parts, place))
    if sparse_format.VALUES in parts:
        return matrix.pack(*sparse_format.kept(parts, place))
    dense = parts[sparse_format.WEIGHT] if sparse_format.WEIGHT in parts else sparse_format.weight(parts, place)
    mask = packing.stored_mask(dense)
    return matrix.pack(mask, dense[mask])


class StreamedLinear(nn.Linear):
    """A dense linear without gradients that multiplies single vectors with the kernel of `native_tiles`."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Compute input·Wᵀ + bias."""
        vectors = input.reshape(-1, self.in_features)
        if len(vectors) != 1 or not native_tiles.multiplies_dense(self.weight, vectors):
            return super().forward(input)
        outputs = native_tiles.multiply_dense(self.weight, vectors)
        if self.bias is not None:
            outputs += self.bias
        return outputs.view(*input.shape[:-1], self.out_features)
