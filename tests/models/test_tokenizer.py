"""A model's tokenizer is what its files say; no code of the model's runs to make it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from support import tiny_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from besa_cli.errors import BesaError
from besa_cli.models.tokenizer import tokenizer_of

TEXT = "the house 1234 of 99 the  rivers\n 7"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose tokenizer splits digits before its bytes are merged."""
    directory = tiny_models.checkpoint(tmp_path / "m")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("9", "9")]
    words = [*alphabet, *map("".join, merges)]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<s>"
    ).save_pretrained(directory)
    return directory


def settings(model: Path, **values: Any) -> None:
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def written(model: Path) -> list[int]:
    """The ids by tokenizer.json itself."""
    ids: list[int] = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT).ids
    return ids


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "GPT2TokenizerFast"])
def test_a_class_that_splits_otherwise_gives_way_to_the_file(named: str, model: Path) -> None:
    settings(model, tokenizer_class=named)
    stock = transformers.AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    assert stock != written(model), "transformers follows the file by itself now"
    notes: list[str] = []
    found = tokenizer_of(tiny_models.local(model), notes.append)
    assert found(TEXT, add_special_tokens=False)["input_ids"] == written(model)
    assert found.decode(written(model)) == TEXT
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")
    (note,) = notes
    assert named in note


def test_an_export_to_gguf_names_the_way_to_split_that_everything_is_measured_with(model: Path) -> None:
    from besa_cli.exporters.gguf import vocabulary

    settings(model, tokenizer_class="GPT2Tokenizer")
    assert vocabulary.read(model, 512).pre == "smollm"  # digits one by one, then bytes


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend", "NoSuchTokenizer", None])
def test_a_tokenizer_that_is_as_written_is_left_alone(named: str | None, model: Path) -> None:
    settings(model, tokenizer_class=named)
    notes: list[str] = []
    assert tokenizer_of(tiny_models.local(model), notes.append)(TEXT)["input_ids"] == written(model)
    assert notes == []


def test_a_first_space_is_what_the_settings_say(model: Path) -> None:
    plain = Tokenizer.from_file(str(model / "tokenizer.json"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.save(str(model / "tokenizer.json"))
    settings(model, tokenizer_class="GPT2Tokenizer", add_prefix_space=True)
    stock = transformers.AutoTokenizer.from_pretrained(model)(TEXT)["input_ids"]
    assert stock != written(model)
    assert tokenizer_of(tiny_models.local(model))(TEXT)["input_ids"] == stock


def test_code_of_a_tokenizer_never_runs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = model / "mark"
    (model / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nimport transformers\n"
        "class EvilTokenizer(transformers.PreTrainedTokenizerFast): pass\n"
    )
    settings(model, tokenizer_class="GPT2Tokenizer", auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]})
    assert tokenizer_of(tiny_models.local(model))(TEXT)["input_ids"] == written(
        model
    )  # transformers has that class itself
    settings(model, tokenizer_class="EvilTokenizer")
    with pytest.raises(BesaError, match=r"tokenizer_config\.json needs Python code .*evil\.EvilTokenizer"):
        tokenizer_of(tiny_models.local(model))
    assert not mark.exists()


def test_a_sentencepiece_model_alone_asks_for_sentencepiece(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    monkeypatch.setattr("besa_cli.models.tokenizer.find_spec", lambda name: None)
    with pytest.raises(BesaError, match=r"tokenizer\.model needs the package sentencepiece") as refused:
        tokenizer_of(tiny_models.local(model))
    assert "pip install sentencepiece" in refused.value.hint


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "Evil"}}'),
        ("tokenizer.json", '{"a": ' + "[" * 100_000),
        ("tokenizer.json", '{"version": ' + "9" * 5000 + "}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"save_pretrained": "x"}'),
        ("added_tokens.json", "{"),
        ("special_tokens_map.json", "[1"),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_that_is_none_is_one_line(name: str, text: str, model: Path) -> None:
    (model / name).write_text(text)
    with pytest.raises(BesaError, match=str(model)) as refused:
        tokenizer_of(tiny_models.local(model))
    assert len(refused.value.message) < 600


def test_a_pipe_in_place_of_a_file_is_refused_at_once(model: Path) -> None:
    os.mkfifo(model / "added_tokens.json")
    with pytest.raises(BesaError, match=r"added_tokens\.json is a pipe"):
        tokenizer_of(tiny_models.local(model))
