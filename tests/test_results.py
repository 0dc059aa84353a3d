"""The pages of results are those of the lines that were measured, and the README quotes them."""

import re
from pathlib import Path

import pytest
import scripts

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("name", "page"), [("results", "RESULTS.md"), ("quant_protocol_a", "QUANTIZATION.md")])
def test_the_committed_pages_are_those_of_their_lines(name: str, page: str) -> None:
    assert (scripts.BENCHMARKS / page).read_text(encoding="utf-8") == scripts.load(name).page()


def rows(table: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by its first column, without emphasis and thousands' commas."""
    lines = [line for line in re.sub(r"\*\*|(?<=\d),(?=\d{3})", "", table).splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: cells[1:] for cells in split}


def test_the_readme_quotes_what_was_measured() -> None:
    protocol_a = scripts.load("protocol_a")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = rows(text.split("<!-- results:protocol-a -->")[1].split("<!-- /results -->")[0])
    found = protocol_a.newest(protocol_a.LINES)
    names = {
        "magnitude": "magnitude",
        "Wanda": "wanda",
        "SparseGPT (changes the weights)": "sparsegpt",
        "BESA, layer-wise": "besa-layer",
        "BESA, row-wise": "besa-row",
    }
    assert f"dense: {found['dense']['perplexity']:.2f}" in quoted
    for shown, method in names.items():
        assert quoted[shown] == [f"{found[f'{method}-{sparsity}']['perplexity']:.2f}" for sparsity in (50, 60, 70)]


def test_a_line_of_another_dtype_takes_no_other_lines_place() -> None:
    results = scripts.load("results")
    line = {"what": "state", "hidden": 8, "commit": "a", "threads": 2, "machine": "m"}
    lines = [
        {**line, "dtype": "float32", "bytes_per_weight": 1.0},
        {**line, "dtype": "bfloat16", "bytes_per_weight": 2.0},
        {**line, "dtype": "float32", "bytes_per_weight": 3.0},
    ]
    found = [cells for cells in results.speed(lines).splitlines() if "moments" in cells]
    assert [row.split("|")[2:4] for row in found] == [[" bfloat16 ", " 2.00 "], [" float32 ", " 3.00 "]]
