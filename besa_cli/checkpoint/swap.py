"""Replacement and removal of stages, with recovery after a crash in between."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from besa_cli.checkpoint import manifests, ownership
from besa_cli.errors import BesaError
from besa_cli.system import disk


def replace_stage(old: Path, new: Path) -> None:
    """Replace the stage `old` by the finished stage `new`; after a crash in between, `recover` completes it.

    Raises
    ------
    BesaError
        `old` holds a file that besa did not write (named); nothing is changed.
    """
    if old.exists():
        _put_aside(old, old)
    new.rename(old)
    disk.flush_directory(old.parent)
    _remove_aside(old)


def begin_partial(partial: Path, marker: str, manifest: Mapping[str, object]) -> None:
    """Make an empty directory to write to, marked as besa's so that the next command may remove it after a kill.

    Parameters
    ----------
    partial : Path
        What an earlier command left there is removed.
    marker : str
        File name of the manifest.
    manifest : mapping
        Content of the manifest until the directory is finished.

    Raises
    ------
    BesaError
        The directory cannot be made.
    """
    ownership.remove(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise BesaError(f"cannot make {partial}: {error.strerror}", "name another --run") from error
    disk.write_json(partial / marker, manifest)


def recover(old: Path, new: Path) -> None:
    """Finish a replacement or removal that a crash interrupted; the only copy of a stage is put back."""
    if manifests.is_complete(new):
        replace_stage(old, new)
    elif not old.exists() and manifests.is_complete(aside(old)):
        aside(old).rename(old)
        disk.flush_directory(old.parent)
    _remove_aside(old)


def discard(stage: Path, final: Path, sources: Iterable[Path] = ()) -> None:
    """Remove a stage whose final path is `final`; it is renamed first, so that a crash leaves no half stage.

    Raises
    ------
    BesaError
        The stage holds a file that besa did not write, or one that is being read (named); nothing is changed.
    """
    if stage.exists():
        _put_aside(stage, final, sources)
        _remove_aside(final)


def aside(final: Path) -> Path:
    """Return the path at which a stage is kept while it is being replaced."""
    return final.with_name(f".{final.name}.replaced")


def _put_aside(stage: Path, final: Path, sources: Iterable[Path] = ()) -> None:
    for directory in (stage, aside(final)):
        ownership.refuse_to_replace(directory, sources)
    _remove_aside(final)
    stage.rename(aside(final))


def _remove_aside(final: Path) -> None:
    if aside(final).exists():
        ownership.remove(aside(final))
