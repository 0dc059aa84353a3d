"""The script that compares what two versions of the program write: it finds a changed byte, and no timing."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checks import same_bytes
from besa_cli.exporters import EXPORTERS
from besa_cli.pruners import PRUNERS
from besa_cli.quantizers import QUANTIZERS

BESA = Path(sys.executable).with_name("besa")
STAGE = "llama/wanda/pruned"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace in which two commands were typed on a tiny model."""
    work = tmp_path_factory.mktemp("same") / "work"
    place = same_bytes.Workplace(work, BESA)
    same_bytes.write_inputs(work)
    typed = same_bytes.commands("llama", same_bytes.SUBJECTS["llama"])
    for label in ("calibrate", "prune-wanda"):
        place.type(f"llama/{label}", typed[label])
    return work


def result(work: Path, file: Path) -> Path:
    """Write the result of a workplace as it is, as `run` does."""
    found = same_bytes.Result()
    for folder in ("llama", "models", "printed"):
        found.add(work, folder)
    found.write(file)
    return file


@pytest.fixture
def other(made: Path, tmp_path: Path) -> Path:
    """A copy of the workplace in another directory, as if the commands had been typed there."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(made, copy)
    for path in copy.rglob("*.json"):
        path.write_text(path.read_text().replace(str(made), str(copy)))
    return copy


def rewrite(path: Path, **changed: Any) -> None:
    """Change fields of a JSON file, its layout kept."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}, indent=2, ensure_ascii=False) + "\n")


def test_a_file_is_a_line_with_its_sha_256(made: Path, tmp_path: Path) -> None:
    lines = result(made, tmp_path / "a.txt").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == sorted(line.split("  ")[1] for line in lines)
    weights = made / STAGE / "model-00002-of-00004.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"{digest}  {STAGE}/{weights.name}" in lines
    there = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    named = {line.split("  ")[1] for line in lines}
    left_out = {path for path in there - named if Path(path).parts[0] in ("llama", "models", "printed")}
    assert left_out == {f"{STAGE}/timing.jsonl", "llama/tokens/.lock", "llama/wanda/.lock"}
    assert named <= there


def test_timing_versions_and_places_are_not_compared(
    made: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (other / STAGE / "timing.jsonl").write_text("")
    versions = json.loads((made / STAGE / "besa.json").read_text())["versions"]
    rewrite(other / STAGE / "besa.json", versions=dict.fromkeys(versions, "9.9.9"))
    files = [str(result(work, tmp_path / f"{work.name}.txt")) for work in (made, other)]
    assert same_bytes.main(["compare", *files]) == 0
    assert capsys.readouterr().out == "equal\n"
    assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()
    assert str(made) in (made / STAGE / "besa.json").read_text()


def test_a_changed_bit_of_a_weight_is_found(
    made: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = other / STAGE / "model-00003-of-00004.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    files = [str(result(work, tmp_path / f"{work.name}.txt")) for work in (made, other)]
    assert same_bytes.main(["compare", *files]) == 1
    assert capsys.readouterr().out == f"differs: {STAGE}/{file.name}\n"


def test_a_changed_field_is_named_with_both_values(made: Path, other: Path, tmp_path: Path) -> None:
    manifest = json.loads((made / STAGE / "besa.json").read_text())
    rewrite(other / STAGE / "besa.json", counts={**manifest["counts"], "zeros": 7}, new=None)
    (other / STAGE / "config.json").unlink()
    files = [result(work, tmp_path / f"{work.name}.txt") for work in (made, other)]
    assert same_bytes.differences(*files) == [
        f"differs: {STAGE}/besa.json",
        f"    counts.zeros: {manifest['counts']['zeros']} -> 7",
        '    new: "(none)" -> null',
        f"only in {files[0]}: {STAGE}/config.json",
    ]


@pytest.mark.parametrize("change", ["order", "indentation", "end"])
def test_the_same_fields_in_another_layout_are_found(made: Path, other: Path, tmp_path: Path, change: str) -> None:
    file = other / STAGE / "besa.json"
    fields = json.loads(file.read_text())
    if change == "order":
        fields = dict(reversed(fields.items()))
    file.write_text(json.dumps(fields, indent=None if change == "indentation" else 2) + "\n" * (change != "end"))
    files = [result(work, tmp_path / f"{work.name}.txt") for work in (made, other)]
    assert same_bytes.differences(*files) == [
        f"differs: {STAGE}/besa.json",
        "    the fields are equal: their order or the layout differs",
    ]


def test_a_command_that_fails_is_told_and_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = {"first": ("show", "nothing", "--json"), "second": ("--version",)}
    monkeypatch.setattr(same_bytes, "commands", lambda name, subject: typed)
    monkeypatch.setattr(same_bytes, "write_inputs", lambda work: (work / "opt").mkdir())
    file = tmp_path / "a.txt"
    words = ["run", str(file), "--work", str(tmp_path / "work"), "--besa", str(BESA), "--only", "opt"]
    assert same_bytes.main(words) == 1
    assert "2 lines in" in (out := capsys.readouterr().out)
    assert "1 commands failed opt/first" in out
    assert "nothing" in out
    first, second = file.read_text().splitlines()
    assert first == f"{hashlib.sha256(b'exit code 1' + bytes([10])).hexdigest()}  printed/opt/first.json"
    assert second.endswith("  printed/opt/second.json")


def test_a_directory_that_is_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="is not empty"):
        same_bytes.Workplace(tmp_path, BESA)


@pytest.mark.parametrize("name", same_bytes.SUBJECTS)
def test_every_command_method_and_format_is_typed(name: str) -> None:
    typed = [" ".join(words) for words in same_bytes.commands(name, same_bytes.SUBJECTS[name]).values()]
    gguf = same_bytes.SUBJECTS[name].gguf
    wanted = [
        *(f"prune .*--method {method} " for method in PRUNERS),
        *(f"quantize .*--method {method} " for method in QUANTIZERS),
        *(f"export .*--format {kind} " for kind in EXPORTERS if gguf or kind != "gguf"),
        *("calibrate ", "import ", "simulate ", "show ", "eval ppl ", "eval sample ", "eval compare "),
    ]
    for pattern in wanted:
        assert any(re.match(pattern, f"{line} ") for line in typed), pattern
