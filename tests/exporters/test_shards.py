"""The writer of safetensors files, against the library's own reader; files no larger than asked."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import strategies
from torch import Tensor

from besa_cli.exporters import shards

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
SHAPES = ((), (0,), (5,), (3, 7), (2, 3, 4))


def some_tensors(kinds: list[tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(kinds))
    return {
        f"t{number}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for number, (dtype, shape) in enumerate(kinds)
    }


@strategies.fewer
@given(kinds=st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES)), min_size=1, max_size=6))
def test_the_library_reads_what_was_written(
    kinds: list[tuple[torch.dtype, tuple[int, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors = some_tensors(kinds)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    path = tmp_path_factory.mktemp("shards") / "model.safetensors"
    assert sorted(shards.write(path, layout, tensors.__getitem__)) == sorted(tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("limit", [1, 100, 250, 10_000])
def test_files_are_as_few_as_hold_the_tensors(limit: int, tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((number + 1, 5), float(number)) for number in range(6)}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    written = list(shards.write_all(tmp_path, layout, limit, tensors.__getitem__))
    assert sorted(written) == sorted(tensors)
    files = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    sizes = [sum(tensor.nbytes for tensor in file.values()) for file in files]
    assert all(size <= limit or len(file) == 1 for size, file in zip(sizes, files, strict=True))
    assert all(left + min(t.nbytes for t in right.values()) > limit for left, right in zip(sizes, files[1:]))  # noqa: B905
    assert (tmp_path / "model.safetensors").exists() == (len(files) == 1)


def test_a_tensor_other_than_announced_is_a_bug(tmp_path: Path) -> None:
    layout = {"a": (torch.float32, (2, 3))}
    with pytest.raises(ValueError, match="its layout is"):
        list(shards.write(tmp_path / "x.safetensors", layout, lambda _: torch.zeros(3, 2)))
