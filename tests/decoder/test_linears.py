"""Matrices that are no `nn.Linear` of the model's code: Conv1D, experts, and weights that are left as they are."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import exported, tiny_models
from torch import Tensor

from besa_cli.checkpoint.runs import Run
from besa_cli.decoder.decoder import Decoder
from besa_cli.decoder.verify import verify
from besa_cli.errors import BesaError
from besa_cli.jobs import import_, quantize
from besa_cli.jobs.stage import StageJob

CPU = torch.device("cpu")
_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS: dict[str, Any] = {**_COMMON, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
_MOE: dict[str, Any] = {**_HEADS, "num_key_value_heads": 2, "head_dim": 12, "num_experts_per_tok": 2}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "gpt2": transformers.GPT2Config(**_COMMON, n_embd=32, n_head=4, n_positions=64, n_inner=54),
    "falcon": transformers.FalconConfig(**_HEADS, ffn_hidden_size=54),
    "mamba": transformers.MambaConfig(**_COMMON, hidden_size=32, state_size=4),
    "qwen3_moe": transformers.Qwen3MoeConfig(**_MOE, num_experts=4, moe_intermediate_size=20),
    "mixtral": transformers.MixtralConfig(**_MOE, num_local_experts=4, intermediate_size=20),
    "gpt_oss": transformers.GptOssConfig(
        **_MOE, num_local_experts=4, intermediate_size=20, sliding_window=5, rope_parameters={"rope_type": "default"}
    ),
    "llama4_text": transformers.Llama4TextConfig(
        **_MOE, num_local_experts=4, intermediate_size=20, intermediate_size_mlp=54, attention_chunk_size=8,
        interleave_moe_layer_step=1, no_rope_layers=[1, 0], attn_temperature_tuning=False,
    ),
    "nemotron_h": transformers.NemotronHConfig(
        **_HEADS, num_key_value_heads=2, head_dim=12, layers_block_type=["mamba", "moe"], mamba_num_heads=4,
        mamba_head_dim=16, ssm_state_size=4, n_groups=1, chunk_size=8, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=20, moe_shared_expert_intermediate_size=20, intermediate_size=54,
    ),
}  # fmt: skip
EXPERTS = ("qwen3_moe", "mixtral", "gpt_oss", "llama4_text", "nemotron_h")
DENSE: dict[str, set[str]] = {  # what is left as it is, by its name in the checkpoint
    "gpt2": set(),
    "falcon": set(),
    "mamba": {"A_log", "conv1d.weight", "dt_proj.weight"},
    "qwen3_moe": {"gate.weight"},
    "mixtral": {"gate.weight"},
    "gpt_oss": {"router.weight", "gate_up_proj_bias", "down_proj_bias"},
    "llama4_text": {"router.weight"},
    "nemotron_h": {"conv1d.weight", "gate.weight"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a type in the form in which the hub has it, made once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_models.built(CONFIGS[kind]).save_pretrained(made[kind])
        return made[kind]

    return of


stock = functools.partial(tiny_models.stock, dtype=torch.float32)


def stage_of(run: Path, model: Path, rows: Tensor, method: str = "wanda", **asked: Any) -> Path:
    """Prune by a method; returns the finished stage."""
    calibration = tiny_models.calibration_set(rows)
    job = StageJob(Run(run), tiny_models.local(model), calibration, tiny_models.request(method, **asked))
    assert tiny_models.run(job)["status"] == "complete"
    return run / "pruned"


def reports(stage: Path, block: int) -> dict[str, dict[str, Any]]:
    """The reports of a block's linears by name."""
    record = json.loads((stage / f"model-{block + 2:05d}-of-00003.json").read_text())
    return {each["name"]: each for each in record["linears"]}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_stream_gives_stocks_logits(kind: str, source: Callable[[str], Path]) -> None:
    decoder, rows = Decoder(source(kind), CPU, torch.float32), tiny_models.tokens(3, 20)
    hidden = decoder.embed(rows)
    with torch.no_grad():
        for index in range(len(decoder)):
            decoder.load(index)
            hidden = decoder.forward(index, hidden, rows)
        expected = stock(source(kind))(rows, use_cache=False).logits
    torch.testing.assert_close(decoder.finish(hidden, rows), expected, rtol=1e-4, atol=1e-4)
    verify(decoder, rows)


