"""What is made once is made once, whole, whoever asks at the same time and however the first attempt ended."""

import threading
import time
from pathlib import Path

import pytest

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
        threading.Thread(target=lambda: found.append(module.made_once("models/some", make, notify=notes.append)))
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


def test_what_broke_off_leaves_nothing_and_is_made_again(notes: list[str], cache: Path) -> None:
    def broken(target: Path) -> None:
        (target / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module.made_once("models/some", broken, notify=notes.append)
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []
    (cache / "models" / ".some.partial").mkdir()  # of a process that was killed
    (cache / "models" / ".some.partial" / "old").write_text("half")

    def make(target: Path) -> None:
        (target / "x").write_text("whole")

    made = module.made_once("models/some", make, notify=notes.append)
    assert sorted(path.name for path in made.iterdir()) == ["besa-cache.json", "x"]


@pytest.mark.parametrize("damage", ["shorter", "gone", "note"])
def test_damage_is_noticed(damage: str, notes: list[str]) -> None:
    def make(target: Path) -> None:
        (target / "file").write_text("whole")

    made = module.made_once("models/some", make, notify=notes.append)
    if damage == "shorter":
        (made / "file").write_text("whol")
    elif damage == "gone":
        (made / "file").unlink()
    else:
        (made / "besa-cache.json").write_text("{")
    assert (module.made_once("models/some", make, notify=notes.append) / "file").read_text() == "whole"
    assert notes == [f"{made} is damaged and is made again"]


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    first = module.digest(file)
    assert first == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    with monkeypatch.context() as context:
        context.setattr(module, "sha256_file", pytest.fail)
        assert module.digest(file) == first
    file.write_text("three")
    assert module.digest(file) != first
