"""States of the tuning of a pruned model, from which an unfinished stage is resumed: a folder for a number of steps."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from besa_cli.checkpoint import sealed
from besa_cli.checkpoint.stages import PROGRESS, TUNING, Stage
from besa_cli.errors import BesaError


class TuningStates:
    """Folders of an unfinished stage, each with a file for every block; see `besa_cli.stream.tuning`.

    Parameters
    ----------
    stage : Stage
    """

    def __init__(self, stage: Stage) -> None:
        self._stage, self._home = stage, stage.directory / TUNING

    def progress(self) -> dict[str, Tensor]:
        """Return the progress of the newest state; empty if there is none.

        Raises
        ------
        BesaError
            The file is damaged.
        """
        newest = max((path.parent for path in self._home.glob(f"*/{PROGRESS}")), default=None)
        return {} if newest is None else sealed.read(newest / PROGRESS, _remedy(newest))

    def block(self, step: int, index: int) -> dict[str, Tensor]:
        """Return the tensors of block `index` after `step` steps.

        Raises
        ------
        BesaError
            The file is missing or damaged.
        """
        path = self._file(step, index)
        tensors = sealed.read(path, _remedy(path.parent))
        if not tensors:
            raise BesaError(f"{path} is missing", _remedy(path.parent))
        return tensors

    def write(
        self, step: int, blocks: Iterable[Mapping[str, Tensor]], progress: Mapping[str, Tensor], *, best: int
    ) -> None:
        """Store a state, the progress last; then remove all others but the one after `best` steps."""
        for index, tensors in enumerate(blocks):
            sealed.write(self._file(step, index), tensors)
        sealed.write(self._folder(step) / PROGRESS, progress)
        for folder in set(self._home.iterdir()) - {self._folder(step), self._folder(best)}:
            _remove(folder)

    def remove(self) -> None:
        """Remove all states, once the stage is finished."""
        if self._home.is_dir():
            for folder in self._home.iterdir():
                _remove(folder)
            if not any(self._home.iterdir()):
                self._home.rmdir()

    def _folder(self, step: int) -> Path:
        return self._home / f"{step:08d}"

    def _file(self, step: int, index: int) -> Path:
        return self._folder(step) / self._stage.shard(index).name


def _remove(folder: Path) -> None:
    """Remove the files of a state, the progress first, so that a half removed one is not taken for whole."""
    for pattern in (PROGRESS, "model-*.safetensors", ".*.partial"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remedy(folder: Path) -> str:
    return f"delete {folder}; the same command then resumes from an earlier state, or from the start"
