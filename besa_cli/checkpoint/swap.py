"""One stage takes the place of another, and a stage is removed: a crash in between is made good."""

from collections.abc import Iterable
from pathlib import Path

from besa_cli.checkpoint import manifests, ownership
from besa_cli.system import disk


def replace_stage(old: Path, new: Path) -> None:
    """Let the finished stage `new` take the place of `old`; a crash in between is made good by `recover`.

    Raises
    ------
    BesaError
        `old` holds something that besa did not write (named): nothing is changed.
    """
    if old.exists():
        _put_aside(old, old)
    new.rename(old)
    disk.flush_directory(old.parent)
    _remove_aside(old)


def recover(old: Path, new: Path) -> None:
    """Finish an exchange or a removal of stages that a crash interrupted; the only copy of a stage is put back."""
    if manifests.is_complete(new):
        replace_stage(old, new)
    elif not old.exists() and manifests.is_complete(aside(old)):
        aside(old).rename(old)
        disk.flush_directory(old.parent)
    _remove_aside(old)


def discard(stage: Path, final: Path, sources: Iterable[Path] = ()) -> None:
    """Remove a stage whose final place is `final`; half removed, it is nowhere that it could be taken for a stage.

    Raises
    ------
    BesaError
        It holds something that besa did not write, or a file that is read (named): nothing is changed.
    """
    if stage.exists():
        _put_aside(stage, final, sources)
        _remove_aside(final)


def aside(final: Path) -> Path:
    """Where a stage is until another has taken its place."""
    return final.with_name(f".{final.name}.replaced")


def _put_aside(stage: Path, final: Path, sources: Iterable[Path] = ()) -> None:
    for place in (stage, aside(final)):
        ownership.refuse_to_replace(place, sources)
    _remove_aside(final)
    stage.rename(aside(final))


def _remove_aside(final: Path) -> None:
    if aside(final).exists():
        ownership.remove(aside(final))
