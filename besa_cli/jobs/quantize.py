"""Requests of `besa quantize`."""

from typing_extensions import Unpack

from besa_cli import quantizers
from besa_cli.choices import GivenOptions
from besa_cli.jobs.request import Placement, StageRequest
from besa_cli.ops import affine


def request(
    *,
    method: str = "rtn",
    bits: int = 4,
    group_size: str = affine.GROUP,
    symmetric: bool = True,
    options: GivenOptions | None = None,
    **placement: Unpack[Placement],
) -> StageRequest:
    """Check what is asked of `besa quantize`, and resolve its method.

    Parameters
    ----------
    method : str
        A key of `besa_cli.quantizers.QUANTIZERS`.
    bits, group_size, symmetric
        The grid: see `besa_cli.ops.affine.grid`.
    options : mapping, optional
        The method's own options that were given.
    **placement
        Where and how it is computed: see `Placement`.

    Raises
    ------
    UsageError
        The method is unknown, lacks an option, or a value is invalid.
    """
    grid = affine.grid(bits, group_size, symmetric=symmetric)
    return StageRequest(
        command="quantize",
        method=quantizers.load(method, grid, options or {}),
        target_sparsity=None,
        command_options=affine.grid_options(grid),
        **placement,
    )
