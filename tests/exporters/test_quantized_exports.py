"""Exports of quantized stages: the way back, and the codes as other programs read them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from safetensors.torch import load_file, save_file
from support import exported, llamas, quantized, tiny_models, written
from torch import Tensor
from transformers import AutoModelForCausalLM

import besa_cli.hf  # noqa: F401 - lets transformers load sparse checkpoints
from besa_cli import exporters
from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.jobs import import_
from besa_cli.jobs.export import ExportJob

GRIDS = [(4, 32, True), (4, 24, True), (4, None, True), (3, 24, False), (2, 7, True), (8, None, False)]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Run directories with a pruned stage, made once: `wide` has columns of 64 and 96, others awkward ones."""
    made: dict[str, Run] = {}

    def run(family: str) -> Run:
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            if family == "wide":
                made[family] = llamas.stage(place, intermediate_size=96, head_dim=24)
            else:
                made[family] = exported.stage(place, family)
        return made[family]

    return run


def loaded(directory: Path, **settings: object) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(directory, **settings).state_dict())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_sparse_gives_codes_and_weights_back(
    family: str, grid: tuple[int, int | None, bool], pruned: Callable[[str], Run], tmp_path: Path
) -> None:
    bits, group, symmetric = grid
    run = exported.copy_of(pruned(family), tmp_path / "run")
    quantized.stage(run, bits=bits, group=group, symmetric=symmetric)
    directory = exported.export(run, "sparse")
    job = import_.ImportJob(directory, Run(tmp_path / "back"))
    list(job.shards())
    assert job.directory == tmp_path / "back" / "quantized"
    assert tiny_models.files(job.directory) == tiny_models.files(run.stage("quantized"))
    stage, model = loaded(run.stage("quantized")), loaded(directory)
    assert all(torch.equal(model[name], stage[name]) for name in stage)
    manifest = json.loads((directory / "export.json").read_text())
    if bits == 4:  # half of the weights, their mask, scales, and 32 bytes a linear of sizes
        assert manifest["sizes"]["linears"] < 0.3 * manifest["sizes"]["linears_dense"] + 64 * 20


@pytest.mark.parametrize("part", ["codes", "scale", "grid"])
def test_damaged_codes_are_refused(part: str, pruned: Callable[[str], Run], tmp_path: Path) -> None:
    run = quantized.stage(exported.copy_of(pruned("llama"), tmp_path / "run"))
    stored = load_file(exported.export(run, "sparse") / "sparse-00002-of-00003.safetensors")
    name = f"model.layers.0.mlp.up_proj.weight_{part}"
    stored[name] = stored[name][:-1]
    from besa_cli.checkpoint import sparse_format

    with pytest.raises(BesaError, match=r"up_proj\.weight in file is damaged: weight_"):
        sparse_format.decoded(stored, "file")
    with pytest.raises(BesaError, match=r"up_proj\.weight in file is damaged: weight_"):
        sparse_format.codes(stored, "file")


def test_codes_that_are_not_the_weights_are_refused(pruned: Callable[[str], Run], tmp_path: Path) -> None:
    run = quantized.stage(exported.copy_of(pruned("llama"), tmp_path / "run"))
    file = run.stage("quantized") / "codes" / "model-00002-of-00003.safetensors"
    codes = load_file(file)
    codes["model.layers.0.mlp.up_proj.codes"][3, 4] ^= 1
    save_file(codes, file, metadata={"format": "pt"})
    with pytest.raises(BesaError, match=rf"{file} is damaged"):
        exported.export(run, "sparse")
    written.settle(run.stage("quantized"))
    with pytest.raises(BesaError, match=r"layers\.0\.mlp\.up_proj\.weight differs from its codes"):
        exported.export(run, "sparse")


