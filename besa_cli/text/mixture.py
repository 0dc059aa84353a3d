"""Mixtures of sources: the weights in the values of ``--data``, and the share of the samples that each source gets."""

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from besa_cli.errors import UsageError
from besa_cli.text import documents

_DECIMAL = re.compile(r"\d{1,9}(\.\d{0,9})?|\.\d{1,9}", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\d.*|\.\d.*|nan|inf|infinity)", re.ASCII | re.IGNORECASE)
_HINT = "--data c4:0.7 --data chat.jsonl:0.3 takes seven tenths of the samples from c4"


@dataclass(frozen=True, kw_only=True)
class WeightedSource:
    """One value of ``--data``.

    Attributes
    ----------
    asked : str
        The value as given.
    name : str
        Name of a data set, or path of a file: the value without its weight.
    weight : Fraction or None
        Positive; None if the value has none.
    """

    asked: str
    name: str
    weight: Fraction | None = None


def parse(values: Sequence[str], known: Collection[str]) -> tuple[WeightedSource, ...]:
    """Parse the values of ``--data``, ``NAME`` or ``NAME:WEIGHT``; a file whose name ends so is taken as it is.

    Parameters
    ----------
    values : sequence of str
    known : collection of str
        Names of data sets.

    Raises
    ------
    UsageError
        A weight is not a positive number, or only some sources have one, or a source of a mixture is given twice.
    """
    sources = tuple(_source(value, known) for value in values)
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        without = next(source for source in sources if source.weight is None)
        raise UsageError(
            f"--data {documents.printable(weighted[0].asked)} has a weight, "
            f"--data {documents.printable(without.asked)} has none",
            "give every source a weight, or none",
        )
    names = [source.name for source in weighted]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--data {documents.printable(name)} is given twice in a mixture", "add up its weights")
    return sources


def _source(value: str, known: Collection[str]) -> WeightedSource:
    name, colon, number = value.rpartition(":")
    if not (colon and name) or os.path.lexists(documents.local_path(value)) or documents.suffix(Path(value)):
        return WeightedSource(asked=value, name=value)
    if _DECIMAL.fullmatch(number) and Fraction(number) > 0:
        return WeightedSource(asked=value, name=name, weight=Fraction(number))
    if name in known or documents.suffix(Path(name)) or _NUMBER.fullmatch(number):
        shown = documents.printable(value)
        raise UsageError(
            f"the weight '{documents.printable(number)}' of --data {shown} is not a decimal number above 0", _HINT
        )
    return WeightedSource(asked=value, name=value)


def shares(weights: Sequence[Fraction], total: int) -> list[int]:
    """Divide `total` by weights with the method of the largest remainder, exactly; of equal ones the first wins."""
    quotas = [weight * total / sum(weights) for weight in weights]
    counts = [int(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda index: (counts[index] - quotas[index], index))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts
