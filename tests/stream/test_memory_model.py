"""The model of memory: against tensors counted by hand, and how a command is placed within a limit."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_models

from besa_cli.decoder.decoder import Decoder
from besa_cli.errors import UsageError
from besa_cli.jobs import prune, quantize
from besa_cli.ops import attention
from besa_cli.pruners import PRUNERS
from besa_cli.quantizers import QUANTIZERS
from besa_cli.stream import memory_model, windows
from besa_cli.stream.memory_model import Demand, MemoryUse, Shape

SHAPE = Shape(
    blocks=1,
    loaded=1_100,
    weights=1_000,
    largest=400,
    rows=(20, 30),
    columns=(20, 20),
    hidden=20,
    widest=30,
    source=2.0,
    rest=500,
    embedding=0,
    vocabulary=64,
    dtype=torch.float32,
)


def test_tuning_holds_one_block_or_all_of_them() -> None:
    """Beside a block of 1,100 parameters in fp32 and as stored, with its gradient, what is learned of its weights."""
    tune_demand = partial(memory_model.tune_demand, SHAPE, tokens=100, passing=10, seqlen=10)
    of = {name: tune_demand(blocks, kept=kept, resident=resident) for name, blocks, kept, resident in (
        ("one", 5, 2_000, False), ("more blocks", 6, 2_000, False), ("more kept", 5, 3_000, False),
        ("few kept", 5, 600, False), ("all", 5, 2_000, True),
    )}  # fmt: skip
    phase = {name: demand.phases["tuning"] for name, demand in of.items()}
    assert phase["all"] - phase["one"] == 4 * 1_100 * 4
    assert phase["more blocks"] - phase["one"] == 2 * 10 * 20 * 4  # the hidden states of a sample, and their gradient
    assert phase["more kept"] == phase["one"]
    assert phase["one"] - phase["few kept"] == 400 * 16
    assert of["more kept"].hidden - of["one"].hidden == 1_000 * 16
    assert phase["one"] > 500 + 1_100 * 6 + 1_000 * 4 + 1_000 * 16


@pytest.mark.parametrize(("option", "blocks"), [("block", 1), ("2", 2), ("attn-mlp", 1)])
def test_the_sizes_are_those_of_the_tensors(option: str, blocks: int, tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path, "llama", blocks=3, dtype=torch.bfloat16)
    decoder = Decoder(directory, torch.device("cpu"), torch.float32)
    found = memory_model.shape(decoder, windows.segments(decoder, option))
    tensors = tiny_models.weights(directory)
    inside = {name: tensor for name, tensor in tensors.items() if ".layers." in name}
    assert found.loaded == sum(tensor.numel() for tensor in inside.values()) * blocks // 3
    assert found.source == 2.0
    assert found.rest == sum(tensor.nbytes for name, tensor in tensors.items() if name not in inside)
    assert found.blocks == blocks
    matrices = [tensor for name, tensor in inside.items() if ".layers.0." in name and tensor.dim() == 2]
    if option != "attn-mlp":
        assert found.weights == blocks * sum(tensor.numel() for tensor in matrices)
    assert found.largest == max(tensor.numel() for tensor in matrices)
    assert found.embedding == 2 * tensors["model.embed_tokens.weight"].nbytes
    assert found.widest == 54
    assert found.streams == (4 if option == "attn-mlp" else 2)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_there_when_logits_are_wanted_and_not_before(tied: bool, tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path, "llama", tied=tied)
    decoder = Decoder(directory, torch.device("cpu"), torch.float32)
    head = tiny_models.weights(directory).get("lm_head.weight", torch.empty(0))
    assert decoder.head_bytes() == head.nbytes
    assert tied or decoder.model.get_output_embeddings().weight.is_meta
    whole = tiny_models.built(tiny_models.config("llama", tied=tied))
    tokens = tiny_models.tokens(2, 9)
    with torch.no_grad():
        expected = whole(tokens)
        hidden = whole(tokens, output_hidden_states=True).hidden_states[0]
        for index in range(len(decoder)):
            decoder.load(index)
            hidden = decoder.forward(index, hidden, tokens)
            decoder.drop(index)
        torch.testing.assert_close(decoder.finish(hidden, tokens), expected.logits)
    assert decoder.head_bytes() == 0


def requests() -> list[Any]:
    """Every method there is, and what changes what it holds."""
    plain = [prune.request(method=name, options={}) for name in PRUNERS]
    plain += [quantize.request(method=name, options={}) for name in QUANTIZERS]
    chosen: list[dict[str, Any]] = [{"bits": 4}, {"importance": "sparsegpt"}, {"candidates": 1000, "batch_size": 3}]
    return plain + [prune.request(method="besa", options=options) for options in chosen]


@pytest.mark.parametrize("request_", requests(), ids=lambda asked: f"{asked.method.name}-{asked.method.options}")
def test_what_must_be_there_is_counted_in_every_phase(request_: Any) -> None:
    held = request_.method.options.memory_use()
    found = memory_model.prune_demand(SHAPE, held, tokens=70, passing=7, learning=7)
    waiting = attention.KEPT  # probabilities of attention, at most
    inputs, targets = torch.empty(70, 20), torch.empty(70, 20)
    assert found.hidden == inputs.nbytes + targets.nbytes
    block, source, masks = torch.empty(1_100), torch.empty(1_100, dtype=torch.bfloat16), torch.empty(1_000).bool()
    always = block.nbytes + source.nbytes
    gram = (
        torch.empty(20, 20)
        if request_.method.name in ("sparsegpt", "gptq")
        or request_.method.options.record().get("importance") == "sparsegpt"
        else None
    )
    second = 0 if gram is None else gram.nbytes
    assert found.phases["statistics"] > always + second
    assert found.phases["deciding"] > always + masks.nbytes + 3 * second  # it, its factor, and one in work
    stored, widest = torch.empty(1_000, dtype=torch.bfloat16), torch.empty(7, 30)
    changed = torch.empty(1_000) if request_.grid or request_.method.name == "sparsegpt" else torch.empty(0)
    assert found.phases["propagation"] > always + stored.nbytes + masks.nbytes + changed.nbytes + widest.nbytes
    assert ("learning" in found.phases) == (request_.method.name in ("besa", "clip"))
    if request_.method.name == "besa":
        ranks, mixtures = torch.empty(1_000, dtype=torch.int16), torch.empty(50, request_.method.options.candidates)
        learned = ranks.nbytes + 4 * mixtures.nbytes  # logits, gradients, two moments
        grids = torch.empty(1_000) if request_.grid else torch.empty(0)
        assert found.phases["learning"] > always + learned + grids.nbytes + waiting
    if request_.method.name in ("wanda", "magnitude"):
        scores = torch.empty(1_000)
        assert found.phases["deciding"] > always + scores.nbytes + masks.nbytes
    assert found.peak() >= max(found.phases.values()) + found.hidden
    assert found.peak(overlapping=True) - found.peak() >= 2 * source.nbytes


def test_measuring_holds_the_inputs_of_all_blocks_and_what_a_pass_needs() -> None:
    found = memory_model.effects_demand(SHAPE, blocks=9, tokens=70, passing=7, seqlen=7, head=11)
    assert found.hidden == 9 * torch.empty(70, 20).nbytes + 3 * torch.empty(70, 20).nbytes
    block, source, ranks = torch.empty(1_100), torch.empty(1_100, dtype=torch.bfloat16), torch.empty(1_000).short()
    pruned, logits = torch.empty(1_000), torch.empty(7, SHAPE.vocabulary)
    assert found.phases["budget"] > block.nbytes + source.nbytes + ranks.nbytes + pruned.nbytes
    assert found.phases["head"] >= 11 + 3 * logits.nbytes
    wanda = prune.request(method="wanda", options={}).method.options.memory_use()
    pruning = memory_model.prune_demand(SHAPE, wanda, tokens=70, passing=7)
    joined = memory_model.larger(found, pruning)
    assert joined.phases == {**found.phases, **pruning.phases}
    assert joined.hidden == found.hidden > pruning.hidden


@pytest.mark.parametrize(("blocks", "kept"), [(1, 1), (2, 2), (3, 1), (9, 1)])
def test_activations_are_kept_for_two_blocks_at_most(blocks: int, kept: int) -> None:
    held = prune.request(options={"batch_size": 3}).method.options.memory_use()
    shape = replace(SHAPE, blocks=blocks)
    few, many = (memory_model.prune_demand(shape, held, tokens=70, passing=7, learning=each) for each in (7, 8))
    token = many.phases["learning"] - few.phases["learning"]
    one = memory_model.prune_demand(SHAPE, held, tokens=70, passing=7, learning=8).phases["learning"]
    alone = one - memory_model.prune_demand(SHAPE, held, tokens=70, passing=7, learning=7).phases["learning"]
    between = torch.empty(20).nbytes  # a hidden state at each boundary
    assert token == kept * (alone - between) + blocks * between


def test_the_kept_activations_are_those_of_a_real_window(tmp_path: Path) -> None:
    """Bytes that autograd keeps for a step of `--window 1` to 4, against the number of blocks that is counted."""
    directory = tiny_models.checkpoint(tmp_path, "llama", blocks=4, dtype=torch.float32)
    decoder = Decoder(directory, torch.device("cpu"), torch.float32)
    for index in range(4):
        decoder.load(index)
    saved = []
    for blocks in (1, 2, 3, 4):
        span = windows.WholeBlocks(decoder, range(blocks))
        own = {name: linear.weight.detach().clone().requires_grad_() for name, linear in span.linears.items()}
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            span.forward(torch.randn(1, 9, decoder.config.hidden_size), tiny_models.tokens(1, 9), own)
        saved.append(sum(sizes))
    assert saved[1] > 1.8 * saved[0]
    assert saved[3] < saved[2] * 1.5 < saved[1]


def test_no_phase_but_its_own_holds_the_embedding() -> None:
    wanda = prune.request(method="wanda", options={}).method.options.memory_use()
    without = memory_model.prune_demand(SHAPE, wanda, tokens=70, passing=7)
    freed = memory_model.prune_demand(replace(SHAPE, embedding=90), wanda, tokens=70, passing=7)
    for phase, held in without.phases.items():
        assert freed.phases[phase] == held - (0 if phase == "embeddings" else 90)
    large = memory_model.prune_demand(replace(SHAPE, embedding=10**9, rest=2 * 10**9), wanda, tokens=70, passing=7)
    assert large.phase == "embeddings"
    assert set(large.phases.values()) == {0, 2 * 10**9}


@given(
    tokens=st.integers(1, 10**6),
    passing=st.integers(1, 10**5),
    more=st.integers(1, 10**5),
    held=st.sampled_from([request.method.options.memory_use() for request in requests()]),
)
def test_more_tokens_never_take_less(tokens: int, passing: int, more: int, held: MemoryUse) -> None:
    few = memory_model.prune_demand(SHAPE, held, tokens=tokens, passing=passing)
    many = memory_model.prune_demand(SHAPE, held, tokens=tokens + more, passing=passing + more)
    assert many.peak() >= few.peak()
    assert many.peak() - many.hidden == many.peak(in_files=True)
    measured = [
        memory_model.eval_demand(SHAPE, tokens=each, passing=passing, seqlen=9).peak()
        for each in (tokens, tokens + more)
    ]
    assert measured[1] > measured[0]


def test_the_head_is_held_beside_blocks_where_a_second_portion_follows() -> None:
    sized = partial(memory_model.eval_demand, SHAPE, tokens=9, passing=9, seqlen=9)
    without = sized()
    for portions, beside in ((1, 0), (2, 5_000)):
        found = sized(head=5_000, portions=portions)
        assert found.phases["head"] == without.phases["head"] + 5_000
        assert found.phases["blocks"] == without.phases["blocks"] + beside


def test_a_comparison_holds_two_streams_and_the_logits_of_both() -> None:
    sized = partial(memory_model.eval_demand, SHAPE, tokens=1000, passing=9, seqlen=9, head=5_000)
    one, both = sized(), sized(compared=True)
    assert both.hidden == 2 * one.hidden
    assert both.phases["head"] - one.phases["head"] == 9 * SHAPE.vocabulary * 4
    assert both.phases["blocks"] == one.phases["blocks"]


def demand(batch: int) -> Demand:
    return Demand(phases={"statistics": 100 * batch, "deciding": 250}, hidden=1_000)


def test_the_first_way_that_fits_is_taken() -> None:
    own = demand(8).peak()
    resident = 10**6
    asked = [(None, 8, False), (own, 8, False), (own - 1, 8, True), (own - 1_000, 8, True), (own - 1_001, 4, True)]
    for limit, batch, in_files in [*asked, (own - 1_000 - 550, 2, True)]:
        found = memory_model.plan(limit and limit + resident, resident, 8, demand)
        assert (found.batch, found.in_files) == (batch, in_files)
        assert limit is None or found.peak <= limit + resident
    assert found.phase == "deciding"


def test_overlapping_is_given_up_before_anything_else() -> None:
    def both(batch: int) -> Demand:
        return Demand(phases={"statistics": 100 * batch}, hidden=1_000, beside=70)

    own = both(8).peak()
    assert both(8).peak(overlapping=True) == own + 70
    asked = [(None, True, False), (own + 70, True, False), (own + 69, False, False), (own - 1, False, True)]
    for limit, overlapping, in_files in asked:
        found = memory_model.plan(limit, 0, 8, both, overlapping=True)
        assert (found.overlapping, found.in_files, found.batch) == (overlapping, in_files, 8)
        assert limit is None or found.peak <= limit
    assert not memory_model.plan(None, 0, 8, both).overlapping


@pytest.mark.parametrize("windows", [True, False])
def test_what_fits_in_no_way_is_refused_with_what_would(windows: bool) -> None:
    with pytest.raises(UsageError, match=r"--max-memory 0.1GB is too little.* about 0.2 GB") as caught:
        memory_model.plan(10**8, 10**8, 8, demand, windows=windows)
    assert ("--window" in caught.value.hint) == windows  # only prune has it
    with pytest.raises(UsageError):  # a stage that was begun keeps its batch
        memory_model.plan(demand(8).peak() - 1_001, 0, 8, demand, fixed=True)


def test_the_check_on_held_out_samples_is_counted() -> None:
    use = prune.request(method="besa", options={}).method.options.memory_use()
    without = memory_model.prune_demand(SHAPE, use, tokens=70, passing=7, learning=7)
    found = memory_model.prune_demand(SHAPE, use, tokens=70, passing=7, learning=7, held_out=14, head=5_000)
    streams = 2 * 3 * torch.empty(14, 20).nbytes  # and their copies while these are written
    uniform = torch.empty(1_000, dtype=torch.bfloat16).nbytes
    for phase, held in without.phases.items():
        assert found.phases[phase] == held + streams + (uniform if phase == "propagation" else 0)
    logits = torch.empty(memory_model.CHECK_TOKENS, 64)
    assert found.phases["check"] >= streams + 5_000 + 2 * logits.nbytes  # the model's, and the dense model's
    assert found.hidden == without.hidden
    freed = memory_model.prune_demand(
        replace(SHAPE, embedding=90), use, tokens=70, passing=7, learning=7, held_out=14, head=5_000
    )
    assert freed.phases["check"] == found.phases["check"]  # it is read again
