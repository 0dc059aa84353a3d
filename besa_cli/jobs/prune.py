"""What is asked of `besa prune`, and what it does to a block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from besa_cli.errors import UsageError
from besa_cli.jobs import request
from besa_cli.ops import budget
from besa_cli.pruners import PRUNERS
from besa_cli.stream.block import Block, Decision


@dataclass(frozen=True, kw_only=True)
class PruneRequest(request.StageRequest):
    """What is asked of `prune`; its other attributes are those of `besa_cli.jobs.request.StageRequest`.

    Attributes
    ----------
    sparsity : float
        Share of the linears' weights to prune, in [0, 1).
    nm : (n, m), optional
        Prune n of every m columns instead.
    """

    methods: ClassVar[Mapping[str, str]] = PRUNERS
    package: ClassVar[str] = "pruners"

    method: str = "besa"
    sparsity: float = 0.5
    nm: tuple[int, int] | None = None

    def check(self) -> None:
        """See `besa_cli.jobs.request.StageRequest`."""
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"--sparsity {self.sparsity} is not in [0, 1)", "0.5 prunes half of the weights")
        if self.nm and not 0 < self.nm[0] < self.nm[1]:
            raise UsageError(
                f"--nm '{self.nm[0]}:{self.nm[1]}' is no pattern N:M with 0 < N < M", "2:4 prunes 2 of every 4 columns"
            )
        low, high = self.method_options().reach if self.options.get("preset") else (0.0, 1.0)
        if not low <= self.sparsity <= high:
            raise UsageError(
                f"--sparsity {self.sparsity} is beyond what --preset {self.options['preset']} can learn: "
                f"{low:.3f} to {high:.3f}",
                "leave the preset out; the released program itself needs --no-sigmoid-smooth there",
            )

    @property
    def stage(self) -> str:
        """See `besa_cli.jobs.request.StageRequest`."""
        return "quantized" if self.grid else "pruned"

    @property
    def command(self) -> str:
        """See `besa_cli.jobs.request.StageRequest`."""
        return "prune"

    @property
    def observes(self) -> bool:
        """See `besa_cli.jobs.request.StageRequest`."""
        return True

    def describe(self, model: str) -> str:
        """See `besa_cli.jobs.request.StageRequest`."""
        bits = f" to {self.grid}" if self.grid else ""
        return f"pruning {model} with {self.method}{bits}"

    def budgets(self, sizes: Sequence[int]) -> list[int] | None:
        """See `besa_cli.jobs.request.StageRequest`."""
        return None if self.nm else budget.window_counts(self.sparsity, sizes)

    def change(self, block: Block) -> Decision:
        """See `besa_cli.jobs.request.StageRequest`."""
        pruned: Decision = self.module.prune(block, self.method_options())
        return pruned

    def resolved(self) -> dict[str, Any]:
        """See `besa_cli.jobs.request.StageRequest`: with the pattern, and with what a preset stands for."""
        given = {**self.options, **({"nm": self.nm} if self.nm else {})}
        authors = getattr(self.module, "authors", None) if given.get("preset") == "authors" else None
        return {**authors(given.get("granularity", "row")), **given} if authors else given

    def sparsity_option(self) -> dict[str, Any]:
        """See `besa_cli.jobs.request.StageRequest`."""
        return {"nm": f"{self.nm[0]}:{self.nm[1]}"} if self.nm else {"sparsity": self.sparsity}
