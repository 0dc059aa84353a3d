"""Every architecture: the block stream against the whole stock model, and what each method leaves in a stage."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import calls, tiny_models
from support.tiny_models import stock
from torch import Tensor

from besa_cli.checkpoint.runs import Run
from besa_cli.decoder.decoder import Decoder
from besa_cli.decoder.verify import verify
from besa_cli.errors import BesaError
from besa_cli.jobs import prune
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.stage import StageJob
from besa_cli.pruners import PRUNERS
from besa_cli.stream import propagation

CPU = torch.device("cpu")
REQUESTS = {
    "besa-row": tiny_models.request("besa", sparsity=0.37),
    "besa-layer": tiny_models.request("besa", sparsity=0.61, granularity="layer"),
    "besa-stream": tiny_models.request("besa", sparsity=0.5, target="stream"),
    "wanda": tiny_models.request("wanda", sparsity=0.37),
    "sparsegpt": tiny_models.request("sparsegpt", sparsity=0.37),
    "magnitude": tiny_models.request("magnitude", sparsity=0.37),
    "wanda-nm": tiny_models.request("wanda", nm=(2, 4)),
    "sparsegpt-nm": tiny_models.request("sparsegpt", nm=(2, 4)),
    "magnitude-nm": tiny_models.request("magnitude", nm=(3, 8)),
}
MASK_ONLY = [name for name in REQUESTS if not name.startswith("sparsegpt")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The fp16 checkpoint of a family, made once: its weights are stored in less than what is computed in."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tiny_models.checkpoint(tmp_path_factory.mktemp(family), family, dtype=torch.float16)
        return made[family]

    return of


def finish(directory: Path, model: Path, request: StageRequest, rows: Tensor | None = None) -> Path:
    """Prune `model` in a run directory; returns the stage."""
    calibration = tiny_models.calibration_set(tiny_models.tokens(2, 12) if rows is None else rows)
    manifest = tiny_models.run(StageJob(Run(directory), tiny_models.local(model), calibration, request))
    assert manifest["status"] == "complete"
    return directory / "pruned"


def pattern_of(request: StageRequest) -> tuple[int, int] | None:
    """The N:M pattern that was asked for."""
    pattern: tuple[int, int] | None = getattr(request.method.options, "nm", None)
    return pattern


def check_counts(stage: Path, family: str, request: StageRequest) -> None:
    """The zeros in the tensors, block by block, are what the request says, and what the manifest says."""
    model = stock(stage)
    state = model.state_dict()
    names = tiny_models.linear_names(model, tiny_models.blocks_of(family))
    zeros = [sum(int((state[name] == 0).sum()) for name in block) for block in names]
    pattern = pattern_of(request)
    if pattern is None:
        sizes = [sum(state[name].numel() for name in block) for block in names]
        expected = tiny_models.prefix_counts(request.target_sparsity or 0.0, sizes)
    else:
        n, m = pattern
        whole = [sum(state[name].shape[0] * (state[name].shape[1] // m) * n for name in block) for block in names]
        expected = [sum(whole[: index + 1]) for index in range(len(whole))]
    assert [sum(zeros[: index + 1]) for index in range(len(zeros))] == expected
    manifest = json.loads((stage / "besa.json").read_text())
    assert manifest["counts"]["pruned"] == manifest["counts"]["zeros"] == sum(zeros)
    for index, block in enumerate(names):
        report = json.loads((stage / f"model-{index + 2:05d}-of-{len(names) + 1:05d}.json").read_text())
        counted = {
            f"{tiny_models.blocks_of(family)}.{index}.{each['name']}.weight": each["pruned"]
            for each in report["linears"]
        }
        assert counted == {name: int((state[name] == 0).sum()) for name in block}


def check_windows(stage: Path, family: str, n: int, m: int) -> None:
    """Exactly n zeros in every full window of m columns, none in the ragged rest."""
    model = stock(stage)
    state = model.state_dict()
    for name in (name for block in tiny_models.linear_names(model, tiny_models.blocks_of(family)) for name in block):
        zero = state[name] == 0
        full = zero.shape[1] // m * m
        assert (zero[:, :full].reshape(-1, m).sum(1) == n).all(), name
        assert not zero[:, full:].any(), name


def check_bits(stage: Path, model: Path, *, survivors: bool) -> None:
    """Every tensor but the linears' is the source's, bit for bit; with `survivors` so are the linears' kept weights."""
    before, after = tiny_models.weights(model), tiny_models.weights(stage)
    assert before.keys() == after.keys()
    pruned = 0
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape), name
        if torch.equal(tensor, before[name]):
            continue
        pruned += 1
        assert name.endswith("weight"), name
        assert re.search(r"\.\d+\.", name), name
        assert tensor.dim() == 2, name
        if survivors:
            assert torch.equal(tensor, before[name].masked_fill(tensor == 0, 0.0)), name
    assert pruned


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_block_stream_is_the_whole_model(family: str, tied: bool, tmp_path: Path) -> None:
    directory = tiny_models.checkpoint(tmp_path / "model", family, blocks=4, tied=tied, dtype=torch.float16)
    rows = tiny_models.tokens(3, 20)
    whole = stock(directory, torch.float32)
    with torch.no_grad():
        expected = whole(rows, output_hidden_states=True, use_cache=False)
    decoder = Decoder(directory, CPU, torch.float32)
    assert (len(decoder), decoder.prefix) == (4, tiny_models.blocks_of(family))
    assert decoder.embedding_bytes() == decoder.model.get_input_embeddings().weight.nbytes
    hidden = propagation.embed(decoder, rows, 2)  # batches of 2 and 1
    decoder.drop_embedding()  # what follows needs it for the logits alone
    assert decoder.embedding_bytes() == 0
    assert all(each.is_meta for each in decoder.model.parameters() if len(each) == tiny_models.VOCABULARY)
    for index in range(4):
        torch.testing.assert_close(hidden, expected.hidden_states[index], rtol=1e-5, atol=1e-5)
        decoder.load(index)
        propagation.advance(decoder, index, hidden, rows, 2)
        decoder.drop(index)
    with torch.no_grad():
        logits = decoder.finish(hidden, rows)
        part = decoder.finish(hidden, rows, slice(5, 9))
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part, expected.logits[:, 5:9], rtol=1e-5, atol=1e-5)
    verify(decoder, rows)


