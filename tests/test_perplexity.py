"""`besa eval ppl` against plain loops over the whole stock model, and what it keeps of its results."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from besa_cli import evaluation, preparation
from besa_cli.corpora import EvaluationText
from besa_cli.errors import BesaError, UsageError
from besa_cli.evaluation import Measurement, Perplexity, Settings

Besa = Callable[..., Any]  # conftest.Outcome

TOKENS = 16 * 9 + 7  # nine windows of 16, and a partial one


def text_of(tokens: int = TOKENS) -> EvaluationText:
    words = " ".join(f"w{number}" for number in tiny.tokens(1, tokens, seed=5)[0].tolist())
    digest = hashlib.sha256(words.encode()).hexdigest()
    return EvaluationText(name="words.txt", split=None, text=words, digest=digest, source="file")


def measurement(directory: Path, text: EvaluationText, **settings: Any) -> Measurement:
    given = {"seqlen": 16, "device": "cpu", "dtype": "float32", **settings}
    tokenizer = tokenizer_of(directory)
    made_of = preparation.tokenizer_digest(directory)
    return Measurement(directory, "digest", text, tokenizer, made_of, Settings(**given))


def tokenizer_of(directory: Path) -> Any:
    """As it was saved: for some architectures `AutoTokenizer` takes a class that expects one of its own kind."""
    return PreTrainedTokenizerFast.from_pretrained(directory)


def ids_of(directory: Path, text: EvaluationText) -> Tensor:
    return torch.tensor(tokenizer_of(directory)(text.text)["input_ids"])


def windows_loop(directory: Path, ids: Tensor, seqlen: int, limit: int | None = None) -> tuple[float, int]:
    """The released program's protocol, written anew: whole windows, mean of their mean losses."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    count = min(len(ids) // seqlen, limit or len(ids))
    losses = []
    with torch.no_grad():
        for number in range(count):
            window = ids[None, number * seqlen : (number + 1) * seqlen]
            losses.append(float(model(window, labels=window).loss))
    return math.exp(math.fsum(losses) / count), count


