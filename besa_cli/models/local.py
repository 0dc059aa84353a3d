"""Checkpoint directories on this machine."""

from pathlib import Path

from besa_cli.errors import BesaError
from besa_cli.models import files, pickled
from besa_cli.models.files import CheckConfig
from besa_cli.system.disk import read_json, require_regular
from besa_cli.system.notes import Notify


def directory(path: Path, *, notify: Notify, check_config: CheckConfig = lambda _: None) -> Path:
    """Return a checkpoint directory unchanged, or, if it holds pickled weights alone, its conversion in the cache.

    `notify` and `check_config` are the parameters of `besa_cli.models.resolve`.

    Raises
    ------
    BesaError
        A file is missing, cut off or not an ordinary file, or the model is already quantized.
    """
    path = path.absolute()
    check(path)
    check_config(path)
    shards = files.weight_files(path)
    if shards is None:
        return pickled.directory(path, files.list_side_files(path), notify=notify)
    for shard in shards:
        files.check_whole(shard)
    return path


def check(path: Path) -> None:
    """Check the files beside the weights of a checkpoint directory.

    Raises
    ------
    BesaError
        There is no ``config.json``, a side file is not an ordinary file, or the model is already quantized.
    """
    if not (path / "config.json").exists():
        raise BesaError(f"{path} has no config.json, so it is not a model", "name a Hugging Face checkpoint directory")
    for name in files.list_side_files(path):
        require_regular(path / name)
    files.refuse_quantized(read_json(path / "config.json"), str(path))
    files.refuse_quantization_files(path)
