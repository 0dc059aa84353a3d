"""`--experts`: which experts stay, what their stage computes in stock transformers, and what resumes it."""

import functools
import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import multi_rank, tiny_models
from torch import Tensor

from benchmarks.checks import architectures, whole_experts
from besa_cli.checkpoint import manifests
from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.errors import BesaError, UsageError
from besa_cli.jobs import prune, quantize, tune
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.stage import StageJob
from besa_cli.jobs.tune_job import TuneJob
from besa_cli.stream import expert_scores

ROWS = tiny_models.tokens(4, 20)
GROUPS = {"n_routed_experts": 6, "n_group": 2, "topk_group": 1}
KINDS: dict[str, dict[str, Any]] = {  # what differs from the tiny models of the check of all architectures
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v3": GROUPS,
    "gpt_oss": {},
    "glm4_moe": {},
    "granitemoe": {},
    "llama4_text": {},
    "nemotron_h": {},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a type in the form in which the hub has it, made once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            config = architectures.configuration(kind)
            for name, value in KINDS[kind].items():
                setattr(config, name, value)
            tiny_models.built(config).save_pretrained(made[kind])
        return made[kind]

    return of


stock = functools.partial(tiny_models.stock, dtype=torch.float32)


def request(method: str = "wanda", *, share: float = 0.34, sparsity: float = 0.0, **options: Any) -> StageRequest:
    return prune.request(
        method=method, experts=share, sparsity=sparsity, device="cpu", dtype="float32", options=options
    )


def job(run: Path, model: Path, asked: StageRequest, notes: list[str] | None = None) -> StageJob:
    noted = [] if notes is None else notes
    return StageJob(Run(run), tiny_models.local(model), tiny_models.calibration_set(ROWS), asked, notify=noted.append)


@pytest.fixture(scope="module")
def stage(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished stage of a type in which nothing but experts is removed, made once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"{kind}-run")
            tiny_models.run(job(made[kind], source(kind), request()))
        return made[kind] / "pruned"

    return of


def record(stage: Path) -> manifests.KeptExperts:
    """The entry of the manifest on the experts."""
    found: manifests.KeptExperts = json.loads((stage / "besa.json").read_text())["experts"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_stage_has_the_logits_of_the_source_with_masked_routers(
    kind: str, source: Callable[[str], Path], stage: Callable[[str], Path]
) -> None:
    experts = record(stage(kind))
    assert {len(stay) for stay in experts["kept"] if stay} == {4 if KINDS[kind] else 3}
    whole, fewer = stock(source(kind)), stock(stage(kind))
    with torch.no_grad():
        logits, before = fewer(ROWS, use_cache=False).logits, whole(ROWS, use_cache=False).logits
        with whole_experts.masked(whole, whole.model.layers, experts["kept"], experts["experts"]):
            expected = whole(ROWS, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert float((before - expected).abs().max()) > 1e-3  # removing them changes something
    counts = json.loads((stage(kind) / "besa.json").read_text())["counts"]
    assert counts["pruned"] == 0


def test_the_scores_are_those_of_plain_loops_over_stocks_tokens(
    source: Callable[[str], Path], stage: Callable[[str], Path]
) -> None:
    experts = record(stage("qwen3_moe"))
    whole, calls = stock(source("qwen3_moe"), experts_implementation="eager"), []
    for layer in whole.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: calls.append((module, *args)))
    with torch.no_grad():
        whole(ROWS, use_cache=False)
        for index, (module, hidden, chosen, weights) in enumerate(calls):
            lengths: list[list[float]] = [[] for _ in range(4)]
            for state, numbers, shares in zip(hidden, chosen, weights, strict=True):
                for number, share in zip(numbers.tolist(), shares, strict=True):
                    gate, up = (module.gate_up_proj[number] @ state).chunk(2)
                    added = share * (module.down_proj[number] @ (torch.nn.functional.silu(gate) * up))
                    lengths[number].append(float(added.norm()))
            means = [sum(each) / len(each) for each in lengths]
            assert experts["tokens"][index] == [len(each) for each in lengths]
            assert experts["scores"][index] == pytest.approx(means, rel=1e-4)
            assert sorted(set(range(4)) - set(experts["kept"][index])) == [means.index(min(means))]
    assert len(calls) == len(experts["kept"]) == 3


def test_tensors_of_an_expert_each_are_numbered_anew(
    source: Callable[[str], Path], stage: Callable[[str], Path]
) -> None:
    before, after = tiny_models.weights(source("qwen3_moe")), tiny_models.weights(stage("qwen3_moe"))
    expected: dict[str, Tensor] = {name: each for name, each in before.items() if ".experts." not in name}
    for block, stay in enumerate(record(stage("qwen3_moe"))["kept"]):
        gate = f"model.layers.{block}.mlp.gate.weight"
        expected[gate] = before[gate][stay]
        for number, old in enumerate(stay):
            for part in ("gate", "up", "down"):
                inner = f"model.layers.{block}.mlp.experts.{{}}.{part}_proj.weight"
                expected[inner.format(number)] = before[inner.format(old)]
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_tensors_of_all_experts_are_cut(source: Callable[[str], Path], stage: Callable[[str], Path]) -> None:
    before, after = tiny_models.weights(source("gpt_oss")), tiny_models.weights(stage("gpt_oss"))
    assert after.keys() == before.keys()
    for block, stay in enumerate(record(stage("gpt_oss"))["kept"]):
        held = [name for name in before if f"layers.{block}.mlp." in name]
        assert len(held) == 6
        assert all(torch.equal(after[name], before[name][stay]) for name in held)
    assert all(torch.equal(after[name], before[name]) for name in before if ".mlp." not in name)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("mixtral", "besa"), ("mixtral", "magnitude"), ("gpt_oss", "wanda"), ("gpt_oss", "sparsegpt")],
)
def test_the_sparsity_is_that_of_the_experts_that_stay(
    kind: str, method: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    notes: list[str] = []
    manifest = tiny_models.run(job(tmp_path, source(kind), request(method, sparsity=0.37), notes))
    counts, experts = manifest["counts"], manifest["experts"]
    before, after = (_matrices(tiny_models.weights(each)) for each in (source(kind), tmp_path / "pruned"))
    weights = sum(each.numel() for each in after.values())
    zeros = sum(int((each == 0).sum()) for each in after.values())
    assert (counts["weights"], experts["removed"]) == (weights, sum(each.numel() for each in before.values()) - weights)
    assert zeros == counts["pruned"] == counts["zeros"] == round(Fraction("0.37") * weights)
    assert manifests.describe_experts(experts) in notes
    stock(tmp_path / "pruned")


def _matrices(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the linears in the blocks."""
    others = ("gate.weight", "router.weight", "proj_bias")
    return {
        name: each
        for name, each in weights.items()
        if ".layers." in name and each.dim() > 1 and not name.endswith(others)
    }


def test_killed_between_blocks_it_resumes_without_measuring_again(
    source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut, model = tmp_path / "whole", tmp_path / "cut", source("qwen3_moe")
    asked = request(sparsity=0.5)
    tiny_models.run(job(whole, model, asked))
    for report in job(cut, model, asked).blocks():
        if report.index == 1:
            break
    monkeypatch.setattr(expert_scores, "measure", lambda *args, **named: pytest.fail("measured again"))
    tiny_models.run(job(cut, model, asked))
    assert tiny_models.files(cut) == tiny_models.files(whole)


class Killed(BaseException):
    """Nothing may catch it."""


@pytest.mark.parametrize(("owner", "name"), [(expert_scores, "measure"), (Stage, "record_experts")])
def test_killed_before_the_experts_are_recorded_it_measures_again(
    owner: object,
    name: str,
    source: Callable[[str], Path],
    stage: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(*args: object, **named: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        with pytest.raises(Killed):
            tiny_models.run(job(tmp_path, source("mixtral"), request()))
    tiny_models.run(job(tmp_path, source("mixtral"), request()))
    assert tiny_models.files(tmp_path / "pruned") == tiny_models.files(stage("mixtral"))


def test_another_share_is_another_stage(source: Callable[[str], Path], stage: Callable[[str], Path]) -> None:
    with pytest.raises(BesaError, match=r"experts 0\.34 there, 0\.5 asked"):
        job(stage("mixtral").parent, source("mixtral"), request(share=0.5))


def test_the_forecast_counts_what_stays(
    source: Callable[[str], Path], stage: Callable[[str], Path], tmp_path: Path
) -> None:
    forecast = job(tmp_path, source("mixtral"), request()).forecast()
    written = sum(path.stat().st_size for path in stage("mixtral").glob("*.safetensors"))
    whole = (source("mixtral") / "model.safetensors").stat().st_size
    assert written <= forecast.disk < 1.05 * written < whole


def test_a_stage_of_fewer_experts_is_quantized(
    source: Callable[[str], Path], stage: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = quantize.request(method="rtn", bits=4, group_size="16", device="cpu", dtype="float32")
    model = tiny_models.local(stage("qwen3_moe"))
    manifest = tiny_models.run(StageJob(Run(tmp_path), model, tiny_models.calibration_set(ROWS), asked))
    before = json.loads((stage("qwen3_moe") / "besa.json").read_text())["counts"]
    assert manifest["counts"]["weights"] == before["weights"]
    assert "experts" not in manifest
    assert len(stock(tmp_path / "quantized").model.layers[0].mlp.gate.weight) == 3


def tuning(run: Path, stage: Path) -> TuneJob:
    rows = tiny_models.calibration_set(ROWS[:2], ROWS[2:])
    return TuneJob(Run(run), tiny_models.local(stage), rows, tune.request(epochs=1, device="cpu", dtype="float32"))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_stage_is_tuned_on_the_predictions_of_the_experts_that_stay(
    kind: str, stage: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing but experts was removed, so that the stage is the model that it learns from."""
    work = tuning(tmp_path, stage(kind))
    list(work.work())
    start, _ = work.finish()["whole_model"]["divergence"]
    assert start < 1e-6
    stock(tmp_path / "tuned")


def test_experts_removed_before_the_stage_are_no_dense_model_to_tune_on(
    stage: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny_models.run(job(tmp_path / "second", stage("mixtral"), tiny_models.request("magnitude")))
    with pytest.raises(BesaError, match="has fewer experts than its dense model: it cannot be tuned"):
        tuning(tmp_path / "run", tmp_path / "second" / "pruned")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.25, float("nan"), 1.5])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match="is not between 0 and 1"):
        request(share=share)


