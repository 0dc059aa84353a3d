"""What is asked of `besa prune`, and what it does to a block."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from besa_cli import compute, windows
from besa_cli.choices import Target
from besa_cli.errors import UsageError, unknown
from besa_cli.ops import budget
from besa_cli.ops.affine import Grid
from besa_cli.pruners import PRUNERS
from besa_cli.stream.block import Block, Pruned


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of `prune`.

    Attributes
    ----------
    method : str
        A key of `besa_cli.pruners.PRUNERS`.
    sparsity : float
        Share of the linears' weights to prune, in [0, 1).
    nm : (n, m), optional
        Prune n of every m columns instead.
    options : mapping
        The method's own options that were given, by the names of its `Options`.
    device, dtype : str
        As on the command line, ``auto`` included.
    seed : int
    calibration : str, optional
        Directory of a calibration set that was named, for the record.
    max_memory : int, optional
        Bytes of memory that the process is to stay within; the hidden states go to files where they would not fit.
    """

    method: str = "besa"
    sparsity: float = 0.5
    nm: tuple[int, int] | None = None
    options: Mapping[str, Any]
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    calibration: str | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.method not in PRUNERS:
            raise unknown("method", self.method, PRUNERS)
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"--sparsity {self.sparsity} is not in [0, 1)", "0.5 prunes half of the weights")
        if self.nm and not 0 < self.nm[0] < self.nm[1]:
            raise UsageError(
                f"--nm '{self.nm[0]}:{self.nm[1]}' is no pattern N:M with 0 < N < M", "2:4 prunes 2 of every 4 columns"
            )
        compute.device(self.device)
        self.method_options()

    @property
    def grid(self) -> Grid | None:
        """See `besa_cli.jobs.plan.Plan`: where pruning and quantizing are learned together."""
        grid: Grid | None = getattr(self.method_options(), "grid", None)
        return grid

    @property
    def stage(self) -> str:
        """See `besa_cli.jobs.plan.Plan`."""
        return "quantized" if self.grid else "pruned"

    @property
    def command(self) -> str:
        """See `besa_cli.jobs.plan.Plan`."""
        return "prune"

    @property
    def window(self) -> str:
        """See `besa_cli.jobs.plan.Plan`."""
        return str(getattr(self.method_options(), "window", windows.BLOCK))

    @property
    def target(self) -> Target:
        """See `besa_cli.jobs.plan.Plan`."""
        target: Target = getattr(self.method_options(), "target", "block")
        return target

    @property
    def observes(self) -> bool:
        """See `besa_cli.jobs.plan.Plan`."""
        return True

    def facts(self) -> dict[str, Any]:
        """See `besa_cli.jobs.plan.Plan`."""
        return {"quantization": asdict(self.grid)} if self.grid else {}

    def doing(self, model: str) -> str:
        """See `besa_cli.jobs.plan.Plan`."""
        bits = f" to {self.grid}" if self.grid else ""
        return f"pruning {model} with {self.method}{bits}"

    def budgets(self, sizes: Sequence[int]) -> list[int] | None:
        """See `besa_cli.jobs.plan.Plan`."""
        return None if self.nm else budget.window_counts(self.sparsity, sizes)

    def change(self, block: Block) -> Pruned:
        """See `besa_cli.jobs.plan.Plan`."""
        pruned: Pruned = _module(self.method).prune(block, self.method_options())
        return pruned

    def method_options(self) -> Any:
        """The method's `Options`.

        Raises
        ------
        UsageError
            An option that this method does not have; says which methods do.
        """
        known = _option_names(self.method)
        given = {**self.options, **({"nm": self.nm} if self.nm else {})}
        for name in given:
            if name not in known:
                having = [method for method in PRUNERS if name in _option_names(method)]
                raise UsageError(
                    f"--{name.replace('_', '-')} is no option of --method {self.method}",
                    f"methods with that option: {', '.join(having) or 'none'}",
                )
        module = _module(self.method)
        if given.get("preset") == "authors":
            given = {**module.authors(given.get("granularity", "row")), **given}
        return module.Options(**given)

    def record(self) -> dict[str, Any]:
        """All options with their values, under the names of the command line."""
        own = self.method_options()
        named = {field.name: getattr(own, field.name) for field in fields(own) if field.name != "nm"}
        amount = {"nm": f"{self.nm[0]}:{self.nm[1]}"} if self.nm else {"sparsity": self.sparsity}
        return {"method": self.method, **amount, **named, "device": self.device, "dtype": self.dtype, "seed": self.seed}


def _module(method: str) -> Any:
    return importlib.import_module(f"besa_cli.pruners.{method}")


def _option_names(method: str) -> list[str]:
    return [field.name for field in fields(_module(method).Options)]
