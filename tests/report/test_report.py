"""`besa report`: what the page says is what is on disk, read again by other means; it needs nothing from elsewhere."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lxml import html
from safetensors.torch import load_file
from support import tiny_models

from besa_cli.app import main
from besa_cli.bench import record, rounds
from besa_cli.bench.contenders import TokenLoad
from besa_cli.bench.rounds import Speeds
from besa_cli.checkpoint import sparse_format
from besa_cli.checkpoint.runs import Run
from besa_cli.report import pictures

Besa = Callable[..., Any]  # conftest.Outcome

HOSTILE = "<script>alert('w7')</script> $x^2 & \"w9\""
BLOCKS = 3


def call(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each kind: learned and measured; tuned; quantized; interrupted. The names are hostile."""
    place = tmp_path_factory.mktemp("made")
    model = tiny_models.add_tokenizer(tiny_models.checkpoint(place / "_<b>model&amp;", blocks=BLOCKS))
    rows = tiny_models.rows_file(place / "rows.jsonl", tiny_models.tokens(samples=8))
    (place / "words.txt").write_text(" ".join(f"w{3 + number * number % 120}" for number in range(90)))
    cpu = ("--device", "cpu", "--dtype", "float32")
    drawn = ("--model", model, "--data", rows, "--samples", 8, "--seqlen", 16, *cpu)
    for run, words in {
        "learned<i>": ("--epochs", 2),
        "wanda": ("--method", "wanda", "--sparsity", 0.25),
        "cut": ("--method", "magnitude"),
    }.items():
        call("prune", *drawn, *words, "--run", place / run)
    call("tune", "--data", rows, "--samples", 8, "--seqlen", 16, *cpu, "--run", place / "wanda")
    call("quantize", "--group-size", 9, "--run", place / "wanda")
    for run in ("learned<i>", "wanda"):
        call("eval", "ppl", place / "words.txt", "--seqlen", 12, *cpu, "--run", place / run)
        call("eval", "sample", HOSTILE, "--tokens", 5, "--dtype", "float32", "--run", place / run)
    call("simulate", "--dataflow", "vitcod", "--dataflow", "roofline", "--run", place / "learned<i>")
    call("export", "--format", "sparse", "--run", place / "learned<i>")
    measure_speed(Run(place / "learned<i>"))
    interrupt(place / "cut" / "pruned")
    return place


def measure_speed(run: Run) -> None:
    """Store what `besa bench` would, on a processor with a hostile name."""
    load = TokenLoad(prompt=8, new=3, batch=2)
    speeds = [
        Speeds(name=name, workload=load, prefill=1234.5, decode=rate, prefill_seconds=[], decode_seconds=[],
               resident=5_000_000, weights_read=None, share=None)
        for name, rate in (("dense", 10.0), ("<i>sparse", 25.04))
    ]  # fmt: skip
    facts = {"processor": "<b>fast", "threads": 2}
    measured = record.record(speeds, rounds.compare(speeds, "<i>sparse"), facts, 2e9, 5)
    record.save(measured, run, "model", read(run.stage("pruned") / "besa.json")["digest"])


def interrupt(stage: Path) -> None:
    """What a kill leaves behind after the first block."""
    manifest = json.loads((stage / "besa.json").read_text())
    for name in ("counts", "digest", "held_out"):
        manifest.pop(name, None)
    (stage / "besa.json").write_text(json.dumps({**manifest, "status": "running"}))
    for index in range(1, BLOCKS):
        for suffix in ("json", "safetensors"):
            (stage / f"model-{index + 2:05d}-of-{BLOCKS + 1:05d}.{suffix}").unlink()
    (stage / "model.safetensors.index.json").unlink()


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be changed."""
    return shutil.copytree(made, tmp_path / "made")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures: a page in a tenth of the time."""
    monkeypatch.setattr(pictures, "installed", lambda: False)


