"""Files of conversations: each becomes the text that transformers writes by the template, or an error that names it."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from support import chats

from besa_cli.errors import BesaError
from besa_cli.text import chat


class Stub:
    """A tokenizer with a template and nothing else; it renders as transformers does."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        assert options.pop("tokenize") is False
        options.setdefault("chat_template", self.chat_template)
        texts: Any = render_jinja_template([conversation], **options)
        return str(texts[0][0])


@pytest.mark.parametrize("template", [chats.PLAIN, chats.WITH_TOOLS])
@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz"])
def test_200_conversations_are_what_transformers_makes_of_each(tmp_path: Path, template: str, kind: str) -> None:
    tokenizer = chats.tokenizer(chats.checkpoint(tmp_path / "model", template))
    rows = chats.valid(200)
    file = chats.write(tmp_path / "chat.jsonl", rows)
    if kind == ".jsonl.gz":
        (tmp_path / "chat.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        file = tmp_path / "chat.jsonl.gz"
    assert chat.holds_conversations(file)
    notes: list[str] = []
    texts = chat.read(file, tokenizer, notes.append)
    assert len(texts) == 200
    for row, text in zip(rows, texts, strict=True):
        turns, tools = chats.as_templates_expect(row)
        assert text == tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
    left_out = [
        f"{file}: the model's chat template has no place for the {what} of 50 conversations: left out"
        for what in ("list of tools", "tool calls")
    ]
    assert notes == (left_out if template == chats.PLAIN else [])


@pytest.mark.parametrize(("row", "problem"), list(chats.broken()))
def test_a_broken_row_is_named_by_file_line_and_field(tmp_path: Path, row: Any, problem: str) -> None:
    file = chats.write(tmp_path / "chat.jsonl", [*chats.valid(7), "", row, *chats.valid(2)])
    with pytest.raises(BesaError) as caught:
        chat.read(file, Stub(chats.WITH_TOOLS), pytest.fail)
    assert caught.value.message.startswith(f"{file}, line 9: {problem}")
    assert '"messages"' in caught.value.hint


@pytest.mark.parametrize(
    ("line", "problem"),
    [('{"messages": [', "broken JSON"), ("[1]", "not a JSON object"), ('{"messages": NaN}', "'messages' is a number")],
)
def test_a_line_that_is_no_json_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = chats.write(tmp_path / "chat.jsonl", [*chats.valid(2), line])
    with pytest.raises(BesaError, match=f"line 3: {problem}"):
        chat.read(file, Stub(chats.PLAIN), pytest.fail)


def test_a_model_without_a_template_is_refused(tmp_path: Path) -> None:
    file = chats.write(tmp_path / "chat.jsonl", chats.valid(2))
    with pytest.raises(BesaError, match=r"chat\.jsonl holds conversations, but the model has no chat template"):
        chat.read(file, Stub(None), pytest.fail)


def test_what_the_template_itself_refuses_is_named_with_its_reason(tmp_path: Path) -> None:
    file = chats.write(tmp_path / "chat.jsonl", [{"messages": [chats.USER]}, {"messages": [chats.USER, chats.USER]}])
    with pytest.raises(BesaError, match=r"line 2: the model's chat template refuses .*: turns must alternate"):
        chat.read(file, Stub(chats.ALTERNATING), pytest.fail)


def test_a_template_that_writes_the_date_writes_the_same_every_day(tmp_path: Path) -> None:
    file = chats.write(tmp_path / "chat.jsonl", [{"messages": [chats.USER]}])
    template = Stub("\n{% set day = strftime_now('%Y-%m-%d, %B %-d') %}{{ day }} {{ messages[0].content }}")
    assert list(chat.read(file, template, pytest.fail)) == ["\n2024-07-26, July 26 hi"]


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"messages": []}, None, True),
        ({"messages": [], "text": "a"}, None, False),
        ({"messages": [], "text": "a"}, "messages", True),
        ({"turns": [], "text": "a"}, "turns", True),
        ({"turns": "a", "messages": []}, "turns", False),
        ({"text": "a"}, None, False),
    ],
)
def test_the_first_row_says_whether_a_file_holds_conversations(
    tmp_path: Path, row: dict[str, Any], column: str | None, expected: bool
) -> None:
    assert chat.holds_conversations(chats.write(tmp_path / "a.jsonl", [row]), column) is expected
    if row.get("messages") != [] or "text" in row:
        return
    assert not chat.holds_conversations(chats.write(tmp_path / "a.txt", [row]), column)


def test_a_file_of_blank_lines_holds_none(tmp_path: Path) -> None:
    file = chats.write(tmp_path / "a.jsonl", ["", " "])
    assert not chat.holds_conversations(file)
    with pytest.raises(BesaError, match="holds no conversation"):
        chat.read(file, Stub(chats.PLAIN), pytest.fail)


def test_parquet_conversations_read_like_those_of_json_lines(tmp_path: Path) -> None:
    rows = [row for row in chats.valid(40) if all(isinstance(turn["content"], str) for turn in row["messages"])]
    assert len(rows) > 15
    file = tmp_path / "chat.parquet"
    table = [{"turns": row["messages"], "text": "unused", "tools": None} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file)
    assert not chat.holds_conversations(file)
    assert chat.holds_conversations(file, "turns")
    lines = chats.write(tmp_path / "chat.jsonl", rows)
    stub = Stub(chats.PLAIN)
    assert list(chat.read(file, stub, pytest.fail, "turns")) == list(chat.read(lines, stub, pytest.fail))


def test_a_broken_row_of_parquet_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "chat.parquet"
    turns = [[chats.USER], [{"role": "robot", "content": "hi"}]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": each} for each in turns]), file)
    with pytest.raises(BesaError, match=r"chat\.parquet, row 2: 'messages\[0\]\.role' is 'robot'"):
        chat.read(file, Stub(chats.PLAIN), pytest.fail)


def test_conversations_are_read_in_slices_too(tmp_path: Path) -> None:
    texts = chat.read(chats.write(tmp_path / "a.jsonl", chats.valid(5)), Stub(chats.WITH_TOOLS), pytest.fail)
    assert texts[1:3] == [texts[1], texts[2]]
    assert all(isinstance(text, chat.RenderedConversation) for text in (*texts[1:3], texts[-1]))
    assert json.loads(json.dumps(texts[0])) == texts[0]