def test_the_default_is_absent_from_the_manifest() -> None:
    assert "experts" not in prune.request(method="wanda").to_manifest()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("kept", [0, 1, 4], "experts are kept that a block does not have"),
        ("kept", [0, 2, 1], "experts are kept that a block does not have"),
        ("kept", [0, 1], "experts are not those of 3 blocks"),
        ("scores", [0.5], "experts are kept that a block does not have"),
    ],
)
def test_a_changed_record_is_refused(
    key: str, value: list[float], told: str, stage: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = json.loads((stage("mixtral") / "besa.json").read_text())
    manifest["experts"][key][1] = value
    (tmp_path / "besa.json").write_text(json.dumps(manifest))
    with pytest.raises(BesaError, match=told):
        manifests.read_stage(tmp_path)


@pytest.mark.parametrize("share", [None, 0.34])
def test_a_checkpoint_that_lacks_an_expert_is_refused(
    share: float | None, source: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = tiny_models.weights(source("mixtral"))
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    shutil.copytree(source("mixtral"), tmp_path / "model")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    asked = tiny_models.request("magnitude") if share is None else request(share=share)
    with pytest.raises(BesaError, match=r"has 3 tensors as model\.layers\.1\..*0\.w2\.weight, one an expert, for 4"):
        job(tmp_path / "run", tmp_path / "model", asked)


def test_show_counts_experts_and_says_what_their_extremes_are(
    source: Callable[[str], Path], tmp_path: Path, besa: Callable[..., Any]
) -> None:
    """The lowest and the highest sparsity of an expert, counted here in the tensors."""
    tiny_models.run(job(tmp_path, source("qwen3_moe"), request(sparsity=0.4)))
    stage = tmp_path / "pruned"
    shown = besa("show", stage)
    weights, experts = tiny_models.weights(stage), record(stage)
    shares = {}
    for block in range(3):
        for number in range(3):
            inner = f"model.layers.{block}.mlp.experts.{number}."
            own = torch.cat([each.flatten() for name, each in weights.items() if name.startswith(inner)])
            shares[block, number] = float((own == 0).double().mean())
    low, high = min(shares.values()), max(shares.values())
    assert f"sparsity of the 9 experts: {100 * low:.2f} %" in shown.out
    assert f"to {100 * high:.2f} % (block" in shown.out
    assert manifests.describe_experts(experts) in shown.out
    most = max(max(row) for row in experts["tokens"])
    assert f"to {most:,} (block" in shown.out
    worst = max(
        row[number] / max(row)
        for row, kept in zip(experts["scores"], experts["kept"], strict=True)
        for number in set(range(4)) - set(kept)
    )
    assert f"scored up to {100 * worst:.1f} % of the highest" in shown.out


def test_a_model_without_experts_is_refused_before_anything_else(tmp_path: Path, besa: Callable[..., Any]) -> None:
    model = tiny_models.checkpoint(tmp_path / "model")
    (model / "model.safetensors").unlink()  # nothing but the configuration is needed to see it
    outcome = besa("prune", "--model", model, "--experts", "0.25", "--run", tmp_path / "run")
    assert outcome.code == 2
    assert "error: --experts: llama has no experts that could be removed" in outcome.err
    assert not (tmp_path / "run" / "pruned").exists()


def test_two_ranks_remove_the_same_experts(
    source: Callable[[str], Path], stage: Callable[[str], Path], tmp_path: Path
) -> None:
    """The main rank measures, and the other prunes the experts that stay by its own samples."""
    rows = tiny_models.rows_file(tmp_path / "rows.jsonl", ROWS)
    words = ["prune", "--model", source("mixtral"), "--data", rows, "--samples", len(ROWS), "--seqlen", ROWS.shape[1]]
    words += [
        "--method",
        "wanda",
        "--sparsity",
        0.5,
        "--experts",
        0.34,
        "--dtype",
        "float32",
        "--run",
        tmp_path / "both",
    ]
    with multi_rank.crew(tmp_path, 2, *words) as crew:
        assert [rank.code() for rank in crew] == [0, 0], [rank.said for rank in crew]
    both, alone = record(tmp_path / "both" / "pruned"), record(stage("mixtral"))
    assert both["kept"] == alone["kept"]
    assert both["scores"][1] == pytest.approx(alone["scores"][1], rel=1e-4)
    counts = json.loads((tmp_path / "both" / "pruned" / "besa.json").read_text())["counts"]
    assert counts["pruned"] == counts["zeros"] == round(counts["weights"] / 2)
