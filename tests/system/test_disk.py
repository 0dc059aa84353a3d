"""Files that besa writes: whole or absent, with the mode that the user's umask gives, and never through a link."""

import json
import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = (*_FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)


def test_a_safetensors_file_has_the_bytes_that_the_library_writes(tmp_path: Path) -> None:
    numbers = torch.arange(24).reshape(4, 6)
    tensors = {f'{number}.é"\n{dtype}': numbers.to(dtype, copy=True) for number, dtype in enumerate(_DTYPES)}
    tensors |= {f"b.{number}": numbers.to(dtype, copy=True) for number, dtype in enumerate(reversed(_DTYPES))}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.ones(0, 3), "turned": numbers.float().T}
    tensors |= {"step": numbers.to(torch.uint8)[:, ::2], "odd": torch.ones(3, dtype=torch.uint8)}
    tensors |= {"learned": torch.nn.Parameter(torch.ones(2, 2))}
    disk.save_tensors(tmp_path / "own", tensors)
    whole = {name: each.contiguous() for name, each in tensors.items()}
    save_file(whole, tmp_path / "stock", metadata={"format": "pt"})
    assert (tmp_path / "own").read_bytes() == (tmp_path / "stock").read_bytes()
    disk.save_tensors(tmp_path / "none", {})
    assert load_file(tmp_path / "none") == {}


def test_a_kill_in_the_middle_of_a_safetensors_file_leaves_only_what_is_swept(tmp_path: Path) -> None:
    if not (child := os.fork()):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        disk.publish(tmp_path / "shard", lambda path: disk.save_tensors(path, {"a": torch.ones(1 << 20)}))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGXFSZ
    assert [path.name for path in tmp_path.iterdir()] == [f".shard.{child}.partial"]
    disk.sweep(tmp_path / "shard")
    assert list(tmp_path.iterdir()) == []


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