def page(besa: Besa, *words: object) -> html.HtmlElement:
    """The page on some runs."""
    outcome = besa("report", *words, "--output", "page.html")
    assert outcome.code == 0, outcome.err
    return html.fromstring(Path("page.html").read_bytes())


@pytest.fixture(scope="module")
def both(made: Path) -> html.HtmlElement:
    """The page on the two finished runs."""
    call("report", made / "learned<i>", made / "wanda", "--output", made / "both.html")
    return html.fromstring((made / "both.html").read_bytes())


def text(element: html.HtmlElement) -> str:
    return " ".join(" ".join(element.itertext()).split())


def cells(table: html.HtmlElement) -> list[list[str]]:
    """The rows of a table's body."""
    return [[text(cell) for cell in row] for row in table.xpath(".//tbody/tr")]


def table_of(document: html.HtmlElement, caption: str, number: int = 0) -> list[list[str]]:
    return cells(document.xpath(f".//table[caption[starts-with(., '{caption}')]]")[number])


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def results(run: Path, kind: str) -> list[dict[str, Any]]:
    return [read(file) for file in sorted((run / "eval").glob(f"{kind}-*.json"))]


def test_every_model_has_its_own_size_and_results(both: html.HtmlElement, made: Path) -> None:
    learned, tuned = made / "learned<i>", made / "wanda"
    rows = {row[0]: row[1:] for row in cells(both.xpath("//table[@class='models']")[0])}
    assert list(rows) == [
        "dense _<b>model&amp;",
        "learned<i> besa 50 %",
        "wanda, pruned wanda 25 %",
        "wanda, tuned wanda 25 %, tuned",
        "wanda, quantized wanda 25 %, tuned, rtn 4 bits",
    ]
    measured = {record["model_digest"]: record for run in (learned, tuned) for record in results(run, "ppl")}
    for title, stage in (
        ("learned<i> besa 50 %", learned / "pruned"),
        ("wanda, quantized wanda 25 %, tuned, rtn 4 bits", tuned / "quantized"),
    ):
        manifest, row = read(stage / "besa.json"), rows[title]
        own = measured[manifest["digest"]]
        dense = measured[own["baseline_digest"]]["perplexity"]
        assert row[0] == f"{own['perplexity']:.4f} {own['perplexity'] - dense:+.2f}"
        assert float(row[1]) == pytest.approx(own["kl"], rel=5e-3)
        assert row[2] == f"{100 * own['same_token']:.2f} %"
        assert row[4] == f"{100 * manifest['counts']['pruned'] / manifest['counts']['weights']:.2f} %"
    assert rows["wanda, pruned wanda 25 %"][:3] == ["–"] * 3
    assert rows["dense _<b>model&amp;"][0] == f"{dense:.4f}"


def test_sizes_are_those_of_the_encoded_tensors(besa: Besa, made: Path) -> None:
    from besa_cli.report import runs as reported

    (found,) = reported.collect([made / "learned<i>"]).runs
    tensors = tiny_models.weights(made / "learned<i>" / "pruned")
    linears = {name for name, tensor in tensors.items() if ".layers." in name and tensor.dim() == 2}
    encoded = {
        name: sum(part.nbytes for part in sparse_format.encoded(name, tensor).values()) if name in linears
        else tensor.nbytes for name, tensor in tensors.items()
    }  # fmt: skip
    sizes = found.stages[0].sizes
    assert sizes is not None
    assert sizes.dense == sum(tensor.nbytes for tensor in tensors.values())
    assert sizes.linears == sum(tensors[name].nbytes for name in linears)
    assert sizes.packed == sum(encoded.values())
    weights = sum(tensors[name].numel() for name in linears)
    assert sizes.bits_per_weight == 8 * sum(encoded[name] for name in linears) / weights
    manifest = read(made / "wanda" / "quantized" / "besa.json")
    quantized = reported.collect([made / "wanda"]).runs[0].stages[-1].sizes
    assert quantized is not None
    assert quantized.bits_per_weight == manifest["counts"]["bits_per_weight"]
    others = sum(
        t.nbytes for name, t in tiny_models.weights(made / "wanda" / "quantized").items() if name not in linears
    )
    assert quantized.packed == others + math.ceil(manifest["counts"]["bits"] / 8)


