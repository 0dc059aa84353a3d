"""Conversations: rows with messages, checked field by field and written out by the model's own chat template."""

import datetime
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

from typing_extensions import override

from besa_cli.errors import BesaError, reason_of
from besa_cli.system.disk import Json, JsonObject
from besa_cli.system.notes import Notify
from besa_cli.text import documents, row_files
from besa_cli.text.spool import Texts

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGES, TOOLS = "messages", "tools"
_DATE = datetime.datetime(2024, 7, 26)  # "today" for templates that write the date: that of Llama 3's own template
_CODES = ("-d", "-m", *"AaBbdHIjMmpSYy")  # of `strftime`
_HINT = 'a line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


class Template(Protocol):
    """Protocol of tokenizers with a chat template; those of transformers satisfy it."""

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template, or several by name; None without one."""

    def apply_chat_template(self, conversation: list[JsonObject], **options: Any) -> Any:
        """Return the text of a conversation (with ``tokenize=False``)."""


class RenderedConversation(str):
    """Text of a conversation, with all special tokens that belong around it and in it."""

    __slots__ = ()


class Conversations(Sequence[RenderedConversation]):
    """Texts of conversations, each read on access."""

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    @override
    def __len__(self) -> int:
        """Return the number of conversations."""
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> RenderedConversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[RenderedConversation]: ...
    @override
    def __getitem__(self, index: int | slice) -> RenderedConversation | list[RenderedConversation]:
        """Return one conversation, or a list of them for a slice."""
        if isinstance(index, slice):
            return [RenderedConversation(text) for text in self._texts[index]]
        return RenderedConversation(self._texts[index])


def holds_conversations(path: Path, column: str | None = None) -> bool:
    """Check that the rows of a file are conversations, by its first row or its columns.

    They are if `column` holds lists. By default they are if there are `messages` and no `text`.
    """
    kind = documents.suffix(path)
    if kind == ".parquet":
        columns = row_files.parquet_columns(path)
        if column is None:
            return MESSAGES in columns and documents.COLUMN not in columns
        return columns.get(column, "").startswith(("list", "large_list"))
    if kind == ".txt":
        return False
    first = next(row_files.json_lines(path), None)
    if first is None:
        return False
    if column is None:
        return MESSAGES in first[1] and documents.COLUMN not in first[1]
    return isinstance(first[1].get(column), list)


def digest(template: Template) -> str:
    """Return the SHA-256 of the chat template."""
    return hashlib.sha256(json.dumps(template.chat_template, sort_keys=True).encode()).hexdigest()


def read(path: Path, template: Template, notify: Notify, column: str | None = None) -> Conversations:
    """Read a file of conversations and write each out by the model's chat template.

    Parameters
    ----------
    path : Path
        A file for which `holds_conversations` is True.
    template : Template
        The model's tokenizer.
    notify : callable
        Called with a one-line note if the template leaves out tools.
    column : str, optional
        Field or column with the messages; ``messages`` by default.

    Raises
    ------
    BesaError
        The model has no chat template, or refuses a conversation, or a row is not a conversation (file, line and field
        are named).
    """
    if not template.chat_template:
        raise BesaError(
            f"{path} holds conversations, but the model has no chat template", "give text, or a model tuned for chat"
        )
    known, texts = json.dumps(template.chat_template), Texts()
    with_tools = with_calls = 0
    for place, row in _rows(path, column or MESSAGES):
        messages, tools = checked(row, place, column or MESSAGES)
        texts.append(render(template, messages, tools, place))
        with_tools += tools is not None and TOOLS not in known
        with_calls += "tool_calls" not in known and any("tool_calls" in message for message in messages)
    if not texts:
        raise BesaError(f"{path} holds no conversation", _HINT)
    for count, what in ((with_tools, "list of tools"), (with_calls, "tool calls")):
        if count:
            notify(f"{path}: the model's chat template has no place for the {what} of {count} conversations: left out")
    return Conversations(texts)


def render(template: Template, messages: list[JsonObject], tools: list[JsonObject] | None, place: str) -> str:
    """Return the text of a conversation by the chat template, always of the same day.

    Raises
    ------
    BesaError
        The template refuses the conversation, or writes nothing.
    """
    dated = template.chat_template
    fixed = {"chat_template": _always_today(dated)} if isinstance(dated, str) and "strftime_now" in dated else {}
    try:
        text = str(template.apply_chat_template(messages, tools=tools, tokenize=False, **fixed))
    except MemoryError:
        raise
    except Exception as error:  # of any kind: a template is a program
        raise BesaError(
            f"{place}: the model's chat template refuses the conversation: {reason_of(error)}",
            "change or remove the conversation",
        ) from error
    if not text.strip() or not row_files.is_unicode(text):
        problem = "writes nothing" if not text.strip() else "writes text that is not Unicode"
        raise BesaError(f"{place}: the model's chat template {problem}", "change or remove the conversation")
    return text


def _always_today(template: str) -> str:
    """Return a template with a macro in place of the clock, so that the same file gives the same samples every day."""
    steps = "".join(f"|replace('%{code}', '{_DATE.strftime(f'%{code}')}')" for code in _CODES)
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{steps} -}}}}{{%- endmacro %}}{{{{ '' }}}}{template}"


def _rows(path: Path, column: str) -> Iterator[tuple[str, JsonObject]]:
    """Yield place and fields of every row."""
    if documents.suffix(path) != ".parquet":
        for number, row in row_files.json_lines(path):
            yield f"{path}, line {number}", row
        return
    columns = [name for name in (column, TOOLS) if name in row_files.parquet_columns(path)]
    for number, row in row_files.parquet_rows(path, columns):
        yield f"{path}, row {number}", row


def checked(row: JsonObject, place: str, column: str = MESSAGES) -> tuple[list[JsonObject], list[JsonObject] | None]:
    """Return the messages and the tools of a row, in the form that chat templates expect.

    Fields that are null are left out, contents that are lists of text are joined, and the arguments of tool calls are
    objects, also if the file has them as a string of JSON.

    Raises
    ------
    BesaError
        A field is missing or of another kind; the message names it.
    """
    if column not in row or row[column] is None:
        raise _fault(place, column, f"is missing (fields: {row_files.names(row)})")
    messages = _list(row[column], place, column)
    if not messages:
        raise _fault(place, column, "is empty")
    checks = [_message(message, place, f"{column}[{index}]") for index, message in enumerate(messages)]
    return checks, _tools(row.get(TOOLS), place)


def _fault(place: str, field: str, problem: str) -> BesaError:
    return BesaError(f"{place}: '{field}' {problem}", _HINT)


def _kind(value: object) -> str:
    """Return the JSON name of a value's type."""
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _list(value: object, place: str, field: str) -> list[Json]:
    if not isinstance(value, list):
        raise _fault(place, field, f"is {_kind(value)}, not a list")
    return value


