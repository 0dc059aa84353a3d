"""Export formats: one file (or folder) each, with `Options` and the functions `pieces`, `write` and `loading`.

`write` writes the export to a directory and yields each finished piece; `pieces` returns their number beforehand, and
`loading` the text of the model card on loading the export.
"""

import importlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from besa_cli.choices import GivenOptions
from besa_cli.errors import require_options, unknown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from besa_cli.checkpoint.exports import ExportOptions
    from besa_cli.exporters.source import Piece, StageSource

# Name on the command line -> what it is, in a few words. The module has the same name, with _ for -.
EXPORTERS = {
    "hf": "dense safetensors with exact zeros, for any program",
    "sparse": "a smaller safetensors checkpoint, for transformers with besa_cli.hf",
    "compressed-tensors": "the codes of a quantized stage, for transformers and vLLM",
    "gguf": "one file for llama.cpp (LLaMA-architecture models)",
}


class FormatModule(Protocol):
    """Protocol of the module of a format."""

    def pieces(self, source: "StageSource", options: "DataclassInstance") -> int:
        """Return the number of pieces that `write` yields; refuse a stage that the format does not support."""

    def write(self, source: "StageSource", target: Path, options: "DataclassInstance") -> "Iterator[Piece]":
        """Write the export to the directory, piece by piece."""

    def loading(self, options: "DataclassInstance") -> str:
        """Return instructions for loading the export, in Markdown."""


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """An export format with its options.

    Attributes
    ----------
    name : str
        A key of `EXPORTERS`.
    options : dataclass
        The format's ``Options``.
    given : mapping
        The options that were given explicitly.
    module : FormatModule
    """

    name: str
    options: "DataclassInstance"
    given: GivenOptions
    module: FormatModule

    def record(self) -> "ExportOptions":
        """Return the format and all its options with their values, for the manifest."""
        return cast("ExportOptions", {"format": self.name, **asdict(self.options)})


def load(name: str, given: GivenOptions | None = None) -> Exporter:
    """Resolve an export format.

    Raises
    ------
    UsageError
        The format is unknown, it does not have one of the options, or a value is invalid.
    """
    if name not in EXPORTERS:
        raise unknown("format", name, EXPORTERS)
    own = dict(given or {})
    require_options(own, "format", name, EXPORTERS, _option_names)
    module = _module(name)
    return Exporter(name=name, options=module.Options(**own), given=own, module=module)


def _module(name: str) -> Any:
    return importlib.import_module(f"besa_cli.exporters.{name.replace('-', '_')}")


def _option_names(name: str) -> list[str]:
    return [field.name for field in fields(_module(name).Options)]
