"""Accelerators as TOML files of numbers, each with its source in a comment."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path

from besa_cli.errors import BesaError, UsageError, reason_of, unknown
from besa_cli.system import disk
from besa_cli.system.disk import JsonObject

_LARGEST = 1 << 20  # bytes of a file
_GREATEST = 10**15  # limit of all numbers: more bytes per second than any memory transfers
_LONGEST_TITLE = 200
_SECTIONS = ("array", "memory", "buffers", "words")
_FOLDER = files("besa_cli.sim") / "accelerators"


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """The numbers of an accelerator, all integers of at least 1.

    Attributes
    ----------
    title : str
        Name for tables and figures.
    lanes, pes_per_lane : int
        The array: `lanes` × `pes_per_lane` processing elements, each with one multiply-add per cycle.
    clock_hz, bytes_per_second : int
        Clock in cycles per second; bandwidth of the off-chip memory in bytes per second.
    input_bytes, output_bytes : int
        Sizes of the on-chip buffers for inputs and for partial sums.
    weight_bits, activation_bits, sum_bits : int
        Widths of a stored weight, of an off-chip input or output, and of an on-chip partial sum.
    scale_bits, scale_group : int
        Width of a scale, and the columns of a row that share one; used only for weights of fewer than 16 bits.
    """

    title: str
    lanes: int
    pes_per_lane: int
    clock_hz: int
    bytes_per_second: int
    input_bytes: int
    output_bytes: int
    weight_bits: int
    activation_bits: int
    sum_bits: int
    scale_bits: int
    scale_group: int

    @property
    def pes(self) -> int:
        """Number of processing elements."""
        return self.lanes * self.pes_per_lane

    def transfer_cycles(self, count: int) -> int:
        """Return the cycles needed to transfer `count` bytes over the memory bus, rounded up."""
        return -(-count * self.clock_hz // self.bytes_per_second)


def names() -> list[str]:
    """List the accelerators that ship with the program."""
    return sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))


def load(name: str) -> Accelerator:
    """Load an accelerator by its name, or from a TOML file with the tables of those in ``sim/accelerators``.

    Raises
    ------
    UsageError
        There is no such accelerator, or a number is missing, unknown or not an integer of at least 1.
    """
    if name in names():
        return _parse((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"), name)
    path = Path(name)
    if path.suffix != ".toml":
        raise unknown("accelerator", name, [*names(), "a TOML file"])
    try:
        return _parse(disk.read_text(path, _LARGEST), name)
    except BesaError as error:
        raise UsageError(error.message, "name a TOML file with --accelerator") from error


def _parse(text: str, place: str) -> Accelerator:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{place}: invalid TOML: {reason_of(error)}", "compare it with the shipped files") from error
    values: JsonObject = {"title": str(table.get("title", Path(place).stem))[:_LONGEST_TITLE]}
    for name in _SECTIONS:
        section = table.get(name, {})
        if not isinstance(section, Mapping):
            raise UsageError(f"{place}: {name} is not a table of numbers", f"write [{name}]")
        values |= section
    known = [field.name for field in fields(Accelerator)]
    for key, value in values.items():
        if key not in known:
            refusal = unknown("number", key, known)
            raise UsageError(f"{refusal.message} in {place}", refusal.hint)
        if key != "title":
            _require_number(place, key, value)
    missing = [key for key in known if key not in values]
    if missing:
        raise UsageError(
            f"{place} lacks {missing[0]}", f"give all numbers of the tables {', '.join(_SECTIONS)} as in besa.toml"
        )
    return Accelerator(**values)


def _require_number(place: str, key: str, value: object) -> None:
    if type(value) is not int or value < 1:
        text = reason_of(ValueError(str(value)))
        raise UsageError(f"{place}: {key} = {text} is not an integer of at least 1", "give an integer of 1 or more")
    if value > _GREATEST:
        raise UsageError(f"{place}: {key} is more than {_GREATEST}", "give a smaller integer")
