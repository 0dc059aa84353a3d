"""Log-likelihoods from the block stream are those that lm-eval's own class gives for the model in memory."""

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from support import tiny_models
from support.task_files import words
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import BesaError
from besa_cli.evaluation.zeroshot import fit, harness
from besa_cli.evaluation.zeroshot.streamed import StreamedLM
from besa_cli.system import memory

LONG = 70  # words: more than a tiny model takes


def request(*arguments: str, kind: str = "loglikelihood") -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("made-up", 0, 1))


def requests(count: int = 30) -> list[Instance]:
    """Contexts of all lengths (none, and one that is cut), continuations of several tokens or of one."""
    draw = random.Random(7)
    made = [request("", f" {words(draw)}"), request(words(draw, LONG, LONG), f" {words(draw)}")]
    for _ in range(count):
        context = words(draw, 1, 50)
        made += [request(context, f" {words(draw, 1, 4)}"), request(context, f" {words(draw, 1, 1)}")]
    shared = words(draw, 5, 5)
    return [*made, request(shared, " w7"), request(shared, " w8"), request(f"{shared} ", "w9 w10")]


def tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """As it was saved: for some architectures `AutoTokenizer` takes a class that expects one of its own kind."""
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(directory)
    return made


def made(path: Path, family: str, dtype: torch.dtype = torch.float32, blocks: int = 2) -> Path:
    return tiny_models.add_tokenizer(tiny_models.checkpoint(path, family, dtype=dtype, blocks=blocks))


def in_memory(directory: Path, dtype: str = "float32", batch_size: int = 1) -> HFLM:
    return HFLM(
        pretrained=str(directory), tokenizer=tokenizer(directory), device="cpu", dtype=dtype, batch_size=batch_size
    )


def streamed(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> StreamedLM:
    return StreamedLM(directory, tokenizer(directory), torch.device("cpu"), dtype, **options)


def values(scored: Sequence[tuple[float, bool]]) -> list[float]:
    return [value for value, _ in scored]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_streamed_is_in_memory(family: str, tmp_path: Path) -> None:
    directory = made(tmp_path / "model", family)
    asked = requests()
    expected = in_memory(directory).loglikelihood(asked, disable_tqdm=True)
    found = streamed(directory).loglikelihood(asked)
    assert len(set(values(expected))) > len(asked) // 2  # not all the same, whatever is asked
    assert values(found) == pytest.approx(values(expected), rel=1e-5, abs=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt_neox"])
def test_streamed_in_the_same_batches_is_in_memory_to_the_last_bit(
    family: str, dtype: str, batch_size: int, tmp_path: Path
) -> None:
    directory = made(tmp_path / "model", family, dtype=torch.bfloat16)
    asked = requests()
    expected = in_memory(directory, dtype, batch_size).loglikelihood(asked, disable_tqdm=True)
    found = streamed(directory, getattr(torch, dtype), batch_size=batch_size).loglikelihood(asked)
    assert found == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("model"), "llama", blocks=3)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_whose_length_is_no_round_number(family: str, tmp_path: Path) -> None:
    described = tiny_models.config(family)
    described.max_position_embeddings = 37
    tiny_models.built(described).save_pretrained(tmp_path)
    directory = tiny_models.add_tokenizer(tmp_path)
    asked = requests()
    expected = in_memory(directory).loglikelihood(asked, disable_tqdm=True)
    assert values(streamed(directory).loglikelihood(asked)) == pytest.approx(values(expected), rel=1e-5, abs=1e-5)


def test_whole_texts(model: Path) -> None:
    draw = random.Random(5)
    asked = [request(words(draw, count, count), kind="loglikelihood_rolling") for count in (1, 40, 64, 65, 200)]
    expected = in_memory(model).loglikelihood_rolling(asked, disable_tqdm=True)
    assert streamed(model).loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-5)


