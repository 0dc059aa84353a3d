"""KL divergence and most likely tokens of `besa eval ppl` against plain loops over two whole stock models in fp64."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import calls, tiny_models
from support.joined_text import joined
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.evaluation import perplexity, results, token_figures
from besa_cli.evaluation.measurement import Perplexity, PerplexityMeasurement, PerplexitySettings, WindowComparison
from besa_cli.evaluation.plan import plan
from besa_cli.evaluation.texts import EvaluationText
from besa_cli.stream import propagation

Besa = Callable[..., Any]  # conftest.Outcome

TOKENS = 16 * 5 + 7  # five windows of 16, and a partial one


def text_of(tokens: int = TOKENS, seed: int = 5) -> EvaluationText:
    words = " ".join(f"w{number}" for number in tiny_models.tokens(1, tokens, seed=seed)[0].tolist())
    digest = hashlib.sha256(words.encode()).hexdigest()
    return EvaluationText(name=f"words-{seed}.txt", split=None, text=words, digest=digest, source="file")


def measurement(directory: Path, text: EvaluationText, digest: str = "own", **settings: Any) -> PerplexityMeasurement:
    given = PerplexitySettings(**{"seqlen": 16, "device": "cpu", "dtype": "float32", **settings})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    return PerplexityMeasurement(directory, digest, text, tokenizer, "t", given)


def pair(
    directory: Path, dense: Path, *texts: EvaluationText, **settings: Any
) -> tuple[list[PerplexityMeasurement], list[PerplexityMeasurement]]:
    own = [measurement(directory, text, **settings) for text in texts]
    return own, [measurement(dense, text, "dense", **settings) for text in texts]


def compared(directory: Path, dense: Path, *texts: EvaluationText, **settings: Any) -> list[Perplexity]:
    own, others = pair(directory, dense, *(texts or (text_of(),)), **settings)
    run = perplexity.PerplexityRun(own, None, others)
    for _ in run:
        pass
    return run.results()


def loop(directory: Path, dense: Path, text: EvaluationText, stride: int = 16, seqlen: int = 16) -> tuple[float, float]:
    """Mean KL(dense ‖ model) and share of equal most likely tokens, position by position, logits of whole models."""
    ids = torch.tensor(PreTrainedTokenizerFast.from_pretrained(directory)(text.text)["input_ids"])
    own, other = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float64, attn_implementation="eager").eval()
        for each in (directory, dense)
    )
    total, same, counted = 0.0, 0, 0
    for begin in range(0, len(ids) - seqlen + 1, stride):
        window = ids[None, begin : begin + seqlen]
        with torch.no_grad():
            found, expected = (model(window).logits[0].double() for model in (own, other))
        first = 0 if begin == 0 else max(seqlen - 1 - stride, 0)
        for position in range(first, seqlen - 1):
            p, q = (logits[position].softmax(-1).tolist() for logits in (expected, found))
            total += math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            same += p.index(max(p)) == q.index(max(q))
            counted += 1
    return total / counted, same / counted


def near(directory: Path, dense: Path, *, strength: float = 0.2, outside: bool = False) -> Path:
    """A copy of a checkpoint whose blocks (and other weights if `outside`) differ a little."""
    made = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if outside or ".layers." in name:
                parameter.add_(strength * parameter.std() * torch.randn_like(parameter))
    made.save_pretrained(directory)
    return tiny_models.add_tokenizer(directory)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.add_tokenizer(tiny_models.checkpoint(tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="module")
def model(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return near(tmp_path_factory.mktemp("model"), dense)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("outside", [False, True], ids=["same-head", "other-head"])
def test_both_figures_are_those_of_the_whole_models(outside: bool, family: str, tied: bool, tmp_path: Path) -> None:
    dense = tiny_models.add_tokenizer(tiny_models.checkpoint(tmp_path / "dense", family, tied=tied))
    model = near(tmp_path / "model", dense, outside=outside)
    (found,) = compared(model, dense, batch_size=2)
    divergence, share = loop(model, dense, text_of())
    assert found.kl == pytest.approx(divergence, rel=1e-4)
    assert found.same_token == share
    assert found.baseline_digest == "dense"
    assert divergence > 1e-3


@pytest.mark.parametrize("stride", [1, 5, 15, 16])
def test_overlapping_windows_compare_each_token_once(stride: int, dense: Path, model: Path) -> None:
    text = text_of(60)
    (found,) = compared(model, dense, text, stride=stride, batch_size=3)
    divergence, share = loop(model, dense, text, stride)
    assert found.kl == pytest.approx(divergence, rel=1e-4)
    assert found.same_token == share


def test_the_divergence_is_from_the_dense_model_and_not_the_other_way_round(dense: Path, model: Path) -> None:
    (one,), (other,) = compared(model, dense), compared(dense, model)
    assert one.kl != pytest.approx(other.kl, rel=1e-3)
    assert one.same_token == other.same_token


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_against_itself(dtype: str, dense: Path) -> None:
    (found,) = compared(dense, dense, dtype=dtype)
    assert (found.kl, found.same_token) == (0.0, 1.0)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("head_tokens", [1, 4, 512])
@pytest.mark.parametrize("at_once", [2, 6, 100])
def test_neither_batches_nor_portions_nor_the_heads_parts_matter(
    at_once: int, head_tokens: int, batch_size: int, dense: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text_of(70, 1), text_of(16, 2), text_of(95, 3)]
    plain = [each for text in texts for each in compared(model, dense, text)]
    monkeypatch.setattr(token_figures, "HEAD_TOKENS", head_tokens)
    monkeypatch.setattr(perplexity, "_CPU_TOKENS", at_once * 16)
    found = compared(model, dense, *texts, batch_size=batch_size)
    for one, other in zip(found, plain, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-5)
        assert one.same_token == other.same_token
        assert one.nll == pytest.approx(other.nll, rel=1e-6)
    if (batch_size, head_tokens) == (1, 512):  # the very same sums, in whatever portions
        assert found == plain


@pytest.mark.parametrize("outside", [False, True])
def test_losses_are_the_bits_of_each_model_alone_and_nothing_passes_twice(
    outside: bool, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = near(tmp_path / "model", dense, outside=outside)
    own, others = pair(model, dense, text_of(70, 1), text_of(90, 2), batch_size=2)
    alone = [perplexity.measure(jobs) for jobs in (own, others)]
    monkeypatch.setattr(perplexity, "_CPU_TOKENS", 4 * 16)
    passed, embedded, finished = [0], [0], [0]
    for owner, name, count in (
        (Decoder, "forward", passed),
        (propagation, "embed", embedded),
        (Decoder, "finish", finished),
    ):

        def note(*given: Any, count: list[int] = count, name: str = name) -> None:
            count[0] += 1 if name == "finish" else len(given[1 if name == "embed" else 3])

        monkeypatch.setattr(owner, name, calls.noting(getattr(owner, name), note))
    run = perplexity.PerplexityRun(own, None, others)
    passed[0] = 0  # without the trial of the first block
    for _ in run:
        pass
    windows = sum(len(job.windows) for job in own)
    assert (passed[0], embedded[0], finished[0]) == (2 * 2 * windows, 2 * windows, 2 * windows)
    stripped = [replace(each, kl=None, same_token=None, baseline_digest=None) for each in run.results()]
    assert [stripped, run.baseline_results()] == alone


def test_the_steps_are_named_and_counted(dense: Path, model: Path) -> None:
    own, others = pair(model, dense, text_of())
    run = perplexity.PerplexityRun(own, None, others)
    steps = [(step.index, step.steps, step.phase, step.measured) for step in run]
    assert steps == [
        (0, 5, "block 1/2 of the baseline", ()),
        (1, 5, "block 2/2 of the baseline", ()),
        (2, 5, "block 1/2", ()),
        (3, 5, "block 2/2", ()),
        (4, 5, "head", (0,)),
    ]
    assert len(run.work) == 5
    alone = perplexity.PerplexityRun(own).work
    assert run.work == [*alone[:2], *alone[:2], 2 * alone[2]]


@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_a_run_goes_on_from_what_is_known(done: int, dense: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, others = pair(model, dense, text_of(40, 1), text_of(60, 2))
    monkeypatch.setattr(perplexity, "_CPU_TOKENS", 2 * 16)  # a window a portion
    whole = perplexity.PerplexityRun(own, None, others)
    kept: list[tuple[Any, Any]] = [([[], []], [[], []])]
    for step in whole:
        if step.measured:
            kept.append(([list(each) for each in whole.losses], [list(each) for each in whole.comparisons]))
    losses, comparisons = kept[done]
    rest = perplexity.PerplexityRun(own, losses, others, comparisons)
    assert rest.steps == (5 - done) * 5
    assert sum(1 for _ in rest) == rest.steps
    assert (rest.results(), rest.baseline_results()) == (whole.results(), whole.baseline_results())
    again = perplexity.PerplexityRun(own, whole.losses, others, [[], []])  # losses without comparisons
    assert again.steps == 25
    assert again.losses == [[], []]


# --- what is the same outside the blocks is in memory once


def test_a_head_that_is_the_same_is_loaded_once(dense: Path, model: Path, tmp_path: Path) -> None:
    decoder = Decoder(model, torch.device("cpu"), torch.float32)
    assert decoder.has_same_outside(dense)
    own, others = pair(model, dense, text_of())
    run = perplexity.PerplexityRun(own, None, others)
    for _ in run:
        pass
    assert run._other.embedding_bytes() == 0
    assert run._other.head_bytes() == run._decoder.weights.nbytes(["lm_head.weight"])  # not loaded
    assert run._decoder.head_bytes() == 0


@pytest.mark.parametrize("change", ["head", "norm", "dtype", "config", "more"])
def test_what_is_not_the_same_is_found(change: str, dense: Path, tmp_path: Path) -> None:
    other = near(tmp_path / "other", dense)
    tensors = load_file(other / "model.safetensors")
    if change == "head":
        tensors["lm_head.weight"][-1, -1] += 1
    elif change == "norm":
        tensors["model.norm.weight"][3] *= 1.001
    elif change == "dtype":
        tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    elif change == "more":
        tensors["lm_head.bias"] = torch.zeros(tiny_models.VOCABULARY)
    else:
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.125}))
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert not Decoder(other, torch.device("cpu"), torch.float32).has_same_outside(dense)
    (found,) = compared(other, dense)
    assert found.kl == pytest.approx(loop(other, dense, text_of())[0], rel=1e-4)


def test_a_portion_of_two_models_has_half_the_windows(
    dense: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, others = pair(model, dense, text_of(16 * 8))
    monkeypatch.setattr(perplexity, "_CPU_TOKENS", 4 * 16)
    assert len(perplexity.PerplexityRun(own).portions) == 2
    assert len(perplexity.PerplexityRun(own, None, others).portions) == 4


def test_the_forecast_counts_both_models(dense: Path, model: Path, tmp_path: Path) -> None:
    own, others = pair(model, dense, text_of())
    one, both = (perplexity.PerplexityRun(own, None, baseline).forecast(tmp_path) for baseline in ([], others))
    states = 5 * 16 * tiny_models.HIDDEN * 4
    assert both.memory - one.memory >= states
    assert (both.left, both.blocks) == (2, 2)
    assert both.seconds > 0


def test_a_divergence_that_is_no_number_is_an_error(dense: Path) -> None:
    job = measurement(dense, text_of())
    for value in (math.inf, math.nan):
        with pytest.raises(BesaError, match=rf"gives a divergence of {value} for tokens of words-5.txt in float32"):
            job.result([(1.0, 15)], [WindowComparison(1.0, value, 3)], "dense")
    least = job.result([(1.0, 15)], [WindowComparison(1.0, -1e-9, 15)], "dense")
    assert (least.kl, least.same_token) == (0.0, 1.0)  # rounding may come out below zero


# --- stored results


def figures(kl: float | None, digest: str | None) -> dict[str, Any]:
    return {"kl": kl, "same_token": None if kl is None else 0.5, "baseline_digest": digest}


def test_a_plan_compares_what_is_not_compared_yet(dense: Path, model: Path) -> None:
    own, others = pair(model, dense, *(text_of(40, seed) for seed in range(1, 7)))
    plain = {job.file: job.result([(1.0, 15)] * 2) for job in (*own, *others)}
    del plain[own[0].file], plain[others[0].file]  # neither is stored
    del plain[own[1].file]  # the parent alone
    plain[own[3].file] = replace(plain[own[3].file], **figures(0.1, "dense"))
    plain[own[4].file] = replace(plain[own[4].file], **figures(0.1, "dense"))
    del plain[others[4].file]  # the comparison, but not the parent
    plain[own[5].file] = replace(plain[own[5].file], **figures(0.1, "another"))
    made = plan(own, others, lambda job: plain.get(job.file))
    assert (made.alone, made.together, made.baseline_alone) == ([], [0, 1, 2, 5], [4])
    assert (sorted(made.stored), sorted(made.stored_baseline), made.replaced) == ([3, 4], [1, 2, 3, 5], [2, 5])
    assert made.passes_baseline
    assert made.runs() == [(made.of([0, 1, 2, 5]), made.baseline_of([0, 1, 2, 5])), (made.baseline_of([4]), [])]
    without = plan(own, [], lambda job: plain.get(job.file))
    assert (without.alone, without.together, without.baseline_alone) == ([0, 1], [], [])
    assert not without.passes_baseline


def test_windows_of_other_tokens_are_not_compared(dense: Path, model: Path) -> None:
    own = [measurement(model, text_of(40, 1))]
    others = [measurement(dense, text_of(40, 2), "dense")]
    made = plan(own, others, lambda job: None)
    assert (made.alone, made.together, made.baseline_alone) == ([0], [], [0])


def test_results_without_the_figures_are_read(dense: Path, model: Path, tmp_path: Path) -> None:
    (found,) = compared(model, dense)
    file = tmp_path / "ppl.json"
    results.save(found, file, {"name": "m"})
    assert results.load(file) == found
    record = json.loads(file.read_text())
    for name in ("kl", "same_token", "baseline_digest"):
        del record[name]
    file.write_text(json.dumps(record))
    older = results.load(file)
    assert older == replace(found, kl=None, same_token=None, baseline_digest=None)
    for name, value in (("kl", -1.0), ("kl", "0.5"), ("same_token", 1.5)):
        file.write_text(json.dumps({**record, name: value}))
        with pytest.raises(BesaError, match=name):
            results.load(file)


def test_windows_are_kept_with_their_comparisons(model: Path, tmp_path: Path) -> None:
    store = results.Results(tmp_path / "eval")
    job = measurement(model, text_of())
    made = [WindowComparison(1.5, 0.25, 3), WindowComparison(2.5, -1e-9, 0)]
    store.save_losses(job, [(1.0, 15), (2.0, 15)], made, "dense")
    assert store.load_comparisons(job, "dense") == made
    assert store.load_comparisons(job, "another") == []
    assert store.load_losses(job) == [(1.0, 15), (2.0, 15)]
    store.save_losses(job, [(1.0, 15)])  # as older versions write them
    assert (store.load_losses(job), store.load_comparisons(job, "dense")) == ([(1.0, 15)], [])


EVALUATION = ("eval", "ppl", "words.txt", "--seqlen", 16, "--dtype", "float32")


@pytest.fixture
def pruned(besa: Besa, dense: Path, workplace: Path) -> Path:
    """A working directory with a finished run and a text."""
    (workplace / "words.txt").write_text(joined(text_of().text))
    tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(2, 12))
    drawn = ("--data", "rows.jsonl", "--samples", 2, "--seqlen", 12)
    outcome = besa("prune", "--model", dense, "--method", "wanda", "--dtype", "float32", *drawn)
    assert outcome.code == 0, outcome.err
    return workplace


def row_of(outcome: Any) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    (row,) = json.loads(outcome.out)["results"]
    found: dict[str, Any] = row
    return found


def counting(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories whose first block portions pass, in order."""
    seen: list[Path] = []

    def note(decoder: Decoder, index: int, *rest: Any) -> None:
        if index == 0:
            seen.append(decoder.weights.directory)

    monkeypatch.setattr(propagation, "advance", calls.noting(propagation.advance, note))
    return seen