@pytest.mark.parametrize("method", ["wanda", "besa", "sparsegpt"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_finished_stage(kind: str, method: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """Names, shapes and counts are those of the source, and what is not pruned keeps its bits."""
    stage = stage_of(tmp_path / "run", source(kind), tiny_models.tokens(4, 16), method, sparsity=0.37)
    before, after = tiny_models.weights(source(kind)), tiny_models.weights(stage)
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = [name for name in before if any(f".{index}." in name for index in (0, 1)) and before[name].dim() > 1]
    dense = {name for name in blocks if any(name.endswith(end) for end in DENSE[kind])}
    assert changed == set(blocks) - dense
    counts = json.loads((stage / "besa.json").read_text())["counts"]
    assert counts["weights"] == sum(before[name].numel() for name in changed)
    zeros = sum(int((after[name] == 0).sum()) for name in changed)
    assert zeros == counts["pruned"] == counts["zeros"] == round(0.37 * counts["weights"])
    if method != "sparsegpt":
        assert all(torch.equal(after[name], before[name].masked_fill(after[name] == 0, 0.0)) for name in changed)
    stock(stage)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_left_as_it_is_is_named(kind: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    stage = stage_of(tmp_path / "run", source(kind), tiny_models.tokens(1, 8), "magnitude")
    left = json.loads((stage / "besa.json").read_text()).get("left_out", {"tensors": [], "weights": 0})
    weights = {name: tensor for name, tensor in tiny_models.weights(stage).items() if tensor.dim() > 1}
    ends = {end for end in DENSE[kind] if "bias" not in end}  # a bias for each expert is one vector a linear
    assert {end for name in left["tensors"] for end in ends if name.endswith(end)} == ends
    assert len(left["tensors"]) == len(ends)
    assert left["weights"] == sum(
        tensor.numel() for name, tensor in weights.items() if any(name.endswith(end) for end in ends)
    )


def require_lowest_pruned(scores: Tensor, kept: Tensor) -> None:
    """In every row, no weight that is kept scores lower than one that is pruned; rows differ by one at most."""
    assert (scores.masked_fill(kept, -1.0).amax(1) <= scores.masked_fill(~kept, torch.inf).amin(1) * (1 + 1e-5)).all()
    pruned = (~kept).sum(1)
    assert int(pruned.max() - pruned.min()) <= 1


def test_a_transposed_matrix_is_pruned_by_its_inputs(source: Callable[[str], Path], tmp_path: Path) -> None:
    """Conv1D stores (cols, rows): a column of the stored matrix is a row, whose weights are compared."""
    rows = tiny_models.tokens(4, 16)
    seen: dict[str, Tensor] = {}
    model = stock(source("gpt2"))
    for name in ("attn.c_attn", "mlp.c_proj"):
        module = model.transformer.h[0].get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(rows)
    stage = stage_of(tmp_path / "run", source("gpt2"), rows)
    after = tiny_models.weights(stage)
    attention = after["transformer.h.0.attn.c_attn.weight"]
    norms = seen["attn.c_attn"].flatten(0, 1).norm(dim=0)
    before = tiny_models.weights(source("gpt2"))["transformer.h.0.attn.c_attn.weight"]
    require_lowest_pruned(before.T.abs() * norms, attention.T != 0)
    report = reports(stage, 0)["attn.c_attn"]
    assert (report["rows"], report["cols"], report["transposed"]) == (96, 32, True)


def routed(kind: str, directory: Path, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Inputs of every expert's two matrices in block 1 of the stock model, by plain loops over its tokens."""
    model, caught = stock(directory, experts_implementation="eager"), []
    block = next(module for name, module in model.named_modules() if name.endswith("layers"))[1]
    experts = {"nemotron_h": "mixer", "llama4_text": "feed_forward"}.get(kind, "mlp")
    experts = block.get_submodule(experts).experts
    experts.register_forward_pre_hook(lambda _, args: caught.append(args))
    with torch.no_grad():
        model(rows, use_cache=False)
        ((hidden, *chosen),) = caught
        if kind == "llama4_text":  # all tokens for every expert, zero if they are not for it
            states = hidden.view(4, -1, 32)
            gate, up = (states @ experts.gate_up_proj).chunk(2, -1)
            return list(zip(states, up * torch.nn.functional.silu(gate), strict=True))
        found = []
        for expert in range(4):
            tokens = [token for token in range(len(hidden)) if expert in chosen[0][token].tolist()]
            states = hidden[tokens]
            first = experts.up_proj if kind == "nemotron_h" else experts.gate_up_proj
            matrix = first[expert].T if not experts.is_transposed else first[expert]
            inner = states @ matrix + (experts.gate_up_proj_bias[expert] if experts.has_bias else 0.0)
            gated = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
            found.append((states, gated))
    return found


_STORED = {  # where block 1 has its experts, and their matrices by name; the last of them takes the gated states
    "qwen3_moe": ("model.layers.1.mlp.experts.{}.%s.weight", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("model.layers.1.block_sparse_moe.experts.{}.%s.weight", ("w1", "w3", "w2")),
    "gpt_oss": ("model.layers.1.mlp.experts.%s", ("gate_up_proj", "down_proj")),
    "llama4_text": ("model.layers.1.feed_forward.experts.%s", ("gate_up_proj", "down_proj")),
    "nemotron_h": ("backbone.layers.1.mixer.experts.{}.%s.weight", ("up_proj", "down_proj")),
}


def matrix_of(weights: dict[str, Tensor], pattern: str, expert: int) -> Tensor:
    """An expert's matrix of shape (rows, cols) in a checkpoint."""
    return weights[pattern.format(expert)] if "{}" in pattern else weights[pattern][expert].T


@pytest.mark.parametrize("kind", EXPERTS)
def test_an_expert_is_pruned_by_the_tokens_that_reach_it(
    kind: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    """Stock gives the inputs of block 1 from block 0 as it was pruned."""
    rows = tiny_models.tokens(4, 16)
    model = tmp_path / "model"
    tiny_models.built(CONFIGS[kind]).save_pretrained(model)
    tensors = load_file(model / "model.safetensors")
    stage = stage_of(tmp_path / "run", model, rows)
    thinned = {
        name: tensor for name, tensor in tiny_models.weights(stage).items() if ".0." in name.replace("experts.0.", "")
    }
    save_file({**tensors, **thinned}, model / "model.safetensors", metadata={"format": "pt"})  # block 0 as pruned
    after = tiny_models.weights(stage)
    for expert, inputs in enumerate(routed(kind, model, rows)):
        assert len(inputs[0]), "every expert is reached"
        pattern, names = _STORED[kind]
        for name in names:
            weight, kept = (matrix_of(stored, pattern % name, expert) for stored in (tensors, after))
            require_lowest_pruned(weight.abs() * inputs[name == names[-1]].norm(dim=0), kept != 0)


@pytest.mark.parametrize("method", ["wanda", "besa", "sparsegpt"])
def test_experts_that_no_token_reaches_are_pruned_by_magnitude(method: str, tmp_path: Path) -> None:
    """Five tokens reach at most ten of 16 experts of each block."""
    config = transformers.Qwen3MoeConfig(**_MOE, num_experts=16, moe_intermediate_size=20)
    model, rows = tmp_path / "model", tiny_models.tokens(1, 5)
    tiny_models.built(config).save_pretrained(model)
    stage = stage_of(tmp_path / "run", model, rows, method)
    before, after = tiny_models.weights(model), tiny_models.weights(stage)
    unreached = [
        (block, name) for block in (0, 1) for name, each in reports(stage, block).items() if each.get("unreached")
    ]
    assert len(unreached) >= 2 * 3 * 6
    assert json.loads((stage / "besa.json").read_text())["counts"]["unreached"] == len(unreached)
    for block, name in unreached:
        assert ".experts." in name
        weight = before[f"model.layers.{block}.{name}.weight"]
        kept = after[f"model.layers.{block}.{name}.weight"] != 0
        lowest = weight.abs().masked_fill(kept, -1.0).amax(1)
        assert (lowest <= weight.abs().masked_fill(~kept, torch.inf).amin(1)).all()


def test_experts_that_return_their_inputs_hold_no_matrices(tmp_path: Path) -> None:
    """LongCat-Flash sends tokens to experts that do nothing; the checkpoint has gates for them that are never used."""
    config = transformers.LongcatFlashConfig(
        **{**_COMMON, "num_hidden_layers": 4}, num_layers=2, hidden_size=32, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, ffn_hidden_size=54, expert_ffn_hidden_size=20, q_lora_rank=12,
        kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, zero_expert_num=2,
        moe_topk=3, max_position_embeddings=64,
    )  # fmt: skip
    model, rows = tmp_path / "model", tiny_models.tokens(4, 16)
    tiny_models.built(config).save_pretrained(model)
    verify(Decoder(model, CPU, torch.float32), rows)
    stage = stage_of(tmp_path / "run", model, rows)
    before, after = tiny_models.weights(model), tiny_models.weights(stage)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if ".experts." in name and int(name.split(".experts.")[1][0]) < 4} < changed
    assert not any(f".experts.{number}." in name for name in changed for number in (4, 5))
    stock(stage)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pattern_is_in_every_window_of_a_row(kind: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    stage = stage_of(tmp_path / "run", source(kind), tiny_models.tokens(2, 12), nm=(2, 4))
    for block in (0, 1):
        for each in reports(stage, block).values():
            assert each["pruned"] == each["rows"] * (each["cols"] // 4) * 2


def test_a_resumed_stage_has_the_same_bytes(source: Callable[[str], Path], tmp_path: Path) -> None:
    """The first block of a mixture stored with all experts in one tensor is read again from its shard."""
    calibration = tiny_models.calibration_set(tiny_models.tokens(2, 12))
    model, request = tiny_models.local(source("gpt_oss")), tiny_models.request()
    next(iter(StageJob(Run(tmp_path / "resumed"), model, calibration, request).blocks()))
    for run in ("resumed", "whole"):
        tiny_models.run(StageJob(Run(tmp_path / run), model, calibration, request))
    resumed, whole = (tiny_models.weights(tmp_path / run / "pruned") for run in ("resumed", "whole"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "qwen3_moe"])
def test_sparse_exports_are_imported_to_the_bit(kind: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """The codes of a transposed tensor, or of one for all experts, are refused."""
    run, rows = Run(tmp_path / "run"), tiny_models.tokens(2, 12)
    model = tiny_models.add_tokenizer(shutil.copytree(source(kind), tmp_path / "model"))
    pruned = stage_of(run.path, model, rows)
    request = quantize.request(method="rtn", bits=4, options={}, device="cpu", dtype="float32")
    tiny_models.run(StageJob(run, tiny_models.local(pruned), tiny_models.calibration_set(rows), request))
    for stage in ("quantized", "pruned"):
        if stage == "quantized" and kind != "qwen3_moe":
            with pytest.raises(BesaError, match="cannot hold its codes"):
                exported.export(run, "sparse")
            shutil.rmtree(run.stage(stage))
            continue
        back = Run(tmp_path / f"{stage}-again")
        list(import_.ImportJob(exported.export(run, "sparse"), back).shards())
        again, there = (tiny_models.weights(each.stage(stage)) for each in (back, run))
        assert again.keys() == there.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in there.items())
        shutil.rmtree(run.exports)
        shutil.rmtree(run.stage(stage))
