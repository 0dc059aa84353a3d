"""Sensitivity of the channels in a job: from its stage, from beside the calibration set, or measured and kept there."""

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from besa_cli.calibration.calibration_set import CalibrationSet
from besa_cli.checkpoint import sensitivity_file, stages
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.stream import sensitivity
from besa_cli.stream.activations import ActivationStore
from besa_cli.stream.block import OnStep
from besa_cli.system import compute
from besa_cli.system.notes import Notify

_VERSION = 1  # of the measurement: raise it with every change that gives other values


@dataclass(frozen=True, kw_only=True)
class ChannelSensitivity:
    """Source of the sensitivity of a model's channels.

    Attributes
    ----------
    decoder : Decoder
    calibration : CalibrationSet
    model : str
        Digest of the model's weights.
    stage : Path
        Directory of the stage, in which a copy lies until it is finished.
    recorded : str, optional
        Digest of the values that an unfinished stage was begun with.
    """

    decoder: Decoder
    calibration: CalibrationSet
    model: str
    stage: Path
    recorded: str | None

    @property
    def key(self) -> str:
        """Everything that the values depend on."""
        facts = (
            _VERSION,
            sensitivity.SAMPLES,
            self.model,
            self.calibration.digest,
            compute.name_of(self.decoder.dtype),
        )
        return " ".join(map(str, facts))

    @property
    def _in_stage(self) -> Path:
        return self.stage / stages.SENSITIVITY

    @property
    def _beside_samples(self) -> Path | None:
        """File beside the calibration set; None if the set is not stored."""
        directory = self.calibration.directory
        return directory and sensitivity_file.beside_samples(directory, self.key)

    @property
    def place(self) -> Path | None:
        """File that holds the values already; None if they must be measured."""
        places = (self._in_stage if self.recorded else None, self._beside_samples)
        return next((place for place in places if place is not None and place.exists()), None)

    def digest(self, values: Tensor) -> str:
        """Return the digest of the values for the manifest."""
        return sensitivity_file.digest(values, self.key)

    def values(self, on_step: OnStep, activations: ActivationStore, notify: Notify) -> Tensor:
        """Read the values, or measure them and keep them beside the calibration set; fp32, of shape (blocks, hidden).

        Raises
        ------
        BesaError
            A file is damaged, a gradient overflows, or the values are not those that the stage was begun with.
        """
        place, shape = self.place, (len(self.decoder), self.decoder.hidden_size)
        if place is not None:
            found = sensitivity_file.read(place, self.key, shape)
            if place != self._in_stage:
                notify(f"sensitivity of the channels: reused from {place}")
        else:
            found = sensitivity.measure(self.decoder, self.calibration.tokens, on_step=on_step, activations=activations)
            self._keep(found, notify)
        if self.recorded not in (None, self.digest(found)):
            raise BesaError(
                f"{self.stage} was begun with another sensitivity of the channels than "
                f"{place or 'this machine measures'}",
                "start over with --restart",
            )
        return found

    def _keep(self, values: Tensor, notify: Notify) -> None:
        """Write the values beside the calibration set, if its directory may be written to."""
        place = self._beside_samples
        if place is None or not os.access(place.parent, os.W_OK | os.X_OK):
            return
        sensitivity_file.write(place, values, self.key)
        notify(f"sensitivity of the channels: kept in {place}")

    def keep_in_stage(self, values: Tensor) -> None:
        """Write the values to the stage, from which an interrupted run takes them."""
        if not self._in_stage.exists():
            sensitivity_file.write(self._in_stage, values, self.key)
