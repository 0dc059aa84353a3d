"""Every figure in the pages is that of a recorded line, and says so where the line is older than its method."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import protocol_a, quant_protocol_a
from benchmarks.quality.ablation_plan import Cell
from benchmarks.results import recorded, stated
from benchmarks.shared import besa_runs
from benchmarks.speed import learning_cost
from besa_cli import pruners, quantizers

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [README, *sorted((ROOT / "docs").glob("*.md"))]}
LOG = [page for page in sorted((ROOT / "dev" / "log").glob("*.md")) if page.name != "README.md"]
LINES = sorted(besa_runs.RESULTS.glob("*.jsonl"))

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"<!-- results:[\w-]+ -->.*?<!-- /results -->", re.DOTALL)
_ASIDE = re.compile(r"`[^`]*`|\]\([^)]*\)|arXiv \d+\.\d+|(?:Apache-|BY-SA |ODC-BY |AFL |Python )\d[.\d]*")
_FIGURE = re.compile(r"\d[\d,]*\.\d+|\d[\d,]*(?= (?:MB|GB|ms|s|seconds|minutes|hours|days|times|passes|points)\b)")

# Numbers outside the generated parts that are no measurements of ours: what they are, by page.
STATED = {
    "README.md": {"92": "MB of the demo model's wheel"},
    "docs/export.md": {"2026.10": "the version of xllamacpp"},
    "docs/method.md": {
        **dict.fromkeys(("0.1", "1.0", "0.01", "3.75", "1.75", "0.05", "100"), "options and constants of the program"),
        **dict.fromkeys(("0.03", "0.9", "0.95", "0.001", "0.002", "0.15", "0.25"), "constants of the whole model"),
        **dict.fromkeys(("0.3", "0.7", "0.5", "0.497", "0.376", "0.624"), "examples that follow from formulas"),
    },
    "docs/models.md": {"92": "MB of the demo model's wheel", "2.5": "the version of a model"},
    "docs/usage.md": {"92": "MB of the demo model's wheel"},
    "docs/scale.md": {
        **dict.fromkeys(("0.4", "0.5", "80", "2.5"), "constants of the model of memory"),
        **dict.fromkeys(("24", "0.13", "22"), "a GPU's memory; what follows from the model of time"),
    },
    "docs/simulate.md": {
        **dict.fromkeys(("76.8", "164.9"), "ViTCoD's machine"),
        **dict.fromkeys(("50.20", "50.36", "5,207.53", "5,125.00"), "printed in the paper"),
        **dict.fromkeys(("0.5", "0.1"), "thresholds"),
    },
    "docs/tasks.md": {"56.94": "printed in the paper"},
}


def test_the_committed_page_of_few_bits_is_that_of_its_lines() -> None:
    assert quant_protocol_a.PAGE.read_text(encoding="utf-8") == quant_protocol_a.page()


@pytest.mark.parametrize("page", [path.relative_to(ROOT).as_posix() for path in stated.pages()])
def test_what_a_page_says_of_measurements_is_made_from_the_lines(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text == stated.rewritten(text), "make it anew: python -m benchmarks.results.results"


def test_every_part_is_on_a_page_and_every_marker_is_that_of_a_part() -> None:
    texts = [path.read_text(encoding="utf-8") for path in PAGES.values()]
    there = [name for text in texts for name in stated.names(text)]
    assert sorted(there) == sorted(stated.PARTS)
    for text in texts:
        assert text.count("<!-- results:") == text.count("<!-- /results -->") == len(stated.names(text))
    with pytest.raises(KeyError, match="stranger"):
        stated.rewritten("<!-- results:stranger -->\n1.23\n<!-- /results -->")


def test_a_digit_that_is_changed_on_a_page_or_in_a_line_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = README.read_text(encoding="utf-8")
    shown = protocol_a.perplexity("wanda", 0.5, protocol_a.found())
    other = text.replace(shown, shown.replace(shown[0], str((int(shown[0]) + 1) % 10), 1))
    assert other != text
    assert stated.rewritten(other) == text
    lines = [json.loads(line) for line in protocol_a.LINES.read_text().splitlines()]
    newest = protocol_a.of("wanda", 0.6, protocol_a.found())[-1]
    changed = [{**line, "perplexity": {"wikitext2": 1.0}} if line == newest else line for line in lines]
    assert changed != lines
    monkeypatch.setattr(protocol_a, "LINES", tmp_path / "lines.jsonl")
    protocol_a.LINES.write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert stated.rewritten(text) != text


def figures(text: str) -> Iterator[str]:
    """What looks like a measured figure outside the generated parts."""
    left = _ASIDE.sub("", _FENCE.sub("", _GENERATED.sub("", text)))
    yield from (found[0] for found in _FIGURE.finditer(left))


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/cli.md"])
def test_no_figure_stands_outside_the_generated_parts(page: str) -> None:
    """cli.md is generated; elsewhere numbers that are not measurements are named above. The log is not looked at."""
    there, known = set(figures(PAGES[page].read_text(encoding="utf-8"))), STATED.get(page, {})
    assert there - set(known) == set(), "quote it from a line (benchmarks/results/stated.py), or say above what it is"
    assert set(known) - there == set(), "is not there any more"


def test_a_figure_that_is_typed_by_hand_is_found() -> None:
    text = "BESA comes to 35.04 in 362 s and 5.1 to 7.1 passes.\n<!-- results:x -->\n9.9\n<!-- /results -->\n`8.8`\n"
    assert list(figures(text)) == ["35.04", "362", "5.1", "7.1"]


@pytest.mark.parametrize("path", LINES, ids=lambda path: path.stem)
def test_every_line_says_what_made_it(path: Path) -> None:
    for text in path.read_text(encoding="utf-8").splitlines():
        line: dict[str, Any] = json.loads(text)
        assert line.get("commit") or line["from"].startswith("dev/log, ")
        if path.stem == "other_programs":  # whose versions are not ours
            continue
        for method, version in line["methods"].items():
            assert 1 <= version <= recorded.methods(method)[method]


def entries(page: Path) -> list[str]:
    """The headings of a page of the log."""
    return re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_index_of_the_log_has_every_entry_under_its_page_and_no_other() -> None:
    index = (ROOT / "dev" / "log" / "README.md").read_text(encoding="utf-8")
    listed = {part.partition(")")[0]: part for part in re.split(r"^## \[[^]]*\]\(", index, flags=re.MULTILINE)[1:]}
    assert sorted(listed) == sorted(page.name for page in LOG)
    for page in LOG:
        assert re.findall(r"^- (.*)$", listed[page.name], re.MULTILINE) == entries(page), page.name
        dates = [title[:10] for title in entries(page)]
        assert dates == sorted(dates, reverse=True), f"{page.name}: the newest entry first"


def test_a_line_taken_over_from_the_log_names_an_entry_of_it() -> None:
    titles = [title for page in LOG for title in entries(page)]
    for path in LINES:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if "from" in line:
                entry = line["from"].removeprefix("dev/log, ")
                assert entry in titles


def test_what_an_older_method_made_is_left_out_or_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    before = protocol_a.perplexity("wanda", 0.5, protocol_a.found())
    assert before != "-"
    assert "(old)" not in quant_protocol_a.shown(quant_protocol_a.known(), "gptq-g128")
    monkeypatch.setitem(pruners.VERSIONS, "besa", pruners.VERSIONS["besa"] + 1)
    monkeypatch.setitem(quantizers.VERSIONS, "gptq", quantizers.VERSIONS["gptq"] + 1)
    monkeypatch.setitem(pruners.VERSIONS, "wanda", 2)
    assert protocol_a.perplexity("wanda", 0.5, protocol_a.found()) == "-"
    assert quant_protocol_a.shown(quant_protocol_a.known(), "gptq-g128").endswith(" (old)")
    assert "(old)" in learning_cost.speed(besa_runs.read_lines(learning_cost.SPEED))


def test_a_quantized_cell_of_other_defaults_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    found = quant_protocol_a.known()
    assert quant_protocol_a.is_current("clip-g128", found["clip-g128"])
    line = json.loads(json.dumps(found["clip-g128"]))
    line["steps"][0]["options"]["epochs"] += 1
    assert not quant_protocol_a.is_current("clip-g128", line)


def test_all_of_protocol_a_is_of_one_dtype() -> None:
    for line in protocol_a.found().values():
        assert line["setup"]["dtype"] == line.get("compute", line["setup"])["dtype"] == protocol_a.SETUP.dtype


def test_a_line_of_another_dtype_takes_no_other_lines_place() -> None:
    line = {"what": "state", "hidden": 8, "commit": "a", "threads": 2, "machine": "m", "methods": {}}
    lines = [
        {**line, "dtype": "float32", "bytes_per_weight": 1.0},
        {**line, "dtype": "bfloat16", "bytes_per_weight": 2.0},
        {**line, "dtype": "float32", "bytes_per_weight": 3.0},
    ]
    found = [cells for cells in learning_cost.speed(lines).splitlines() if "moments" in cells]
    assert [row.split("|")[2:4] for row in found] == [[" bfloat16 ", " 2.00 "], [" float32 ", " 3.00 "]]


def test_other_texts_are_those_that_a_whole_line_has() -> None:
    def line(method: str, seed: int, **perplexity: float) -> tuple[Cell, dict[str, Any]]:
        setting = protocol_a.setting(method, 0.6)
        return Cell(setting=setting, seed=seed), {"perplexity": perplexity}

    found = dict(
        [
            line("wanda", 0, wikitext2=10.0, c4=30.0),
            line("wanda", 1, wikitext2=99.0),
            line("magnitude", 0, wikitext2=5.0),
        ]
    )
    assert protocol_a.other_texts(found, {"wanda": "Wanda", "magnitude": "magnitude"}, 0.6).splitlines() == [
        "| 60 % | wikitext2 | c4 |",
        "|---|---|---|",
        "| Wanda | 10.00 (n=1) | 30.00 (n=1) |",
    ]
