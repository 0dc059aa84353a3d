"""Accelerators: numbers in TOML files, each with its source in a comment beside it."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from besa_cli.errors import BesaError, UsageError, reason_of, unknown
from besa_cli.system import disk

_LARGEST = 1 << 20  # bytes of a file
_GREATEST = 10**15  # of all numbers: more bytes a second than any memory moves
_LONGEST_TITLE = 200
_SECTIONS = ("array", "memory", "buffers", "words")
_FOLDER = files("besa_cli.sim") / "accelerators"


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """The numbers of a machine; all are whole and at least 1.

    Attributes
    ----------
    title : str
        What it is, in words.
    lanes, pes_per_lane : int
        The array: `lanes` × `pes_per_lane` processing elements, each one multiplication and addition a cycle.
    clock_hz, bytes_per_second : int
        Cycles a second; bytes a second from and to the memory outside.
    input_bytes, output_bytes : int
        Buffers on the chip for a linear's inputs and for the sums it is working on.
    weight_bits, activation_bits, sum_bits : int
        Widths of a stored weight, of an input or output outside, and of a sum inside.
    scale_bits, scale_group : int
        Width of a scale, and how many columns of a row share one; only where weights have fewer than 16 bits.
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
        """Processing elements."""
        return self.lanes * self.pes_per_lane

    def transfer_cycles(self, count: int) -> int:
        """Cycles that `count` bytes take over the memory's bus."""
        return -(-count * self.clock_hz // self.bytes_per_second)


def names() -> list[str]:
    """The accelerators that ship with the program."""
    return sorted(entry.name.removesuffix(".toml") for entry in _FOLDER.iterdir() if entry.name.endswith(".toml"))


def load(name: str) -> Accelerator:
    """An accelerator by its name, or from a TOML file laid out like those in ``sim/accelerators``.

    Raises
    ------
    UsageError
        There is no such accelerator, or a number is missing, unknown or not a whole number from 1 on.
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
        raise UsageError(f"{place}: broken TOML: {reason_of(error)}", "compare it with the shipped ones") from error
    found: dict[str, Any] = {"title": str(table.get("title", Path(place).stem))[:_LONGEST_TITLE]}
    for section in _SECTIONS:
        given = table.get(section, {})
        if not isinstance(given, Mapping):
            raise UsageError(f"{place}: {section} is not a table of numbers", f"write [{section}]")
        found |= given
    known = [field.name for field in fields(Accelerator)]
    for key, value in found.items():
        if key not in known:
            stranger = unknown("number", key, known)
            raise UsageError(f"{stranger.message} in {place}", stranger.hint)
        if key != "title":
            _require_number(place, key, value)
    missing = [key for key in known if key not in found]
    if missing:
        raise UsageError(f"{place} lacks {missing[0]}", f"it needs the tables {', '.join(_SECTIONS)} of besa.toml")
    return Accelerator(**found)


def _require_number(place: str, key: str, value: object) -> None:
    if type(value) is not int or value < 1:
        shown = reason_of(ValueError(str(value)))
        raise UsageError(f"{place}: {key} = {shown} is not a whole number from 1 on", "give a larger whole number")
    if value > _GREATEST:
        raise UsageError(f"{place}: {key} is more than {_GREATEST}", "give a smaller whole number")
