"""A hostile input of every kind (`make faults`: many), and what the campaign counts as wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import fault_tally
from faults.hostile import gguf_file, values
from faults.hostile.forks import forked
from faults.hostile.frame import RAN, Case, Line, Whole, accepted, either, refused, run

HOSTILE = Path(__file__).parent / "hostile"
WHOLE = Whole(perplexity=1.0, pruned=2.0, gguf=3.0, sample="")


def test_no_answer_to_an_input_of_every_kind_is_wrong() -> None:
    """In a process of its own, which has no other threads when it forks."""
    words = [sys.executable, str(HOSTILE), "--subset"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    wrong = [line for line in done.stderr.splitlines() if line.startswith("WRONG ")]
    assert (done.returncode, wrong) == (0, []), done.stderr[-2000:]
    total = done.stdout.splitlines()[-1].split("|")
    assert int(total[2]) == int(total[3]) > 40


def seen(place: Path, work: Callable[[], int], harm: Callable[[Path], object] = lambda place: None) -> str:
    """What the campaign says of a command that does this."""
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    case = Case(kind="k", name="n", harm=harm, lines=(Line(words=("show",)),), expect=either())
    return run(case, place, WHOLE, typing=lambda line, place: forked(work, place, line))


def says(text: str, code: int = 1) -> Callable[[], int]:
    def work() -> int:
        sys.stderr.write(text)
        return code

    return work


def writes(name: str) -> Callable[[], int]:
    def work() -> int:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x")
        return 0

    return work


def raises() -> int:
    raise KeyError("x")


def does(act: Callable[[], None]) -> Callable[[], int]:
    """What succeeds, having done something."""

    def work() -> int:
        act()
        return 0

    return work


def takes_memory() -> int:
    return len(bytearray(4 << 30)) & 0


@pytest.mark.parametrize(
    "work", [says("error: x\n"), says("error: x\n", 2), says("", 0), writes("r/x"), writes("done/x")]
)
def test_one_line_or_a_success_is_right(work: Callable[[], int], tmp_path: Path) -> None:
    assert seen(tmp_path / "place", work) == ""


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (raises, "a traceback"),
        (says("error: x\nTraceback (most recent call last)\n"), "a traceback"),
        (says("error: x\n", 3), "exit code 3"),
        (says("nothing\n"), "0 error lines"),
        (says("error: x\nerror: y\n"), "2 error lines"),
        (says("error: \x1b[2J\n"), "control character '\\x1b'"),
        (says("error: \u202e\n"), "control character '\\u202e'"),
        (does(lambda: os.kill(os.getpid(), 9)), "exit code -9"),
        (writes("x"), "changed: x"),
        (writes("notes.txt"), "changed: notes.txt"),
        (does(lambda: Path("notes.txt").unlink()), "changed: notes.txt"),
        (writes("r/canary.txt"), "changed: r/canary.txt"),
        (writes(RAN), "code ran"),
        (takes_memory, "MB of memory"),
    ],
)
def test_what_is_wrong_whatever_the_input_was(work: Callable[[], int], said: str, tmp_path: Path) -> None:
    assert said in seen(tmp_path / "place", work)


def test_an_expectation_is_held_to(tmp_path: Path) -> None:
    def judged(expect: object, work: Callable[[], int], number: int) -> str:
        place = tmp_path / str(number)
        place.mkdir()
        case = Case(kind="k", name="n", harm=lambda place: None, lines=(Line(words=()),), expect=expect)  # type: ignore[arg-type]
        return run(case, place, WHOLE, typing=lambda line, place: forked(work, place, line))

    fails, succeeds = says("error: x.json is broken\n"), says("", 0)
    assert judged(refused("x.json"), fails, 0) == ""
    assert "does not say ['y.json']" in judged(refused("y.json"), fails, 1)
    assert "accepted" in judged(refused(), succeeds, 2)
    assert "refused" in judged(accepted(), fails, 3)
    assert "another" in judged(accepted(lambda judged: "another"), succeeds, 4)
    assert judged(either(lambda judged: "another", "x.json"), fails, 5) == ""


def test_every_field_of_a_document_is_made_wrong_alone() -> None:
    document = {"a": 1, "b": {"c": [1, 2, 3]}}
    places = [values.named(place) for place in values.fields(document)]
    assert places == ["a", "b", "b.c", "b.c.0", "b.c.1"]
    assert json.loads(values.with_wrong(document, ("b", "c", 1), "null")) == {"a": 1, "b": {"c": [1, None, 3]}}
    assert json.loads(values.with_wrong(document, ("a",), "missing")) == {"b": {"c": [1, 2, 3]}}
    assert values.with_wrong(document, ("a",), "deep").count("[") > 10_000


def test_a_gguf_file_is_written_as_it_was_read(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "é"])
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    found = gguf_file.read(path)
    assert found.values["tokenizer.ggml.tokens"] == (gguf_file.ARRAY, (gguf_file.TEXT, ["a", "é"]))
    assert found.bytes() == path.read_bytes()


def test_a_table_takes_its_place_in_a_page(tmp_path: Path) -> None:
    page = tmp_path / "PAGE.md"
    page.write_text("# Page\n\n## One\n\nold\n\n## Two\n\nkept\n")
    fault_tally.write_section(page, "One", "new\n")
    fault_tally.write_section(page, "Three", "more\n")
    assert page.read_text() == "# Page\n\n## One\n\nnew\n\n## Two\n\nkept\n\n## Three\n\nmore\n"
