import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from besa_cli.checkpoint.reports import BlockReport, LinearReport
from besa_cli.console import (
    Console,
    escaped,
    human_bytes,
    human_divergence,
    human_perplexity,
    human_seconds,
    human_share,
    short_names,
    show_error,
)

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@contextmanager
def terminal(kind: str = "xterm") -> Iterator[Terminal]:
    """A terminal in the place of stderr (not a fixture: pytest puts its own stream there after the fixtures)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", kind)
        patch.setenv("COLUMNS", "160")
        stream = Terminal()
        patch.setattr("sys.stderr", stream)
        yield stream


def report(index: int, *, blocks: int = 3, resumed: bool = False, seconds: float = 2.0) -> BlockReport:
    linears = tuple(
        LinearReport(name=name, rows=10, cols=100, pruned=pruned, zeros=pruned)
        for name, pruned in (("self_attn.q_proj", 512), ("mlp.down_proj", 488))
    )
    return BlockReport(
        index=index,
        blocks=blocks,
        linears=linears,
        error_before=0.0123,
        error_after=0.00456,
        learned_loss=0.00042,
        resumed=resumed,
        seconds=seconds,
        peak_memory=1_920_000_000,
    )


def visible(text: str) -> str:
    """Terminal output without its escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_without_a_terminal_each_block_is_one_plain_line_with_all_facts(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().blocks("pruning", 3) as progress:
        for index in range(3):
            progress.step(1, 2, "learning")
            progress.finished(report(index))
    out, err = capsys.readouterr()
    assert out == ""
    assert CONTROL.search(err) is None
    first, second, third = err.splitlines()
    assert first == (
        "pruning: block 1/3  q 51.2%  down 48.8%  error 1.23e-02 -> 4.56e-03  loss 4.20e-04  time 2.0 s  left 4.0 s  "
        "memory 1.92 GB"
    )
    assert "block 2/3" in second
    assert "left 0.0 s" in third


def test_blocks_of_an_earlier_run_do_not_count_for_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().blocks("pruning", 4) as progress:
        progress.finished(report(0, blocks=4, resumed=True, seconds=0.01))
        progress.finished(report(1, blocks=4, seconds=30.0))
        progress.finished(report(2, blocks=4, seconds=10.0))
    resumed, first, second = capsys.readouterr().err.splitlines()
    assert "time resumed  left -" in resumed
    assert "left 1 min 00 s" in first
    assert "left 20.0 s" in second


def test_the_time_left_knows_that_steps_differ(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().blocks("measuring", 3, [1.0, 1.0, 6.0]) as progress:
        progress.advance(0, 2.0)
        progress.advance(1, 4.0)
        progress.advance(2, 18.0)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("left ")[2] for line in lines] == ["14.0 s", "18.0 s", "0.0 s"]


def test_a_terminal_shows_every_block_and_the_step_at_work() -> None:
    with terminal() as stream:
        console = Console()
        with console.blocks("pruning", 3) as progress:
            progress.finished(report(0))
            progress.step(7, 60, "learning")
            console.note("a note [not markup]")
            progress.finished(report(1))
    shown = visible(stream.getvalue())
    assert "\x1b" in stream.getvalue()
    assert "pruning" in shown
    assert re.search(r"block +q +down +error +loss +time +left +memory", shown)
    assert re.search(r"1/3 +51\.2% +48\.8% +1\.23e-02 -> 4\.56e-03 +4\.20e-04 +2\.0 s +4\.0 s +1\.92 GB", shown)
    assert "a note [not markup]" in shown
    assert shown.count("memory") == 1


def test_a_terminal_is_left_with_its_cursor_when_the_work_fails() -> None:
    with terminal() as stream, pytest.raises(KeyboardInterrupt), Console().blocks("pruning", 3):
        raise KeyboardInterrupt
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_a_dumb_terminal_gets_no_control_codes() -> None:
    with terminal("dumb") as stream, Console().blocks("evaluating", 2) as progress:
        progress.advance(0, 1.5)
    assert stream.getvalue() == "evaluating: block 1/2  time 1.5 s  left 1.5 s\n"


def test_a_table_is_aligned_and_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a/" + "very/" * 60 + "long"
    Console().table("Sizes", ("name", "count", "share"), [(path, 7, "50.00 %"), ("b", 12345, None)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Sizes"
    assert lines[2] == "name".ljust(len(path)) + "  count    share"
    assert lines[4] == path + "      7  50.00 %"
    assert lines[5] == "b".ljust(len(path)) + "  12345        -"


@given(st.lists(st.tuples(st.text(st.characters(min_codepoint=33, max_codepoint=126)), st.integers()), max_size=5))
def test_every_line_of_a_table_of_numbers_ends_in_the_same_column(rows: list[tuple[str, int]]) -> None:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        Console().table("", ("name", "count"), rows)
    lines = out.getvalue().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[-1] for line in lines[2:]] == [str(number) for _, number in rows]


def test_with_json_stdout_holds_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json=True)
    console.line("text")
    console.table("", ("a",), [("b",)])
    console.note("a note")
    console.emit_json({"perplexity": float("inf"), "each": [1.5, float("nan")], "text": "café"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"perplexity": None, "each": [1.5, None], "text": "café"}
    assert err == "a note\n"


def test_without_json_there_is_no_object(capsys: pytest.CaptureFixture[str]) -> None:
    Console().emit_json({"a": 1})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("at_terminal", [False, True])
def test_an_error_is_never_wrapped(at_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal() if at_terminal else io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    path = "/" + "/".join(f"[bold]part {number}" for number in range(100))
    show_error(f"cannot read {path}", "look at [it]")
    assert visible(stream.getvalue()) == f"error: cannot read {path}\nhint: look at [it]\n"
    assert ("\x1b" in stream.getvalue()) is at_terminal


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_920_000_000, "1.92 GB"),
        (134_000_000, "134 MB"),
        (10**15, "1000 TB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.97, "1 min 00 s"),
        (358, "5 min 58 s"),
        (3599.7, "1 h 00 min"),
        (7380, "2 h 03 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(16.52314, "16.5231"), (99999.4, "99999.4000"), (1234567.0, "1.2346e+06"), (float("inf"), "inf")],
)
def test_perplexity(value: float, text: str) -> None:
    assert human_perplexity(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.0000"), (2.34567, "2.3457"), (0.01, "0.0100"), (0.00123456, "1.23e-03")]
)
def test_divergence(value: float, text: str) -> None:
    assert human_divergence(value) == text


def test_share() -> None:
    assert human_share(0.5) == "50.00 %"


def test_short_names_stay_unique() -> None:
    assert short_names(["self_attn.q_proj", "mlp.gate_proj", "fc1"]) == ["q", "gate", "fc1"]
    assert short_names(["a.out_proj", "b.out_proj", "b.up_proj"]) == ["a.out_proj", "b.out_proj", "up"]


HOSTILE = "a\x1b]0;x\x07\x1b[2J\nerror: forged\r\x9b31m\u202egnp.\u2028\x7f"
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("kind", ["line", "text", "note", "table", "error", "blocks", "json"])
def test_control_characters_out_of_files_are_written_out(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    console = Console(json=kind == "json")
    if kind == "error":
        show_error(HOSTILE, HOSTILE)
    elif kind == "table":
        console.table(HOSTILE, [HOSTILE, "n"], [[HOSTILE, 1]])
    elif kind == "blocks":
        with console.blocks(HOSTILE, 1) as progress:
            progress.advance(0, 1.0, HOSTILE)
    elif kind == "json":
        console.emit_json({HOSTILE: HOSTILE})
    else:
        getattr(console, kind)(HOSTILE)
    said = "".join(capsys.readouterr())
    assert UNSAFE.search(said) is None
    assert "forged" in said
    assert kind == "text" or not re.search("^error: forged", said, re.MULTILINE)
    if kind == "json":
        assert json.loads(said) == {HOSTILE: HOSTILE}


def test_control_characters_do_not_reach_a_terminal_either() -> None:
    with terminal() as stream:
        console = Console()
        console.note(HOSTILE)
        show_error(HOSTILE)
        with console.blocks(f"[bold]{HOSTILE}", 1) as progress:
            progress.step(0, 1, HOSTILE)
            progress.advance(0, 1.0, HOSTILE)
    assert "\x1b]" not in stream.getvalue()
    assert "[bold]" in stream.getvalue()
    assert UNSAFE.search(visible(stream.getvalue()).replace("\r", "")) is None


@given(st.text())
def test_what_is_escaped_is_one_line_and_safe(text: str) -> None:
    said = escaped(text)
    assert len(said.splitlines()) <= 1
    assert UNSAFE.search(said) is None
    assert said == text or len(said) > len(text)


def test_pieces_of_a_text_are_written_at_once_with_control_characters_escaped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = Console()
    console.stream("one \x1b[2J")
    assert capsys.readouterr().out == "one \\x1b[2J"
    console.stream("two\n\tthree\x00")
    assert capsys.readouterr().out == "two\n\tthree\\x00"
    Console(json=True).stream("four")
    assert capsys.readouterr().out == ""
