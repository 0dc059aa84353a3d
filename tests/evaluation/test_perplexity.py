"""`besa eval ppl` against plain loops over the whole stock model, and what it keeps of its results."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import calls, tiny_models
from support.joined_text import joined
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from besa_cli.checkpoint.runs import Run
from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError, UsageError
from besa_cli.evaluation import perplexity, results, token_figures
from besa_cli.evaluation.measurement import Perplexity, PerplexityMeasurement, PerplexitySettings
from besa_cli.evaluation.texts import EvaluationText
from besa_cli.models.tokenizer import tokenizer_digest
from besa_cli.stream import propagation
from besa_cli.system import lock

Besa = Callable[..., Any]  # conftest.Outcome

TOKENS = 16 * 9 + 7  # nine windows of 16, and a partial one


def text_of(tokens: int = TOKENS) -> EvaluationText:
    words = " ".join(f"w{number}" for number in tiny_models.tokens(1, tokens, seed=5)[0].tolist())
    digest = hashlib.sha256(words.encode()).hexdigest()
    return EvaluationText(name="words.txt", split=None, text=words, digest=digest, source="file")


def measurement(directory: Path, text: EvaluationText, **settings: Any) -> PerplexityMeasurement:
    given = {"seqlen": 16, "device": "cpu", "dtype": "float32", **settings}
    tokenizer = tokenizer_of(directory)
    made_of = tokenizer_digest(directory)
    return PerplexityMeasurement(directory, "digest", text, tokenizer, made_of, PerplexitySettings(**given))


def measured(job: PerplexityMeasurement) -> Perplexity:
    (result,) = perplexity.measure([job])
    return result


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
    return tiny_models.add_tokenizer(tiny_models.checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.float16))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_perplexity_is_that_of_the_whole_model(family: str, tied: bool, tmp_path: Path) -> None:
    directory = tiny_models.add_tokenizer(
        tiny_models.checkpoint(tmp_path / "model", family, tied=tied, dtype=torch.bfloat16)
    )
    text = text_of()
    expected, count = windows_loop(directory, ids_of(directory, text), 16)
    found = measured(measurement(directory, text, batch_size=4))
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.windows, found.windows_in_text, count) == (TOKENS, 9, 9, 9)


def test_a_random_model_is_as_surprised_as_one_that_guesses(model: Path) -> None:
    assert measured(measurement(model, text_of())).perplexity > 0.5 * tiny_models.VOCABULARY


@pytest.mark.parametrize("batch_size", [1, 2, 9, 100])
@pytest.mark.parametrize("head_tokens", [1, 4, 15, 512])
def test_neither_batches_nor_the_heads_portions_matter(
    batch_size: int, head_tokens: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = measured(measurement(model, text_of()))
    monkeypatch.setattr(token_figures, "HEAD_TOKENS", head_tokens)
    found = measured(measurement(model, text_of(), batch_size=batch_size))
    assert found.nll == pytest.approx(plain.nll, rel=1e-6)


@pytest.mark.parametrize("limit", [1, 4, 9, 50])
def test_the_limit_takes_the_first_windows(limit: int, model: Path) -> None:
    expected, count = windows_loop(model, ids_of(model, text_of()), 16, limit)
    found = measured(measurement(model, text_of(), limit=limit))
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert (found.windows, found.windows_in_text) == (count, 9)


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_overlapping_windows_count_each_token_once(stride: int, model: Path) -> None:
    ids = ids_of(model, text_of(60))
    expected = strided_loop(model, ids, 16, stride)
    found = measured(measurement(model, text_of(60), stride=stride, batch_size=3))
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.windows == (60 - 16) // stride + 1


def test_a_stride_of_a_whole_window_is_no_overlap(model: Path) -> None:
    text = text_of()
    whole, plain = measured(measurement(model, text, stride=16)), measured(measurement(model, text))
    assert whole.nll == plain.nll


def test_a_text_of_exactly_one_window(model: Path) -> None:
    found = measured(measurement(model, text_of(16)))
    assert (found.windows, found.windows_in_text) == (1, 1)
    with pytest.raises(BesaError, match=r"words.txt has 15 tokens, less than one window of 16"):
        measurement(model, text_of(15))


def test_the_head_is_a_step_of_its_own(model: Path) -> None:
    walk = perplexity.PerplexityRun([measurement(model, text_of())])
    steps = [(step.index, step.steps, step.phase, step.measured) for step in walk]
    assert steps == [(0, 3, "block 1/2", ()), (1, 3, "block 2/2", ()), (2, 3, "head", (0,))]
    assert walk.steps == len(walk.work) == 3
    config = AutoConfig.from_pretrained(model)
    head = config.vocab_size * config.hidden_size
    assert walk.work[2] % head == 0
    assert walk.work[0] == walk.work[1] > walk.work[2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seqlen": 1}, "--seqlen 1 "),
        ({"seqlen": tiny_models.LONGEST + 1}, f"--seqlen 65 is more than the {tiny_models.LONGEST} tokens"),
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
    small = tiny_models.config("llama")
    small.vocab_size = 100
    tiny_models.built(small).save_pretrained(tmp_path)
    with pytest.raises(BesaError, match=r"token id 1\d\d, outside the model's vocabulary of 100"):
        measurement(tiny_models.add_tokenizer(tmp_path), text_of())


def test_a_result_is_kept_under_a_name_of_its_own(model: Path, tmp_path: Path) -> None:
    jobs = [
        measurement(model, text_of(), **settings)
        for settings in ({}, {"limit": 2}, {"stride": 4}, {"seqlen": 12}, {"dtype": "bfloat16"})
    ]
    jobs.append(measurement(model, text_of(TOKENS + 1)))
    assert len({job.file for job in jobs}) == len(jobs)
    assert measurement(model, text_of(), batch_size=7).file == jobs[0].file  # it changes no result
    result = measured(jobs[0])
    results.save(result, tmp_path / jobs[0].file, {"name": "dense"})
    assert results.load(tmp_path / jobs[0].file) == result
    record = json.loads((tmp_path / jobs[0].file).read_text())
    record["versions"]["torch"] = "0.1"
    (tmp_path / jobs[0].file).write_text(json.dumps(record))
    assert results.load(tmp_path / jobs[0].file) is None  # measured by something else
    assert results.load(tmp_path / "none.json") is None


def test_the_command_measures_the_stage_and_its_parent(besa: Besa, model: Path, workplace: Path) -> None:
    (workplace / "words.txt").write_text(joined(text_of().text))
    tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(2, 12))
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
    assert [line.partition(" from")[0] for line in again.err.splitlines()] == [
        "wanda 50.00 %: result taken",
        "dense: result taken",
    ]
    alone = besa(*words, "--no-baseline")
    assert json.loads(alone.out)["results"][0]["dense"] is None
    other = besa(*words, "--model", model)
    assert json.loads(other.out)["results"][0]["perplexity"] == pytest.approx(dense, rel=1e-5)
    assert len(list(Path("besa-run", "eval").iterdir())) == 2  # a model that is not of the run leaves nothing in it


def test_a_result_is_a_plain_record(model: Path) -> None:
    result = measured(measurement(model, text_of()))
    assert isinstance(result, Perplexity)
    assert result.perplexity == math.exp(result.nll)
    assert (result.dataset, result.split, result.seqlen, result.stride) == ("words.txt", None, 16, None)
    assert (result.device, result.dtype) == ("cpu", "float32")


# --- named data sets


def test_the_papers_data_sets_are_measured_by_its_protocol(besa: Besa, model: Path, workplace: Path) -> None:
    words = [f"w{number}" for number in tiny_models.tokens(1, 120, seed=9)[0].tolist()]
    sentences = [" ".join(words[start : start + 7]) for start in range(0, 120, 7)]
    (workplace / "data").mkdir()
    (workplace / "data" / "ptb.test.txt").write_text("".join(f" {sentence} \n" for sentence in sentences))
    lines = [json.dumps({"text": sentence}) for sentence in reversed(sentences)]
    (workplace / "data" / "c4-validation.00000-of-00008.jsonl").write_text("\n".join(lines))
    command = ("eval", "ppl", "ptb", "c4", "--data-dir", "data", "--model", model, "--seqlen", 16, "--dtype", "float32")
    outcome = besa(*command, "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["results"]
    joined = (" ".join(sentences), " ".join(reversed(sentences)))
    for row, text, name in zip(rows, joined, ("ptb", "c4"), strict=True):
        ids = torch.tensor(tokenizer_of(model)(text)["input_ids"])
        expected, count = windows_loop(model, ids, 16)
        assert row["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert (row["dataset"], row["windows"], row["records"], row["official"]) == (name, count, 18, False)
        assert row["note"] in outcome.err.splitlines()


@pytest.mark.parametrize("name", ["ptb", "c4"])
def test_a_data_set_that_is_nowhere_stops_the_command_before_any_work(
    name: str, besa: Besa, model: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(propagation, "embed", pytest.fail)
    outcome = besa("eval", "ppl", "wikitext2", name, "--data-dir", workplace, "--model", model, "--seqlen", 16)
    assert (outcome.code, outcome.out) == (1, "")
    error, hint = outcome.err.splitlines()
    assert error.startswith(f"error: the data set '{name}' is not available: ")
    assert str(workplace) in error
    assert hint.endswith(f"besa eval ppl {name} --data-dir {workplace}")


# --- several texts, in portions


def other_text(tokens: int, seed: int) -> EvaluationText:
    words = " ".join(f"w{number}" for number in tiny_models.tokens(1, tokens, seed=seed)[0].tolist())
    digest = hashlib.sha256(words.encode()).hexdigest()
    return EvaluationText(name=f"text-{seed}.txt", split=None, text=words, digest=digest, source="file")


@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted).map(tuple), min_size=1, max_size=4),
    batch=st.integers(1, 4),
    batches=st.integers(1, 4),
)
def test_portions_cover_every_window_once_in_whole_batches(
    lengths: list[tuple[int, int]], batch: int, batches: int
) -> None:
    most = batch * batches
    made = perplexity.split_passes(lengths, batch, most)
    seen = [(part.text, window) for portion in made for part in portion for window in range(part.start, part.stop)]
    assert seen == [(text, window) for text, (start, stop) in enumerate(lengths) for window in range(start, stop)]
    for portion in made:
        assert 0 < sum(part.stop - part.start for part in portion) <= most
        assert len({part.text for part in portion}) == len(portion)
        for part in portion:
            start, stop = lengths[part.text]
            assert (part.start - start) % batch == 0
            assert part.stop == stop or (part.stop - start) % batch == 0


def test_a_portion_is_bounded_by_two_blocks_by_a_gibibyte_and_on_a_cpu_by_its_tokens(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(model, torch.device("cpu"), torch.float32)
    assert perplexity.windows_at_once(decoder, 16, 1) == 32_768 // 16
    assert perplexity.windows_at_once(decoder, 16, 3) == 32_768 // 16 // 3 * 3
    assert perplexity.windows_at_once(decoder, 16, 5000) == 5000  # never less than a batch
    assert perplexity.windows_at_once(decoder, 16, 3, models=2) == 32_768 // 2 // 16 // 3 * 3
    monkeypatch.setattr(perplexity, "_CPU_TOKENS", 1 << 40)
    assert perplexity.windows_at_once(decoder, 16, 1) == (1 << 30) // (16 * tiny_models.HIDDEN * 4)
    monkeypatch.setattr(perplexity, "_BYTES", 1)
    block = sum(parameter.numel() for parameter in decoder.blocks[0].parameters()) * 4
    assert perplexity.windows_at_once(decoder, 16, 1) == 2 * block // (16 * tiny_models.HIDDEN * 4)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("stride", [None, 7])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_texts_together_and_in_portions_give_the_bits_of_each_alone(
    at_once: int, stride: int | None, batch_size: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [other_text(tokens, seed) for tokens, seed in ((70, 1), (16, 2), (95, 3))]
    jobs = [measurement(model, text, stride=stride, batch_size=batch_size) for text in made]
    alone = [measured(job) for job in jobs]
    monkeypatch.setattr(perplexity, "_CPU_TOKENS", at_once * 16)
    assert perplexity.measure(jobs) == alone


def test_one_walk_loads_each_block_once_for_all_texts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    noted = calls.noting(Decoder.load, lambda self, index, *rest: loaded.append(index))
    monkeypatch.setattr(Decoder, "load", noted)
    jobs = [measurement(model, other_text(100, seed)) for seed in (1, 2, 3)]
    walk = perplexity.PerplexityRun(jobs)
    loaded.clear()
    assert [step.measured for step in walk] == [(), (), (0, 1, 2)]
    assert loaded == [0, 1]


@pytest.mark.parametrize("done", [0, 1, 2, 5])
def test_a_walk_goes_on_from_what_is_known(done: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [measurement(model, other_text(40, 1)), measurement(model, other_text(60, 2))]
    monkeypatch.setattr(perplexity, "_CPU_TOKENS", 16)  # a window a portion
    whole = perplexity.PerplexityRun(jobs)
    kept: list[list[list[tuple[float, int]]]] = [[list(losses) for losses in whole.losses]]
    for step in whole:
        if step.measured:
            kept.append([list(losses) for losses in whole.losses])
    assert len(kept) == 1 + 2 + 3
    rest = perplexity.PerplexityRun(jobs, kept[done])
    assert rest.steps == (5 - done) * 3
    assert sum(1 for _ in rest) == rest.steps
    assert rest.losses == whole.losses


def test_a_text_is_cut_where_it_is_to_be_cut(model: Path) -> None:
    text = text_of()
    cut = replace(text, longest=16 * 3 + 5)
    found = measured(measurement(model, cut))
    expected, _ = windows_loop(model, ids_of(model, text), 16, 3)
    assert (found.tokens, found.windows, found.windows_in_text) == (53, 3, 3)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)


# --- what is kept of an interrupted evaluation


@pytest.fixture
def pruned(besa: Besa, model: Path, workplace: Path) -> Path:
    """A working directory with a finished run and two texts."""
    for number in (1, 2):
        (workplace / f"text-{number}.txt").write_text(joined(other_text(40 + 16 * number, number).text))
    tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(2, 12))
    drawn = ("--data", "rows.jsonl", "--samples", 2, "--seqlen", 12)
    outcome = besa("prune", "--model", model, "--method", "wanda", "--dtype", "float32", *drawn)
    assert outcome.code == 0, outcome.err
    return workplace


EVALUATION = ("eval", "ppl", "text-1.txt", "text-2.txt", "--seqlen", 16, "--dtype", "float32", "--json")


def interrupt_after(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C be pressed in the first block after so many passes through the model."""
    advance, count = propagation.advance, [0]

    def interrupted(decoder: Decoder, index: int, *rest: Any) -> None:
        count[0] += index == 0
        if count[0] > passes:
            raise KeyboardInterrupt
        advance(decoder, index, *rest)

    monkeypatch.setattr(propagation, "advance", interrupted)


