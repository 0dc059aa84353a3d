"""Request for calibration samples, as a command line or a file of options states it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """Calibration samples that a command asks for; None stands for an option that was not given.

    Attributes
    ----------
    shared : Path, optional
        Directory of a finished calibration set (`--calibration`); excludes all that choose samples to draw.
    data : list of str, optional
        Names (`besa_cli.text.corpora.SOURCES`) or files, each with ``:WEIGHT`` in a mixture.
    text_column : str, optional
        Field or column with the documents of the files.
    samples, seqlen : int, optional
        Number of samples, and tokens of each.
    pack : bool, optional
        Join short documents to full samples.
    data_dir : Path, optional
        Directory with official files of named data sets.
    seed : int
        Not negative.
    """

    shared: Path | None = None
    data: list[str] | None = None
    text_column: str | None = None
    samples: int | None = None
    seqlen: int | None = None
    pack: bool | None = None
    data_dir: Path | None = None
    seed: int = 0

    def given(self) -> dict[str, list[str] | str | int]:
        """Return the given options that say which samples are drawn, by name."""
        names = ("data", "text_column", "samples", "seqlen", "pack")
        options: dict[str, list[str] | str | int | None] = {name: getattr(self, name) for name in names}
        return {name: value for name, value in options.items() if value is not None}
