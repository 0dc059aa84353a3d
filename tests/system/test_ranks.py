"""Several ranks of one command: the result of one process, whoever is killed, and one line of whatever goes wrong."""

import json
import os
import signal
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_models
from support.multi_rank import Rank, crew, wait_for
from torch import Tensor

from besa_cli.system import ranks as ranks_module

Besa = Callable[..., Any]  # conftest.Outcome

SAMPLES, BLOCKS = 7, 3  # 7 samples: neither two nor three ranks have equally many


@pytest.fixture
def words(workplace: Path) -> list[object]:
    model = tiny_models.add_tokenizer(tiny_models.checkpoint(workplace / "model", blocks=BLOCKS, dtype=torch.bfloat16))
    rows = tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(SAMPLES, 12))
    drawn = ["--data", rows, "--samples", SAMPLES, "--seqlen", 12]
    return ["prune", "--model", model, "--dtype", "float32", *drawn]


def shards(run: Path) -> dict[str, Tensor]:
    return tiny_models.weights(run / "pruned")


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Share of the weights that only one of two models has pruned."""
    assert one.keys() == other.keys()
    return sum(int(((one[name] == 0) != (other[name] == 0)).sum()) for name in one) / sum(
        tensor.numel() for tensor in one.values()
    )


def prune(place: Path, size: int, *words: object) -> None:
    """Let so many ranks run a command line to its end; only the first of them may say anything."""
    with crew(place, size, *words) as ranks:
        finish(ranks)


def finish(ranks: list[Rank]) -> None:
    assert [rank.code() for rank in ranks] == [0] * len(ranks), [rank.said for rank in ranks]
    for rank in ranks[1:]:
        assert (rank.said, rank.out.read_text()) == ("", "")


def lines(ranks: list[Rank]) -> list[str]:
    """All errors that were said, by any rank."""
    return [line for rank in ranks for line in rank.said.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_two_ranks_give_the_very_tensors_of_one_process(method: str, words: list[object], workplace: Path) -> None:
    prune(workplace, 1, *words, "--method", method, "--run", "one")
    prune(workplace, 2, *words, "--method", method, "--run", "two")
    one, two = shards(workplace / "one"), shards(workplace / "two")
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    made = [json.loads((workplace / name / "pruned" / "besa.json").read_text()) for name in ("one", "two")]
    for manifest in made:
        manifest["compute"].pop("threads")  # of all ranks together
    assert made[0] == made[1]
    timed = [json.loads(line) for line in (workplace / "two" / "pruned" / "timing.jsonl").read_text().splitlines()]
    assert [line["ranks"] for line in timed] == [2] * BLOCKS


def test_the_main_rank_measures_the_budgets_of_all_blocks_for_the_others(words: list[object], workplace: Path) -> None:
    made = []
    for size, run in ((1, "one"), (2, "two")):
        prune(workplace, size, *words, "--method", "wanda", "--budget", "model", "--run", run)
        made.append(json.loads((workplace / run / "pruned" / "besa.json").read_text()))
    one, two = (manifest["block_budgets"] for manifest in made)
    assert made[0]["counts"] == made[1]["counts"]
    for own, other in zip(one["effects"], two["effects"], strict=True):  # threads may sum in another order
        assert other == pytest.approx(own, rel=1e-3)
    assert two["pruned"] == pytest.approx(one["pruned"], rel=0.02)
    assert different(shards(workplace / "one"), shards(workplace / "two")) < 0.02


@pytest.mark.parametrize(
    "asked",
    [
        ["--method", "sparsegpt"],
        ["--batch-size", 2],
        ["--batch-size", 1, "--target", "stream", "--window", 2],
        ["--batch-size", 4, "--loss", "channel", "--window", "attn-mlp", "--optimizer", "prodigy", "--epochs", 2],
        ["--batch-size", 2, "--bits", 4, "--group-size", 9, "--loss", "frobenius"],
        ["--batch-size", 2, "--preset", "authors"],
        ["--batch-size", 2, "--global-epochs", 1],
    ],
    ids=lambda asked: " ".join(map(str, asked)),
)
def test_two_ranks_come_near_to_one_process(asked: list[object], words: list[object], workplace: Path) -> None:
    prune(workplace, 1, *words, *asked, "--run", "one")
    prune(workplace, 2, *words, *asked, "--run", "two")
    stage = "quantized" if "--bits" in asked else "pruned"
    one, two = (tiny_models.weights(workplace / name / stage) for name in ("one", "two"))
    assert different(one, two) < 0.002
    for name, tensor in one.items():
        assert float((two[name].float() - tensor.float()).norm()) <= 0.05 * float(tensor.float().norm()), name
    losses = [
        [json.loads(path.read_text()) for path in sorted((workplace / name / stage).glob("model-0000[2-9]*.json"))]
        for name in ("one", "two")
    ]
    for alone, shared in zip(*losses, strict=True):
        for key in ("error_before", "error_after", "learned_loss"):
            assert shared[key] == (None if alone[key] is None else pytest.approx(alone[key], rel=1e-2))


def test_a_killed_rank_ends_the_others_and_any_number_goes_on(words: list[object], besa: Besa, workplace: Path) -> None:
    slow = [*words, "--batch-size", 6, "--epochs", 60, "--run"]
    prune(workplace, 2, *slow, "whole")
    first = workplace / "cut" / "pruned" / f"model-00002-of-{BLOCKS + 1:05d}.safetensors"
    with crew(workplace, 2, *slow, "cut") as ranks:
        wait_for(first, ranks)
        os.kill(ranks[1].process.pid or 0, signal.SIGKILL)
        assert ranks[0].code() == 1
        assert lines(ranks) == ["error: one of the 2 ranks is lost, so the others end too"]
    with crew(workplace, 3, *slow, "cut") as ranks:  # goes on from the disk; killed again, now the first
        wait_for(first.with_name(first.name.replace("00002", "00003")), ranks)
        os.kill(ranks[0].process.pid or 0, signal.SIGKILL)
        assert [rank.code() for rank in ranks] == [-signal.SIGKILL, 1, 1]
        assert len(lines(ranks)) == 1
    prune(workplace, 1, *slow, "cut")
    whole, cut = shards(workplace / "whole"), shards(workplace / "cut")
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items() if ".layers.0." in name)
    assert different(whole, cut) < 0.05  # hundreds of steps make much of the last bits


def test_killed_and_gone_on_with_as_many_ranks_ends_in_the_same_bytes(words: list[object], workplace: Path) -> None:
    slow = [*words, "--batch-size", 2, "--epochs", 30, "--run"]
    prune(workplace, 2, *slow, "whole")
    with crew(workplace, 2, *slow, "cut") as ranks:
        wait_for(workplace / "cut" / "pruned" / f"model-00002-of-{BLOCKS + 1:05d}.safetensors", ranks)
        ranks[0].process.terminate()
        assert [rank.code() for rank in ranks] == [128 + signal.SIGTERM, 1]
        assert lines(ranks) == ["error: interrupted"]
    prune(workplace, 2, *slow, "cut")
    assert tiny_models.files(workplace / "cut") == tiny_models.files(workplace / "whole")


@pytest.mark.parametrize(
    ("more", "others", "line"),
    [
        (["--batch-size", 3], None, "--batch-size 3 cannot be shared out evenly over 2 ranks"),
        (["--dry-run"], None, "--dry-run forecasts one process, not 2 ranks"),
        ([], ["--sparsity", 0.4], "rank 1 of 2 has sparsity 0.4, rank 0 has 0.5"),
        (["--method", "wanda", "--sparsity", "2"], None, "--sparsity 2.0 is not in [0, 1)"),
    ],
)
def test_what_ranks_cannot_do_is_said_once(
    more: list[object], others: list[object] | None, line: str, words: list[object], workplace: Path
) -> None:
    with crew(workplace, 2, *words, *more, others=None if others is None else [*words, *others]) as ranks:
        codes = [rank.code() for rank in ranks]
        assert lines(ranks) == [f"error: {line}"]
    assert codes == ([2, 2] if others is None else [1, 2])
    assert not (workplace / "besa-run" / "pruned").exists() or others is not None


def test_more_ranks_than_samples_are_refused(words: list[object], workplace: Path) -> None:
    with crew(workplace, 3, *words[:-4], "--samples", 2, "--seqlen", 12) as ranks:
        assert [rank.code() for rank in ranks] == [2, 1, 1]
        assert lines(ranks) == ["error: 2 calibration samples are too few for 3 ranks"]


def test_a_finished_stage_sends_all_ranks_home(words: list[object], workplace: Path) -> None:
    prune(workplace, 1, *words, "--method", "magnitude")
    before = tiny_models.files(workplace / "besa-run", without=())
    with crew(workplace, 2, *words, "--method", "magnitude") as ranks:
        finish(ranks)
        assert "finished already" in ranks[0].said
    assert tiny_models.files(workplace / "besa-run", without=()) == before


def test_commands_that_ranks_cannot_share_are_refused_once(workplace: Path) -> None:
    with crew(workplace, 2, "show") as ranks:
        assert [rank.code() for rank in ranks] == [2, 2]
        assert lines(ranks) == ["error: besa show does not work on 2 ranks: besa prune does"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_others_do_not_come_gives_up_with_one_line(
    rank: int, besa: Besa, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    told = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks_module, "_JOINING", timedelta(seconds=1))
    outcome = besa("prune", "--model", "nowhere")
    assert outcome.code == 1
    assert [line for line in outcome.err.splitlines() if line.startswith("error: ")] == [
        f"error: rank {rank} of 2 did not meet all others at 127.0.0.1:{port}: timeout after 1 s"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "9" * 18),
        ("WORLD_SIZE", "9" * 5000),
        ("WORLD_SIZE", "\u0662"),
        ("RANK", "2"),
        ("MASTER_PORT", "65536"),
        ("MASTER_PORT", "x"),
    ],
)
def test_variables_that_cannot_be_are_named(name: str, value: str, besa: Besa, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for each, usual in {**told, name: value}.items():
        monkeypatch.setenv(each, usual)
    outcome = besa("prune", "--model", "nowhere")
    assert (outcome.code, outcome.err.count("error: ")) == (2, 1)
    assert f"error: {name} is " in outcome.err


def test_variables_that_say_too_little_are_named(besa: Besa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = besa("prune")
    assert (found.code, found.err.splitlines()[0]) == (2, "error: WORLD_SIZE is 2, but RANK is not set")
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert besa("prune").err.startswith("error: WORLD_SIZE is 'two', not a number")


@pytest.mark.parametrize("batch", [1, 2])
def test_two_ranks_learn_grids_where_nothing_is_to_be_pruned(batch: int, words: list[object], workplace: Path) -> None:
    joint = [*words, "--bits", 4, "--group-size", 16, "--sparsity", 0, "--batch-size", batch]
    for size in (1, 2):
        prune(workplace, size, *joint, "--run", f"of-{size}")
    one, two = (tiny_models.weights(workplace / f"of-{size}" / "quantized") for size in (1, 2))
    total = sum(weight.numel() for weight in one.values())
    apart = sum(int((~torch.isclose(one[name].float(), two[name].float(), rtol=1e-2, atol=1e-3)).sum()) for name in one)
    assert apart < 0.02 * total
