"""Files that besa writes: whole or absent, with the mode that the user's umask gives, and never through a link."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from besa_cli.errors import BesaError
from besa_cli.system import disk, lock


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_mode_of_the_umask_whatever_library_writes_them(umask: int, tmp_path: Path) -> None:
    disk.publish(tmp_path / "shard", lambda path: disk.save_tensors(path, {"a": torch.ones(3)}))
    disk.write_json(tmp_path / "json", {})
    disk.append_line(tmp_path / "lines", "x")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("shard", "json", "lines"), 0o666 & ~umask)


@pytest.mark.parametrize("kind", ["to a file", "dangling"])
def test_nothing_is_written_through_a_link(kind: str, tmp_path: Path) -> None:
    precious, run = tmp_path / "precious", tmp_path / "run"
    if kind == "to a file":
        precious.write_text("mine")
    run.mkdir()
    for name in ("besa.json", f".besa.json.{os.getpid()}.partial", ".holder.json", "timing.jsonl"):
        (run / name).symlink_to(precious)
    disk.write_json(run / "besa.json", {"a": 1})
    with lock.hold(run, "besa prune"):
        assert json.loads((run / ".holder.json").read_text())["command"] == "besa prune"
    with pytest.raises(BesaError, match=r"timing\.jsonl: it is a link"):
        disk.append_line(run / "timing.jsonl", "x")
    assert precious.read_text() == "mine" if kind == "to a file" else not precious.exists()
    assert not (run / "besa.json").is_symlink()


def test_a_pipe_is_neither_read_nor_written(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(BesaError, match="cannot write"):
        disk.append_line(pipe, "x")
    with pytest.raises(BesaError, match="is a pipe, not a file"):
        disk.read_json(pipe)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null"])
def test_a_device_is_not_read(path: str) -> None:
    with pytest.raises(BesaError, match="is a device, not a file"):
        disk.read_json(Path(path))


@pytest.mark.parametrize(
    "text", ["", "[]", "7", '{"a": ', "[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}"]
)
def test_what_is_not_a_json_object_is_one_line_with_the_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(BesaError, match=r"x\.json") as caught:
        disk.read_json(tmp_path / "x.json")
    assert len(caught.value.message) < 600


def test_a_name_given_twice_is_refused_where_it_matters(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": {"b": 1, "b": 2}}', encoding="utf-8")
    assert disk.read_json(tmp_path / "x.json") == {"a": {"b": 2}}
    with pytest.raises(BesaError, match="'b' is given twice"):
        disk.read_json(tmp_path / "x.json", unique=True)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"{}" + b" " * 100)
    with pytest.raises(BesaError, match="102 bytes, more than the 50"):
        disk.read_text(tmp_path / "x.json", largest=50)


def test_who_holds_a_run_is_read_as_any_other_file(tmp_path: Path) -> None:
    with lock.hold(tmp_path, "besa prune"):
        (tmp_path / ".holder.json").write_text(json.dumps({"pid": [], "host": 3, "command": None}))
        with pytest.raises(BesaError, match="in use by another besa process"), lock.hold(tmp_path, "besa quantize"):
            pass
