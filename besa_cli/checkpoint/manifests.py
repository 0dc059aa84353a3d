"""The manifest of a stage or a calibration set: what it is, what made it, and whether it is finished."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from besa_cli import __version__, disk
from besa_cli.errors import BesaError

FORMAT = 1
MANIFEST = disk.MANIFEST
EXPORT = "export.json"  # the manifest of an export, written last; an export is no stage
_LIBRARIES = ("torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"besa": __version__, **{name: version(name) for name in _LIBRARIES}}


def read(directory: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a stage or calibration set, or, under its own name, of an export.

    Raises
    ------
    BesaError
        There is none, or a newer version of besa wrote it.
    """
    manifest = disk.read_json(directory / name)
    found = manifest.get("format")
    if not isinstance(found, int) or found > FORMAT:
        raise BesaError(
            f"{directory / name} has format {found}, this besa {__version__} knows {FORMAT}",
            "use the besa version that wrote it, or a newer one",
        )
    return manifest


def is_complete(directory: Path) -> bool:
    """Whether a finished stage is there."""
    return (directory / MANIFEST).exists() and read(directory).get("status") == "complete"
