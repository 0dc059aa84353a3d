"""`besa quantize` and `besa prune --bits` from a checkpoint to a stage: stock loading, codes, counts, resume."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models
from torch import Tensor
from transformers import AutoModelForCausalLM

from besa_cli.checkpoint.runs import Run
from besa_cli.checkpoint.stages import Stage
from besa_cli.errors import BesaError
from besa_cli.jobs import quantize
from besa_cli.jobs.request import StageRequest
from besa_cli.jobs.stage import StageJob
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid
from besa_cli.system import disk

Besa = Callable[..., Any]  # conftest.Outcome
ROWS = tiny_models.tokens(3, 12)


def asked(method: str = "rtn", **options: Any) -> StageRequest:
    own: dict[str, Any] = {name: options.pop(name) for name in ("damping", "epochs", "lr") if name in options}
    return quantize.request(method=method, options=own, device="cpu", dtype="float32", **options)


PLANS: dict[str, StageRequest] = {
    "rtn": asked("rtn", bits=4, group_size="16"),
    "gptq": asked("gptq", bits=3, group_size="channel", symmetric=False),
    "clip": asked("clip", bits=2, group_size="16", epochs=2),
    "eight": asked("rtn", bits=8, group_size="channel", symmetric=False),
    "joint": tiny_models.request("besa", sparsity=0.4, bits=4, group_size="20"),
    "joint-halves": tiny_models.request("besa", bits=3, symmetric=False, window="attn-mlp", optimizer="prodigy"),
}


def job(run: Path, model: Path, plan: StageRequest) -> StageJob:
    return StageJob(Run(run), tiny_models.local(model), tiny_models.calibration_set(ROWS), plan)


def unpacked(directory: Path, grid: Grid, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as the specification says they are made from the codes, with none of the program's functions.

    Also finds every code again in the weights that are `stored`.
    """
    found, group = {}, grid.group_size
    for file in sorted((directory / "codes").iterdir()):
        parts = load_file(file)
        for name in (name.removesuffix(".codes") for name in parts if name.endswith(".codes")):
            codes, scales = parts[f"{name}.codes"].float(), parts[f"{name}.scales"].float()
            middle = torch.full_like(scales, 2 ** (grid.bits - 1))
            zeros = middle if grid.symmetric else parts[f"{name}.zeros"].float()
            where = torch.arange(codes.shape[1]) // (group or codes.shape[1])
            found[f"{name}.weight"] = (codes - zeros[:, where]) * scales[:, where]
            again = (stored[f"{name}.weight"].double() / scales[:, where].double()).round() + zeros[:, where]
            assert torch.equal(again.clamp(0, 2**grid.bits - 1), codes.double())
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("name", PLANS)
def test_a_stage_loads_as_it_is_and_its_codes_are_its_weights(family: str, name: str, tmp_path: Path) -> None:
    if name == "joint-halves" and family in ("gpt_neox",):
        pytest.skip("its blocks have no two halves one after the other")
    model = tiny_models.checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
    manifest = tiny_models.run(job(tmp_path / "run", model, PLANS[name]))
    stage = tmp_path / "run" / "quantized"
    load: Any = AutoModelForCausalLM.from_pretrained  # its type tells nothing of the second result
    loaded, information = load(stage, output_loading_info=True)
    assert not any(information.values())
    state = loaded.state_dict()
    grid = Grid(**manifest["quantization"])
    stored = tiny_models.weights(stage)
    codes = unpacked(stage, grid, stored)
    names = [each for block in tiny_models.linear_names(loaded, tiny_models.blocks_of(family)) for each in block]
    assert set(codes) <= set(stored)
    assert len(codes) == len(names)
    for weight_name, weight in codes.items():
        assert torch.equal(weight.to(torch.bfloat16), stored[weight_name])
    before = tiny_models.weights(model)
    for each, tensor in stored.items():
        if each not in codes:
            assert torch.equal(tensor, before[each]), each
    already = sum(int((before[each] == 0).sum()) for each in codes)
    pruned = manifest["counts"]["pruned"] if "joint" in name else already
    zeros = sum(int((state[each] == 0).sum()) for each in names)
    counts = manifest["counts"]
    assert (counts["pruned"], counts["zeros"], counts["rounded_to_zero"]) == (pruned, zeros, zeros - pruned)
    assert counts["bits_per_weight"] == pytest.approx(bits(codes, grid) / counts["weights"])
    assert manifest["stage"] == "quantized"


