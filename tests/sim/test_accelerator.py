"""Accelerators: what ships is whole and says where each number is from; what is wrong in a file is named."""

import os
from importlib.resources import files
from pathlib import Path

import pytest

from besa_cli.errors import UsageError
from besa_cli.sim import accelerator

FOLDER = files("besa_cli.sim") / "accelerators"


def shipped(name: str) -> str:
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8")


def test_what_ships_is_the_array_of_the_paper_and_that_of_vitcod() -> None:
    assert accelerator.names() == ["besa", "vitcod"]
    paper, vitcod = accelerator.load("besa"), accelerator.load("vitcod")
    assert (paper.lanes, paper.pes_per_lane, paper.pes) == (64, 64, 4096)
    assert (vitcod.lanes, vitcod.pes_per_lane, vitcod.pes) == (64, 8, 512)
    assert paper.bytes_per_second == vitcod.bytes_per_second == int(76.8 * 1024**3)


@pytest.mark.parametrize("name", accelerator.names())
def test_every_number_that_ships_has_its_source_beside_it(name: str) -> None:
    numbers = [line for line in shipped(name).splitlines() if "=" in line and not line.startswith(("#", "title"))]
    assert len(numbers) == 11
    assert all(len(line.partition("#")[2].strip()) > 5 for line in numbers)


@pytest.mark.parametrize("name", accelerator.names())
def test_a_file_of_ones_own_is_read_as_those_that_ship(name: str, workplace: Path) -> None:
    (workplace / "mine.toml").write_text(shipped(name), encoding="utf-8")
    assert accelerator.load("mine.toml") == accelerator.load(name)


def test_transfers_take_whole_cycles() -> None:
    paper = accelerator.load("besa")
    assert paper.transfer_cycles(0) == 0
    assert paper.transfer_cycles(1) == 1
    assert paper.transfer_cycles(4096 * 4096) == 101_726  # 164.9267 bytes a cycle: 101,725.2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lanes = 64", "lanes = 0", "m.toml: lanes = 0 is not an integer of at least 1"),
        ("lanes = 64", "lanes = 6.5", "m.toml: lanes = 6.5 is not an integer of at least 1"),
        ("lanes = 64", "lanes = true", "m.toml: lanes = True is not an integer of at least 1"),
        ("lanes = 64", "lanes = 'x'", "m.toml: lanes = x is not an integer of at least 1"),
        ("lanes = 64", f"lanes = {10**300}", "m.toml: lanes is more than 1000000000000000"),
        ("lanes = 64", f"lanes = {'9' * 5000}", "m.toml: invalid TOML: Exceeds the limit"),
        ("lanes = 64", f"lanes = {'[' * 50_000}", "m.toml: invalid TOML"),
        ("lanes = 64", "lane = 64", "unknown number 'lane' in m.toml"),
        ("lanes = 64", "# lanes", "m.toml lacks lanes"),
        ("[array]", "[array", "m.toml: invalid TOML: Expected ']'"),
        ("title", "array = 3\ntitle", "m.toml: invalid TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(old: str, new: str, message: str, workplace: Path) -> None:
    (workplace / "m.toml").write_text(shipped("besa").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        accelerator.load("m.toml")
    assert caught.value.message.startswith(message)
    assert caught.value.hint


def test_what_is_not_an_ordinary_file_or_far_too_large_is_refused_at_once(workplace: Path) -> None:
    os.mkfifo("pipe.toml")
    (workplace / "device.toml").symlink_to("/dev/zero")
    with (workplace / "huge.toml").open("wb") as file:
        file.truncate(1 << 40)
    for name, message in (
        ("pipe.toml", "pipe.toml is a pipe"),
        ("device.toml", "device.toml is a device"),
        ("huge.toml", "huge.toml has"),
    ):
        with pytest.raises(UsageError) as caught:
            accelerator.load(name)
        assert caught.value.message.startswith(message)


def test_a_table_that_is_none_and_files_that_cannot_be_read_are_named(workplace: Path) -> None:
    (workplace / "n.toml").write_text("array = 3")
    (workplace / "b.toml").write_bytes(b"\xff\xfe")
    for name, message in (
        ("n.toml", "n.toml: array is not a table of numbers"),
        ("b.toml", "cannot read b.toml: 'utf-8' codec"),
        ("gone.toml", "cannot read gone.toml: No such file"),
        ("bessa", "unknown accelerator 'bessa'"),
    ):
        with pytest.raises(UsageError) as caught:
            accelerator.load(name)
        assert caught.value.message.startswith(message)
