"""Samples that a tiny model writes itself: each token against the whole model, the script of the template, resuming."""

import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support import chats, llamas

from besa_cli.calibration import calibration_set, own_text, prepare
from besa_cli.calibration.request import CalibrationRequest
from besa_cli.decoder import architecture
from besa_cli.errors import BesaError, UsageError
from besa_cli.models import Model
from besa_cli.system import memory

FP32 = own_text.Machine(device="cpu", dtype="float32")


def writer(model: Model, **given: Any) -> own_text.Writer:
    values = {"seqlen": 20, "seed": 3, "notify": lambda _: None, "machine": FP32, **given}
    return own_text.Writer(model=model, tokenizer=chats.tokenizer(model), **values)


def written(author: own_text.Writer, samples: int = 3, held_out: int = 2) -> torch.Tensor:
    windows, _ = author.write(samples, held_out)
    assert (len(windows.tokens), len(windows.held_out)) == (samples, held_out)
    return torch.tensor([list(row) for row in (*windows.tokens, *windows.held_out)])


def test_every_token_is_drawn_by_the_whole_models_distribution(workplace: Path) -> None:
    """Naive oracle: one pass of the stock model over the finished row, and a sum over the vocabulary in order."""
    model = chats.checkpoint(workplace / "base", None)
    rows = written(writer(model))
    stock = transformers.AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32)
    with torch.no_grad():
        probabilities = stock(rows).logits.double().softmax(-1)
    ends = {chats.tokenizer(model).eos_token_id, stock.generation_config.eos_token_id}
    for number, row in enumerate(rows.tolist()):
        generator, given_next = Random(f"3 {number}"), False
        assert row[0] == chats.tokenizer(model).bos_token_id
        for place in range(1, len(row)):
            if given_next:  # after the end of a text, the next one begins
                assert row[place] == row[0]
                given_next = False
                continue
            number_drawn, reached = generator.random(), 0.0
            for token in range(row[place]):
                reached += float(probabilities[number, place - 1, token])
            share = float(probabilities[number, place - 1, row[place]])
            assert reached - 1e-5 <= number_drawn <= reached + share + 1e-5
            given_next = row[place] in ends


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    scores = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    expected = scores.double().softmax(-1)[0]
    numbers = [(index + 0.5) / 4000 for index in range(4000)]
    drawn = own_text.draw_tokens(scores.expand(4000, 4), numbers)
    counts = torch.tensor([drawn.count(token) for token in range(4)]) / 4000
    assert torch.allclose(counts.double(), expected, atol=1 / 2000)
    assert own_text.draw_tokens(torch.tensor([[0.0, -torch.inf]]), [1 - 2**-53]) == [0]
    assert own_text.draw_tokens(torch.tensor([[-torch.inf, 0.0]]), [0.0]) == [1]


CHAT = own_text.Script(opening=[1, 2], again=[1, 2], reply=[3, 4], closing=[3, 5], ends=frozenset({3, 9}))


@given(st.lists(st.integers(3, 12), min_size=1, max_size=60))
def test_the_turns_follow_the_script_whatever_is_drawn(drawn: list[int]) -> None:
    row = own_text.WrittenRow(CHAT, 0, 0)
    text = "".join(f"{token} " for token in [*row.opening(50), *(row.token(token) for token in drawn)])
    said = r"(?:4 |5 |6 |7 |8 |10 |11 |12 )*"
    whole = rf"(1 2 {said}3 4 {said}3 5 )*"
    begun = rf"(1 (2 {said}(3 (4 {said}(3 )?)?)?)?)?"
    assert re.fullmatch(whole + begun, text)


def test_the_script_of_a_template_is_what_stands_around_its_turns(workplace: Path) -> None:
    model = chats.checkpoint(workplace / "chat")
    tokenizer = chats.tokenizer(model)
    script = own_text.script_of(tokenizer, [7])
    assert tokenizer.decode(script.opening) == "[user]\n"
    assert tokenizer.decode(script.reply) == "</s>\n[assistant]\n"
    assert tokenizer.decode(script.closing) == "</s>\n"
    assert script.ends == {7, tokenizer.eos_token_id}
    assert written(writer(model))[:, : len(script.opening)].tolist() == [list(script.opening)] * 5


def test_without_a_template_the_text_begins_with_the_first_token(workplace: Path) -> None:
    tokenizer = chats.tokenizer(chats.checkpoint(workplace / "base", None))
    script = own_text.script_of(tokenizer, [])
    assert (script.opening, script.again) == ([tokenizer.bos_token_id], [tokenizer.bos_token_id])
    assert (script.reply, script.closing, script.ends) == ((), (), {tokenizer.eos_token_id})
    tokenizer.bos_token_id = None
    assert own_text.script_of(tokenizer, []).opening == [tokenizer.eos_token_id]
    tokenizer.eos_token_id = None
    bare = own_text.script_of(tokenizer, [])
    assert (bare.opening, bare.ends) == ([], frozenset())
    firsts = {tuple(own_text.WrittenRow(bare, 0, number).opening(llamas.VOCABULARY)) for number in range(20)}
    assert len(firsts) > 10