def stored(name: str) -> dict[str, Any]:
    """The stored result of the model of this name."""
    files = list(Path("besa-run", "eval").glob("*.json"))
    (record,) = [
        record for record in map(json.loads, (file.read_text() for file in files)) if record["model"]["name"] == name
    ]
    found: dict[str, Any] = record
    return found


STAGE = "wanda 50.00 %"


def test_the_command_gives_the_figures_and_stores_them(
    besa: Besa, pruned: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = counting(monkeypatch)
    row = row_of(besa(*EVALUATION, "--json"))
    divergence, share = loop(Path("besa-run", "pruned"), dense, text_of())
    assert row["kl"] == pytest.approx(divergence, rel=1e-4)
    assert row["same_token"] == share
    assert row["baseline_digest"] == row["dense"]["model_digest"]
    assert (row["dense"]["kl"], row["dense"]["same_token"]) == (None, None)
    assert len(seen) == 2
    for name in ("kl", "same_token", "baseline_digest"):
        assert stored(STAGE)[name] == row[name]
        assert stored("dense")[name] is None
    again = besa(*EVALUATION, "--json")
    assert row_of(again) == row
    assert len(seen) == 2  # taken from the files
    table = besa(*EVALUATION).out.splitlines()
    assert table[0].split()[-5:] == ["KL", "to", "dense", "same", "token"]
    assert f"{row['kl']:.4f}" in table[2]
    assert f"{100 * share:.2f} %" in table[2]
    compared = besa("eval", "compare", "besa-run")
    assert "words.txt KL, 5 × 16" in compared.out
    assert f"{row['kl']:.4f}" in compared.out
    shown = json.loads(besa("show", "besa-run", "--json").out)["evaluations"]
    assert row["kl"] in [each["kl"] for each in shown.values()]


def test_without_the_baseline_there_are_no_figures_whatever_is_stored(besa: Besa, pruned: Path) -> None:
    for _ in range(2):
        outcome = besa(*EVALUATION, "--no-baseline", "--json")
        row = row_of(outcome)
        assert (row["kl"], row["same_token"], row["baseline_digest"], row["dense"]) == (None, None, None, None)
        assert "KL" not in besa(*EVALUATION, "--no-baseline").out
        besa(*EVALUATION)


def test_both_pass_again_where_the_figures_are_missing(
    besa: Besa, pruned: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = row_of(besa(*EVALUATION, "--json", "--run", "besa-run"))
    for file in Path("besa-run", "eval").glob("*.json"):  # as an older version left them
        record = json.loads(file.read_text())
        file.write_text(json.dumps({name: value for name, value in record.items() if name not in figures(None, None)}))
    before = stored("dense")
    seen = counting(monkeypatch)
    outcome = besa(*EVALUATION, "--json")
    assert row_of(outcome) == expected
    assert [each.resolve() for each in seen] == [dense.resolve(), Path("besa-run", "pruned").resolve()]
    assert "lacks the KL divergence from dense" in outcome.err
    assert "dense: passes again to be compared with; --no-baseline leaves that out" in outcome.err
    assert stored("dense") == before  # its result is not written again
    assert stored(STAGE)["kl"] == expected["kl"]


def test_a_stored_dense_result_is_kept_and_the_figures_are_there(
    besa: Besa, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = row_of(besa(*EVALUATION, "--json"))
    for file in Path("besa-run", "eval").glob("*.json"):
        if json.loads(file.read_text())["model"]["name"] == STAGE:
            file.unlink()
    seen = counting(monkeypatch)
    assert row_of(besa(*EVALUATION, "--json")) == expected
    assert len(seen) == 2
    for file in Path("besa-run", "eval").glob("*.json"):
        if json.loads(file.read_text())["model"]["name"] == "dense":
            file.unlink()
    assert row_of(besa(*EVALUATION, "--json")) == expected
    assert len(seen) == 3  # the dense model alone


def test_an_interruption_keeps_comparisons_beside_an_older_result(
    besa: Besa, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_of(besa(*EVALUATION, "--no-baseline", "--json"))
    monkeypatch.setattr(perplexity, "_CPU_TOKENS", 2 * 16)  # a window a portion
    advance, count = propagation.advance, [0]

    def interrupted(decoder: Decoder, index: int, *rest: Any) -> None:
        count[0] += index == 0
        if count[0] > 5:
            raise KeyboardInterrupt
        advance(decoder, index, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propagation, "advance", interrupted)
        assert besa(*EVALUATION).code == 130
    seen = counting(monkeypatch)
    row = row_of(besa(*EVALUATION, "--json"))
    assert len(seen) == 6  # three windows are left, two were kept
    assert row["kl"] > 0
    assert not list(Path("besa-run", "eval").glob("*.windows"))


def test_a_parent_that_was_changed_is_not_compared_with(besa: Besa, pruned: Path, dense: Path) -> None:
    manifest = Path("besa-run", "pruned", "besa.json")
    record = json.loads(manifest.read_text())
    other = near(pruned / "other", dense)
    record["model"]["directory"] = str(other)
    manifest.write_text(json.dumps(record))
    refused = besa(*EVALUATION)
    assert refused.code == 1
    assert "has changed since the stage was made from it" in refused.err
    assert "--no-baseline" in refused.err
    assert besa(*EVALUATION, "--no-baseline").code == 0


def test_the_forecast_is_of_one_run_for_both(besa: Besa, pruned: Path) -> None:
    before = tiny_models.files(pruned, without=())
    said = json.loads(besa(*EVALUATION, "--dry-run", "--json").out)
    assert (said["left"], said["blocks"]) == (2, 2)
    assert tiny_models.files(pruned, without=()) == before
    assert besa(*EVALUATION).code == 0
    done = json.loads(besa(*EVALUATION, "--dry-run", "--json").out)
    assert done["left"] == 0


def test_the_exact_dense_logits_are_not_kept(dense: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more logits exist at once than those of the positions taken together, in either model."""
    monkeypatch.setattr(token_figures, "HEAD_TOKENS", 4)
    sizes: list[int] = []
    finish = Decoder.finish

    def noted(self: Decoder, hidden: Tensor, tokens: Tensor, part: slice | None = None, **how: Any) -> Tensor:
        logits = finish(self, hidden, tokens, part, **how)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(Decoder, "finish", noted)
    compared(model, dense, batch_size=5)
    assert max(sizes) == 4 * tiny_models.VOCABULARY