@pytest.mark.parametrize("passes", [0, 1, 2, 3, 8, 13])
def test_an_interrupted_evaluation_goes_on_and_comes_to_the_same(
    passes: int, besa: Besa, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree("besa-run", "undisturbed")
    expected = json.loads(besa(*EVALUATION, "--run", "undisturbed").out)["results"]
    monkeypatch.setattr(perplexity, "_CPU_TOKENS", 16)  # a window a pass: of 7, the parent's and the stage's in turn
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(passes, patch)
        outcome = besa(*EVALUATION)
    assert (outcome.code, outcome.out) == (130, "")
    *_, error, hint = outcome.err.splitlines()
    assert error == "error: interrupted"
    assert hint.startswith(f"hint: {passes // 2} windows are measured and kept; run the same")
    seen: list[int] = []
    noted = calls.noting(propagation.advance, lambda decoder, index, *rest: seen.append(index))
    monkeypatch.setattr(propagation, "advance", noted)
    outcome = besa(*EVALUATION)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["results"] == expected
    assert seen.count(0) == 14 - passes // 2 * 2  # nothing is measured twice, but a window that only the parent passed
    names = {path.name: path.read_bytes() for path in Path("besa-run", "eval").iterdir()}
    assert names.keys() == {path.name for path in Path("undisturbed", "eval").iterdir()}
    assert not any(name.endswith(".windows") for name in names)


def test_without_a_run_an_interruption_says_that_nothing_is_kept(
    besa: Besa, pruned: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tiny_models.files(pruned)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(0, patch)
        outcome = besa(*EVALUATION, "--model", model)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1].startswith("hint: nothing was kept; with --run DIR")
    assert tiny_models.files(pruned) == before


def test_windows_of_another_batch_size_or_version_are_measured_again(model: Path, tmp_path: Path) -> None:
    store = results.Results(Run(tmp_path).evaluations)
    job = measurement(model, text_of(), batch_size=2)
    store.save_losses(job, [(1.5, 15), (2.5, 15)])
    assert store.load_losses(job) == [(1.5, 15), (2.5, 15)]
    assert store.load_losses(measurement(model, text_of(), batch_size=1)) == []
    (file,) = tmp_path.glob("eval/*.windows")
    file.write_text(file.read_text().replace('"torch": "', '"torch": "0.'))
    assert store.load_losses(job) == []


def test_a_running_prune_is_not_disturbed(besa: Besa, pruned: Path) -> None:
    with lock.hold(Path("besa-run"), "besa prune"):
        outcome = besa(*EVALUATION)
        assert outcome.code == 0, outcome.err
        assert Path("besa-run", ".holder.json").exists()


def test_evaluations_write_one_after_the_other(tmp_path: Path) -> None:
    """Threads stand for processes: the lock is one of the file, opened anew each time."""
    inside: list[int] = []

    def write(number: int) -> None:
        for _ in range(10):
            with lock.hold_results(tmp_path):
                inside.append(number)
                time.sleep(0.001)
                assert inside[-1] == number

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert len(inside) == 40


def test_a_directory_that_cannot_be_written_is_found_out_before_measuring(
    besa: Besa, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(0, monkeypatch)  # no block is reached
    (pruned / "file").write_text("")
    outcome = besa(*EVALUATION, "--model", pruned / "besa-run" / "pruned", "--run", "file")
    assert outcome.code == 1
    assert "cannot write file" in outcome.err


def test_a_stage_that_was_changed_is_measured_when_it_is_named(besa: Besa, pruned: Path) -> None:
    first = json.loads(besa(*EVALUATION).out)["results"]
    shard = sorted(Path("besa-run", "pruned").glob("model-*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file({**tensors, name: tensors[name] * 3}, shard, metadata={"format": "pt"})
    refused = besa(*EVALUATION)
    assert refused.code == 1
    assert "is damaged or was changed since it was made" in refused.err
    assert "--model besa-run/pruned" in refused.err
    second = json.loads(besa(*EVALUATION, "--model", "besa-run/pruned").out)["results"]
    assert all(one["perplexity"] != other["perplexity"] for one, other in zip(first, second, strict=True))


def test_progress_without_a_terminal_counts_the_head(besa: Besa, pruned: Path) -> None:
    lines = besa(*EVALUATION, "--no-baseline").err.splitlines()
    title = "text-1.txt, text-2.txt, wanda 50.00 %: step"
    assert [line.split("  ")[0] for line in lines] == [
        f"{title} 1/3 (block 1/2)",
        f"{title} 2/3 (block 2/2)",
        f"{title} 3/3 (head)",
    ]


def overflowing(directory: Path) -> Path:
    """A model whose logits float16 does not hold, nor those of any text; its hidden states it does."""
    model = tiny_models.built(tiny_models.config("llama"))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(directory)
    return tiny_models.add_tokenizer(directory)


def test_a_perplexity_that_is_no_number_is_an_error_and_never_kept(besa: Besa, workplace: Path) -> None:
    directory, text = overflowing(workplace / "model"), workplace / "words.txt"
    text.write_text(joined(text_of().text))
    words = ("--model", directory, "--seqlen", 16, "--run", "run")
    outcome = besa("eval", "ppl", text, *words, "--dtype", "float16")
    assert outcome.code == 1
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    for word in (str(directory), "words", "a loss of nan", "in float16"):
        assert word in line
    assert "hint: compute with --dtype float32" in outcome.err
    assert not list((workplace / "run").rglob("ppl-*"))
    assert besa("eval", "ppl", text, *words, "--dtype", "float32").code == 0
    assert len(list((workplace / "run").rglob("ppl-*.json"))) == 1


def test_a_result_that_is_no_number_is_measured_again(besa: Besa, model: Path, workplace: Path) -> None:
    """An earlier version kept such results."""
    (workplace / "words.txt").write_text(joined(text_of().text))
    words = (
        "eval",
        "ppl",
        "words.txt",
        "--model",
        model,
        "--seqlen",
        16,
        "--dtype",
        "float32",
        "--run",
        "run",
        "--json",
    )
    first = besa(*words)
    (file,) = (workplace / "run").rglob("ppl-*.json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "nll": math.nan, "perplexity": math.nan}))
    again = besa(*words)
    assert (again.code, json.loads(again.out)) == (0, json.loads(first.out))
    assert json.loads(file.read_text()) == record


def test_losses_that_are_no_numbers_are_not_gone_on_from(besa: Besa, model: Path, workplace: Path) -> None:
    job = measurement(model, text_of())
    with pytest.raises(BesaError, match=r"gives a loss of nan for tokens of words.txt in float32"):
        job.result([(1.0, 15), (math.nan, 15)])
    with pytest.raises(BesaError, match=r"a loss of inf for tokens of words.txt in float32"):
        job.result([(math.inf, 15)])
    whole = perplexity.PerplexityRun([job])
    list(whole)
    resumed = perplexity.PerplexityRun([job], [[whole.losses[0][0], (math.nan, 15), *whole.losses[0][2:5]]])
    list(resumed)
    assert resumed.losses == whole.losses