def test_blocks_that_are_not_given_what_the_model_gives_them_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(tiny_models.checkpoint(tmp_path / "model", "llama"), CPU, torch.float32)
    known = decoder.keywords

    def turned(index: int, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, named = known(index, tokens)
        cos, sin = named["position_embeddings"]
        return args, {**named, "position_embeddings": (sin, cos)}

    verify(decoder, tiny_models.tokens(2, 12))
    monkeypatch.setattr(decoder, "keywords", turned)
    with pytest.raises(BesaError, match="gives other hidden states block by block than as a whole"):
        verify(decoder, tiny_models.tokens(2, 12))


def test_a_model_that_calls_its_blocks_in_another_order_is_refused(tmp_path: Path) -> None:
    decoder = Decoder(tiny_models.checkpoint(tmp_path / "model", "llama", blocks=3), CPU, torch.float32)
    own: Any = decoder.model.base_model
    first, *others = own.layers
    own.layers = torch.nn.ModuleList([*others, first])
    with pytest.raises(BesaError, match="gives other hidden states block by block than as a whole"):
        verify(decoder, tiny_models.tokens(2, 12))


@pytest.mark.parametrize("wide", [8, 0])
def test_blocks_that_are_given_something_of_every_token_are_refused(wide: int, tmp_path: Path) -> None:
    """Gemma 4 looks its tokens up again for every block; without that its blocks see hidden states alone."""
    config = transformers.Gemma4TextConfig(  # type: ignore[call-arg]  # it does not declare global_head_dim
        vocab_size=128, hidden_size=32, intermediate_size=54, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, global_head_dim=12, max_position_embeddings=64, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, pad_token_id=0,
        hidden_size_per_layer_input=wide, vocab_size_per_layer_input=128,
    )  # fmt: skip
    tiny_models.built(config).save_pretrained(tmp_path / "model")
    decoder = Decoder(tmp_path / "model", CPU, torch.float32)
    refused = pytest.raises(BesaError, match="Gemma4ForCausalLM passes its blocks arguments that depend on the tokens")
    with refused if wide else contextlib.nullcontext():
        verify(decoder, tiny_models.tokens(2, 12))


def test_the_comparison_reads_every_block_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(tiny_models.checkpoint(tmp_path / "model", "qwen2", blocks=3), CPU, torch.float32)
    read: list[int] = []
    monkeypatch.setattr(decoder, "load", calls.noting(decoder.load, lambda index, *words: read.append(index)))
    verify(decoder, tiny_models.tokens(2, 12))
    assert read == [0, 1, 2]


def test_mixed_attention_gives_each_block_arguments_of_its_own(tmp_path: Path) -> None:
    decoder = Decoder(tiny_models.checkpoint(tmp_path / "model", "gemma3"), CPU, torch.float32)
    rows = tiny_models.tokens(1, 12)
    (_, sliding), (_, full) = decoder.keywords(0, rows), decoder.keywords(1, rows)
    assert isinstance(sliding["attention_mask"], Tensor)
    assert full["attention_mask"] is None  # plain causal attention needs no mask
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])  # two rotary bases


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in tiny_models.FAMILIES
        for name in REQUESTS
        if name != "besa-stream" or family == "gemma3"
    ],
)
def test_a_finished_stage(family: str, name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    request, model = REQUESTS[name], source(family)
    stage = finish(tmp_path / "run", model, request)
    check_counts(stage, family, request)
    check_bits(stage, model, survivors=name in MASK_ONLY)
    if (pattern := pattern_of(request)) is not None:
        check_windows(stage, family, *pattern)


def test_every_method_is_covered() -> None:
    assert {request.method.name for request in REQUESTS.values()} == set(PRUNERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["besa-row", "sparsegpt"])
def test_the_sources_dtype_is_kept_whatever_is_computed_in(
    dtype: torch.dtype, compute: str, name: str, tmp_path: Path
) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", dtype=dtype)
    asked = REQUESTS[name]
    request = prune.request(method=asked.method.name, sparsity=0.5, options={}, device="cpu", dtype=compute)
    stage = finish(tmp_path / "run", model, request)
    assert {tensor.dtype for tensor in tiny_models.weights(stage).values()} == {dtype}
    check_counts(stage, "llama", request)
    check_bits(stage, model, survivors=name == "besa-row")


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.1, 0.99])
@pytest.mark.parametrize("method", PRUNERS)
def test_every_sparsity_is_met_to_the_weight(
    method: str, sparsity: float, source: Callable[[str], Path], tmp_path: Path
) -> None:
    request = tiny_models.request(method, sparsity=sparsity)
    model = source("llama")
    if sparsity == 0.0:
        stage = finish(tmp_path / "run", model, request)
        assert not any(bool((tensor == 0).any()) for tensor in tiny_models.weights(stage).values())
        return
    check_counts(finish(tmp_path / "run", model, request), "llama", request)


