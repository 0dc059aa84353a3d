"""`besa generate` beside a plain loop over the whole model: prompts, conversations, draws, and what is refused."""

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import exported, tiny_models
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from besa_cli.inference import generating, loading
from besa_cli.inference.generating import Generated, Sampling

Besa = Callable[..., Any]  # conftest.Outcome

TEMPLATE = "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}{{ m.content }} {% endfor %}w4"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.add_tokenizer(tiny_models.checkpoint(tmp_path / "model"))


@pytest.fixture
def chatting(model: Path) -> Path:
    """The same model with a chat template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    return model


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Puts bytes into a pipe that is stdin."""

    def put(text: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    return put


def continued(directory: Path, prompt: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
    """A plain loop: the most likely token, or one drawn from the softmax of the scores, again and again."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    asked = ids.shape[1]
    torch.manual_seed(seed)
    with torch.no_grad():
        for _ in range(tokens):
            scores = whole(ids).logits[:, -1]
            if temperature:
                following = torch.multinomial((scores / temperature).softmax(dim=-1), 1)
            else:
                following = scores.argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
            if int(following) == 2:  # the end of a text
                break
    return str(tokenizer.decode(ids[0, asked:], skip_special_tokens=True))


def said(outcome: Any) -> str:
    assert outcome.code == 0, outcome.err
    return str(outcome.out).removesuffix("\n")


def refused(outcome: Any, code: int, *words: str) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    for word in words:
        assert word in outcome.err


def test_a_prompt_is_continued_and_the_text_is_all_that_stdout_gets(besa: Besa, model: Path) -> None:
    outcome = besa("generate", "w5 w9 w100", "--model", model, "--max-tokens", 12, "--dtype", "float32")
    assert said(outcome) == continued(model, "w5 w9 w100", 12)
    assert "prompt: 3 tokens at " in outcome.err
    assert "continuation: 12 tokens at " in outcome.err
    assert "peak memory: " in outcome.err


def test_json_states_text_counts_and_rates(besa: Besa, model: Path) -> None:
    outcome = besa("generate", "w5 w9", "--model", model, "--max-tokens", 5, "--dtype", "float32", "--json")
    record = json.loads(outcome.out)
    assert record["text"] == continued(model, "w5 w9", 5)
    assert (record["prompt"], record["prompt_tokens"], record["tokens"]) == ("w5 w9", 2, 5)
    assert (record["ended"], record["packed"]) == (False, False)
    assert record["prompt_tokens_per_second"] > 0
    assert record["tokens_per_second"] > 0
    assert record["peak_memory"] > 1 << 20


@pytest.mark.parametrize(("temperature", "seed"), [(0.7, 0), (3.0, 5)])
def test_tokens_are_drawn_at_the_temperature_with_the_seed(
    temperature: float, seed: int, besa: Besa, model: Path
) -> None:
    drawn = ["--temperature", temperature, "--seed", seed, "--max-tokens", 16, "--dtype", "float32"]
    expected = continued(model, "w5 w9", 16, temperature, seed)
    assert expected != continued(model, "w5 w9", 16)
    assert said(besa("generate", "w5 w9", "--model", model, *drawn)) == expected


def test_a_text_ends_where_the_checkpoint_or_the_tokenizer_says(besa: Besa, model: Path) -> None:
    first = continued(model, "w5 w9", 1)
    GenerationConfig(eos_token_id=int(first.removeprefix("w"))).save_pretrained(model)
    outcome = besa("generate", "w5 w9", "--model", model, "--dtype", "float32", "--json")
    assert json.loads(outcome.out)["ended"] is True
    assert json.loads(outcome.out)["tokens"] == 1
    whole = loading.load(model, torch.float32)
    assert generating.end_tokens(whole, PreTrainedTokenizerFast.from_pretrained(model)) == sorted(
        {2, int(first.removeprefix("w"))}
    )


def test_without_max_tokens_a_model_writes_no_more_than_it_has_room_for(besa: Besa, model: Path) -> None:
    GenerationConfig(eos_token_id=2).save_pretrained(model)
    outcome = besa("generate", " ".join(["w7"] * 60), "--model", model, "--dtype", "float32", "--json")
    assert json.loads(outcome.out)["tokens"] <= 4  # of 64
    assert json.loads(outcome.out)["text"] == continued(model, " ".join(["w7"] * 60), 4)


def test_words_come_as_soon_as_they_are_certain(model: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    whole = loading.load(model, torch.float32)
    events: list[str | int] = []
    inputs = tokenizer("w5 w9", return_tensors="pt")
    made = generating.generate(
        whole, tokenizer, inputs, Sampling(tokens=6), on_text=events.append, on_token=events.append
    )
    assert "".join(piece for piece in events if isinstance(piece, str)) == made.text == continued(model, "w5 w9", 6)
    assert [piece for piece in events if isinstance(piece, int)] == [1, 2, 3, 4, 5, 6]
    assert isinstance(events[events.index(3) - 1], str)  # a word is there before the third token is


def test_speeds_are_sums_over_answers_without_first_tokens() -> None:
    def made(prompt: int, tokens: int, before: float, after: float) -> Generated:
        return Generated(
            text="",
            transcript="",
            prompt_tokens=prompt,
            tokens=tokens,
            prompt_seconds=before,
            seconds=after,
            ended=False,
        )

    speed = generating.speed([made(10, 5, 2.0, 1.0), made(30, 3, 3.0, 2.0)])
    assert (speed.prompt_tokens, speed.tokens) == (40, 8)
    assert math.isclose(speed.prompt_rate or 0, 40 / 5)
    assert math.isclose(speed.rate or 0, (4 + 2) / 3)
    assert generating.speed([made(10, 1, 2.0, 0.0)]).rate is None


@pytest.mark.parametrize("given", [["-"], []])
def test_a_prompt_may_come_from_a_pipe(
    given: list[str], besa: Besa, model: Path, stdin: Callable[[bytes], None]
) -> None:
    stdin(b"w5 w9\n")
    outcome = besa("generate", *given, "--model", model, "--max-tokens", 7, "--dtype", "float32", "--json")
    assert json.loads(outcome.out)["prompt"] == "w5 w9"
    assert json.loads(outcome.out)["text"] == continued(model, "w5 w9", 7)


def test_the_chat_template_is_used_where_there_is_one_but_for_raw(besa: Besa, chatting: Path) -> None:
    asked = ["generate", "w5 w9", "--model", chatting, "--max-tokens", 8, "--dtype", "float32"]
    assert said(besa(*asked)) == continued(chatting, "w3 w5 w9 w4", 8)
    assert said(besa(*asked, "--raw")) == continued(chatting, "w5 w9", 8)
    assert said(besa(*asked)) != said(besa(*asked, "--raw"))


@pytest.mark.parametrize("first", [True, False])
def test_a_conversation_keeps_its_history_and_ends_at_an_empty_line(
    first: bool, besa: Besa, chatting: Path, stdin: Callable[[bytes], None]
) -> None:
    stdin(b"w50 w60\n\nw70\n" if first else b"w5 w9\nw50 w60\n\nw70\n")
    asked = ["generate", *(["w5 w9"] if first else []), "--interactive", "--model", chatting]
    outcome = besa(*asked, "--max-tokens", 6, "--dtype", "float32")
    one = continued(chatting, "w3 w5 w9 w4", 6)
    two = continued(chatting, f"w3 w5 w9 w4 {one} w3 w50 w60 w4", 6)
    assert said(outcome) == f"{one}\n{two}"
    assert "continuation: 12 tokens" in outcome.err


def test_without_a_template_a_conversation_is_one_text(besa: Besa, model: Path, stdin: Callable[[bytes], None]) -> None:
    stdin(b"w5 w9\nw50")  # ends without an empty line
    outcome = besa("generate", "--interactive", "--model", model, "--max-tokens", 6, "--dtype", "float32")
    one = continued(model, "w5 w9", 6)
    two = continued(model, f"w5 w9 {one} w50", 6)
    assert said(outcome) == f"{one}\n{two}"


def test_a_conversation_without_turns_is_none(besa: Besa, model: Path, stdin: Callable[[bytes], None]) -> None:
    stdin(b"")
    outcome = besa("generate", "--interactive", "--model", model)
    assert (outcome.code, outcome.out) == (0, "")


def test_a_conversation_that_grows_too_long_ends_in_one_line(
    besa: Besa, chatting: Path, stdin: Callable[[bytes], None]
) -> None:
    stdin(b"w5\n" + b"w9 " * 50 + b"\n")
    outcome = besa("generate", "--interactive", "--model", chatting, "--max-tokens", 10, "--dtype", "float32")
    assert outcome.code == 2
    assert outcome.out == f"{continued(chatting, 'w3 w5 w4', 10)}\n"
    assert "with --max-tokens 10 more than the 64 that" in outcome.err


def test_the_newest_stage_writes_as_its_exports_do(besa: Besa, tmp_path: Path) -> None:
    run = exported.stage(tmp_path)
    texts = {}
    for name in ("hf", "sparse"):
        directory = exported.export(run, name)
        outcome = besa("generate", "w5 w9", "--model", directory, "--max-tokens", 8, "--json")
        assert json.loads(outcome.out)["packed"] is (name == "sparse")
        texts[name] = json.loads(outcome.out)["text"]
    outcome = besa("generate", "w5 w9", "--run", run.path, "--max-tokens", 8)
    assert texts == dict.fromkeys(texts, said(outcome))
    assert "magnitude 50.00 %" in outcome.err
    assert texts["hf"] == continued_as_computed(run.stage("pruned"), "w5 w9", 8)


def continued_as_computed(directory: Path, prompt: str, tokens: int) -> str:
    """The same by stock transformers in the dtype that is chosen here."""
    from besa_cli.system import compute

    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    whole: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=compute.dtype("auto", torch.device("cpu")))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = whole.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=2, pad_token_id=2)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_damaged_export_is_refused_in_one_line(besa: Besa, tmp_path: Path) -> None:
    run = exported.stage(tmp_path)
    for name, pattern in (("sparse", "sparse-00002-*"), ("hf", "*.safetensors")):
        directory = exported.export(run, name)
        (file,) = directory.glob(pattern)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        refused(besa("generate", "w5", "--model", directory), 1, file.name, "is damaged")
    sparse = run.exports / "sparse"
    (sparse / "sparse.safetensors.index.json").unlink()
    refused(besa("generate", "w5", "--model", sparse), 1, "sparse.safetensors.index.json")


def test_an_export_of_codes_is_refused_by_name(besa: Besa, tmp_path: Path) -> None:
    run = exported.stage(tmp_path)
    directory = exported.export(run, "hf")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (directory / "config.json").write_text(json.dumps(config))
    refused(besa("generate", "w5", "--model", directory), 1, "already compressed (compressed-tensors)")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["", "--model", "MODEL"], "PROMPT is empty"),
        (["w5", "--max-tokens", "0"], "--max-tokens 0 is not in 1"),
        (["w5", "--max-tokens", "-1"], "--max-tokens -1 is not in 1"),
        (["w5", "--temperature", "nan"], "--temperature nan is not"),
        (["w5", "--temperature", "-0.5"], "--temperature -0.5 is not"),
        (["w5", "--temperature", "1e-9"], "--temperature 1e-09 is less than 0.001"),
        (["--interactive", "--json"], "--interactive and --json exclude each other"),
        (["-", "--interactive"], "--interactive reads its turns from stdin"),
        (["w5", "--max-tokens", "70", "--model", "MODEL"], "give --max-tokens 63 or less"),
        (["w5 " * 64, "--model", "MODEL"], "give a shorter prompt"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(options: list[str], words: str, besa: Besa, model: Path) -> None:
    refused(besa("generate", *(str(model) if word == "MODEL" else word for word in options)), 2, words)


def test_a_terminal_is_not_waited_for(besa: Besa, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    refused(besa("generate"), 2, "PROMPT is missing")


def test_a_pipe_without_text_or_utf8_is_refused(besa: Besa, model: Path, stdin: Callable[[bytes], None]) -> None:
    stdin(b"")
    refused(besa("generate", "--model", model), 2, "PROMPT is empty")
    stdin(b"w5 \xff")
    refused(besa("generate", "--model", model), 2, "stdin is not valid UTF-8 at byte 4")


def test_a_directory_without_a_model_is_refused(besa: Besa, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    refused(besa("generate", "w5", "--model", tmp_path / "nothing"), 1, "has no config.json, so it is not a model")
    refused(besa("generate", "w5", "--run", tmp_path / "nothing"), 1, "has no stage")
    run = exported.stage(tmp_path)
    refused(besa("generate", "w5", "--model", run.path), 1, "is a run directory", f"name it with --run {run.path}")


def test_packed_weights_do_not_run_on_a_gpu(besa: Besa, tmp_path: Path) -> None:
    directory = exported.export(exported.stage(tmp_path), "sparse")
    refused(besa("generate", "w5", "--model", directory, "--device", "cuda"), 2, "packed weights, on the CPU")


def test_slow_kernels_are_said_in_one_line(
    besa: Besa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = exported.export(exported.stage(tmp_path), "sparse")
    monkeypatch.setenv("BESA_INSTRUCTIONS", "torch")
    outcome = besa("generate", "w5", "--model", directory, "--max-tokens", 2)
    assert outcome.code == 0
    assert "packed weights, kernels for torch" in outcome.err
    assert sum("packed weights run slowly here: " in record.message for record in caplog.records) == 1