def test_a_template_that_hides_its_turns_is_not_followed(workplace: Path) -> None:
    for name, template in (("upper", "{{ messages[0].content | upper }}"), ("twice", chats.PLAIN + chats.PLAIN)):
        tokenizer = chats.tokenizer(chats.checkpoint(workplace / name, template))
        assert own_text.script_of(tokenizer, []).opening == [tokenizer.bos_token_id]


def test_rows_do_not_depend_on_those_beside_them(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chats.checkpoint(workplace / "chat")
    together = written(writer(model))
    monkeypatch.setattr(own_text, "_ROWS", 2)
    assert torch.equal(written(writer(model)), together)
    assert torch.equal(written(writer(model), samples=2, held_out=0), together[:2])
    assert not torch.equal(written(writer(model, seed=4)), together)


def test_a_killed_run_resumes_with_the_rows_that_are_missing(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chats.checkpoint(workplace / "chat")
    monkeypatch.setattr(own_text, "_ROWS", 2)
    whole = written(writer(model))

    def interrupt(line: str) -> None:
        if "has written 4 of 5" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer(model, directory=workplace / "kept", notify=interrupt).write(3, 2)
    assert len(list((workplace / "kept").iterdir())) == 2
    said: list[str] = []
    resumed = writer(model, directory=workplace / "kept", notify=said.append)
    assert torch.equal(written(resumed), whole)
    assert [line for line in said if "has written" in line] == [f"{model.name} has written 5 of 5 samples"]
    (workplace / "kept" / "of the user.txt").touch()
    resumed.clear()
    assert [path.name for path in (workplace / "kept").iterdir()] == ["of the user.txt"]


def calibrated(model: Model, *data: str, keep: bool = True, **given: Any) -> calibration_set.CalibrationSet:
    request = CalibrationRequest(data=list(data), **{"samples": 3, "seqlen": 20, **given})
    options = prepare.calibration_options(model, request, lambda _: None)
    return prepare.calibrate(model, options, Path("run/calibration"), None, lambda _: None, keep=keep, machine=FP32)


def test_a_set_of_own_text_says_who_wrote_it(workplace: Path) -> None:
    model = chats.checkpoint(workplace / "chat")
    made = calibrated(model, "self", seed=3)
    (source,) = made.manifest["sources"]
    facts = ("asked", "source", "file", "rows", "device", "dtype")
    assert [source.get(name) for name in facts] == ["self", "model", "chat", 7, "cpu", "float32"]
    assert made.manifest["sampling"] == "written"
    assert torch.equal(made.tokens, written(writer(model), samples=3, held_out=4)[:3])
    assert sorted(path.name for path in Path("run").iterdir()) == ["calibration"]
    assert calibration_set.load(Path("run/calibration")).digest == made.digest
    other = chats.checkpoint(workplace / "other")
    with pytest.raises(BesaError, match=r"written by .* instead of"):
        calibrated(other, "self", seed=3)


def test_own_text_is_a_part_of_a_mixture(workplace: Path) -> None:
    model = chats.checkpoint(workplace / "chat")
    made = calibrated(model, "self:0.5", "bundled:0.5", samples=4)
    assert [source["samples"] for source in made.manifest["sources"]] == [2, 2]
    own = written(writer(model, seed=0), samples=2, held_out=2)[:2].tolist()
    assert sum(row in own for row in made.tokens.tolist()) == 2


def test_a_forecast_writes_no_text(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text.Writer, "write", lambda *_: pytest.fail("the model was asked to write"))
    made = calibrated(chats.checkpoint(workplace / "chat"), "self", keep=False)
    assert made.tokens.shape == (3, 20)
    assert not Path("run").exists()


def test_own_text_beside_other_text_needs_weights_and_is_not_packed(workplace: Path) -> None:
    model = chats.checkpoint(workplace / "chat")
    with pytest.raises(UsageError, match="--data self and --data bundled need weights"):
        calibrated(model, "self", "bundled")
    for pack, word in ((True, "--pack"), (False, "--no-pack")):
        with pytest.raises(UsageError, match=f"{word} has no effect with --data self"):
            calibrated(model, "self", pack=pack)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chats.checkpoint(workplace / "chat")
    monkeypatch.setattr(architecture, "load_stock", lambda *_: pytest.fail("the model was loaded"))
    small = own_text.Machine(device="cpu", dtype="float32", max_memory=1000)
    with pytest.raises(BesaError, match=r"--data self needs .* of memory for the whole model, 0\.0 GB are free"):
        writer(model, machine=small).write(3, 2)
    monkeypatch.setattr(memory, "available", lambda _: 1000)
    with pytest.raises(BesaError, match="needs"):
        writer(model).write(3, 2)


def test_samples_shorter_than_the_opening_are_refused(workplace: Path) -> None:
    with pytest.raises(UsageError, match=r"--seqlen 4 is too short for --data self: the opening .* has 7 tokens"):
        writer(chats.checkpoint(workplace / "chat"), seqlen=4).write(1, 0)
