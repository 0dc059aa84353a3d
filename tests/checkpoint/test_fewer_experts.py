"""A checkpoint seen with fewer experts: names, sizes and values, against the tensors taken apart by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from besa_cli.checkpoint.fewer_experts import ExpertTensors, FewerExperts

EXPERTS, LEFT = 4, 2


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STORED = {
    **{f"layers.1.experts.{number}.up.weight": tensor(3, 2, seed=number) for number in range(EXPERTS)},
    "layers.1.gate.weight": tensor(EXPERTS, 5),
    "layers.2.fused": tensor(7, EXPERTS + 1, 2),  # the last part belongs to no expert
    "layers.2.norm": tensor(6),
}
HELD = [
    ExpertTensors(block=1, tensors=tuple(f"layers.1.experts.{number}.up.weight" for number in range(EXPERTS))),
    ExpertTensors(block=1, tensors=("layers.1.gate.weight",), axis=0),
    ExpertTensors(block=2, tensors=("layers.2.fused",), axis=1),
]
KEPT: list[list[int]] = [[], [1, 3], [0, 2]]
EXPECTED = {
    "layers.1.experts.0.up.weight": STORED["layers.1.experts.1.up.weight"],
    "layers.1.experts.1.up.weight": STORED["layers.1.experts.3.up.weight"],
    "layers.1.gate.weight": STORED["layers.1.gate.weight"][[1, 3]],
    "layers.2.fused": STORED["layers.2.fused"][:, [0, 2, 4]],
    "layers.2.norm": STORED["layers.2.norm"],
}


@pytest.fixture
def fewer(tmp_path: Path) -> FewerExperts:
    save_file(STORED, tmp_path / "model.safetensors")
    return FewerExperts(tmp_path, HELD, experts=EXPERTS, remaining=LEFT)


def test_names_shapes_and_sizes_are_known_before_the_experts_are(fewer: FewerExperts) -> None:
    assert fewer.names == sorted(EXPECTED)
    assert {name: fewer.shape(name) for name in fewer.names} == {
        name: tuple(each.shape) for name, each in EXPECTED.items()
    }
    assert {name: fewer.nbytes([name]) for name in fewer.names} == {
        name: each.nbytes for name, each in EXPECTED.items()
    }
    assert fewer.nbytes(fewer.names) == sum(each.nbytes for each in EXPECTED.values())
    assert "layers.1.experts.2.up.weight" not in fewer
    assert fewer.blocks == [1, 2]


def test_the_tensors_are_those_of_the_experts_that_stay(fewer: FewerExperts) -> None:
    fewer.keep(KEPT)
    found = fewer.read(fewer.names)
    assert found.keys() == EXPECTED.keys()
    assert all(torch.equal(found[name], EXPECTED[name]) for name in EXPECTED)
    assert all(each.is_contiguous() for each in found.values())


def test_the_first_experts_stay_until_it_is_said_which(fewer: FewerExperts) -> None:
    name = "layers.1.experts.1.up.weight"
    assert torch.equal(fewer.read([name])[name], STORED[name])


@pytest.mark.parametrize("numbers", [[1, 4], [3, 1], [1, 1], [1], [0, 1, 2]])
def test_other_numbers_are_an_error(numbers: list[int], fewer: FewerExperts) -> None:
    with pytest.raises(ValueError, match="are not 2 of 4 experts"):
        fewer.keep([[], numbers, [0, 1]])
