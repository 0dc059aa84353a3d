"""Sizes of candidates against a plain sum and against the files of real exports; lines of candidates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_models

from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import UsageError
from besa_cli.fitting import probing
from besa_cli.fitting.space import Candidate, Shapes, Space, sparsities
from besa_cli.ops.affine import Grid

Besa = Callable[..., Any]  # conftest.Outcome
LINEARS = ((48, 32), (24, 32), (32, 54))
SHAPES = Shapes(linears=LINEARS, value_bits=16, rest=1000)
GRIDS = {None: None, 4: Grid(bits=4, group_size=16), 3: Grid(bits=3, group_size=16)}


def plain_bits(candidate: Candidate) -> int:
    total = 0
    for rows, cols in LINEARS:
        kept, grid = rows * cols - round(candidate.sparsity * rows * cols), GRIDS[candidate.bits]
        each = 16 if grid is None else grid.bits
        scales = 0 if grid is None else 16 * rows * -(-cols // 16)
        total += scales + min(each * rows * cols, rows * cols + each * kept)
    return total


@given(st.sampled_from([None, 4, 3]), st.floats(0, 0.99))
def test_the_size_is_that_of_values_scales_masks_and_the_rest(bits: int | None, sparsity: float) -> None:
    candidate, space = Candidate(sparsity, bits), Space(shapes=SHAPES, sparsities=(0.0,), grids=GRIDS)
    assert space.bytes(candidate) == 1000 + -(-plain_bits(candidate) // 8)
    assert space.bits_per_weight(candidate) == plain_bits(candidate) / sum(rows * cols for rows, cols in LINEARS)


@given(st.sampled_from([0.01, 0.02, 0.05, 0.1, 0.125]))
def test_each_candidate_of_a_line_is_smaller_than_the_one_before(step: float) -> None:
    space = Space(shapes=SHAPES, sparsities=sparsities(step), grids=GRIDS)
    for bits, line in space.lines.items():
        sizes = [space.bytes(candidate) for candidate in line]
        assert sizes == sorted(set(sizes), reverse=True)
        assert line[0] == Candidate(0.0, bits)
        left_out = {Candidate(each, bits) for each in space.sparsities} - set(line)
        assert all(space.bytes(candidate) >= sizes[0] for candidate in left_out)
    assert set(probing.probed(space)) <= set(space.candidates)
    assert all({line[0], line[-1]} <= set(probing.probed(space)) for line in space.lines.values())


def test_steps_are_exact_and_end_below_one() -> None:
    assert sparsities(0.05)[:4] == (0.0, 0.05, 0.1, 0.15)
    assert sparsities(0.05)[-1] == 0.9
    assert sparsities(0.5) == (0.0, 0.5)


@pytest.mark.parametrize("step", [0.0, -0.1, 0.6, 0.003, float("nan"), float("inf"), 0.07777])
def test_a_step_that_is_none_is_refused(step: float) -> None:
    with pytest.raises(UsageError, match="--step"):
        sparsities(step)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_size_is_that_of_the_sparse_export(bits: int | None, workplace: Path, besa: Besa) -> None:
    directory = tiny_models.checkpoint(workplace / "m", blocks=2)
    decoder = Decoder(directory, torch.device("cpu"), torch.float32)
    grids = {bits: None if bits is None else Grid(bits=bits, group_size=16)}
    space = Space(shapes=probing.shapes(decoder), sparsities=(0.5,), grids=grids)
    rows = tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(3, 12))
    words = ("--model", directory, "--data", rows, "--samples", 3, "--seqlen", 12)
    assert besa("prune", *words, "--method", "magnitude", "--sparsity", 0.5, "--run", "r").code == 0
    if bits is not None:
        assert besa("quantize", "--bits", bits, "--group-size", 16, "--run", "r").code == 0
    outcome = besa("export", "--format", "sparse", "--run", "r", "--json")
    assert outcome.code == 0, outcome.err
    index = json.loads((workplace / "r/export/sparse/sparse.safetensors.index.json").read_text())
    shapes = 14 * (16 if bits is None else 32)  # what says the shape of each linear, and its grid
    rounding = 14 * 2 * 64  # of masks and codes to whole bytes, row by row
    assert 0 <= index["metadata"]["total_size"] - space.bytes(Candidate(0.5, bits)) <= shapes + rounding
