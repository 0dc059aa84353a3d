"""One stage takes the place of another, and a stage is removed: a crash in between is made good."""

import shutil
from pathlib import Path

from besa_cli import disk
from besa_cli.checkpoint import manifests


def replace_stage(old: Path, new: Path) -> None:
    """Let the finished stage `new` take the place of `old`; a crash in between is made good by `recover`."""
    if old.exists():
        _put_aside(old, old)
    new.rename(old)
    disk.flush_directory(old.parent)
    shutil.rmtree(_aside(old), ignore_errors=True)


def recover(old: Path, new: Path) -> None:
    """Finish an exchange or a removal of stages that a crash interrupted."""
    if (new / manifests.MANIFEST).exists() and manifests.read(new).get("status") == "complete":
        replace_stage(old, new)
    if _aside(old).exists():
        shutil.rmtree(_aside(old), ignore_errors=True)


def discard(stage: Path, final: Path) -> None:
    """Remove a stage whose final place is `final`; half removed, it is nowhere that it could be taken for a stage."""
    if stage.exists():
        _put_aside(stage, final)
        shutil.rmtree(_aside(final))


def _put_aside(stage: Path, final: Path) -> None:
    if _aside(final).exists():
        shutil.rmtree(_aside(final))
    stage.rename(_aside(final))


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")
