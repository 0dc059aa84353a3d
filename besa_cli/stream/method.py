"""Methods as jobs use them: a pruner or a quantizer with its options, resolved once from names."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import ModuleType
from typing import ClassVar, Protocol, Self

from besa_cli.choices import GivenOptions, OptionValue, Target
from besa_cli.errors import require_options, unknown
from besa_cli.ops.affine import Grid
from besa_cli.stream import windows
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse


@dataclass(frozen=True, kw_only=True)
class MethodOptions(ABC):
    """Base class of the options of every method; a method overrides the answers that differ for it.

    Attributes
    ----------
    uses_calibration : bool
        Whether the method decides from calibration samples; if not, none pass through the model. Of the class.
    """

    uses_calibration: ClassVar[bool] = True

    @classmethod
    def option_names(cls) -> list[str]:
        """Return the names of the options on the command line, with underscores."""
        return [field.name for field in fields(cls)]

    @classmethod
    def from_given(cls, given: GivenOptions) -> Self:
        """Build the options from those that were given on the command line; the others keep their defaults."""
        return cls(**given)

    def record(self) -> dict[str, OptionValue]:
        """Return the options with their values, under the names of `option_names`, for a manifest."""
        return {name: getattr(self, name) for name in self.option_names()}

    @abstractmethod
    def memory_use(self) -> MemoryUse:
        """Return the extra memory that the method needs with these options."""

    def reconstruction_window(self) -> str:
        """Return what is reconstructed together: see `besa_cli.stream.windows.segments`."""
        return windows.BLOCK

    def learning_target(self) -> Target:
        """Return what a window should keep: see `besa_cli.stream.walk.compress`."""
        return "block"

    def needs_sensitivity(self) -> bool:
        """Return True if the method wants `Block.sensitivity`."""
        return False

    def weight_grid(self) -> Grid | None:
        """Return the grid that the method itself puts weights on, if any."""
        return None

    def has_uniform_rival(self) -> bool:
        """Return True if the method gives uniform masks with each decision, with which its result is compared.

        See `besa_cli.stream.held_out`.
        """
        return False

    def sparsity_range(self) -> tuple[float, float]:
        """Return the lowest and the highest sparsity that the method can reach with these options."""
        return 0.0, 1.0


class Method(Protocol):
    """Method with its options, ready to decide blocks: `besa_cli.pruners.Pruner`, `besa_cli.quantizers.Quantizer`."""

    @property
    def name(self) -> str:
        """Name on the command line."""

    @property
    def options(self) -> MethodOptions:
        """The method's own options."""

    @property
    def grid(self) -> Grid | None:
        """Grid that weights are put on, if any."""

    def decide(self, block: Block) -> Decision:
        """Decide which weights of a block are pruned, and their codes where they are quantized."""


def resolve(
    package: str, methods: Mapping[str, str], name: str, given: GivenOptions
) -> tuple[ModuleType, MethodOptions]:
    """Import the module of a method, ``besa_cli.{package}.{name}``, and build its options from those that were given.

    Parameters
    ----------
    package : {"pruners", "quantizers"}
    methods : mapping
        Methods of the package, by name.
    name : str
    given : mapping
        Values by the names of the method's options; see `MethodOptions.option_names`.

    Raises
    ------
    UsageError
        The method is unknown, it lacks one of the options, or a value is invalid.
    """
    if name not in methods:
        raise unknown("method", name, methods)

    def module_of(method: str) -> ModuleType:
        return importlib.import_module(f"besa_cli.{package}.{method}")

    require_options(given, "method", name, methods, lambda other: module_of(other).Options.option_names())
    module = module_of(name)
    options: MethodOptions = module.Options.from_given(given)
    return module, options
