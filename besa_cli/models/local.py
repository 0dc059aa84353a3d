"""A checkpoint directory on this machine."""

from collections.abc import Callable
from pathlib import Path

from besa_cli.disk import read_json
from besa_cli.errors import BesaError
from besa_cli.models import files, pickled


def directory(path: Path, *, notify: Callable[[str], None]) -> Path:
    """A checkpoint directory as it is, or, if it holds pickled weights alone, its conversion in the cache.

    Raises
    ------
    BesaError
        A file is missing or cut off, or the model is already quantized.
    """
    path = path.absolute()
    if not (path / "config.json").is_file():
        raise BesaError(f"{path} has no config.json, so it is no model", "name a Hugging Face checkpoint directory")
    files.refuse_quantized(read_json(path / "config.json"), str(path))
    shards = files.weight_files(path)
    if shards is None:
        return pickled.directory(path, files.side_files(entry.name for entry in path.iterdir()), notify=notify)
    for shard in shards:
        files.check_whole(shard)
    return path
