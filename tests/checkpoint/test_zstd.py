"""Files compressed for downloads: the same bytes back, also by the `zstd` program; what is not whole is refused."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import strategies

from besa_cli.checkpoint import zstd
from besa_cli.errors import BesaError

CONTENT = bytes(range(256)) * 5000 + b"end"  # more than one piece


def compressed(place: Path, content: bytes = CONTENT) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "weights.safetensors").write_bytes(content)
    return zstd.compress(place / "weights.safetensors")


@strategies.fewer
@given(content=st.one_of(st.binary(max_size=300), st.integers(0, 40_000).map(lambda size: os.urandom(100) * size)))
def test_the_same_bytes_come_back(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("files")
    file = compressed(place, content)
    assert [path.name for path in place.iterdir()] == ["weights.safetensors.zst"]
    assert zstd.expand(file, place, len(content)).read_bytes() == content
    assert len(list(place.iterdir())) == 2


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the program zstd")
def test_the_program_zstd_agrees_both_ways(tmp_path: Path) -> None:
    file = compressed(tmp_path)
    subprocess.run(["zstd", "-q", "-d", file], check=True)
    plain = tmp_path / "weights.safetensors"
    assert plain.read_bytes() == CONTENT
    subprocess.run(["zstd", "-q", "-f", "-19", plain], check=True)
    plain.unlink()
    assert zstd.expand(file, tmp_path, len(CONTENT)).read_bytes() == CONTENT


@pytest.mark.parametrize("kept", [0, 3, 20, -1])
def test_a_file_cut_short_is_refused_by_name(kept: int, tmp_path: Path) -> None:
    file = compressed(tmp_path, os.urandom(3_000_000))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(BesaError, match=r"weights\.safetensors\.zst is cut short or damaged"):
        zstd.expand(file, tmp_path, 3_000_000)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_what_is_no_such_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors.zst"
    with pytest.raises(BesaError, match=r"weights\.safetensors\.zst is missing"):
        zstd.expand(file, tmp_path, 3_000_000)
    file.write_bytes(CONTENT)
    with pytest.raises(BesaError, match=r"weights\.safetensors\.zst is cut short or damaged"):
        zstd.expand(file, tmp_path, 3_000_000)


def header(end: object) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, end]}})
    return len(text).to_bytes(8, "little") + text.encode()


def test_a_compressed_file_of_weights_says_itself_how_long_it_is(tmp_path: Path) -> None:
    file = compressed(tmp_path, header(8) + bytes(8))
    assert zstd.declared_size(file) == len(header(8)) + 8


BOMBS = {
    "zeros": bytes(50_000_000),
    "no end": header(None) + bytes(8),
    "an end below zero": header(-1) + bytes(8),
    "an end that is text": header("8") + bytes(8),
    "a header that is cut": header(8)[:20],
    "a header of gigabytes": (1 << 33).to_bytes(8, "little") + bytes(1000),
    "deep": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a list": (2).to_bytes(8, "little") + b"[]",
    "an entry that is a list": (10).to_bytes(8, "little") + b'{"a": [1]}',
}


@pytest.mark.parametrize("what", BOMBS)
def test_what_does_not_say_how_long_it_is_is_not_expanded(what: str, tmp_path: Path) -> None:
    file = compressed(tmp_path, BOMBS[what])
    with pytest.raises(BesaError, match=r"weights\.safetensors\.zst"):
        zstd.declared_size(file)


@pytest.mark.parametrize("how", ["in the stream", "in a second stream"])
def test_expanding_ends_where_more_comes_than_was_promised(how: str, tmp_path: Path) -> None:
    file = compressed(tmp_path, CONTENT + (b"more" if how == "in the stream" else b""))
    if how != "in the stream":
        other = compressed(tmp_path / "other", b"more")
        file.write_bytes(file.read_bytes() + other.read_bytes())
    with pytest.raises(BesaError, match="holds more than the"):
        zstd.expand(file, tmp_path, len(CONTENT))
    assert not (tmp_path / "weights.safetensors").exists()


def test_what_the_disk_cannot_hold_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match="MB free"):
        zstd.expand(compressed(tmp_path), tmp_path, 1 << 60)


def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.safetensors.zst")
    with pytest.raises(BesaError, match="is a pipe"):
        zstd.declared_size(tmp_path / "weights.safetensors.zst")
