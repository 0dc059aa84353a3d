import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from besa_cli.calibration import calibration_set, prepare
from besa_cli.calibration.request import CalibrationRequest
from besa_cli.errors import BesaError, UsageError
from besa_cli.models import Model
from besa_cli.models.tokenizer import tokenizer_digest, tokenizer_of

VOCABULARY = 60
LONGEST = 64


def checkpoint(directory: Path, *, words: int = 50, tokenizer: bool = True) -> Model:
    """What preparation looks at: a decoder's configuration and a tokenizer of single words; the weights stand in."""
    directory.mkdir()
    save_file({"weight": torch.zeros(1)}, directory / "model.safetensors")
    settings = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": LONGEST}
    (directory / "config.json").write_text(json.dumps(settings))
    if tokenizer:
        vocabulary = {f"w{number}": number for number in range(words)}
        made = Tokenizer(WordLevel({**vocabulary, "?": words}, unk_token="?"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return Model(name=directory.name, kind="local", directory=directory, revision=None)


@pytest.fixture
def model(workplace: Path) -> Model:
    return checkpoint(workplace / "model")


@pytest.fixture
def text(workplace: Path) -> Path:
    path = workplace / "text.txt"
    path.write_text(" ".join(f"w{number % 50}" for number in range(500)))
    return path


@pytest.fixture
def rows(workplace: Path) -> Path:
    path = workplace / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": list(range(start, start + 20))}) + "\n" for start in range(8)))
    return path


def make(
    model: Model,
    data: Path,
    *,
    samples: int = 4,
    seqlen: int = 16,
    restart: bool = False,
    notes: list[str] | None = None,
) -> calibration_set.CalibrationSet:
    options = calibration_set.CalibrationOptions(data=(str(data),), samples=samples, seqlen=seqlen)
    said = [] if notes is None else notes
    return prepare.calibrate(model, options, Path("run/calibration"), None, said.append, restart=restart)


def test_the_tokenizer_is_the_models_own(model: Model) -> None:
    assert tokenizer_of(model)("w3 w1 nothing")["input_ids"] == [3, 1, 50]


def test_no_tokenizer_and_a_broken_one_are_each_a_line(workplace: Path, model: Model) -> None:
    bare = checkpoint(workplace / "bare", tokenizer=False)
    with pytest.raises(BesaError, match="bare has no tokenizer") as caught:
        tokenizer_of(bare)
    assert "input_ids" in caught.value.hint
    (model.directory / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(BesaError, match=r"tokenizer\.json"):
        tokenizer_of(model)


def test_the_digest_of_a_tokenizer_follows_its_files_alone(workplace: Path, model: Model) -> None:
    before = tokenizer_digest(model.directory)
    assert tokenizer_digest(checkpoint(workplace / "same").directory) == before
    (model.directory / "README.md").write_text("no part of it")
    assert tokenizer_digest(model.directory) == before
    assert tokenizer_digest(checkpoint(workplace / "other", words=49).directory) != before


def asked(model: Model, notes: list[str], **given: int | None) -> calibration_set.CalibrationOptions:
    request = CalibrationRequest(samples=given.get("samples"), seqlen=given.get("seqlen"))
    return prepare.calibration_options(model, request, notes.append)


def test_the_default_length_is_lowered_to_what_the_model_takes_and_said(model: Model) -> None:
    notes: list[str] = []
    assert asked(model, notes) == calibration_set.CalibrationOptions(seqlen=LONGEST)
    assert len(notes) == 1
    assert str(LONGEST) in notes[0]


def test_a_length_that_was_asked_for_is_not_lowered(model: Model, text: Path) -> None:
    notes: list[str] = []
    assert asked(model, notes, seqlen=LONGEST + 1).seqlen == LONGEST + 1
    assert notes == []
    with pytest.raises(UsageError, match=f"--seqlen {LONGEST + 1} exceeds the {LONGEST}"):
        make(model, text, seqlen=LONGEST + 1)


def test_the_same_options_take_the_set_that_is_there(model: Model, text: Path) -> None:
    made = make(model, text)
    stamp = Path("run/calibration/besa.json").stat().st_mtime_ns
    notes: list[str] = []
    again = make(model, text, notes=notes)
    assert torch.equal(again.tokens, made.tokens)
    assert again.manifest == made.manifest
    assert Path("run/calibration/besa.json").stat().st_mtime_ns == stamp
    assert "reused" in notes[0]


def test_other_options_are_refused_with_both_values_unless_restarted(model: Model, text: Path) -> None:
    made = make(model, text)
    with pytest.raises(BesaError, match="samples 4 instead of 5; seqlen 16 instead of 18") as caught:
        make(model, text, samples=5, seqlen=18)
    assert "--run NAME" in caught.value.hint
    assert "--restart" in caught.value.hint
    assert torch.equal(calibration_set.load(Path("run/calibration")).tokens, made.tokens)
    make(model, text, samples=5, seqlen=18, restart=True)
    assert calibration_set.load(Path("run/calibration")).tokens.shape == (5, 18)


def test_a_file_that_has_changed_is_noticed(model: Model, text: Path) -> None:
    make(model, text)
    text.write_text(text.read_text() + " w1")
    with pytest.raises(BesaError, match=r"text\.txt has changed"):
        make(model, text)


def test_the_manifest_says_which_model_it_was_made_for(model: Model, text: Path) -> None:
    manifest = make(model, text).manifest
    assert manifest["model"] == {"name": "model", "kind": "local", "revision": None}
    assert manifest["command"] == "calibrate"


def test_a_set_of_another_tokenizer_is_refused(workplace: Path, model: Model, text: Path) -> None:
    make(model, text)
    other = checkpoint(workplace / "other", words=49)
    with pytest.raises(BesaError, match="made with another tokenizer"):
        prepare.reuse(other, Path("run/calibration"))


def test_token_rows_need_no_tokenizer_and_fit_any_model_that_knows_the_ids(workplace: Path, rows: Path) -> None:
    bare = checkpoint(workplace / "bare", tokenizer=False)
    made = make(bare, rows)
    assert made.tokens.tolist() == [list(range(start, start + 16)) for start in range(4)]
    other = checkpoint(workplace / "other")
    assert torch.equal(prepare.reuse(other, Path("run/calibration")).tokens, made.tokens)


@pytest.mark.parametrize(
    ("key", "value", "what"), [("vocab_size", 18, "token id 18"), ("max_position_embeddings", 15, "16 tokens")]
)
def test_a_set_that_the_model_cannot_take_is_refused(
    workplace: Path, rows: Path, key: str, value: int, what: str
) -> None:
    make(checkpoint(workplace / "bare", tokenizer=False), rows)
    small = checkpoint(workplace / "small", tokenizer=False)
    config = small.directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(BesaError, match=what):
        prepare.reuse(small, Path("run/calibration"))


def test_without_a_tokenizer_text_is_refused_before_it_is_read(
    workplace: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object, **__: object) -> None:
        pytest.fail("began to work")

    monkeypatch.setattr(calibration_set, "build", build)
    with pytest.raises(BesaError, match="has no tokenizer"):
        make(checkpoint(workplace / "bare", tokenizer=False), text)


def test_calibrate_prints_what_it_made_as_text_and_as_json(besa: Callable[..., Any], model: Model, text: Path) -> None:
    words = ("calibrate", "--model", model.directory, "--data", text, "--samples", 4, "--seqlen", 16)
    first, second = besa(*words), besa(*words, "--json")
    assert (first.code, second.code) == (0, 0)
    assert first.out.startswith("4 samples of 16 tokens")
    printed = json.loads(second.out)
    assert printed["tokens_digest"] == calibration_set.load(Path("besa-run/calibration")).digest
