"""Metadata of a GGUF file, read key by key; unknown keys are refused by name.

llama.cpp may compute with any key under the architecture's name, so a key that is neither used nor known to be harmless
can mean a different model.
"""

import math
from collections.abc import Sequence
from typing import NoReturn

from besa_cli.models.gguf.file_header import Header, Value, refuse

LONGEST_CONTEXT = 10**8  # tokens; ten times that of any known model
_MOST = 2**31 - 1
_NOTES = ("general.", "tokenizer.", "split.")  # read elsewhere, or notes of the file's author
# Keys without effect on what a model computes.
_NO_EFFECT = ("rope.scaling.finetuned", "tensor_data_layout")
# Features that besa's models lack; with these values they have no effect.
_DISABLED = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
}


class Metadata:
    """Metadata of a file, by llama.cpp's keys without the architecture's prefix.

    Parameters
    ----------
    header : Header
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self._used: set[str] = set()

    def has(self, key: str) -> bool:
        """Check that the file has a key, without counting it as used."""
        return f"{self.header.architecture}.{key}" in self.header.fields

    def refuse(self, key: str, reason: str) -> NoReturn:
        """Refuse the file, naming one of the model's keys."""
        refuse(self.header, f"{self.header.architecture}.{key}", reason)

    def refuse_tensor(self, name: str, reason: str) -> NoReturn:
        """Refuse the file, naming one of its tensors."""
        refuse(self.header, name, reason)

    def _value(self, key: str) -> Value | None:
        self._used.add(key)
        return self.header.fields.get(f"{self.header.architecture}.{key}")

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        """Read an integer; an array with one value per block counts if all values are equal.

        Raises
        ------
        BesaError
            The key is missing without a default, of another type, or out of bounds.
        """
        value = self._value(key)
        if isinstance(value, Sequence) and not isinstance(value, str) and len(set(value)) == 1:
            value = value[0]
        if value is None and default is not None:
            return default
        if value is None or not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self._refuse_value(key, value, f"an integer from {least} to {most}")
        return value

    def integers(self, key: str, blocks: int) -> list[int]:
        """Read a non-negative integer for each block.

        Raises
        ------
        BesaError
            The key is missing or not such a list.
        """
        value = self._value(key)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != blocks:
            self._refuse_value(key, value, f"a list of {blocks} integers")
        integers = [entry for entry in value if isinstance(entry, int) and 0 <= entry <= _MOST]
        return integers if len(integers) == blocks else self._refuse_value(key, value, "a list of integers from 0 up")

    def real(self, key: str, default: float | None = None, *, least: float = 0.0) -> float:
        """Read a finite number above `least`.

        Raises
        ------
        BesaError
            The key is missing without a default, of another type, not finite, or not above `least`.
        """
        value = self._value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not least < value < math.inf:
            self._refuse_value(key, value, f"a number above {least:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Read a boolean."""
        value = self._value(key)
        if value is None:
            return default
        return value if isinstance(value, bool) else self._refuse_value(key, value, "true or false")

    def text(self, key: str, default: str) -> str:
        """Read a string."""
        value = self._value(key)
        if value is None:
            return default
        return value if isinstance(value, str) else self._refuse_value(key, value, "a string")

    def _refuse_value(self, key: str, value: Value | None, expected: str) -> NoReturn:
        if value is None:
            self.refuse(key, f"is missing; it must be {expected}")
        self.refuse(key, f"is {value!r:.80}, not {expected}")

    def pattern(self, key: str, blocks: int, every: int) -> list[bool]:
        """Read one boolean per block, stored as a list or as a period.

        A period p means True for all blocks but every p-th.

        Parameters
        ----------
        key : str
        blocks : int
            Number of blocks.
        every : int
            Default period.

        Raises
        ------
        BesaError
            The key is neither, or a list of another length.
        """
        value = self._value(key)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != blocks:
                self.refuse(key, f"has {len(value)} entries for {blocks} blocks")
            return [bool(entry) for entry in value]
        every = self.integer(key, every)
        return [(index + 1) % every != 0 for index in range(blocks)]

    def expect(self, key: str, value: float | str, reason: str = "") -> None:
        """Refuse any value but `value`; a missing key is accepted, and a float may differ by float32 rounding."""
        stored = self._value(key)
        if stored is None or stored == value:
            return
        is_close = (
            isinstance(stored, float) and isinstance(value, int | float) and math.isclose(stored, value, rel_tol=1e-6)
        )
        if not is_close:
            self.refuse(key, reason or f"is {stored!r:.80}; besa reads only models with {value!r}")

    def any_tensor(self, *parts: str) -> bool:
        """Check that any block has a tensor of one of these names, given without the block's prefix."""
        endings = tuple(f".{part}" for part in parts)
        return any(name.startswith("blk.") and name.endswith(endings) for name in self.header.tensors)

    def finish(self) -> None:
        """Refuse keys that were not used and are not known to be harmless.

        Raises
        ------
        BesaError
            There is such a key.
        """
        from gguf import MODEL_ARCH_NAMES

        for key, value in _DISABLED.items():
            self.expect(key, value)
        prefix = f"{self.header.architecture}."
        other_prefixes = tuple(
            f"{name}." for name in (*MODEL_ARCH_NAMES.values(), "adapter", "clip") if f"{name}." != prefix
        )
        for name in self.header.fields:
            if name.startswith(_NOTES):
                continue
            key = name.removeprefix(prefix)
            if name.startswith(prefix) and key not in self._used and key not in _NO_EFFECT:
                refuse(self.header, name, "is a part of the model that besa does not know")
            if not name.startswith(prefix) and name.startswith(other_prefixes):
                refuse(self.header, name, f"belongs to another architecture than '{self.header.architecture}'")
