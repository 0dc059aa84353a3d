"""Requests of `besa tune`."""

from dataclasses import dataclass
from typing import Literal

from typing_extensions import Unpack, override

from besa_cli.choices import OptionValue
from besa_cli.errors import require_counts, require_factors
from besa_cli.jobs.request import Placement, Request
from besa_cli.stream.tuning import RATE


@dataclass(frozen=True, kw_only=True)
class TuneRequest(Request):
    """Request of `tune`; made by `request`.

    Attributes
    ----------
    epochs : int
        Passes over the samples.
    rate : float
        Learning rate, relative to the root mean square of each linear's kept weights.
    """

    command: Literal["tune"] = "tune"
    epochs: int
    rate: float

    @property
    @override
    def stage(self) -> Literal["tuned"]:
        return "tuned"

    @override
    def describe(self, model: str) -> str:
        return f"tuning {model}"

    @override
    def to_manifest(self) -> dict[str, OptionValue]:
        return {"epochs": self.epochs, "lr": self.rate, **self._placement}


def request(*, epochs: int = 1, lr: float | None = None, **placement: Unpack[Placement]) -> TuneRequest:
    """Check what is asked of `besa tune`.

    Parameters
    ----------
    epochs : int
        Passes over the samples.
    lr : float, optional
        Learning rate, relative to the root mean square of each linear's kept weights.
    **placement
        Where and how it is computed: see `Placement`.

    Raises
    ------
    UsageError
        A value is invalid.
    """
    require_counts(epochs=epochs)
    require_factors(lr=lr)
    return TuneRequest(epochs=epochs, rate=RATE if lr is None else lr, **placement)
