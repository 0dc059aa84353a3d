"""The rank of this process from the environment variables of `torchrun`, read without loading torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from besa_cli.errors import UsageError

_MOST_RANKS = 100_000
_DIGITS = 20
_NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Rank of a process among those that were started together.

    Attributes
    ----------
    rank, size : int
        Rank from 0, and number of ranks.
    local_rank, local_size : int
        Rank and number of ranks on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def rank_from_environment(environment: Mapping[str, str]) -> RankInfo:
    """Read this process's rank; without `WORLD_SIZE` there is a single rank.

    Raises
    ------
    UsageError
        A variable is missing, not a number, or out of range.
    """
    size = _number(environment, "WORLD_SIZE", 1)
    if size == 1:
        return RankInfo()
    for name in _NEEDED:
        if name not in environment:
            raise UsageError(
                f"WORLD_SIZE is {size}, but {name} is not set",
                "start all ranks with torchrun, or unset WORLD_SIZE to run alone",
            )
    rank = _number(environment, "RANK", 0)
    for name, value, limit in (
        ("WORLD_SIZE", size, _MOST_RANKS),
        ("RANK", rank, size - 1),
        ("MASTER_PORT", _number(environment, "MASTER_PORT", 0), 65535),
    ):
        if value > limit:
            raise UsageError(f"{name} is {value}, more than {limit}", "start all ranks with torchrun")
    return RankInfo(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", 0),
        local_size=_number(environment, "LOCAL_WORLD_SIZE", 1),
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < _DIGITS):
        raise UsageError(f"{name} is '{text[:40]}', not a number", f"unset {name} to run alone")
    return int(text)
