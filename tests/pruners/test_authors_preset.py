"""`--preset authors` beside what the paper's released program does, written down plainly, on the same block."""

from types import ModuleType

import pytest
from support import toy_block
from torch import Tensor

from benchmarks.reference import released_program
from besa_cli.pruners import besa
from besa_cli.pruners.besa.options import authors
from besa_cli.stream.block import Block


@pytest.fixture(scope="module")
def released() -> ModuleType:
    """The restatement that also runs on whole models."""
    return released_program


def large(share: float) -> Block:
    weights = toy_block.source(hidden=208, inner=304)
    return toy_block.block(weights, round(share * toy_block.size(weights)), samples=64, seqlen=12)


def options(granularity: str) -> besa.Options:
    # both granularities against the dense block here, so that they differ in nothing else
    asked = {**authors(granularity), "target": "block", "granularity": granularity}
    return besa.BesaOptions(**asked, preset="authors", epochs=2)


def spreads(masks: dict[str, Tensor]) -> list[int]:
    """From the row of a linear that loses least to the one that loses most."""
    counts = [(~mask).sum(1) for mask in masks.values()]
    return [int(count.max() - count.min()) for count in counts]


@pytest.mark.parametrize(("granularity", "share"), [("row", 0.42), ("row", 0.5), ("row", 0.58), ("layer", 0.58)])
def test_the_preset_comes_to_the_allocation_of_the_released_program(
    released: ModuleType, share: float, granularity: str
) -> None:
    expected = released.masks(large(share), options(granularity), share)
    found = dict(besa.prune(large(share), options(granularity)).masks)
    size = toy_block.size(expected)
    # one weight more in every row of a linear is what a floor of its one sparsity may do
    assert abs(toy_block.pruned(found) - toy_block.pruned(expected)) / size <= (
        0.002 if granularity == "row" else 0.005
    )
    for name, mask in expected.items():
        assert toy_block.pruned({name: found[name]}) / mask.numel() == pytest.approx(
            toy_block.pruned({name: mask}) / mask.numel(), abs=0.01
        ), name
    if granularity == "row":  # else two starting points would be compared
        assert max(spreads(expected)) > 20
        assert max(spreads(found)) > 20
