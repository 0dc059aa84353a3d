"""Checks that llama.cpp merges pairs to tokens exactly as the exported tokenizer does."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from besa_cli.errors import BesaError
from besa_cli.system.disk import Json

_REMEDY = "export as hf, and convert that with llama.cpp's own script"


def alphabet() -> list[str]:
    """List the characters that represent the 256 bytes."""
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def require_bytes(wanted: Collection[str], vocabulary: Collection[str], path: Path) -> None:
    """Refuse a tokenizer without a token for every byte.

    Raises
    ------
    BesaError
        A byte has no token.
    """
    missing = sorted(set(wanted).difference(vocabulary))
    if missing:
        raise BesaError(f"{path} has no token for {len(missing)} of 256 bytes, such as {missing[0]!r}", _REMEDY)


def require_reached(model: Json, path: Path) -> None:
    """Refuse tokens that the merges do not produce: either llama.cpp or the tokenizer matches them as whole words.

    Raises
    ------
    BesaError
        A token is not produced by the merges (named).
    """
    from tokenizers import models

    merging = models.BPE(model["vocab"], [(first, second) for first, second in map(parts, model["merges"])])
    for token in model["vocab"]:
        if len(merging.tokenize(token)) != 1:
            raise BesaError(
                f"{path} has ignore_merges {model.get('ignore_merges')}, llama.cpp uses the opposite for this kind of "
                f"tokenizer, which changes {token!r}",
                _REMEDY,
            )


def parts(pair: str | list[str]) -> list[str]:
    """Return the two tokens of a merge, which old files write as one text."""
    return pair.split(" ") if isinstance(pair, str) else pair


def scores(tokens: list[str], model: Json, added: Collection[int], path: Path) -> list[float]:
    """Return each token's score: minus the rank of its first merge; tokens without a merge come after all others.

    llama.cpp merges any two neighbours that form a token, the highest score first. Therefore all pairs that form a
    token must be among the merges, with consecutive ranks.

    Raises
    ------
    BesaError
        They are not, so that llama.cpp would merge other pairs, or in another order.
    """
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, pair in enumerate(model["merges"]):
        ranks["".join(parts(pair))].append(rank)
    known = set(model["vocab"])
    for number, token in enumerate(tokens):
        if number in added or token not in known or (token.startswith("<0x") and token.endswith(">")):
            continue
        pairs = sum(token[:cut] in known and token[cut:] in known for cut in range(1, len(token)))
        own = ranks.get(token, [])
        if len(own) != pairs or (own and own[-1] - own[0] != pairs - 1):
            raise BesaError(
                f"{path} has {len(own)} merges for the {pairs} pairs that form {token!r}, or not consecutive ones; "
                "llama.cpp merges by scores, which cannot express that",
                _REMEDY,
            )
    count = len(model["merges"])
    return [float(-ranks[token][0] if token in ranks else -(count + number)) for number, token in enumerate(tokens)]
