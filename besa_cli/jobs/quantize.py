"""What is asked of `besa quantize`, and what it does to a block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from besa_cli.jobs import request
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid
from besa_cli.quantizers import QUANTIZERS
from besa_cli.stream.block import Block, Decision


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest(request.StageRequest):
    """What is asked of `quantize`; its other attributes are those of `besa_cli.jobs.request.StageRequest`.

    Attributes
    ----------
    bits : int
    group_size : str
        A number of columns, or ``channel``.
    symmetric : bool
    """

    methods: ClassVar[Mapping[str, str]] = QUANTIZERS
    package: ClassVar[str] = "quantizers"

    method: str = "rtn"
    bits: int = 4
    group_size: str = "128"
    symmetric: bool = True

    def check(self) -> None:
        """See `besa_cli.jobs.request.StageRequest`."""
        _ = self.grid

    @property
    def grid(self) -> Grid:
        """See `besa_cli.jobs.request.StageRequest`."""
        return affine.grid(self.bits, self.group_size, symmetric=self.symmetric)

    @property
    def stage(self) -> str:
        """See `besa_cli.jobs.request.StageRequest`."""
        return "quantized"

    @property
    def command(self) -> str:
        """See `besa_cli.jobs.request.StageRequest`."""
        return "quantize"

    @property
    def observes(self) -> bool:
        """See `besa_cli.jobs.request.StageRequest`."""
        return bool(self.module.OBSERVES)

    def describe(self, model: str) -> str:
        """See `besa_cli.jobs.request.StageRequest`."""
        return f"quantizing {model} with {self.method} to {self.grid}"

    def budgets(self, sizes: Sequence[int]) -> None:
        """See `besa_cli.jobs.request.StageRequest`: nothing is pruned."""
        return

    def change(self, block: Block) -> Decision:
        """See `besa_cli.jobs.request.StageRequest`."""
        quantized: Decision = self.module.quantize(block, self.grid, self.method_options())
        return quantized

    def sparsity_option(self) -> dict[str, Any]:
        """See `besa_cli.jobs.request.StageRequest`."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