def bits(codes: dict[str, Tensor], grid: Grid) -> int:
    """What the packed linears take: values or values and mask, scales, zero points."""
    total = 0
    for weight in codes.values():
        rows, cols = weight.shape
        groups = 1 if grid.group_size is None else -(-cols // min(grid.group_size, cols))
        kept = int((weight != 0).sum())
        total += min(grid.bits * rows * cols, grid.bits * kept + rows * cols)
        total += rows * groups * (16 if grid.symmetric else 16 + grid.bits)
    return total


def test_the_joint_stage_prunes_what_was_asked_to_the_weight(tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16)
    manifest = tiny_models.run(
        job(tmp_path / "run", model, tiny_models.request("besa", sparsity=0.37, bits=8, group_size="16"))
    )
    assert manifest["counts"]["pruned"] == round(0.37 * manifest["counts"]["weights"])
    assert manifest["options"]["symmetric"] is True
    assert not (tmp_path / "run" / "pruned").exists()


@pytest.mark.parametrize("method", ["rtn", "gptq", "clip"])
def test_what_was_pruned_stays_zero_through_the_run(method: str, tmp_path: Path) -> None:
    model, run = tiny_models.checkpoint(tmp_path / "model", "qwen2"), tmp_path / "run"
    tiny_models.run(job(run, model, tiny_models.request("wanda")))
    tiny_models.run(job(run, run / "pruned", asked(method, bits=2, group_size="16", symmetric=False)))
    before, after = tiny_models.weights(run / "pruned"), tiny_models.weights(run / "quantized")
    linears = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(linears) == 14
    for name in linears:
        assert bool((after[name][before[name] == 0] == 0).all())
    manifest = json.loads((run / "quantized" / "besa.json").read_text())
    assert manifest["model"]["stage"] == "pruned"
    assert manifest["counts"]["pruned"] == sum(int((before[name] == 0).sum()) for name in linears)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("last", ["codes", "report"])
def test_stopped_between_two_blocks_and_run_again_gives_the_same_bytes(
    name: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16)
    tiny_models.run(job(tmp_path / "whole", model, PLANS[name]))
    expected = tiny_models.files(tmp_path / "whole")

    class Killed(BaseException):
        pass

    save = disk.save_tensors

    def dying(path: Path, tensors: dict[str, Tensor]) -> None:
        codes = path.parent.name == "codes"
        if "00003-of" in path.name and codes == (last == "report"):  # after the block's report, or after its codes
            raise Killed
        save(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "save_tensors", dying)
        with pytest.raises(Killed):
            tiny_models.run(job(tmp_path / "cut", model, PLANS[name]))
    again = job(tmp_path / "cut", model, PLANS[name])
    assert [report.resumed for report in again.blocks()] == [True, False]
    again.finish()
    assert tiny_models.files(tmp_path / "cut") == expected


def test_a_stage_whose_parent_was_made_anew_is_not_the_newest(tmp_path: Path) -> None:
    model, run = tiny_models.checkpoint(tmp_path / "model", "llama"), tmp_path / "run"
    tiny_models.run(job(run, model, tiny_models.request("wanda")))
    tiny_models.run(job(run, run / "pruned", asked()))
    assert Run(run).newest() == run / "quantized"
    tiny_models.run(
        StageJob(
            Run(run),
            tiny_models.local(model),
            tiny_models.calibration_set(ROWS),
            tiny_models.request("magnitude"),
            restart=True,
        )
    )
    assert Run(run).stale("quantized")
    assert Run(run).newest() == run / "pruned"


def test_the_command_line(besa: Besa, tmp_path: Path) -> None:
    model = tiny_models.add_tokenizer(tiny_models.checkpoint(tmp_path / "model", "llama"))
    rows = tiny_models.rows_file(tmp_path / "rows.jsonl", ROWS)
    drawn = ("--data", rows, "--samples", 3, "--seqlen", 12)
    none = besa("quantize", "--run", "run")
    assert (none.code, none.err.count("\n")) == (1, 2)
    assert "run has no pruned stage" in none.err
    assert besa("prune", "--model", model, "--method", "wanda", *drawn, "--run", "run").code == 0
    done = besa("quantize", "--bits", 3, "--group-size", "channel", "--asymmetric", "--run", "run", "--json")
    assert done.code == 0, done.err
    made = json.loads(done.out)
    assert made["options"]["group_size"] == "channel"
    assert made["quantization"] == {"bits": 3, "group_size": None, "symmetric": False}
    shown = besa("show", "run/quantized")
    assert "3 bits in channels, asymmetric" in shown.out
    assert f"{made['counts']['bits_per_weight']:.3f} bits per weight" in shown.out
    assert "--asymmetric" in shown.out
    again = besa("quantize", "--bits", 3, "--group-size", "channel", "--asymmetric", "--run", "run")
    assert "run/quantized is finished already" in again.err
    other = besa("quantize", "--bits", 3, "--group-size", "channel", "--run", "run")
    assert other.code == 1
    assert "symmetric False there, True asked" in other.err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["quantize", "--bits", "3.5"], 2, "3.5"),
        (["quantize", "--bits", "5"], 2, "--bits 5 is not one of 2, 3, 4, 8"),
        (["quantize", "--group-size", ""], 2, "--group-size '' is neither channel nor a number"),
        (["prune", "--bits", "4", "--group-size", ""], 2, "--group-size '' is neither channel nor a number"),
        (["prune", "--asymmetric"], 2, "--asymmetric has no effect without --bits"),
        (["quantize", "--group-size", "0"], 2, "--group-size '0' is neither channel nor a number"),
        (["quantize", "--method", "gtpq"], 2, "unknown method 'gtpq'"),
        (["quantize", "--method", "rtn", "--damping", "0.1"], 2, "--damping is not an option of --method rtn"),
        (["quantize", "--method", "gptq", "--epochs", "2"], 2, "--epochs is not an option of --method gptq"),
        (["prune", "--bits", "4", "--method", "wanda"], 2, "--bits is not an option of --method wanda"),
        (["prune", "--group-size", "64"], 2, "--group-size has no effect without --bits"),
        (["prune", "--bits", "4", "--preset", "authors"], 2, "--bits 4 and --preset authors exclude each other"),
        (["prune", "--bits", "16"], 2, "--bits 16 is not one of"),
    ],
)
def test_bad_options_get_one_line_before_any_work(words: list[str], code: int, says: str, besa: Besa) -> None:
    refused = besa(*words, "--model", "/nowhere", "--run", "run")
    assert (refused.code, refused.out) == (code, "")
    assert says in refused.err
    assert refused.err.count("error:") == 1
    assert not Path("run").exists()


