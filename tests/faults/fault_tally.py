"""What became of the injections of `tests/faults/interruptions.py`: counted, kept, and put into tables."""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = ("identical", "refused", "unclear", "lost")


@dataclass(kw_only=True)
class Tally:
    """What became of the injections: (harm, command) → outcome → how many."""

    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)

    def add(self, harmed: str, command: str, outcome: str, why: str = "") -> None:
        """Count one injection."""
        self.counts.setdefault((harmed, command), Counter())[outcome] += 1
        if outcome in ("lost", "unclear"):
            sys.stderr.write(f"{outcome.upper()} {harmed}, {command}: {why}\n")

    def save(self, file: Path) -> None:
        """Keep the counts as JSON."""
        file.write_text(json.dumps([[*key, dict(found)] for key, found in self.counts.items()], indent=1) + "\n")

    def load(self, file: Path) -> None:
        """Add counts that were saved."""
        for harmed, command, found in json.loads(file.read_text()):
            self.counts.setdefault((harmed, command), Counter()).update(found)

    def of(self, outcome: str) -> int:
        """All injections with this outcome."""
        return sum(found[outcome] for found in self.counts.values())

    @property
    def injected(self) -> int:
        """All injections."""
        return sum(found.total() for found in self.counts.values())

    def tables(self) -> str:
        """By harm and by command, in Markdown."""
        return f"{self._table('harm', 0)}\n{self._table('command', 1)}"

    def _table(self, title: str, part: int) -> str:
        rows: dict[str, Counter[str]] = {}
        for key, found in self.counts.items():
            rows.setdefault(key[part], Counter()).update(found)
        rows = {**dict(sorted(rows.items())), "**all**": sum(rows.values(), Counter())}
        lines = [f"| {title} | injected | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
        for name, found in rows.items():
            cells = " | ".join(str(found[column]) for column in COLUMNS)
            lines.append(f"| {name} | {found.total()} | {cells} |")
        return "\n".join(lines) + "\n"


def kinds(tried: Counter[str], right: Counter[str]) -> str:
    """A table in Markdown: kinds of inputs, how many were tried, and how many answered rightly."""
    rows = [*((kind, tried[kind], right[kind]) for kind in sorted(tried)), ("**all**", tried.total(), right.total())]
    lines = [f"| {kind} | {all_} | {good} |" for kind, all_, good in rows]
    return "\n".join(["| kind | tried | right |", "|---|---|---|", *lines]) + "\n"


def write_section(file: Path, title: str, text: str) -> None:
    """Put a text under a heading of a Markdown page, in the place of what stands there, or at the end."""
    head, *sections = re.split(r"^(?=## )", file.read_text(), flags=re.MULTILINE)
    new = f"## {title}\n\n{text.strip()}\n\n"
    known = any(section.startswith(f"## {title}\n") for section in sections)
    kept = [new if section.startswith(f"## {title}\n") else section for section in sections] + [new] * (not known)
    file.write_text("".join([head, *(f"{section.rstrip()}\n\n" for section in kept)]).rstrip() + "\n")
