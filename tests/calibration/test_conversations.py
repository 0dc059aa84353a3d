"""Calibration sets of conversations and of mixtures, made on a tiny model with a chat template."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support import chats

from besa_cli.calibration import calibration_set, prepare
from besa_cli.calibration.request import CalibrationRequest
from besa_cli.checkpoint import inspection
from besa_cli.errors import BesaError, UsageError
from besa_cli.models import Model


@pytest.fixture
def model(workplace: Path) -> Model:
    return chats.checkpoint(workplace / "model")


@pytest.fixture
def conversations(workplace: Path) -> Path:
    return chats.write(workplace / "chat.jsonl", chats.valid(60))


@pytest.fixture
def notes(workplace: Path) -> Path:
    path = workplace / "notes.txt"
    path.write_text(" ".join(f"note {number}" for number in range(400)))
    return path


def draw(model: Model, *data: object, notes: list[str] | None = None, **given: Any) -> calibration_set.CalibrationSet:
    request = CalibrationRequest(data=[str(value) for value in data], **{"samples": 6, "seqlen": 24, **given})
    said = [] if notes is None else notes
    options = prepare.calibration_options(model, request, said.append)
    directory = Path("run/calibration")
    return prepare.calibrate(model, options, directory, None, said.append, restart=True)


def rendered(model: Model, seed: int) -> list[str]:
    """The conversations in the order of the seed, each as transformers alone writes it."""
    tokenizer = chats.tokenizer(model)
    texts = []
    for row in chats.valid(60):
        turns, tools = chats.as_templates_expect(row)
        texts.append(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False))
    random.Random(seed).shuffle(texts)
    return texts


@pytest.mark.parametrize("seed", [0, 5])
def test_samples_decode_to_the_text_of_the_template(model: Model, conversations: Path, seed: int) -> None:
    made = draw(model, conversations, seed=seed)
    assert made.held_out is not None
    ids = torch.cat([made.tokens.flatten(), made.held_out.flatten()])
    tokenizer = chats.tokenizer(model)
    expected: list[int] = []
    for text in rendered(model, seed):
        expected += tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.tolist() == expected[: len(ids)]
    text = tokenizer.decode(ids[:-4], clean_up_tokenization_spaces=False).rstrip("\ufffd")
    assert "".join(rendered(model, seed)).startswith(text)
    (source,) = made.manifest["sources"]
    assert made.manifest["sampling"] == "packed"
    assert source["documents"] == 60
    assert len(source["chat_template"]) == 64


def test_between_a_text_and_a_conversation_stands_one_end_token(model: Model, workplace: Path) -> None:
    """A conversation ends as its template says; a text is ended by the separator."""
    data = [chats.write(workplace / "a.jsonl", [{"messages": [chats.USER]}]), workplace / "b.txt", workplace / "c.txt"]
    data[1].write_text("bb")
    data[2].write_text("cc")
    orders = set()
    for seed in range(8):
        order = [0, 1, 2]
        random.Random(seed).shuffle(order)
        orders.add(tuple(order))
        made = draw(model, *data, samples=1, seqlen=16, seed=seed)
        parts = [("[user]\nhi</s>\n", "bb</s>", "cc</s>")[index] for index in order]
        assert "".join(parts).startswith(chats.tokenizer(model).decode(made.tokens[0]))
    assert len(orders) > 3


def test_without_packing_each_sample_is_within_one_conversation(model: Model, conversations: Path) -> None:
    made = draw(model, conversations, pack=False, samples=5, seqlen=40)
    texts = rendered(model, 0)
    for row in made.tokens:
        text = chats.tokenizer(model).decode(row, clean_up_tokenization_spaces=False).strip("\ufffd")
        assert any(text in whole for whole in texts)


def test_a_named_column_holds_the_texts_or_the_messages(model: Model, workplace: Path) -> None:
    rows = [{"turns": row["messages"], "text": "unused", "body": "x" * 30} for row in chats.valid(60)]
    file = chats.write(workplace / "rows.jsonl", rows)
    by_turns = draw(model, file, text_column="turns")
    chat_file = chats.write(workplace / "chat.jsonl", chats.valid(60))
    assert by_turns.digest == draw(model, chat_file).digest
    assert by_turns.manifest["options"]["text_column"] == "turns"
    body = draw(model, file, text_column="body", pack=True)
    assert set(chats.tokenizer(model).decode(body.tokens[0]).replace("</s>", "")) == {"x"}
    assert inspection.command_line("calibrate", inspection.options_to_repeat(dict(body.manifest))).count(
        "--text-column body"
    )


def test_the_options_of_a_set_without_a_column_are_those_of_before() -> None:
    names = ["data", "samples", "seqlen", "seed", "pack"]
    assert list(calibration_set.CalibrationOptions().record()) == names


def test_a_column_of_no_file_is_refused(model: Model, notes: Path) -> None:
    for data in ("bundled", notes):
        with pytest.raises(UsageError, match="--text-column body has no effect"):
            draw(model, data, text_column="body")


def test_a_model_without_a_template_is_refused(workplace: Path, conversations: Path) -> None:
    with pytest.raises(BesaError, match="holds conversations, but the model has no chat template"):
        draw(chats.checkpoint(workplace / "base", None), conversations)


def test_a_broken_conversation_stops_before_anything_is_written(model: Model, workplace: Path) -> None:
    file = chats.write(workplace / "chat.jsonl", [*chats.valid(3), {"messages": [{"role": "user"}]}])
    with pytest.raises(BesaError, match=r"chat\.jsonl, line 4: 'messages\[0\]\.content' is missing"):
        draw(model, file)
    assert not Path("run").exists()


# --- mixtures


def test_each_source_of_a_mixture_gives_its_share(model: Model, conversations: Path, notes: Path) -> None:
    made = draw(model, f"{conversations}:0.7", f"{notes}:0.3", samples=8)
    alone = {
        "chat.jsonl": draw(model, conversations, samples=6).tokens.tolist(),
        "notes.txt": draw(model, notes, samples=2).tokens.tolist(),
    }
    assert sorted(made.tokens.tolist()) == sorted([*alone["chat.jsonl"], *alone["notes.txt"]])
    assert made.tokens.tolist() != [*alone["chat.jsonl"], *alone["notes.txt"]], "the samples are not mixed"
    said = {source["asked"]: source for source in made.manifest["sources"]}
    assert {name: source["samples"] for name, source in said.items()} == {"chat.jsonl": 6, "notes.txt": 2}
    assert {name: source["weight"] for name, source in said.items()} == {"chat.jsonl": "0.7", "notes.txt": "0.3"}
    assert {name: source["sampling"] for name, source in said.items()} == {
        "chat.jsonl": "packed",
        "notes.txt": "documents",
    }
    assert made.manifest["sampling"] == "mixture"
    assert made.held_out is not None
    assert len(made.held_out) == 3, "notes.txt is one document, which the samples are from"


def test_a_mixture_depends_on_its_seed_alone(model: Model, conversations: Path, notes: Path) -> None:
    first, same, other = (
        draw(model, f"{conversations}:1", f"{notes}:1", seed=seed).tokens.tolist() for seed in (1, 1, 2)
    )
    assert first == same
    assert first != other


def test_a_share_below_one_sample_is_said(model: Model, conversations: Path, notes: Path) -> None:
    said: list[str] = []
    made = draw(model, f"{conversations}:0.99", f"{notes}:0.01", samples=3, notes=said)
    assert any("notes.txt:0.01 is left out: its share of 3 samples is less than one" in line for line in said)
    assert [source["asked"] for source in made.manifest["sources"]] == ["chat.jsonl"]


def test_a_mixture_is_reused_and_repeated_by_its_command(model: Model, conversations: Path, notes: Path) -> None:
    made = draw(model, f"{conversations}:0.5", "bundled:0.5")
    options = prepare.calibration_options(
        model, CalibrationRequest(data=[f"{conversations}:0.5", "bundled:0.5"], samples=6, seqlen=24), pytest.fail
    )
    said: list[str] = []
    again = prepare.calibrate(model, options, Path("run/calibration"), None, said.append)
    assert "reused" in said[-1]
    assert again.digest == made.digest
    line = inspection.command_line("calibrate", inspection.options_to_repeat(json.loads(json.dumps(made.manifest))))
    assert f"--data {conversations}:0.5 --data bundled:0.5" in line
    conversations.write_text(conversations.read_text() + "\n")
    with pytest.raises(BesaError, match=r"chat\.jsonl has changed"):
        prepare.calibrate(model, options, Path("run/calibration"), None, said.append)


def test_token_rows_have_no_weights(model: Model, workplace: Path, notes: Path) -> None:
    rows = chats.write(workplace / "rows.jsonl", [{"input_ids": list(range(30))}] * 8)
    with pytest.raises(UsageError, match="holds token rows, which have no weights"):
        draw(model, f"{rows}:1")
    with pytest.raises(UsageError, match="holds token rows, other sources hold text"):
        draw(model, f"{rows}:1", f"{notes}:1")


def test_a_mixture_with_too_little_text_names_the_lack(model: Model, conversations: Path, workplace: Path) -> None:
    (workplace / "short.txt").write_text("too short")
    with pytest.raises(BesaError, match="too few long documents: 0 of 1"):
        draw(model, f"{conversations}:1", f"{workplace / 'short.txt'}:1")