def strided_loop(directory: Path, ids: Tensor, seqlen: int, stride: int) -> float:
    """Overlapping windows as transformers' guide has them: labels of tokens seen before are ignored."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    total, counted = 0.0, 0
    for begin in range(0, len(ids) - seqlen + 1, stride):
        window = ids[None, begin : begin + seqlen]
        labels = window.clone()
        if begin:
            labels[:, :-stride] = -100
        tokens = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(window, labels=labels).loss) * tokens
        counted += tokens
    return math.exp(total / counted)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.add_tokenizer(tiny.checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.float16))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_perplexity_is_that_of_the_whole_model(family: str, tied: bool, tmp_path: Path) -> None:
    directory = tiny.add_tokenizer(tiny.checkpoint(tmp_path / "model", family, tied=tied, dtype=torch.bfloat16))
    text = text_of()
    expected, count = windows_loop(directory, ids_of(directory, text), 16)
    found = measurement(directory, text, batch_size=4).measure()
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.windows, found.windows_in_text, count) == (TOKENS, 9, 9, 9)


def test_a_random_model_is_as_surprised_as_one_that_guesses(model: Path) -> None:
    assert measurement(model, text_of()).measure().perplexity > 0.5 * tiny.VOCABULARY


@pytest.mark.parametrize("batch_size", [1, 2, 9, 100])
@pytest.mark.parametrize("head_tokens", [1, 4, 15, 512])
def test_neither_batches_nor_the_heads_portions_matter(
    batch_size: int, head_tokens: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = measurement(model, text_of()).measure()
    monkeypatch.setattr(evaluation, "_HEAD_TOKENS", head_tokens)
    found = measurement(model, text_of(), batch_size=batch_size).measure()
    assert found.nll == pytest.approx(plain.nll, rel=1e-6)


@pytest.mark.parametrize("limit", [1, 4, 9, 50])
def test_the_limit_takes_the_first_windows(limit: int, model: Path) -> None:
    expected, count = windows_loop(model, ids_of(model, text_of()), 16, limit)
    found = measurement(model, text_of(), limit=limit).measure()
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert (found.windows, found.windows_in_text) == (count, 9)


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_overlapping_windows_count_each_token_once(stride: int, model: Path) -> None:
    ids = ids_of(model, text_of(60))
    expected = strided_loop(model, ids, 16, stride)
    found = measurement(model, text_of(60), stride=stride, batch_size=3).measure()
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.windows == (60 - 16) // stride + 1


def test_a_stride_of_a_whole_window_is_no_overlap(model: Path) -> None:
    text = text_of()
    whole, plain = measurement(model, text, stride=16).measure(), measurement(model, text).measure()
    assert whole.nll == plain.nll


def test_a_text_of_exactly_one_window(model: Path) -> None:
    found = measurement(model, text_of(16)).measure()
    assert (found.windows, found.windows_in_text) == (1, 1)
    with pytest.raises(BesaError, match=r"words.txt has 15 tokens, less than one window of 16"):
        measurement(model, text_of(15))


def test_progress_is_told_every_block(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    measurement(model, text_of()).measure(lambda block, blocks, seconds: seen.append((block, blocks)))
    assert seen == [(0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seqlen": 1}, "--seqlen 1 "),
        ({"seqlen": tiny.LONGEST + 1}, f"--seqlen 65 is more than the {tiny.LONGEST} tokens"),
        ({"stride": 0}, "--stride 0 "),
        ({"stride": 17}, "--stride 17 is not in 1 … 16"),
        ({"limit": 0}, "--limit 0 "),
        ({"batch_size": 0}, "--batch-size 0 "),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, int], said: str, model: Path) -> None:
    with pytest.raises(UsageError, match=said):
        measurement(model, text_of(), **settings)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    small = tiny.config("llama")
    small.vocab_size = 100
    tiny.built(small).save_pretrained(tmp_path)
    with pytest.raises(BesaError, match=r"token id 1\d\d, the model knows 100 tokens"):
        measurement(tiny.add_tokenizer(tmp_path), text_of())


def test_a_result_is_kept_under_a_name_of_its_own(model: Path, tmp_path: Path) -> None:
    jobs = [
        measurement(model, text_of(), **settings)
        for settings in ({}, {"limit": 2}, {"stride": 4}, {"seqlen": 12}, {"dtype": "bfloat16"})
    ]
    jobs.append(measurement(model, text_of(TOKENS + 1)))
    assert len({job.file for job in jobs}) == len(jobs)
    assert measurement(model, text_of(), batch_size=7).file == jobs[0].file  # it changes no result
    result = jobs[0].measure()
    evaluation.save(result, tmp_path / jobs[0].file, {"name": "dense"})
    assert evaluation.load(tmp_path / jobs[0].file) == result
    record = json.loads((tmp_path / jobs[0].file).read_text())
    record["versions"]["torch"] = "0.1"
    (tmp_path / jobs[0].file).write_text(json.dumps(record))
    assert evaluation.load(tmp_path / jobs[0].file) is None  # measured by something else
    assert evaluation.load(tmp_path / "none.json") is None


def test_the_command_measures_the_stage_and_its_parent(besa: Besa, model: Path, workplace: Path) -> None:
    (workplace / "words.txt").write_text(text_of().text)
    tiny.rows_file(workplace / "rows.jsonl", tiny.tokens(2, 12))
    drawn = ("--data", "rows.jsonl", "--samples", 2, "--seqlen", 12)
    outcome = besa("prune", "--model", model, "--method", "wanda", "--dtype", "float32", *drawn)
    assert outcome.code == 0, outcome.err
    words = ("eval", "ppl", "words.txt", "--seqlen", 16, "--dtype", "float32", "--json")
    outcome = besa(*words)
    assert outcome.code == 0, outcome.err
    (row,) = json.loads(outcome.out)["results"]
    ids = ids_of(model, text_of())
    pruned, _ = windows_loop(Path("besa-run", "pruned"), ids, 16)
    dense, _ = windows_loop(model, ids, 16)
    assert row["perplexity"] == pytest.approx(pruned, rel=1e-5)
    assert row["dense"]["perplexity"] == pytest.approx(dense, rel=1e-5)
    assert row["difference"] == pytest.approx(pruned - dense, rel=1e-3)
    assert len(list(Path("besa-run", "eval").iterdir())) == 2
    again = besa(*words)
    assert json.loads(again.out)["results"] == [row]
    assert "dense: result taken from besa-run/eval/" in again.err
    alone = besa(*words, "--no-baseline")
    assert json.loads(alone.out)["results"][0]["dense"] is None
    other = besa(*words, "--model", model)
    assert json.loads(other.out)["results"][0]["perplexity"] == pytest.approx(dense, rel=1e-5)
    assert len(list(Path("besa-run", "eval").iterdir())) == 2  # a model that is not of the run leaves nothing in it


def test_a_result_is_a_plain_record(model: Path) -> None:
    result = measurement(model, text_of()).measure()
    assert isinstance(result, Perplexity)
    assert result.perplexity == math.exp(result.nll)
    assert (result.dataset, result.split, result.seqlen, result.stride) == ("words.txt", None, 16, None)
    assert (result.device, result.dtype) == ("cpu", "float32")
