"""Manifests compared and continued: what differs from what is asked, and the stages before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from besa_cli import checkpoint


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What would change the result, with both values; `auto` agrees with whatever it was resolved to."""
    mine, asked = (
        {
            "command": each["command"],
            **each["options"],
            "model": each["model"]["digest"],
            "calibration": each["calibration"]["tokens_digest"],
        }
        for each in (old, new)
    )
    for name in ("data", "samples", "seqlen", "pack"):  # the tokens themselves are compared
        mine.pop(name, None)
        asked.pop(name, None)
    for name in ("device", "dtype"):
        resolved = old["compute"][name]
        mine[name] = resolved
        asked[name] = resolved if asked[name] == "auto" else asked[name]
    names = list(dict.fromkeys([*mine, *asked]))
    return [
        f"{name} {_short(mine.get(name))} there, {_short(asked.get(name))} asked"
        for name in names
        if mine.get(name) != asked.get(name)
    ]


def _short(value: object) -> str:
    text = "-" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def history(directory: Path) -> list[dict[str, Any]]:
    """The stages before, where the model is itself a stage."""
    if not (directory / checkpoint.MANIFEST).exists():
        return []
    parent = checkpoint.finished(directory)
    own = {key: parent[key] for key in ("stage", "command", "options", "versions", "digest") if key in parent}
    return [*parent.get("history", []), own]


def listed(versions: Mapping[str, str]) -> str:
    """Versions in words."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())
