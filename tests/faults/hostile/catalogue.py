"""All cases, and the table of what became of them."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from faults import fault_injection, fault_tally
from faults.hostile import (
    caches,
    code,
    commands,
    data,
    experiments,
    exports,
    forged,
    gguf,
    hub,
    models,
    pickles,
    runs,
    strangers,
)
from faults.hostile.base import Bench
from faults.hostile.frame import Case

_SYSTEMATIC = (": a field", ": a metadata key", ": a value")  # kinds of every field × every wrong value
_MODULES = (models, code, pickles, gguf, data, runs, strangers, exports, forged, commands, experiments, hub, caches)


def cases(base: Path) -> Iterator[Case]:
    """Every case; `base` is the material that they begin from."""
    for module in _MODULES:
        yield from module.cases(base)


def subset(found: Sequence[Case]) -> list[Case]:
    """The middle case of every kind, which `make test` tries."""
    kinds = dict.fromkeys(case.kind for case in found)
    own = {kind: [case for case in found if case.kind == kind] for kind in kinds}
    return [cases[len(cases) // 2] for cases in own.values()]


def chosen(found: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    """Those that are asked for."""
    if options.subset:
        return subset(found)
    counts = Counter[str]()
    wanted = []
    for case in found:
        counts[case.kind] += 1
        every = options.every * (options.fields if case.kind.endswith(_SYSTEMATIC) else 1)
        if (
            (not options.kinds or any(word in case.kind for word in options.kinds))
            and (not options.names or any(word in case.name for word in options.names))
            and (counts[case.kind] - 1) % every == 0
        ):
            wanted.append(case)
    return wanted


def campaign(place: Path, options: argparse.Namespace) -> int:
    """Try what is asked for; 1 if any answer was wrong."""
    fault_injection.warm_up()
    bench = Bench(place)
    wanted = chosen(list(cases(bench.base)), options)
    tried, right = Counter[str](), Counter[str]()
    for case in wanted:
        if options.list:
            sys.stdout.write(f"{case.kind} | {case.name}\n")
            continue
        began = time.monotonic()
        wrong = bench.run(case)
        tried[case.kind] += 1
        right[case.kind] += not wrong
        if wrong:
            sys.stderr.write(f"WRONG {case.kind} | {case.name} | {time.monotonic() - began:.1f} s | {wrong}\n")
        if tried.total() % 50 == 0:
            sys.stderr.write(f"{tried.total()} of {len(wanted)}, {tried.total() - right.total()} wrong\n")
    table = fault_tally.kinds(tried, right)
    sys.stdout.write(table)
    if options.write:
        fault_tally.write_section(options.write, "Hostile inputs", table)
    return int(tried != right)
