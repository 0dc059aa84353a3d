"""What is asked of `besa quantize`, and what it does to a block."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from besa_cli import compute, windows
from besa_cli.choices import Target
from besa_cli.errors import UsageError, unknown
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid
from besa_cli.quantizers import QUANTIZERS
from besa_cli.stream.block import Block, Pruned


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of `quantize`.

    Attributes
    ----------
    method : str
        A key of `besa_cli.quantizers.QUANTIZERS`.
    bits : int
    group_size : str
        A number of columns, or ``channel``.
    symmetric : bool
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

    method: str = "rtn"
    bits: int = 4
    group_size: str = "128"
    symmetric: bool = True
    options: Mapping[str, Any]
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    calibration: str | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.method not in QUANTIZERS:
            raise unknown("method", self.method, QUANTIZERS)
        compute.device(self.device)
        affine.grid(self.bits, self.group_size, symmetric=self.symmetric)
        self.method_options()

    @property
    def grid(self) -> Grid:
        """See `besa_cli.jobs.plan.Plan`."""
        return affine.grid(self.bits, self.group_size, symmetric=self.symmetric)

    @property
    def stage(self) -> str:
        """See `besa_cli.jobs.plan.Plan`."""
        return "quantized"

    @property
    def command(self) -> str:
        """See `besa_cli.jobs.plan.Plan`."""
        return "quantize"

    @property
    def window(self) -> str:
        """See `besa_cli.jobs.plan.Plan`."""
        return windows.BLOCK

    @property
    def target(self) -> Target:
        """See `besa_cli.jobs.plan.Plan`."""
        target: Target = getattr(self.method_options(), "target", "block")
        return target

    @property
    def observes(self) -> bool:
        """See `besa_cli.jobs.plan.Plan`."""
        return bool(_module(self.method).OBSERVES)

    def facts(self) -> dict[str, Any]:
        """See `besa_cli.jobs.plan.Plan`."""
        return {"quantization": asdict(self.grid)}

    def doing(self, model: str) -> str:
        """See `besa_cli.jobs.plan.Plan`."""
        return f"quantizing {model} with {self.method} to {self.grid}"

    def budgets(self, sizes: Sequence[int]) -> None:
        """See `besa_cli.jobs.plan.Plan`: nothing is pruned."""
        return

    def change(self, block: Block) -> Pruned:
        """See `besa_cli.jobs.plan.Plan`."""
        quantized: Pruned = _module(self.method).quantize(block, self.grid, self.method_options())
        return quantized

    def method_options(self) -> Any:
        """The method's `Options`.

        Raises
        ------
        UsageError
            An option that this method does not have; says which methods do.
        """
        for name in self.options:
            if name not in _option_names(self.method):
                having = [method for method in QUANTIZERS if name in _option_names(method)]
                raise UsageError(
                    f"--{name.replace('_', '-')} is no option of --method {self.method}",
                    f"methods with that option: {', '.join(having) or 'none'}",
                )
        return _module(self.method).Options(**self.options)

    def record(self) -> dict[str, Any]:
        """All options with their values, under the names of the command line."""
        own = self.method_options()
        named = {field.name: getattr(own, field.name) for field in fields(own)}
        grid = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return {"method": self.method, **grid, **named, "device": self.device, "dtype": self.dtype, "seed": self.seed}


def _module(method: str) -> Any:
    return importlib.import_module(f"besa_cli.quantizers.{method}")


def _option_names(method: str) -> list[str]:
    return [field.name for field in fields(_module(method).Options)]