def by_llama_cpp_name(run: Run) -> dict[str, Tensor]:
    """The quantized linears as the stage holds them, rows of queries and keys in llama.cpp's order."""
    names = {
        "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
        "down": "ffn_down",
    }  # fmt: skip
    found = {}
    for name, tensor in tiny_models.weights(run.stage("quantized")).items():
        for own, theirs in names.items():
            if f".{own}_proj." in name:
                heads = {"q": 4, "k": 2}.get(own, 0)
                rows = tensor.shape[0] // heads if heads else 0
                order = [h * rows + i // 2 + (i % 2) * (rows // 2) for h in range(heads) for i in range(rows)]
                found[f"blk.{name.split('.')[2]}.{theirs}.weight"] = tensor[order] if heads else tensor
    return found


@pytest.mark.parametrize(
    ("kind", "bits", "group"), [("Q4_0", 4, 32), ("Q4_0", 4, None), ("Q4_0", 4, 64), ("Q8_0", 8, 32)]
)
def test_gguf_carries_the_codes_bit_for_bit(
    kind: str, bits: int, group: int | None, pruned: Callable[[str], Run], tmp_path: Path
) -> None:
    run = quantized.stage(exported.copy_of(pruned("wide"), tmp_path / "run"), bits=bits, group=group)
    file = exported.export(run, "gguf", type=kind) / f"model-{kind}.gguf"
    found, wanted = {}, by_llama_cpp_name(run)
    for tensor in GGUFReader(file).tensors:
        if tensor.name in wanted:
            assert GGMLQuantizationType(tensor.tensor_type).name == kind
            values = torch.from_numpy(quants.dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type)).copy())
            found[tensor.name] = values.bfloat16()  # the stage rounded the same products to bf16
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((file.parent / "export.json").read_text())["sizes"]["rounded_to_zero"] == 0


@pytest.mark.parametrize("group", [16, 40])
def test_q8_0_rounds_codes_whose_groups_do_not_fit_its_blocks(
    group: int, pruned: Callable[[str], Run], tmp_path: Path
) -> None:
    run = quantized.stage(exported.copy_of(pruned("wide"), tmp_path / "run"), bits=8, group=group)
    file, wanted = exported.export(run, "gguf", type="Q8_0") / "model-Q8_0.gguf", by_llama_cpp_name(run)
    for tensor in GGUFReader(file).tensors:
        if tensor.name in wanted:
            values = torch.from_numpy(quants.dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type)).copy())
            expected = wanted[tensor.name].float()
            assert float((values - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "words"),
    [
        (3, 32, True, "not on a symmetric 4-bit grid"),
        (4, 32, False, "not on a symmetric 4-bit grid"),
        (4, 24, True, "columns in groups of 24"),
    ],
)
def test_what_q4_0_cannot_carry_is_refused(
    bits: int, group: int, symmetric: bool, words: str, pruned: Callable[[str], Run], tmp_path: Path
) -> None:
    run = exported.copy_of(pruned("wide"), tmp_path / "run")
    with pytest.raises(BesaError, match="not on a symmetric 4-bit grid"):
        ExportJob(run, exporters.load("gguf", {"type": "Q4_0"}))
    quantized.stage(run, bits=bits, group=group, symmetric=symmetric)
    with pytest.raises(BesaError, match=words):
        ExportJob(run, exporters.load("gguf", {"type": "Q4_0"}))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="needs compressed-tensors")
@pytest.mark.parametrize(("bits", "group"), [(4, 24), (4, None), (8, 48), (4, 40), (4, 1000)])
@pytest.mark.parametrize("family", ["wide", "llama", "opt", "gpt_neox"])
def test_stock_transformers_makes_the_stage_of_pack_quantized(
    family: str, bits: int, group: int | None, pruned: Callable[[str], Run], tmp_path: Path
) -> None:
    from transformers import CompressedTensorsConfig

    run = quantized.stage(exported.copy_of(pruned(family), tmp_path / "run"), bits=bits, group=group)
    directory = exported.export(run, "compressed-tensors")
    stage = loaded(run.stage("quantized"))
    model = loaded(directory, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert model.keys() == stage.keys()
    different = [name for name in stage if not torch.equal(model[name], stage[name])]
    assert not different


@pytest.mark.parametrize(("group", "width"), [(24, 2), (36, 2), (48, 2), (54, None), (1000, None)])
def test_scales_of_pack_quantized_are_repeated_as_little_as_the_format_allows(
    group: int, width: int | None, pruned: Callable[[str], Run], tmp_path: Path
) -> None:
    run = quantized.stage(exported.copy_of(pruned("llama"), tmp_path / "run"), group=group)  # of 32, 48 and 54 columns
    directory = exported.export(run, "compressed-tensors")
    (made,) = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert made["weights"]["group_size"] == width
    assert made["weights"]["strategy"] == ("group" if width else "channel")
    scale = tiny_models.weights(directory)["model.layers.1.mlp.down_proj.weight_scale"]
    assert scale.shape[1] == 54 // (width or 54)


def test_pack_quantized_needs_a_symmetric_grid(pruned: Callable[[str], Run], tmp_path: Path) -> None:
    run = exported.copy_of(pruned("llama"), tmp_path / "run")
    with pytest.raises(BesaError, match="is not quantized"):
        ExportJob(run, exporters.load("compressed-tensors"))
    quantized.stage(run, symmetric=False)
    with pytest.raises(BesaError, match="4 bits on asymmetric grids"):
        ExportJob(run, exporters.load("compressed-tensors"))