def test_every_cell_has_its_sparsity_and_the_distribution_over_its_rows(both: html.HtmlElement, made: Path) -> None:
    stage = made / "learned<i>" / "pruned"
    seen = 0
    for row in both.xpath("//section[@id='run-1']//table[@class='map']/tbody/tr"):
        index = int(text(row[0]))
        tensors = load_file(stage / f"model-{index + 2:05d}-of-{BLOCKS + 1:05d}.safetensors")
        for button in row.xpath("td/button"):
            label = re.fullmatch(r"Block (\d+), (\S+): (\S+) %, show its rows", button.get("aria-label"))
            assert label
            block, name, share = label.groups()
            assert int(block) == index
            (weight,) = (tensor for key, tensor in tensors.items() if key.endswith(f"{name}.weight"))
            zeros = int((weight == 0).sum())
            assert share == f"{100 * zeros / weight.numel():.2f}"
            assert text(button) == f"{100 * zeros / weight.numel():.1f}"
            (shown,) = both.xpath(f"//div[@id='{button.get('popovertarget')}']")
            assert f"block {index}, {name}" in text(shown)
            assert_distribution(shown, [int((line == 0).sum()) for line in weight], weight.shape[1])
            seen += 1
    assert seen == BLOCKS * 7


def assert_distribution(shown: html.HtmlElement, zeros: list[int], cols: int) -> None:
    bins = cells(shown.xpath(".//table")[0])
    left = list(zeros)
    for edges, _, count in bins:
        low, high = (float(edge) / 100 for edge in edges.split("–"))
        inside = [
            number for number in left if low <= number / cols + 1e-12 and (number / cols < high - 1e-12 or high == 1)
        ]
        assert len(inside) == int(count)
        left = [number for number in left if number not in inside]
    assert left == []
    assert int(bins[0][2])
    assert int(bins[-1][2])
    said = re.search(r"Rows have (\S+) % to (\S+) % zeros, half of them up to (\S+) %", text(shown))
    assert said
    middle = sorted(zeros)[(len(zeros) - 1) // 2]
    assert [f"{100 * number / cols:.2f}" for number in (min(zeros), max(zeros), middle)] == list(said.groups())


def test_errors_curves_and_cycles_are_those_of_the_files(both: html.HtmlElement, made: Path) -> None:
    (section,) = both.xpath("//section[@id='run-1']")
    stage, simulate = made / "learned<i>" / "pruned", made / "learned<i>" / "simulate"
    reports = [read(stage / f"model-{index + 2:05d}-of-{BLOCKS + 1:05d}.json") for index in range(BLOCKS)]
    assert table_of(section, "Error by block") == [
        [str(each["index"]), f"{each['error_before']:.2e}", f"{each['error_after']:.2e}"] for each in reports
    ]
    curves = table_of(section, "Learning curves")
    for each, row in zip(reports, curves, strict=True):
        assert len(each["curve"]) == 16
        shown = [each["curve"][position] for position in (0, 3, 7, 11, 15)]
        assert row == [str(each["index"]), *(f"{loss:.2e}" for loss in shown)]
    (file,) = simulate.glob("*.json")
    means = [
        [flow, label, f"{mean['dense_cycles']:,.0f}", f"{mean['cycles']:,.0f}"]
        for flow, found in read(file)["mean"].items()
        for label, mean in found.items()
    ]
    assert [row[:4] for row in table_of(section, "Simulated cycles")] == means
    assert len({row[0] for row in means}) == 2


def test_measured_speeds_name_the_stage_and_the_machine(both: html.HtmlElement) -> None:
    (section,) = both.xpath("//section[@id='run-1']")
    assert table_of(section, "Measured speed, pruned") == [
        ["dense", "8 + 3, 2 at a time", "1,234", "10.0", "5 MB"],
        ["<i>sparse", "8 + 3, 2 at a time", "1,234", "25.0", "5 MB"],
    ]
    notes = [text(note) for note in section.xpath(".//p[@class='note']")]
    assert any("<b>fast, 2 threads that read 2.0 GB/s from memory; medians of 5 rounds" in note for note in notes)


def test_continuations_are_side_by_side(both: html.HtmlElement, made: Path) -> None:
    (cards,) = both.xpath("//dl[@class='cards']")
    shown = {text(card[0]): card[1].text_content() for card in cards}
    assert list(shown) == ["dense", "learned<i>", "wanda, quantized"]
    stored = {
        record["model_digest"]: record["text"].strip()
        for run in ("learned<i>", "wanda")
        for record in results(made / run, "sample")
    }
    assert shown["learned<i>"] == stored[read(made / "learned<i>" / "pruned" / "besa.json")["digest"]]
    assert shown["wanda, quantized"] == stored[read(made / "wanda" / "quantized" / "besa.json")["digest"]]
    assert shown["dense"] == stored[read(made / "learned<i>" / "pruned" / "besa.json")["model"]["digest"]]


def test_what_was_done_is_told_with_a_command_that_makes_it_again(both: html.HtmlElement, made: Path) -> None:
    from besa_cli.checkpoint import inspection

    commands = [text(code) for code in both.xpath("//section[@id='run-2']//pre/code")]
    for command, name in zip(commands, ("pruned", "tuned", "quantized"), strict=True):
        manifest = read(made / "wanda" / name / "besa.json")
        assert command.startswith(f"besa {manifest['command']} --model ")
        options = inspection.options_to_repeat(manifest)
        assert command.count("--") == len([value for value in options.values() if value is not None])
        assert str(made) not in command
        (digest,) = both.xpath(f"//code[.='{manifest['digest']}'][ancestor::dl][not(ancestor::details)]")
        assert digest is not None
    whole = read(made / "wanda" / "tuned" / "besa.json")["whole_model"]
    assert " → ".join(f"{value:.4f}" for value in whole["divergence"]) in text(both)


def test_the_page_needs_nothing_and_runs_nothing(both: html.HtmlElement, made: Path) -> None:
    source = (made / "both.html").read_text()
    assert len(source.encode()) < 3_000_000
    assert both.xpath("//script|//link|//iframe|//img|//object|//form|//b|//i[not(parent::td or parent::p)]") == []
    names = {name for element in both.iter() if isinstance(element.tag, str) for name in element.attrib}
    assert not {name for name in names if name.startswith("on")}
    for element in both.iter():
        if isinstance(element.tag, str):
            for name in ("src", "href", "{http://www.w3.org/1999/xlink}href", "xlink:href"):
                assert element.get(name, "#").startswith("#")
    (policy,) = both.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "http" not in "".join(both.xpath("//style/text()"))
    assert HOSTILE in both.text_content()
    assert str(made) not in source  # it may be sent to others


def test_the_page_can_be_read_without_seeing_it(besa: Besa, made: Path) -> None:
    document = page(besa, made / "learned<i>", made / "wanda", made / "cut")
    assert document.get("lang") == "en"
    levels = [int(heading.tag[1]) for heading in document.xpath("//h1|//h2|//h3|//h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    identities = document.xpath("//@id")
    assert len(identities) == len(set(identities))
    for target in document.xpath("//@popovertarget | //@aria-labelledby"):
        assert target in identities
    for target in document.xpath("//*[local-name()='use']/@*[starts-with(., '#')] | //a/@href"):
        assert target.removeprefix("#") in identities
    drawn = document.xpath("//figure/*[local-name()='svg']")
    assert len(drawn) == len(document.xpath("//figure")) >= 5
    for picture in drawn:
        assert picture.get("role") == "img"
        assert picture.get("aria-label")
    for figure in document.xpath("//figure"):
        assert figure.xpath("details//table//td")
    for table in document.xpath("//table"):
        assert table.xpath(".//th[@scope='col']")
        assert all(row.xpath("th[@scope='row']") for row in table.xpath(".//tbody/tr"))
    for scrolled in document.xpath("//div[@class='scroll']"):
        assert scrolled.get("tabindex") == "0"
        assert scrolled.get("aria-label")


def test_pictures_take_their_colours_from_the_page(both: html.HtmlElement, made: Path) -> None:
    svg = re.findall(r"<svg.*?</svg>", (made / "both.html").read_text(), re.DOTALL)
    assert svg
    for picture in svg:
        assert re.findall("#[0-9a-f]{6}", picture) == []
        assert "var(--ink)" in picture
    style = Path(pictures.__file__).with_name("style.css").read_text()
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", "".join(svg))) <= set(re.findall(r"(--[a-z0-9]+):", style))


def test_an_interrupted_run_says_which_block_comes_next(besa: Besa, made: Path) -> None:
    document = page(besa, made / "cut")
    (warning,) = document.xpath("//p[@class='warning']")
    assert text(warning) == (
        f"Unfinished: 1 of {BLOCKS} blocks are done; block 1 is next. The same command resumes it."
    )
    assert "No stage is finished yet." in text(document)
    assert [text(row[0]) for row in document.xpath("//table[@class='map']/tbody/tr")] == ["0"]


@pytest.mark.usefixtures("undrawn")
def test_what_is_missing_is_left_out(besa: Besa, runs: Path) -> None:
    run = runs / "learned<i>"
    for part in ("eval", "simulate", "speed", "export", "calibration"):
        shutil.rmtree(run / part)
    document = page(besa, run)
    assert "No quality was measured: besa eval ppl wikitext2 does." in text(document)
    assert document.xpath("//section/@id") == ["models", "run-1"]
    assert len(document.xpath("//table[@class='map']")) == 1
    shutil.rmtree(run / "pruned")
    (run / "calibration").mkdir()
    assert "The run has no stage yet." in text(page(besa, run))


@pytest.mark.usefixtures("undrawn")
def test_a_stale_stage_is_called_so(besa: Besa, runs: Path) -> None:
    manifest = read(runs / "wanda" / "pruned" / "besa.json")
    (runs / "wanda" / "pruned" / "besa.json").write_text(json.dumps({**manifest, "digest": "0" * 64}))
    document = page(besa, runs / "wanda")
    assert [text(warning).split(":")[0] for warning in document.xpath("//article/p[@class='warning']")] == [
        "Stale"
    ]  # what was made from it is judged by it


@pytest.mark.usefixtures("undrawn")
def test_an_imported_stage_is_shown_like_the_one_that_was_exported(besa: Besa, made: Path) -> None:
    assert besa("import", made / "learned<i>" / "export" / "sparse", "--run", "back").code == 0
    there, back = (page(besa, run).xpath("//table[@class='map']")[0] for run in (made / "learned<i>", "back"))
    assert cells(there) == cells(back)


def test_the_same_runs_give_the_same_page(besa: Besa, made: Path) -> None:
    page(besa, made / "learned<i>")
    first = Path("page.html").read_bytes()
    page(besa, made / "learned<i>", made / "learned<i>")
    assert Path("page.html").read_bytes() == first


def refused(outcome: Any, code: int, *words: str) -> None:
    assert outcome.code == code, outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


def test_paths_that_are_no_runs_are_refused(besa: Besa, made: Path, workplace: Path) -> None:
    run = made / "learned<i>"
    refused(besa("report", "nowhere"), 1, "there is no run directory nowhere")
    refused(besa("report"), 1, "there is no run directory besa-run")
    refused(besa("report", made / "words.txt"), 1, "there is no run directory", "words.txt")
    refused(besa("report", run / "pruned"), 1, "is a stage, not a run directory", f"besa report {run}")
    refused(besa("report", run / "export" / "sparse"), 1, "is an export, not a run directory")
    refused(besa("report", run / "calibration"), 1, "is a calibration set, not a run directory")
    refused(besa("report", run, made), 1, "holds nothing that besa knows")
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "pruned/besa.json",
        "calibration/besa.json",
        "pruned/model-00003-of-00004.json",
        "eval/ppl-*.json",
        "eval/sample-*.json",
        "simulate/*.json",
        "speed/*.json",
        "export/sparse/export.json",
    ],
)
@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1, "kind": "continuation"}', '{"format": 1, "mean": 3}'])
def test_a_damaged_file_is_refused_by_name(name: str, content: str, besa: Besa, runs: Path, workplace: Path) -> None:
    file = next((runs / "learned<i>").glob(name))
    file.write_text(content)
    if name.startswith("eval/ppl") and content.startswith('{"format"'):
        file.write_text('{"dataset": "w", "windows": 1, "seqlen": 2, "perplexity": "1"}')  # the kind decides
    refused(besa("report", runs / "learned<i>", "--output", "page.html"), 1, str(file))
    assert not Path("page.html").exists()


