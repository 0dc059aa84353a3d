"""Whether llama.cpp joins pairs to tokens as a tokenizer does that is to be written as GGUF."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from besa_cli.errors import BesaError

_ELSEWISE = "export as hf, and convert that with llama.cpp's own script"


def alphabet() -> list[str]:
    """The characters that stand for the 256 bytes."""
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def require_bytes(wanted: Collection[str], vocabulary: Collection[str], path: Path) -> None:
    """Refuse a tokenizer that has no token for some byte.

    Raises
    ------
    BesaError
        There is such a byte.
    """
    missing = sorted(set(wanted).difference(vocabulary))
    if missing:
        raise BesaError(f"{path} has no token for {len(missing)} of 256 bytes, such as {missing[0]!r}", _ELSEWISE)


def require_reached(model: Mapping[str, Any], path: Path) -> None:
    """Refuse tokens that the merges do not lead to: of llama.cpp and the tokenizer, one takes them whole.

    Raises
    ------
    BesaError
        There is one.
    """
    from tokenizers import models

    merging = models.BPE(model["vocab"], [(first, second) for first, second in map(parts, model["merges"])])
    for token in model["vocab"]:
        if len(merging.tokenize(token)) != 1:
            raise BesaError(
                f"{path} has ignore_merges {model.get('ignore_merges')}, llama.cpp the opposite for such a tokenizer, "
                f"and {token!r} shows it",
                _ELSEWISE,
            )


def parts(pair: str | list[str]) -> list[str]:
    """The two tokens of a merge, which old files write as one text."""
    return pair.split(" ") if isinstance(pair, str) else pair


def scores(tokens: list[str], model: Mapping[str, Any], added: Collection[int], path: Path) -> list[float]:
    """Of each token, minus the rank of the first pair that makes it; what no pair makes comes after all of them.

    llama.cpp joins any two neighbours that make a token, the highest score first. So for each token all pairs that
    could make it have to be among the merges, one after the other.

    Raises
    ------
    BesaError
        They are not: llama.cpp would join other pairs, or in another order.
    """
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, pair in enumerate(model["merges"]):
        ranks["".join(parts(pair))].append(rank)
    known = set(model["vocab"])
    for number, token in enumerate(tokens):
        if number in added or token not in known or (token.startswith("<0x") and token.endswith(">")):
            continue
        ways = sum(token[:cut] in known and token[cut:] in known for cut in range(1, len(token)))
        found = ranks.get(token, [])
        if len(found) != ways or (found and found[-1] - found[0] != ways - 1):
            raise BesaError(
                f"{path} has {len(found)} merges of the {ways} pairs that make {token!r}, or not in a row; llama.cpp "
                "joins by scores, which cannot express that",
                _ELSEWISE,
            )
    count = len(model["merges"])
    return [float(-ranks[token][0] if token in ranks else -(count + number)) for number, token in enumerate(tokens)]
