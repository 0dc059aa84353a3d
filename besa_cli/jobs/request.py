"""What a job is told to do: what is asked of any method, whether it prunes or quantizes."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from besa_cli.choices import Target
from besa_cli.errors import UsageError, unknown
from besa_cli.ops import kernels
from besa_cli.ops.affine import Grid
from besa_cli.stream import windows
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse
from besa_cli.system import compute


@dataclass(frozen=True, kw_only=True)
class StageRequest(ABC):
    """What is asked of a method: see `besa_cli.jobs.prune.PruneRequest` and `besa_cli.jobs.quantize.QuantizeRequest`.

    Attributes
    ----------
    methods : mapping
        The methods there are; of the class.
    folder : str
        The package of theirs, one module a method; of the class.
    method : str
        A key of `methods`.
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

    methods: ClassVar[Mapping[str, str]]
    package: ClassVar[str]

    method: str
    options: Mapping[str, Any]
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    calibration: str | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.method not in self.methods:
            raise unknown("method", self.method, self.methods)
        self.check()
        compute.device(self.device)
        kernels.check()
        self.method_options()

    @abstractmethod
    def check(self) -> None:
        """Refuse values of the command's own fields.

        Raises
        ------
        UsageError
            One of them cannot be meant.
        """

    @property
    def module(self) -> Any:
        """The method's module."""
        return self._module(self.method)

    @property
    @abstractmethod
    def stage(self) -> str:
        """The stage that is made."""

    @property
    @abstractmethod
    def command(self) -> str:
        """The command that makes it."""

    @property
    @abstractmethod
    def observes(self) -> bool:
        """Whether anything is decided from calibration samples; where not, none pass through the model."""

    @abstractmethod
    def describe(self, model: str) -> str:
        """What is done to a model of this name, in a few words."""

    @abstractmethod
    def budgets(self, sizes: Sequence[int]) -> list[int] | None:
        """Weights that each window prunes, from the windows' numbers of weights; None where none are counted out."""

    @abstractmethod
    def change(self, block: Block) -> Decision:
        """What becomes of a block."""

    @property
    def grid(self) -> Grid | None:
        """The grid that weights are put on."""
        grid: Grid | None = getattr(self.method_options(), "grid", None)
        return grid

    @property
    def window(self) -> str:
        """What is reconstructed together, see `besa_cli.stream.windows.segments`."""
        return str(getattr(self.method_options(), "window", windows.BLOCK))

    @property
    def target(self) -> Target:
        """What a window should keep, see `besa_cli.stream.walk.compress`."""
        target: Target = getattr(self.method_options(), "target", "block")
        return target

    def memory_use(self) -> MemoryUse:
        """What the method holds in memory."""
        held: MemoryUse = self.module.memory_use(self.method_options())
        return held

    def extras(self) -> dict[str, Any]:
        """What else the manifest says of what is made."""
        return {"quantization": asdict(self.grid)} if self.grid else {}

    def resolved(self) -> dict[str, Any]:
        """The values for the method's `Options` that were given."""
        return dict(self.options)

    def method_options(self) -> Any:
        """The method's `Options`.

        Raises
        ------
        UsageError
            An option that this method does not have; says which methods do.
        """
        known, given = self._option_names(self.method), self.resolved()
        for name in given:
            if name not in known:
                having = [method for method in self.methods if name in self._option_names(method)]
                raise UsageError(
                    f"--{name.replace('_', '-')} is no option of --method {self.method}",
                    f"methods with that option: {', '.join(having) or 'none'}",
                )
        return self.module.Options(**given)

    @abstractmethod
    def sparsity_option(self) -> dict[str, Any]:
        """The command's own options with their values, under the names of the command line."""

    def to_manifest(self) -> dict[str, Any]:
        """All options with their values, under the names of the command line."""
        own = self.method_options()
        named = {field.name: getattr(own, field.name) for field in fields(own) if field.name != "nm"}
        where = {"device": self.device, "dtype": self.dtype, "seed": self.seed}
        return {"method": self.method, **self.sparsity_option(), **named, **where}

    def _module(self, method: str) -> Any:
        return importlib.import_module(f"besa_cli.{self.package}.{method}")

    def _option_names(self, method: str) -> list[str]:
        return [field.name for field in fields(self._module(method).Options)]
