"""Requests for a stage: the method with its options, and how it is computed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, cast

from typing_extensions import TypedDict, override

from besa_cli.checkpoint.manifests import GridEntry, Quantization, StageName
from besa_cli.choices import Budget, OptionValue
from besa_cli.ops import kernels
from besa_cli.ops.affine import Grid
from besa_cli.stream.block import Block, Decision
from besa_cli.stream.memory_model import MemoryUse
from besa_cli.stream.method import Method
from besa_cli.stream.repair import RepairOptions, repair
from besa_cli.system import compute

_DOING = {"prune": "pruning", "quantize": "quantizing"}


class Placement(TypedDict, total=False):
    """Keyword arguments that the requests of all commands share: attributes of `Request`."""

    device: str
    dtype: str
    seed: int
    calibration: str | None
    max_memory: int | None


@dataclass(frozen=True, kw_only=True)
class GlobalOptions:
    """Options of the learning of all rows together: see `besa_cli.stream.global_rates`.

    Attributes
    ----------
    epochs : int
        Passes over the samples.
    rate : float
        Learning rate of the logits.
    """

    epochs: int
    rate: float


@dataclass(frozen=True, kw_only=True)
class Request(ABC):
    """Request for a stage.

    Attributes
    ----------
    command : {"prune", "tune", "quantize"}
    device, dtype : str
        As on the command line, ``auto`` included.
    seed : int
    calibration : str, optional
        Directory of a calibration set that was named, for the manifest.
    max_memory : int, optional
        Bytes of memory that the process may take; the hidden states go to files where they would not fit.

    Raises
    ------
    UsageError
        The device or the inner loops that are asked for do not exist here.
    """

    command: Literal["prune", "tune", "quantize"]
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    calibration: str | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        compute.device(self.device)
        kernels.check()

    @property
    @abstractmethod
    def stage(self) -> StageName:
        """Name of the stage that is made."""

    @property
    def uses_calibration(self) -> bool:
        """True if calibration samples pass through the model."""
        return True

    @abstractmethod
    def describe(self, model: str) -> str:
        """Return a few words that say what is done to a model of this name."""

    @abstractmethod
    def to_manifest(self) -> dict[str, OptionValue]:
        """Return all options with their values, under the names of the command line."""

    def quantization(self) -> GridEntry:
        """Return the entry of the manifest that describes the grid; empty without one."""
        return {}

    @property
    def _placement(self) -> dict[str, OptionValue]:
        """Options that all commands have, for the manifest."""
        return {"device": self.device, "dtype": self.dtype, "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class StageRequest(Request):
    """Request of `prune` or `quantize`; made by `besa_cli.jobs.prune.request` and `besa_cli.jobs.quantize.request`.

    Attributes
    ----------
    method : Method
    target_sparsity : float, optional
        Share of the linears' weights to prune, in [0, 1); None where nothing is counted: N:M patterns, quantization.
    budget : {"uniform", "model"}
        Each block's share of the pruned weights: that of the whole model, or decided by `besa_cli.stream.effects`.
    command_options : mapping
        The command's own options with their values, under the names of the command line.
    whole_model : GlobalOptions, optional
        Learning of all rows together after the blocks; None leaves the blocks as they are.
    repair : RepairOptions, optional
        Change of the kept weights after each window's masks are decided, or after the passes of the whole model; None
        leaves them as the method decided.
    removed_experts : float, optional
        Share of each block's experts that is removed before anything else is decided; None removes none.
    """

    command: Literal["prune", "quantize"]
    method: Method
    target_sparsity: float | None
    budget: Budget = "uniform"
    command_options: Mapping[str, OptionValue] = field(default_factory=dict)
    whole_model: GlobalOptions | None = None
    repair: RepairOptions | None = None
    removed_experts: float | None = None

    @property
    def grid(self) -> Grid | None:
        """Grid that weights are put on, if any."""
        return self.method.grid

    @property
    @override
    def stage(self) -> Literal["pruned", "quantized"]:
        return "pruned" if self.grid is None else "quantized"

    @property
    @override
    def uses_calibration(self) -> bool:
        own = self.method.options.uses_calibration
        return own or self.repair is not None or self.removed_experts is not None

    @property
    def needs_sensitivity(self) -> bool:
        """True if the sensitivity of the channels is asked for: see `besa_cli.stream.sensitivity`."""
        return self.method.options.needs_sensitivity() or (self.repair is not None and self.repair.needs_sensitivity)

    @property
    def memory_use(self) -> MemoryUse:
        """Extra memory of the method and of the repair."""
        own = self.method.options.memory_use()
        return own if self.repair is None else self.repair.memory_use(own)

    def decide(self, block: Block) -> Decision:
        """Decide which weights of a block are pruned, and change the others if that is asked for."""
        decision = self.method.decide(block)
        return decision if self.repair is None else repair(block, decision, self.repair)

    @property
    def measures_blocks(self) -> bool:
        """True if each block's budget is decided by measurement."""
        return self.budget == "model" and bool(self.target_sparsity)

    @override
    def describe(self, model: str) -> str:
        grid = f" to {self.grid}" if self.grid else ""
        return f"{_DOING[self.command]} {model} with {self.method.name}{grid}"

    @override
    def to_manifest(self) -> dict[str, OptionValue]:
        own = {name: value for name, value in self.method.options.record().items() if name != "nm"}
        return {"method": self.method.name, **self.command_options, **own, **self._placement}

    @override
    def quantization(self) -> GridEntry:
        return {"quantization": cast("Quantization", asdict(self.grid))} if self.grid else {}