def changed(model: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a one-shard checkpoint with other tensors."""
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["besa-row", "wanda", "sparsegpt", "wanda-nm", "sparsegpt-nm"])
def test_zeros_that_were_there_are_counted_first(name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    request = REQUESTS[name]

    def thin(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if key.endswith("up_proj.weight"):
                tensors[key][:, ::4] = 0.0  # a quarter, one in every window of 4

    model = changed(source("llama"), tmp_path / "model", thin)
    stage = finish(tmp_path / "run", model, request)
    check_counts(stage, "llama", request)
    check_bits(stage, model, survivors=name in MASK_ONLY)
    up = tiny_models.weights(stage)["model.layers.0.mlp.up_proj.weight"]
    assert (up[:, ::4] == 0).all()


@pytest.mark.parametrize("method", PRUNERS)
def test_more_zeros_than_asked_are_kept_and_reported(
    method: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    def thin(tensors: dict[str, Tensor]) -> None:
        for key in tensors:
            if "layers.0" in key and key.endswith("proj.weight"):
                tensors[key][:, 1::3] = 0.0

    model = changed(source("llama"), tmp_path / "model", thin)
    stage = finish(tmp_path / "run", model, tiny_models.request(method, sparsity=0.1))
    before, after = tiny_models.weights(model), tiny_models.weights(stage)
    first = [name for name in before if "layers.0" in name and name.endswith("proj.weight")]
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in first)
    report = json.loads((stage / "model-00002-of-00003.json").read_text())
    assert sum(each["pruned"] for each in report["linears"]) == sum(int((before[name] == 0).sum()) for name in first)


@pytest.mark.parametrize("name", ["besa-row", "wanda", "sparsegpt", "wanda-nm", "sparsegpt-nm"])
def test_inputs_that_are_always_zero(name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    request = REQUESTS[name]

    def silence(tensors: dict[str, Tensor]) -> None:
        for block in ("0", "1"):
            tensors[f"model.layers.{block}.input_layernorm.weight"][3:9] = 0.0
            tensors[f"model.layers.{block}.mlp.gate_proj.weight"][5] = 0.0  # silu(0) · up = 0 enters down_proj

    model = changed(source("llama"), tmp_path / "model", silence)
    stage = finish(tmp_path / "run", model, request)
    after = tiny_models.weights(stage)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    query = after["model.layers.0.self_attn.q_proj.weight"]
    if name in ("wanda", "besa-row"):
        assert (query[:, 3:9] == 0).all()  # they never matter, so they go first
    if pattern_of(request) is None:
        check_counts(stage, "llama", request)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_a_base_model_stored_without_its_prefix(family: str, tmp_path: Path) -> None:
    model = tiny_models.built(tiny_models.config(family, tied=True))
    tiny_models.cast(model, torch.bfloat16)
    directory = tmp_path / "model"
    base: Any = model.base_model
    base.save_pretrained(directory)
    assert not any(name.startswith("model.") for name in tiny_models.weights(directory))
    config = json.loads((directory / "config.json").read_text())
    request = REQUESTS["wanda"]
    stage = finish(tmp_path / "run", directory, request)
    check_counts(stage, family, request)
    check_bits(stage, directory, survivors=True)
    assert json.loads((stage / "config.json").read_text()) == config


def test_tensors_that_the_model_does_not_use_are_carried_along(source: Callable[[str], Path], tmp_path: Path) -> None:
    extra = {
        "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.arange(2.0),
        "left.over": torch.arange(5),
    }
    model = changed(source("gpt_neox"), tmp_path / "model", lambda tensors: tensors.update(extra))
    stage = finish(tmp_path / "run", model, REQUESTS["wanda"])
    after = tiny_models.weights(stage)
    assert all(torch.equal(after[name], tensor) for name, tensor in extra.items())
    where = tiny_models.shard_of_names(stage)
    assert "left.over" in where["model-00001-of-00003.safetensors"]
    assert "gpt_neox.layers.1.attention.bias" in where["model-00003-of-00003.safetensors"]


def test_one_shard_a_block_whatever_the_source_is_cut_into(tmp_path: Path) -> None:
    whole = tiny_models.checkpoint(tmp_path / "whole", blocks=3, dtype=torch.bfloat16)
    parts = tiny_models.checkpoint(tmp_path / "parts", blocks=3, dtype=torch.bfloat16, shard_size="9KB")
    assert len(list(parts.glob("*.safetensors"))) > 5
    stages = [finish(tmp_path / f"run-{model.name}", model, REQUESTS["besa-row"]) for model in (whole, parts)]
    shards = [{path.name: path.read_bytes() for path in stage.glob("*.safetensors")} for stage in stages]
    assert shards[0] == shards[1]
    assert sorted(shards[0]) == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    index = json.loads((stages[1] / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards[0])
    for number in (0, 1, 2):
        names = tiny_models.shard_of_names(stages[0])[f"model-{number + 2:05d}-of-00004.safetensors"]
        assert all(name.startswith(f"model.layers.{number}.") for name in names)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "qwen2", tied=True)
    stage = finish(tmp_path / "run", model, REQUESTS["wanda"])
    loaded = stock(stage)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, stock(model).lm_head.weight)


def test_pruning_keeps_the_output_better_the_more_it_knows(tmp_path: Path) -> None:
    """On one tiny model: errors of the first block under the methods are in the order that the literature has."""
    model = tiny_models.checkpoint(tmp_path / "model", blocks=1)
    errors = {}
    for method in PRUNERS:
        job = StageJob(
            Run(tmp_path / method),
            tiny_models.local(model),
            tiny_models.calibration_set(tiny_models.tokens(32, 32)),
            tiny_models.request(method),
        )
        (report,) = job.blocks()
        assert report.error_after is not None
        errors[method] = report.error_after
    assert errors["sparsegpt"] < errors["wanda"]
    assert errors["besa"] <= errors["wanda"]


_SMALL: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
_HEADS = {**_SMALL, "num_attention_heads": 4, "intermediate_size": 48}
UNSUITED = {
    "t5": (
        transformers.T5Config(vocab_size=128, d_model=32, num_layers=2, num_heads=4),
        r"is an encoder-decoder \(t5\)",
    ),
    "bert": (transformers.BertConfig(**_HEADS), r"is an encoder \(bert\)"),
    "distilbert": (transformers.DistilBertConfig(vocab_size=128, dim=32, n_layers=2, n_heads=4), "distilbert"),
}


@pytest.mark.parametrize("name", UNSUITED)
def test_what_cannot_be_pruned_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, message = UNSUITED[name]
    kind: Any = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModel
    model = kind.from_config(config) if name in ("t5", "bert", "distilbert") else tiny_models.built(config)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(BesaError, match=message) as caught:
        StageJob(
            Run(tmp_path / "run"),
            tiny_models.local(tmp_path / "model"),
            tiny_models.calibration_set(tiny_models.tokens()),
            REQUESTS["wanda"],
        )
    assert "causal language models of transformers" in caught.value.hint
    assert not (tmp_path / "run").exists()