def test_a_run_that_was_moved_keeps_its_dense_model(besa: Besa, runs: Path, workplace: Path) -> None:
    for name in ("pruned", "tuned", "quantized"):
        manifest = read(runs / "wanda" / name / "besa.json")
        if "stage" in manifest["model"]:
            assert (runs / "wanda").resolve() != Path(manifest["model"]["directory"]).parent.resolve()
            manifest["model"]["directory"] = str(workplace / "gone" / manifest["model"]["stage"])
            (runs / "wanda" / name / "besa.json").write_text(json.dumps(manifest))
    assert besa("report", runs / "wanda", "--output", "page.html").code == 0
    document = html.fromstring(Path("page.html").read_text())
    titles = [text(cell[0]) for cell in document.xpath("//table[@class='models']/tbody/tr")]
    assert sum(title.startswith("dense") for title in titles) == 1
    shutil.rmtree(runs / "wanda" / "eval")
    outcome = besa("eval", "ppl", runs / "words.txt", "--seqlen", 12, "--run", runs / "wanda", "--json")
    assert outcome.code == 0, outcome.err
    assert "not with the dense one" not in outcome.err
    assert json.loads(outcome.out)["results"][0]["kl"] > 0


def test_nothing_is_overwritten_that_is_not_of_a_report(besa: Besa, made: Path, workplace: Path) -> None:
    Path("mine.html").write_text("<html>mine</html>")
    words = ("report", made / "cut", "--output")
    refused(besa(*words, "mine.html"), 1, "mine.html exists and is not of a report", "--force")
    assert Path("mine.html").read_text() == "<html>mine</html>"
    refused(besa(*words, "no/where.html"), 1, "the directory no does not exist")
    refused(besa(*words, workplace), 1, "is a directory")
    assert besa(*words, "mine.html", "--force").code == 0
    assert besa(*words, "mine.html").code == 0  # it is of a report now
    Path("figures").mkdir()
    Path("figures/sparsity-cut.png").write_bytes(b"mine")
    refused(besa(*words, "page.html", "--png", "figures"), 1, "figures/sparsity-cut.png exists and is not of a report")
    assert Path("figures/sparsity-cut.png").read_bytes() == b"mine"
    assert not Path("page.html").exists()


