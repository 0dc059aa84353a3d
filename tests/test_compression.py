"""Files compressed for downloads: the same bytes back, also by the `zstd` program; what is not whole is refused."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from besa_cli import compression
from besa_cli.errors import BesaError

CONTENT = bytes(range(256)) * 5000 + b"end"  # more than one piece


def compressed(place: Path, content: bytes = CONTENT) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / "weights.safetensors").write_bytes(content)
    return compression.compress(place / "weights.safetensors")


@strategies.fewer
@given(content=st.one_of(st.binary(max_size=300), st.integers(0, 40_000).map(lambda size: os.urandom(100) * size)))
def test_the_same_bytes_come_back(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("files")
    file = compressed(place, content)
    assert [path.name for path in place.iterdir()] == ["weights.safetensors.zst"]
    assert compression.expand(file, place).read_bytes() == content
    assert len(list(place.iterdir())) == 2


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the program zstd")
def test_the_program_zstd_agrees_both_ways(tmp_path: Path) -> None:
    file = compressed(tmp_path)
    subprocess.run(["zstd", "-q", "-d", file], check=True)
    plain = tmp_path / "weights.safetensors"
    assert plain.read_bytes() == CONTENT
    subprocess.run(["zstd", "-q", "-f", "-19", plain], check=True)
    plain.unlink()
    assert compression.expand(file, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("kept", [0, 3, 20, -1])
def test_a_file_cut_short_is_refused_by_name(kept: int, tmp_path: Path) -> None:
    file = compressed(tmp_path, os.urandom(3_000_000))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(BesaError, match=r"weights\.safetensors\.zst is cut short or damaged"):
        compression.expand(file, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_what_is_no_such_file_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors.zst"
    with pytest.raises(BesaError, match=r"weights\.safetensors\.zst is missing"):
        compression.expand(file, tmp_path)
    file.write_bytes(CONTENT)
    with pytest.raises(BesaError, match=r"weights\.safetensors\.zst is cut short or damaged"):
        compression.expand(file, tmp_path)
