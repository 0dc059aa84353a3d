"""What a recorded line was made by, and whether the program still does the same.

Every line of results has `methods`: each method that had a part in it, with its version (`VERSIONS` of
`besa_cli.pruners` and `besa_cli.quantizers`, 1 where it is not named there; of ``tune`` that of
`besa_cli.stream.tuning`). A line of an older version than today's is
old: it is measured again, and until then printed as old or left out.

Lines from before 2026-11-29 were given their versions by their commits, from the history of the code:

besa   1  959d912  a penalty on the sparsity, rate 0.1
       2  889d02b  the budget is held in every step
       3  c67e232  learning starts from narrow mixtures around the target, rate 1
gptq   1  d30153a  grids reach from extreme to extreme: what `--no-search` does in version 2
       2  2ef70fa  how far they reach is searched
clip   1  d8138ef  from the extremes
       2  6b28cfb  learning starts where the error weighted by the inputs is least
others 1  the one that there is

besa 4 weighs channels by default (`--loss sensitivity`). With `--loss token` it decides as besa 3, so a line of besa 3
that records all options, which name that loss or another one, is not old: `_ONLY_DEFAULTS_DIFFER`.

Rounding makes no version: another order of sums, chunks of attention or a number of tokens in a pass moves a perplexity
of the pruned demo model by up to 2 % (dev/log/quality.md, 2026-11-26), as another seed does.
"""

from collections.abc import Mapping
from typing import Any

from besa_cli import pruners, quantizers
from besa_cli.stream import tuning

Line = Mapping[str, Any]


def methods(*names: str) -> dict[str, int]:
    """Today's version of each method; joint learning (`prune --bits`) names ``besa`` and ``clip``."""
    known = {**quantizers.VERSIONS, **pruners.VERSIONS, "tune": tuning.VERSION}
    return {name: known.get(name, 1) for name in names}


_ONLY_DEFAULTS_DIFFER = {("besa", 3): 4}  # a method's version → one that decides alike with the same options


def is_old(line: Line) -> bool:
    """Whether a method that made the line would decide otherwise today, with the options that the line records."""
    made = line["methods"]
    if line.get("options"):
        made = {name: _ONLY_DEFAULTS_DIFFER.get((name, version), version) for name, version in made.items()}
    return bool(made != methods(*made))


OLD = "*(old)*: measured with an older version of a method; today's version gives other figures."


def explained(text: str) -> str:
    """A part of a page, with what the mark means where it has one."""
    return f"{text}\n\n{OLD}" if "(old)" in text else text


def marked(text: str, *lines: Line) -> str:
    """The text with a word where any of its lines is old."""
    return f"{text} (old)" if any(is_old(line) for line in lines) else text


def same_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if options are equal; one that is absent, since it did not exist yet, equals one that is None."""
    names = one.keys() | other.keys()
    return all(one.get(name) == other.get(name) for name in names)
