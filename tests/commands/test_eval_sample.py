"""`besa eval sample`: greedy whatever the checkpoint asks for, and refusals before anything is loaded."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import tiny_models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from besa_cli.checkpoint.runs import Run
from besa_cli.jobs.stage import StageJob

Besa = Callable[..., Any]  # conftest.Outcome

PROMPT = "w5 w9 w100"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.add_tokenizer(tiny_models.checkpoint(tmp_path / "model"))


def greedy(directory: Path, prompt: str, tokens: int) -> str:
    """A plain loop over the whole model: the most likely token, again and again."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    asked = ids.shape[1]
    with torch.no_grad():
        for _ in range(tokens):
            following = whole(ids).logits[:, -1].argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if int(following) == 2:  # the end of a text
                break
    return str(tokenizer.decode(ids[0, asked:], skip_special_tokens=True))


def said(besa: Besa, model: Path, prompt: str, tokens: int = 12) -> str:
    outcome = besa("eval", "sample", prompt, "--model", model, "--tokens", tokens, "--dtype", "float32", "--json")
    assert outcome.code == 0, outcome.err
    (text,) = json.loads(outcome.out)["continuations"].values()
    return str(text)


def refused(outcome: Any, code: int, *words: str) -> None:
    assert outcome.code == code, outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"num_beams": 3},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 5.0},
        {"min_new_tokens": 30},
        {"suppress_tokens": list(range(3, 128))},
        {"bad_words_ids": [[number] for number in range(3, 128)]},
        {"max_length": 4},
        {"guidance_scale": 7.0},
    ],
    ids=lambda asked: next(iter(asked), "nothing"),
)
def test_sample_is_greedy_whatever_the_checkpoint_asks_for(asked: dict[str, Any], besa: Besa, model: Path) -> None:
    expected = greedy(model, PROMPT, 12)
    transformers.GenerationConfig(eos_token_id=2, **asked).save_pretrained(model)
    assert said(besa, model, PROMPT) == expected


def test_sample_ends_where_the_checkpoint_says_that_a_text_ends(besa: Besa, model: Path) -> None:
    first = said(besa, model, PROMPT).split()[0]
    transformers.GenerationConfig(eos_token_id=[2, int(first.removeprefix("w"))]).save_pretrained(model)
    assert said(besa, model, PROMPT) == first


def test_an_empty_prompt_is_refused(besa: Besa, model: Path) -> None:
    refused(besa("eval", "sample", "", "--model", model), 2, "PROMPT is empty")
    refused(besa("eval", "sample", "  ", "--model", model), 2, "PROMPT is empty")


def test_an_empty_prompt_is_taken_where_the_tokenizer_begins_every_text(besa: Besa, model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(model)
    assert said(besa, model, "") == greedy(model, "", 12)


def test_a_prompt_that_is_not_utf8_is_refused(besa: Besa, model: Path) -> None:
    prompt = os.fsdecode(b"w5 \xff w9")  # as Python hands on such an argument
    refused(besa("eval", "sample", prompt, "--model", model), 2, "PROMPT is not valid UTF-8 from character 4 on")


@pytest.mark.parametrize(
    ("words", "tokens", "hint"),
    [
        (3, 62, "give --tokens 61 or less"),
        (64, 1, "give a shorter prompt"),
        (70, 1, "give a shorter prompt"),
        (3, 10**6, "give --tokens 61 or less"),
    ],
)
def test_more_than_the_model_takes_is_refused_before_it_is_loaded(
    words: int, tokens: int, hint: str, besa: Besa, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    outcome = besa("eval", "sample", " ".join(["w7"] * words), "--model", model, "--tokens", tokens)
    refused(
        outcome, 2, f"PROMPT has {words} tokens, with --tokens {tokens} more than the 64 that {model} supports", hint
    )


def test_as_much_as_the_model_takes_is_written(besa: Besa, model: Path) -> None:
    assert said(besa, model, PROMPT, 61) == greedy(model, PROMPT, 61)


def test_a_model_without_a_length_has_a_bound(besa: Besa, tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=1, n_head=4)
    tiny_models.built(config).save_pretrained(tmp_path / "bloom")
    model = tiny_models.add_tokenizer(tmp_path / "bloom")
    refused(besa("eval", "sample", PROMPT, "--model", model, "--tokens", 10**6), 2, "than the 32768 that")
    assert said(besa, model, PROMPT, 70) == greedy(model, PROMPT, 70)


def test_tokens_that_the_model_does_not_know_are_refused(besa: Besa, model: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.add_tokens(["beyond"])
    tokenizer.save_pretrained(model)
    refused(besa("eval", "sample", "w5 beyond", "--model", model), 1, "token id 128, outside")


def test_scores_that_are_no_numbers_are_not_taken_for_words(besa: Besa, model: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        whole.model.layers[0].mlp.down_proj.weight.mul_(1e6)
    whole.save_pretrained(model)
    outcome = besa("eval", "sample", PROMPT, "--model", model, "--dtype", "float16")
    refused(outcome, 1, str(model), "NaN scores for the next token in float16", "compute with --dtype float32")
    assert said(besa, model, PROMPT)


def test_both_continuations_are_stored_with_what_made_them(besa: Besa, model: Path, workplace: Path) -> None:
    calibration = tiny_models.calibration_set(tiny_models.tokens())
    tiny_models.run(
        StageJob(Run(Path("besa-run")), tiny_models.local(model), calibration, tiny_models.request("wanda"))
    )
    stage = workplace / "besa-run" / "pruned"
    for _ in range(2):  # the same again is the same files
        assert besa("eval", "sample", PROMPT, "--tokens", 7, "--dtype", "float32").code == 0
    stored = [json.loads(path.read_text()) for path in (workplace / "besa-run" / "eval").glob("sample-*.json")]
    manifest = json.loads((stage / "besa.json").read_text())
    digests = {manifest["digest"]: stage, manifest["model"]["digest"]: model}
    assert {record["model_digest"] for record in stored} == digests.keys()
    assert len(stored) == 2
    for record in stored:
        assert (record["kind"], record["prompt"], record["tokens"], record["dtype"]) == (
            "continuation",
            PROMPT,
            7,
            "float32",
        )
        assert record["text"] == greedy(digests[record["model_digest"]], PROMPT, 7)
        assert (record["model"]["name"] == "dense") == (digests[record["model_digest"]] == model)
    refused(besa("eval", "compare", "besa-run"), 1, "has no results")  # they are none that a table could hold


def test_nothing_is_stored_of_a_model_outside_a_run(besa: Besa, model: Path, workplace: Path) -> None:
    said(besa, model, PROMPT)
    assert list(workplace.rglob("sample-*")) == []
