"""Conversations of many kinds, valid and broken, and checkpoints whose tokenizer has a chat template."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from support import llamas, tiny_models

from besa_cli.models import Model

PLAIN = (
    "{% for message in messages %}{{ '[' + message['role'] + ']\\n' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ '[tools]' + (tools | tojson) + '</s>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '[' + message.role + ']\\n' + message.content }}"
    "{% if message.tool_calls is defined %}{% for call in message.tool_calls %}"
    "{{ '<call>' + call.function.name + (call.function.arguments | tojson) + '</call>' }}{% endfor %}{% endif %}"
    "{{ '</s>\\n' }}{% endfor %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}{{ message['content'] + '</s>' }}{% endfor %}"
)

Turn = dict[str, Any]


def checkpoint(directory: Path, template: str | None = PLAIN) -> Model:
    """A tiny LLaMA with a byte-level tokenizer, whose ids give back every text, and a chat template."""
    values = {**tiny_models.CONFIGS["llama"][1], "vocab_size": llamas.VOCABULARY, "num_hidden_layers": 2}
    tiny_models.built(transformers.LlamaConfig(**values, tie_word_embeddings=False)).save_pretrained(directory)
    llamas.byte_tokenizer(directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return tiny_models.local(directory)


def tokenizer(model: Model) -> Any:
    """The tokenizer of a checkpoint, by transformers alone."""
    return transformers.AutoTokenizer.from_pretrained(model.directory)


def said(generator: random.Random) -> str:
    """A short text, now and then with other letters than a-z, braces and line ends."""
    words = ["one", "two", "é", "{{ x }}", "a\nb", "</s>", "[user]", "日本", "1 + 2 = 3"]
    return " ".join(generator.choice(words) for _ in range(generator.randint(1, 6)))


def valid(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of conversations: with and without system, parts, tool calls in three forms, tools as list and string."""
    generator, rows = random.Random(seed), []
    for number in range(count):
        turns: list[Turn] = [{"role": "system", "content": said(generator)}] if number % 3 == 0 else []
        for _ in range(generator.randint(1, 3)):
            user: Any = said(generator)
            if number % 5 == 1:
                user = [{"type": "text", "text": said(generator)}, {"type": "text", "text": said(generator)}]
            turns += [{"role": "user", "content": user}, {"role": "assistant", "content": said(generator)}]
        row: dict[str, Any] = {"messages": turns, "id": number}
        if number % 4 == 2:
            function = {"name": "add", "arguments": {"a": number, "b": [1, None]}}
            forms = [
                {
                    "type": "function",
                    "id": "c1",
                    "function": {**function, "arguments": json.dumps(function["arguments"])},
                },
                {"function": function},
                function,
            ]
            turns[-1] = {"role": "assistant", "content": None, "tool_calls": [forms[number % 3]]}
            turns += [{"role": "tool", "content": str(number), "name": "add"}, {"role": "assistant", "content": "so"}]
            tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
            row["tools"] = json.dumps(tools) if number % 8 == 2 else tools
        rows.append(row)
    return rows


def as_templates_expect(row: dict[str, Any]) -> tuple[list[Turn], list[Any] | None]:
    """Messages and tools of a valid row in the one form of transformers' documentation, written out by hand."""
    turns = []
    for turn in row["messages"]:
        content = turn["content"]
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        changed = {**turn, "content": "" if content is None else content}
        if "tool_calls" in turn:
            (call,) = turn["tool_calls"]
            function = call.get("function", call)
            arguments = function["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            changed["tool_calls"] = [
                {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
            ]
        turns.append(changed)
    tools = row.get("tools")
    return turns, json.loads(tools) if isinstance(tools, str) else tools


USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def broken() -> Iterator[tuple[Any, str]]:
    """Rows that are not conversations, each with the words of its error."""
    call = {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}
    for messages, problem in (
        ("hi", "'messages' is a string, not a list"),
        ({"role": "user"}, "'messages' is an object, not a list"),
        ([], "'messages' is empty"),
        (["hi"], "'messages[0]' is a string, not an object"),
        ([USER, None], "'messages[1]' is null, not an object"),
        ([{"content": "hi"}], "'messages[0].role' is missing (fields: content)"),
        ([{"from": "human", "value": "hi"}], "'messages[0].role' is missing (fields: from, value)"),
        ([USER, {"role": "gpt", "content": "ho"}], "'messages[1].role' is 'gpt', not one of system, developer, user"),
        ([{"role": 3, "content": "hi"}], "'messages[0].role' is a number"),
        ([{"role": ["user"], "content": "hi"}], "'messages[0].role' is a list"),
        ([{"role": "user"}], "'messages[0].content' is missing"),
        ([{"role": "user", "content": None}], "'messages[0].content' is missing"),
        ([{"role": "user", "content": 3}], "'messages[0].content' is a number, not a string or a list of texts"),
        ([{"role": "user", "content": {"a": 1}}], "'messages[0].content' is an object"),
        ([{"role": "user", "content": ["hi"]}], "'messages[0].content[0]' is a string, not an object"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'messages[0].content[0].text' is null, not a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'messages[0].content[0].type' is 'image_url'"),
        ([USER, {"role": "assistant", "content": " \n"}], "'messages[1].content' is empty: the turn of the assistant"),
        ([{"role": "user", "content": []}], "'messages[0].content' is empty"),
        ([{"role": "user", "content": "\ud800"}], "'messages[0].content' is not Unicode text"),
        ([USER, call], "'messages[1].tool_calls[0].function.name' is missing"),
        ([USER, {**call, "tool_calls": [{"name": " "}]}], "'messages[1].tool_calls[0].name' is not a name"),
        ([USER, {**call, "tool_calls": [{"name": 3}]}], "'messages[1].tool_calls[0].name' is not a name"),
        ([USER, {**call, "tool_calls": {"name": "f"}}], "'messages[1].tool_calls' is an object, not a list"),
        ([USER, {**call, "tool_calls": ["f"]}], "'messages[1].tool_calls[0]' is a string, not an object"),
        ([USER, {**call, "tool_calls": []}], "'messages[1].content' is missing"),
        (
            [USER, {**call, "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "'messages[1].tool_calls[0].arguments' is a string that is not JSON",
        ),
        (
            [USER, {**call, "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
            "'messages[1].tool_calls[0].arguments' is a string of JSON with a list, not an object",
        ),
        (
            [USER, {**call, "tool_calls": [{"name": "f", "arguments": 3}]}],
            "'messages[1].tool_calls[0].arguments' is a number, not an object",
        ),
        ([{**USER, "tool_calls": [{"name": "f"}]}], "'messages[0].tool_calls' stands in a turn of the user"),
    ):
        yield {"messages": messages}, problem
    yield {"conversations": [USER]}, "'messages' is missing (fields: conversations)"
    yield {"messages": None, "text": "a"}, "'messages' is missing (fields: messages, text)"
    for tools, problem in (
        ({"name": "f"}, "'tools' is an object, not a list"),
        ("f", "'tools' is a string that is not JSON"),
        ('{"name": "f"}', "'tools' is a string of JSON with an object, not a list"),
        (["f"], "'tools[0]' is a string, not an object"),
        ([{"type": "function", "function": {}}], "'tools[0].function.name' is missing"),
        ([{"description": "f"}], "'tools[0].name' is missing"),
    ):
        yield {"messages": [USER, REPLY], "tools": tools}, problem


def write(path: Path, rows: list[Any]) -> Path:
    """A file of JSON lines; a row that is a string is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=True) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