def _object(value: object, place: str, field: str) -> JsonObject:
    """Return an object without the fields that are null."""
    if not isinstance(value, dict):
        raise _fault(place, field, f"is {_kind(value)}, not an object")
    return {name: item for name, item in value.items() if item is not None}


def _name(value: JsonObject, place: str, field: str) -> str:
    """Require the name of a function."""
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        raise _fault(place, f"{field}.name", "is missing" if name is None else "is not a name")
    return name


def _message(value: object, place: str, field: str) -> JsonObject:
    message = _object(value, place, field)
    role = message.get("role")
    if role is None:
        raise _fault(place, f"{field}.role", f"is missing (fields: {row_files.names(message)})")
    if role not in ROLES:
        shown = repr(role)[:40] if isinstance(role, str) else _kind(role)
        raise _fault(place, f"{field}.role", f"is {shown}, not one of {', '.join(ROLES)}")
    calls = _calls(message.pop("tool_calls", None), place, f"{field}.tool_calls")
    if calls and role != "assistant":
        raise _fault(place, f"{field}.tool_calls", f"stands in a turn of the {role}: only the assistant calls tools")
    content = _content(message.get("content", "" if calls else None), place, f"{field}.content")
    if not content.strip() and not calls and role != "tool":
        raise _fault(place, f"{field}.content", f"is empty: the turn of the {role} says nothing")
    return {**message, "content": content, **({"tool_calls": calls} if calls else {})}


def _content(value: object, place: str, field: str) -> str:
    """Return the text of a content: a string, or the texts of its parts joined."""
    if value is None:
        raise _fault(place, field, "is missing")
    if not isinstance(value, list):
        return _text(value, place, field, "a string or a list of texts")
    texts = []
    for index, item in enumerate(value):
        part = _object(item, place, f"{field}[{index}]")
        kind = part.get("type", "text")
        if kind != "text":
            raise _fault(place, f"{field}[{index}].type", f"is {str(kind)[:40]!r}: samples are text only")
        texts.append(_text(part.get("text"), place, f"{field}[{index}].text", "a string"))
    return "".join(texts)


def _text(value: object, place: str, field: str, wanted: str) -> str:
    if not isinstance(value, str):
        raise _fault(place, field, f"is {_kind(value)}, not {wanted}")
    if not row_files.is_unicode(value):
        raise _fault(place, field, "is not Unicode text")
    return value


def _calls(value: object, place: str, field: str) -> list[JsonObject]:
    """Return the tool calls of a turn, each with its ``function``; empty without any."""
    if value is None:
        return []
    return [_call(call, place, f"{field}[{index}]") for index, call in enumerate(_list(value, place, field))]


def _call(value: object, place: str, field: str) -> JsonObject:
    call = _object(value, place, field)
    if "function" in call:
        inner, at = _object(call["function"], place, f"{field}.function"), f"{field}.function"
    else:
        inner, at = {name: call.pop(name) for name in ("name", "arguments") if name in call}, field
    name = _name(inner, place, at)
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments, place, f"{at}.arguments", dict, "an object")
    if not isinstance(arguments, dict):
        raise _fault(place, f"{at}.arguments", f"is {_kind(arguments)}, not an object")
    return {"type": "function", **call, "function": {**inner, "name": name, "arguments": arguments}}


def _tools(value: object, place: str) -> list[JsonObject] | None:
    """Return the tools that a conversation offers; None without any."""
    if isinstance(value, str) and value.strip():
        value = _parsed(value, place, TOOLS, list, "a list")
    if value is None or value == "":
        return None
    tools = []
    for index, item in enumerate(_list(value, place, TOOLS)):
        tool, field = _object(item, place, f"{TOOLS}[{index}]"), f"{TOOLS}[{index}]"
        if "function" in tool:
            _name(_object(tool["function"], place, f"{field}.function"), place, f"{field}.function")
        else:
            _name(tool, place, field)
        tools.append(tool)
    return tools or None


def _parsed(text: str, place: str, field: str, kind: Callable[..., object], wanted: str) -> Any:
    """Parse a string of JSON, as some data sets have it in place of the value itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _fault(place, field, f"is a string that is not JSON ({reason_of(error)})") from error
    if type(value) is not kind:
        raise _fault(place, field, f"is a string of JSON with {_kind(value)}, not {wanted}")
    return value
