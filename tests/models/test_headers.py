"""The header of a safetensors file and the index of a checkpoint: what is not as it should be is refused by name."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from besa_cli.checkpoint import weights
from besa_cli.errors import BesaError
from besa_cli.models import headers

Header = dict[str, Any]


def write(path: Path, header: Header | str, data: bytes) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def good() -> Header:
    """Two tensors of 2 x 3 numbers in fp32 and of 4 in bf16: 24 and 8 bytes."""
    return {
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }


def test_entries_are_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"x": torch.ones(3, 5), "y": torch.ones(7).bfloat16(), "z": torch.ones(()), "none": torch.ones(0, 4)}
    tensors["eight"] = torch.ones(6).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = headers.entries(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        expected = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in found.items()} == expected


def put(name: str, key: str, value: Any) -> Callable[[Header], None]:
    return lambda header: header[name].__setitem__(key, value)


WRONG: dict[str, tuple[Callable[[Header], object], str]] = {
    "unknown dtype": (put("a.weight", "dtype", "F7"), r"a\.weight has the dtype F7"),
    "dtype of another kind": (put("a.weight", "dtype", ["F32"]), r"a\.weight has the dtype"),
    "dtype missing": (lambda header: header["a.weight"].pop("dtype"), r"a\.weight has the dtype None"),
    "shape of text": (put("a.weight", "shape", "23"), r"a\.weight has the shape 23"),
    "shape missing": (lambda header: header["a.weight"].pop("shape"), r"a\.weight has the shape None"),
    "negative shape": (put("a.weight", "shape", [-2, -3]), r"a\.weight has the shape \[-2, -3\]"),
    "shape of truth values": (put("a.weight", "shape", [True, 6]), r"a\.weight has the shape"),
    "shape of fractions": (put("a.weight", "shape", [2.0, 3.0]), r"a\.weight has the shape"),
    "shape of another size": (put("a.weight", "shape", [2, 4]), r"24 bytes, but F32 of the shape \[2, 4\] takes 32"),
    "shape beyond all bounds": (put("a.weight", "shape", [1 << 40, 1 << 40]), r"a\.weight has 24 bytes"),
    "shape of many dimensions": (put("a.weight", "shape", [1] * 100_000), r"a\.weight has the shape"),
    "offsets missing": (lambda header: header["a.weight"].pop("data_offsets"), r"a\.weight has the offsets None"),
    "three offsets": (put("a.weight", "data_offsets", [0, 24, 24]), r"a\.weight has the offsets"),
    "offsets backwards": (put("a.weight", "data_offsets", [24, 0]), r"a\.weight has the offsets"),
    "negative offsets": (put("a.weight", "data_offsets", [-24, 0]), r"a\.weight has the offsets"),
    "no number as offset": (put("a.weight", "data_offsets", [0, float("nan")]), r"a\.weight has the offsets"),
    "the same bytes twice": (
        lambda header: header.update({"b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}}),
        r"b\.weight overlaps",
    ),
    "a hole": (put("b.weight", "data_offsets", [28, 36]), r"b\.weight leaves 4 unused bytes before it"),
    "bytes that are not there": (
        lambda header: header.update({"c": {"dtype": "U8", "shape": [9], "data_offsets": [32, 41]}}),
        "is cut short: 32 bytes of tensors, but its header declares 41",
    ),
    "bytes of no tensor": (lambda header: header.pop("b.weight"), "is damaged: 32 bytes of tensors"),
    "an entry that is a number": (
        lambda header: header.update({"b.weight": 7}),
        r"b\.weight has an entry that is not an object",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_header_that_cannot_be_is_refused_by_the_tensors_name(kind: str, tmp_path: Path) -> None:
    change, said = WRONG[kind]
    header = good()
    change(header)
    path = write(tmp_path / "m.safetensors", header, bytes(32))
    with pytest.raises(BesaError, match=said) as refused:
        headers.entries(path)
    assert str(path) in refused.value.message
    assert len(refused.value.message) < 600


TEXTS = {
    "a tensor named twice": json.dumps(good())[:-1] + ', "a.weight": ' + json.dumps(good()["b.weight"]) + "}",
    "nested too deeply": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a number of 5,000 digits": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, ' + "9" * 5000 + "]}}",
    "a list": "[1, 2]",
    "nothing": "null",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_header_that_is_not_one_json_object_is_refused(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", TEXTS[kind], bytes(32))
    with pytest.raises(BesaError, match=f"{path}") as refused:
        headers.entries(path)
    if kind == "a tensor named twice":
        assert "'a.weight' is given twice" in refused.value.message


@pytest.mark.parametrize("length", [0, 1, 33, 1 << 30, 1 << 63, (1 << 64) - 1])
def test_a_header_longer_than_its_file_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(30))
    with pytest.raises(BesaError, match="is cut short or not a safetensors file"):
        headers.entries(path)


def test_a_pipe_in_place_of_a_shard_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(BesaError, match=r"model\.safetensors is a pipe"):
        weights.Weights(tmp_path)


def test_a_tensor_in_two_shards_is_refused_with_both(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    table = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / headers.INDEX).write_text(json.dumps({"weight_map": table}))
    with pytest.raises(BesaError, match=r"one\.safetensors and two\.safetensors both hold the tensor a"):
        weights.Weights(tmp_path)


@pytest.mark.parametrize(
    "file", ["../m.safetensors", "/m.safetensors", "..", "", "a\0b", "a" * 300, 5, None, ["a"], {"a": "b"}], ids=str
)
def test_an_index_names_files_of_its_own_directory(file: object, tmp_path: Path) -> None:
    (tmp_path / headers.INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(BesaError, match=str(tmp_path / headers.INDEX)):
        headers.weight_map(tmp_path / headers.INDEX)


@pytest.mark.parametrize("told", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}], ids=str)
def test_an_index_without_a_map_is_refused(told: Header, tmp_path: Path) -> None:
    (tmp_path / headers.INDEX).write_text(json.dumps(told))
    with pytest.raises(BesaError, match="has no weight_map"):
        headers.weight_map(tmp_path / headers.INDEX)


@pytest.mark.parametrize("about", [[], "x", 5, True], ids=str)
def test_an_index_whose_metadata_the_library_could_not_read_is_refused(about: object, tmp_path: Path) -> None:
    told = {"metadata": about, "weight_map": {"a": "m.safetensors"}}
    (tmp_path / headers.INDEX).write_text(json.dumps(told))
    with pytest.raises(BesaError, match=r"metadata is .*, not an object"):
        headers.weight_map(tmp_path / headers.INDEX)