def test_each_block_is_loaded_once_a_pass(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests()
    whole = streamed(model).loglikelihood(asked)
    loads: list[int] = []
    present: list[int] = []
    load, drop = Decoder.load, Decoder.drop

    def loaded(self: Decoder, index: int, *arguments: Any) -> Any:
        loads.append(index)
        present.append(sum(not next(block.parameters()).is_meta for block in self.blocks))
        return load(self, index, *arguments)

    monkeypatch.setattr(Decoder, "load", loaded)
    monkeypatch.setattr(Decoder, "drop", lambda self, index: drop(self, index))
    assert streamed(model).loglikelihood(asked) == whole
    assert Counter(loads) == {0: 2, 1: 1, 2: 1}  # the first once more, to see what blocks return
    loads.clear()
    parts = streamed(model, batch_size=1, room=5 * 64 * tiny_models.HIDDEN * 4).loglikelihood(asked)
    assert values(parts) == pytest.approx(values(whole), rel=1e-5)
    turns = loads.count(1)
    assert 3 < turns < 12
    assert loads[1:] == [0, 1, 2] * turns
    assert set(present) == {0}  # nothing else is in memory when a block is loaded


def test_progress_is_told_every_block_of_every_pass(model: Path) -> None:
    seen: list[tuple[int, int]] = []

    @contextmanager
    def watch(steps: int) -> Any:
        yield lambda index, seconds: seen.append((index, steps))

    streamed(model, batch_size=1, room=1, progress=watch).loglikelihood(requests(1)[:2])
    assert seen == [(step, 6) for step in range(6)]


def test_writing_text_is_refused_by_name(model: Path) -> None:
    with pytest.raises(BesaError, match="made-up generates text"):
        streamed(model).generate_until([request("w3", kind="generate_until")])


def test_the_weights_of_a_model_are_counted_in_the_dtype_of_computation(tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path, tied=True, dtype=torch.bfloat16)
    numbers = sum(
        parameter.numel() for parameter in tiny_models.built(tiny_models.config("llama", tied=True)).parameters()
    )
    assert fit.weights(directory, torch.float32) == 4 * numbers
    assert fit.weights(directory, torch.bfloat16) == 2 * numbers
    assert fit.fits(directory, torch.device("cpu"), torch.float32)
    assert memory.available(torch.device("cpu")) > 0


@pytest.mark.parametrize(("free", "fits"), [(100, False), (10**9, True)])
def test_a_model_fits_where_there_is_room_for_its_weights(
    free: int, fits: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda device: free)
    assert fit.fits(model, torch.device("cpu"), torch.float32) == fits


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("1000\n")
    (tmp_path / "current").write_text("400\n")
    monkeypatch.setattr(memory, "_LIMIT", tmp_path / "max")
    monkeypatch.setattr(memory, "_USED", tmp_path / "current")
    assert memory.available(torch.device("cpu")) == 600
    (tmp_path / "max").write_text("max\n")
    assert memory.available(torch.device("cpu")) > 1000


@pytest.mark.parametrize("in_the_whole", [False, True], ids=["streamed", "in-memory"])
def test_scores_that_are_no_numbers_are_no_accuracy(in_the_whole: bool, tmp_path: Path) -> None:
    whole = tiny_models.built(tiny_models.config("llama"))
    with torch.no_grad():
        whole.lm_head.weight.mul_(1e6)
    whole.save_pretrained(tmp_path / "model")
    directory = tiny_models.add_tokenizer(tmp_path / "model")
    lm = streamed(directory, torch.float16)
    if in_the_whole:
        how = {"device": "cpu", "dtype": "float16", "batch_size": "1"}
        lm = harness.in_memory(directory, tokenizer(directory), **how, notify=lambda _: None)
    with pytest.raises(BesaError, match=r"gives logits that are NaN or infinite in float16") as caught:
        lm.loglikelihood(requests(3))
    assert caught.value.hint == "compute with --dtype float32"


def test_room_for_hidden_states_changes_no_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits into a pass depends on what other programs take; products of other shapes round otherwise."""
    directory, finish = made(tmp_path, "llama"), Decoder.finish
    together: dict[tuple[int, ...], int] = {}  # rows that the head takes with an input

    def noted(self: Decoder, hidden: Tensor, tokens: Tensor) -> Tensor:
        together.update({tuple(row): len(tokens) for row in tokens.tolist()})
        return finish(self, hidden, tokens)

    monkeypatch.setattr(Decoder, "finish", noted)
    found = []
    for room in (1, 2_000_000, 1 << 30):
        streamed(directory, room=room).loglikelihood(requests(300))
        found.append(dict(together))
        together.clear()
    assert found[0] == found[1] == found[2]