def test_round_to_nearest_needs_no_tokenizer_and_draws_no_samples(besa: Besa, tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama")
    words = ("quantize", "--model", model, "--group-size", 16, "--run", "run")
    made = besa(*words, "--json")
    assert made.code == 0, made.err
    assert "calibration" not in made.err
    assert not (tmp_path / "run" / "calibration").exists()
    manifest = json.loads(made.out)
    assert manifest["calibration"] == {"tokens_digest": None, "sources": []}
    assert "is finished already" in besa(*words).err
    older = tmp_path / "run" / "quantized" / "besa.json"
    with_samples = json.loads(older.read_text())
    with_samples["calibration"]["tokens_digest"] = "0" * 64
    with_samples["options"] |= {"data": ["c4"], "samples": 128, "seqlen": 2048, "pack": None}
    older.write_text(json.dumps(with_samples))
    assert "is finished already" in besa(*words).err
    for option, value in (("--samples", 4), ("--data", "c4"), ("--calibration", model)):
        refused = besa(*words[:-1], "elsewhere", option, value)
        assert (refused.code, refused.out) == (2, "")
        assert f"{option} {value} has no effect with --method rtn, which uses no samples" in refused.err
    assert not Path("elsewhere").exists()


def test_codes_that_are_gone_are_missed(besa: Besa, tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16)
    tiny_models.run(job(tmp_path / "run", model, asked(group_size="16")))
    gone = Stage(tmp_path / "run" / "quantized", 2).shard(1).name
    (tmp_path / "run" / "quantized" / "codes" / gone).unlink()
    for words in (["show", "run/quantized"], ["export", "--format", "compressed-tensors", "--run", "run"]):
        refused = besa(*words)
        assert refused.code == 1
        assert f"codes/{gone} is missing" in refused.err
        assert f"run/quantized/{gone}; in an unfinished stage" in refused.err  # the file to delete


@pytest.mark.parametrize("done", [1, 2])
def test_codes_that_are_gone_are_missed_before_a_stage_goes_on(done: int, tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama", dtype=torch.bfloat16)
    tiny_models.run(job(tmp_path / "whole", model, asked(group_size="16")))
    blocks = job(tmp_path / "cut", model, asked(group_size="16")).blocks()
    for _ in range(done):  # then killed
        next(blocks)
    stage = Stage(tmp_path / "cut" / "quantized", 2)
    (stage.directory / "codes" / stage.shard(0).name).unlink()
    with pytest.raises(BesaError, match=f"codes/{stage.shard(0).name} is missing"):
        tiny_models.run(job(tmp_path / "cut", model, asked(group_size="16")))
    stage.shard(0).unlink()  # what the hint says
    tiny_models.run(job(tmp_path / "cut", model, asked(group_size="16")))
    assert tiny_models.files(tmp_path / "cut") == tiny_models.files(tmp_path / "whole")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("command", ["quantize", "prune"])
def test_weights_whose_scale_is_beyond_fp16_are_named_before_the_first_block(
    command: str, symmetric: bool, tmp_path: Path
) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    plan: StageRequest = asked(bits=4, symmetric=symmetric)
    if command == "prune":
        plan = tiny_models.request("besa", bits=4, symmetric=symmetric)
    for value, refused in ((492_000.0, symmetric), (990_000.0, True)):  # 65,504 · 15 = 982,560, half of it each side
        tensors[name][3, 5] = value
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        if refused:
            with pytest.raises(BesaError, match=re.escape(f"{name} has weights as large as {value:.3g}: their scale")):
                job(tmp_path / "run", model, plan)
            assert not (tmp_path / "run" / "quantized").exists()
        else:
            job(tmp_path / "run", model, plan)
            shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fp16_weights_at_the_end_of_fp16_stay_finite(symmetric: bool, bits: int, tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama", dtype=torch.float16)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5], tensors[name][4, 7] = -65472.0, 65504.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    manifest = tiny_models.run(job(tmp_path / "run", model, asked(bits=bits, group_size="16", symmetric=symmetric)))
    stored = tiny_models.weights(tmp_path / "run" / "quantized")
    codes = unpacked(tmp_path / "run" / "quantized", Grid(**manifest["quantization"]), stored)
    assert bool(stored[name].isfinite().all())
    assert float(stored[name][3, 5]) < -32000
    assert all(torch.equal(weight.half(), stored[each]) for each, weight in codes.items())


def test_a_refusal_leaves_nothing_behind(besa: Besa, tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert besa("quantize", "--model", model, "--run", "run").code == 1
    assert not Path("run").exists()
    Path("run").mkdir()
    assert besa("quantize", "--model", model, "--run", "run").code == 1
    assert Path("run").exists()


def test_a_stored_linear_is_read_as_a_grid(tmp_path: Path) -> None:
    model = tiny_models.checkpoint(tmp_path / "model", "llama")
    manifest = tiny_models.run(job(tmp_path / "run", model, PLANS["gptq"]))
    stage = Stage(tmp_path / "run" / "quantized", manifest["blocks"])
    name = "model.layers.1.mlp.down_proj"
    found = affine.from_tensors(stage.codes(1), name, Grid(**manifest["quantization"]))
    assert torch.equal(affine.dequantize(found), stage.read(1)[f"{name}.weight"])
