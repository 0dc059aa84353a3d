"""The metadata of a GGUF file, read key by key: what nobody asked for is refused by name.

llama.cpp computes with any key under the architecture's name, so one that we do not use, and do not know to be
harmless, may mean another model than the one we would make.
"""

import math
from collections.abc import Sequence
from typing import NoReturn

from besa_cli.models.gguf.file_header import Header, Value, refuse

LONGEST_CONTEXT = 10**8  # tokens; ten times what any model has
_MOST = 2**31 - 1
_NOTES = ("general.", "tokenizer.", "split.")  # read elsewhere, or notes of whoever made the file
# Said of a model, and without effect on what it computes.
_HARMLESS = ("rope.scaling.finetuned", "tensor_data_layout")
# What these mean is left out of our models; with these values there is nothing to leave out.
_WITHOUT = {
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
    """What a file says of its model, by llama.cpp's names without the architecture's before them.

    Parameters
    ----------
    header : Header
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        self._asked: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the file has a key; this does not count as using it."""
        return f"{self.header.architecture}.{key}" in self.header.fields

    def refuse(self, key: str, because: str) -> NoReturn:
        """Refuse the file by one of the model's keys."""
        refuse(self.header, f"{self.header.architecture}.{key}", because)

    def refuse_tensor(self, name: str, because: str) -> NoReturn:
        """Refuse the file by one of its tensors."""
        refuse(self.header, name, because)

    def _value(self, key: str) -> Value | None:
        self._asked.add(key)
        return self.header.fields.get(f"{self.header.architecture}.{key}")

    def whole(self, key: str, default: int | None = None, *, least: int = 1, most: int = _MOST) -> int:
        """A whole number; one that is given for each block counts where it is the same for all.

        Raises
        ------
        BesaError
            It is missing without a default, of another type, or out of bounds.
        """
        value = self._value(key)
        if isinstance(value, Sequence) and not isinstance(value, str) and len(set(value)) == 1:
            value = value[0]
        if value is None and default is not None:
            return default
        if value is None or not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self._unfit(key, value, f"a whole number from {least} to {most}")
        return value

    def each(self, key: str, blocks: int) -> list[int]:
        """A whole number from 0 up for each block.

        Raises
        ------
        BesaError
            It is missing or something else.
        """
        value = self._value(key)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != blocks:
            self._unfit(key, value, f"a list of {blocks} numbers")
        found = [entry for entry in value if isinstance(entry, int) and 0 <= entry <= _MOST]
        return found if len(found) == blocks else self._unfit(key, value, "a list of whole numbers from 0 up")

    def real(self, key: str, default: float | None = None, *, least: float = 0.0) -> float:
        """A finite number, above `least`.

        Raises
        ------
        BesaError
            It is missing without a default, of another type, not finite, or not above.
        """
        value = self._value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not least < value < math.inf:
            self._unfit(key, value, f"a number above {least:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Yes or no."""
        value = self._value(key)
        if value is None:
            return default
        return value if isinstance(value, bool) else self._unfit(key, value, "true or false")

    def text(self, key: str, default: str) -> str:
        """A text."""
        value = self._value(key)
        if value is None:
            return default
        return value if isinstance(value, str) else self._unfit(key, value, "a text")

    def _unfit(self, key: str, value: Value | None, wanted: str) -> NoReturn:
        if value is None:
            self.refuse(key, f"is missing; it has to be {wanted}")
        self.refuse(key, f"is {value!r:.80}, not {wanted}")

    def pattern(self, key: str, blocks: int, every: int) -> list[bool]:
        """Of each block, whether it has what each `every`-th block is without; given as that number or as a list.

        Raises
        ------
        BesaError
            It is neither, or a list of another length.
        """
        value = self._value(key)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != blocks:
                self.refuse(key, f"has {len(value)} entries for {blocks} blocks")
            return [bool(entry) for entry in value]
        every = self.whole(key, every)
        return [(index + 1) % every != 0 for index in range(blocks)]

    def expect(self, key: str, value: float | str, because: str = "") -> None:
        """Refuse any other value; a number may differ by what float32 rounds off. A key that is missing is right."""
        found = self._value(key)
        if found is None or found == value:
            return
        near = isinstance(found, float) and isinstance(value, int | float) and math.isclose(found, value, rel_tol=1e-6)
        if not near:
            self.refuse(key, because or f"is {found!r:.80}; besa reads only models with {value!r}")

    def any_tensor(self, *parts: str) -> bool:
        """Whether any block has a tensor of one of these names, written without the block's prefix."""
        endings = tuple(f".{part}" for part in parts)
        return any(name.startswith("blk.") and name.endswith(endings) for name in self.header.tensors)

    def finish(self) -> None:
        """Refuse what was not asked for and is not known to be harmless.

        Raises
        ------
        BesaError
            There is such a key.
        """
        from gguf import MODEL_ARCH_NAMES

        for key, value in _WITHOUT.items():
            self.expect(key, value)
        own = f"{self.header.architecture}."
        others = tuple(f"{name}." for name in (*MODEL_ARCH_NAMES.values(), "adapter", "clip") if f"{name}." != own)
        for name in self.header.fields:
            if name.startswith(_NOTES):
                continue
            key = name.removeprefix(own)
            if name.startswith(own) and key not in self._asked and key not in _HARMLESS:
                refuse(self.header, name, "is a part of the model that besa does not know")
            if not name.startswith(own) and name.startswith(others):
                refuse(self.header, name, f"belongs to another model than '{self.header.architecture}'")
