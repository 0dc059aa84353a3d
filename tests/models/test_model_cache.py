"""What is made once is made once, whole, whoever asks at the same time and however the first attempt ended."""

import hashlib
import json
import os
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from besa_cli.errors import BesaError
from besa_cli.models import cache as module


def test_two_at_once_make_it_once(notes: list[str]) -> None:
    made: list[Path] = []

    def make(target: Path) -> None:
        time.sleep(0.2)
        (target / "folder").mkdir()
        (target / "folder" / "file").write_text("whole")
        made.append(target)

    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(module.get_or_make("models/some", make, notify=notes.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert {path.joinpath("folder", "file").read_text() for path in found} == {"whole"}
    assert all("waiting for another besa" in note for note in notes)
    assert len(notes) == 3


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask_whatever_library_writes_them(umask: int, notes: list[str]) -> None:
    def make(target: Path) -> None:
        (target / "config.json").write_text("{}")
        save_file({"a": torch.ones(3)}, target / "model.safetensors")

    before = os.umask(umask)
    try:
        made = module.get_or_make("models/some", make, notify=notes.append)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.iterdir()}
    assert modes == dict.fromkeys(("besa-cache.json", "config.json", "model.safetensors"), 0o666 & ~umask)


def test_what_broke_off_leaves_nothing_and_is_made_again(notes: list[str], cache: Path) -> None:
    def broken(target: Path) -> None:
        (target / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module.get_or_make("models/some", broken, notify=notes.append)
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []
    (cache / "models" / ".some.partial").mkdir()  # of a process that was killed
    (cache / "models" / ".some.partial" / "old").write_text("half")

    def make(target: Path) -> None:
        (target / "x").write_text("whole")

    made = module.get_or_make("models/some", make, notify=notes.append)
    assert sorted(path.name for path in made.iterdir()) == ["besa-cache.json", "x"]


@pytest.mark.parametrize("damage", ["shorter", "gone", "note", "bit", "pipe"])
def test_damage_is_noticed(damage: str, notes: list[str]) -> None:
    def make(target: Path) -> None:
        (target / "file").write_text("whole")

    made = module.get_or_make("models/some", make, notify=notes.append)
    if damage == "shorter":
        (made / "file").write_text("whol")
    elif damage == "bit":
        times = (made / "file").stat()
        (made / "file").write_text("wholf")
        os.utime(made / "file", ns=(times.st_atime_ns, times.st_mtime_ns))
    elif damage == "pipe":
        (made / "file").unlink()
        os.mkfifo(made / "file")
    elif damage == "gone":
        (made / "file").unlink()
    else:
        (made / "besa-cache.json").write_text("{")
    assert (module.get_or_make("models/some", make, notify=notes.append) / "file").read_text() == "whole"
    assert notes == [f"{made} is damaged; making it again"]


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    module.digest(file)
    monkeypatch.setattr(module, "SETTLED_SECONDS", -1)
    first = module.digest(file)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    with monkeypatch.context() as context:
        context.setattr(module, "sha256_file", pytest.fail)
        assert module.digest(file) == first
    file.write_text("three")
    assert module.digest(file) != first


def test_a_digest_is_not_kept_for_a_file_that_may_still_change_unseen(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for text in ("one", "two", "six"):
        file.write_text(text)
        assert module.digest(file) == hashlib.sha256(text.encode()).hexdigest()


def test_a_time_put_back_hides_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SETTLED_SECONDS", -1)
    file = tmp_path / "file"
    file.write_text("one")
    times = file.stat()
    first = module.digest(file)
    time.sleep(0.02)  # the clock of the file system ticks
    with file.open("r+") as opened:
        opened.write("two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert module.digest(file) != first


def test_a_cache_of_an_earlier_release_is_taken_and_watched_from_then_on(notes: list[str]) -> None:
    def make(target: Path) -> None:
        (target / "file").write_text("whole")

    made = module.get_or_make("models/some", make, notify=notes.append)
    (made / "besa-cache.json").write_text('{"files": {"file": 5}}')
    assert module.get_or_make("models/some", make, notify=notes.append) == made
    assert notes == []
    (made / "file").write_text("wholf")
    module.get_or_make("models/some", make, notify=notes.append)
    assert notes == [f"{made} is damaged; making it again"]


def test_weights_that_a_disk_changed_without_a_trace_are_found_by_the_job_that_reads_them(
    notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED_SECONDS", -1)

    def make(target: Path) -> None:
        (target / "model.safetensors").write_text("whole")

    made = module.get_or_make("models/some", make, notify=notes.append)
    module.get_or_make("models/some", make, notify=notes.append)
    module.confirm(made, "content")
    module.confirm(made, "content")
    stamp = json.loads(Path(str(module._record_path("digests", str(made / "model.safetensors")))).read_text())["stamp"]
    (made / "model.safetensors").write_text("wholf")
    monkeypatch.setattr(Path, "stat", lambda path, stat=Path.stat, **_: Stamped(stat(path), stamp, path.name))
    assert module.get_or_make("models/some", make, notify=notes.append) == made
    assert notes == []
    with pytest.raises(BesaError, match="have changed since their first use"):
        module.confirm(made, "other content")
    assert (module.get_or_make("models/some", make, notify=notes.append) / "model.safetensors").read_text() == "whole"
    assert notes == [f"{made} is damaged; making it again"]


class Stamped:
    """What the system says of a file whose bytes have changed on the disk alone."""

    def __init__(self, real: os.stat_result, stamp: list[int], name: str) -> None:
        self.real, self.stamp, self.name = real, stamp, name

    def __getattr__(self, field: str) -> object:
        fields = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
        if self.name == "model.safetensors" and field in fields:
            return self.stamp[fields.index(field)]
        return getattr(self.real, field)


def test_a_directory_of_the_user_is_not_remembered(tmp_path: Path, cache: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.safetensors").write_text("one")
    (mine / "besa-cache.json").write_text('{"files": {"model.safetensors": "0"}}')  # copied from the cache
    module.confirm(mine, "content")
    module.confirm(mine, "other content")
    assert not cache.exists()


def test_without_a_home_one_line_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("BESA_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_path", homeless)
    with pytest.raises(BesaError, match="no home directory") as caught:
        module.root()
    assert "BESA_CACHE" in caught.value.hint


def test_what_needs_no_cache_works_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.delenv("BESA_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_path", homeless)
    (tmp_path / "model.safetensors").write_text("one")
    assert module.digest(tmp_path / "model.safetensors").startswith("7692c3ad")
    module.confirm(tmp_path, "content")


def test_the_home_of_the_cache_is_expanded(monkeypatch: pytest.MonkeyPatch, own_home: Path) -> None:
    monkeypatch.setenv("BESA_CACHE", "~/kept")
    assert module.root() == own_home / "kept"