def test_without_a_name_the_page_lies_in_the_first_run(besa: Besa, runs: Path) -> None:
    outcome = besa("report", runs / "cut", runs / "wanda", "--json")
    assert outcome.code == 0
    told = json.loads(outcome.out)
    file = runs / "cut" / "report.html"
    assert (told["report"], told["bytes"], told["figures"]) == (str(file), file.stat().st_size, [])
    assert besa("show", runs / "cut").code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_refused(besa: Besa, runs: Path) -> None:
    (runs / "cut").chmod(0o500)
    refused(besa("report", runs / "cut"), 1, "is not writable", "--output")


def test_figures_are_written_as_png(besa: Besa, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_DPI", 40)
    document = page(besa, made / "wanda", made / "cut", "--png", "figures")
    written = sorted(Path("figures").iterdir())
    assert len(written) == len(document.xpath("//figure")) + len(document.xpath("//table[@class='map']"))
    for file in written:
        assert file.suffix == ".png"
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {"sparsity-wanda.png", "sparsity-cut.png", "errors.png"} <= {file.name for file in written}
    page(besa, made / "cut", "--png", "figures")  # their own files are replaced
    refused(besa("report", made / "cut", "--output", "x.html", "--png", "page.html"), 1, "is a file, not a directory")


def test_without_matplotlib_the_tables_are_shown(besa: Besa, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "installed", lambda: False)
    outcome = besa("report", made / "learned<i>", "--output", "page.html")
    assert outcome.code == 0
    assert "pip install 'besa-cli[plot]'" in outcome.err
    document = html.fromstring(Path("page.html").read_bytes())
    assert document.xpath("//*[local-name()='svg']") == []
    assert len(document.xpath("//figure/details[@open]")) == len(document.xpath("//figure")) > 2
    assert "besa-cli[plot]" in text(document)
    refused(besa("report", made / "cut", "--output", "x.html", "--png", "figures"), 1, "--png needs matplotlib")


def test_open_calls_the_browser(besa: Besa, made: Path, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    import webbrowser

    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda place: opened.append(place))
    outcome = besa("report", made / "cut", "--output", "page.html", "--open")
    assert outcome.code == 0
    assert opened == [(workplace / "page.html").as_uri()]
    assert "no browser was found" in outcome.err


def test_rows_of_all_experts_share_a_cell() -> None:
    from besa_cli.checkpoint.inspection import BlockMatrices
    from besa_cli.report import rows

    matrices = {f"mlp.experts.{number}.up_proj": torch.ones(4, 6) for number in range(3)} | {"q": torch.ones(2, 5)}
    matrices["mlp.experts.1.up_proj"][2, :5] = 0
    found = rows._cells(BlockMatrices(index=0, weights=matrices, biases={}, report=None))
    assert list(found) == ["mlp.experts.*.up_proj", "q"]
    cell = found["mlp.experts.*.up_proj"]
    assert (cell.weights, cell.zeros, cell.rows, cell.lowest) == (72, 5, 12, 0)
    assert cell.highest == pytest.approx(5 / 6)
    assert [bin.rows for bin in cell.bins if bin.rows] == [11, 1]


@pytest.mark.usefixtures("undrawn")
def test_the_same_weights_in_two_runs_share_their_results(besa: Besa, runs: Path) -> None:
    shutil.copytree(runs / "learned<i>" / "pruned", runs / "copy" / "pruned")
    document = page(besa, runs / "learned<i>", runs / "copy")
    rows = {row[0]: row[1:] for row in cells(document.xpath("//table[@class='models']")[0])}
    assert rows["copy besa 50 %"] == rows["learned<i> besa 50 %"]
    assert "–" not in rows["copy besa 50 %"]


@pytest.mark.usefixtures("undrawn")
def test_tasks_stand_beside_those_of_the_dense_model(besa: Besa, runs: Path) -> None:
    run = runs / "learned<i>"
    manifest = read(run / "pruned" / "besa.json")
    for digest, value in ((manifest["digest"], 0.25), (manifest["model"]["digest"], 0.375)):
        harness = {"results": {"piqa": {"acc,none": value, "acc_stderr,none": 0.1, "alias": "piqa"}}}
        record = {"format": 1, "kind": "tasks", "model": {"name": "m"}, "model_digest": digest, "harness": harness}
        (run / "eval" / f"tasks-{value}.json").write_text(json.dumps({**record, "task": "piqa", "limit": 8}))
    (table,) = page(besa, run).xpath("//table[@class='models']")
    names = [text(cell) for cell in table.xpath("thead//th")]
    column = names.index("acc piqa acc, limit 8")
    shown = {row[0]: row[column] for row in cells(table)}
    assert list(shown.values()) == ["37.50 %", "25.00 % -12.50 points"]
