"""Models that run from packed weights, beside the same checkpoints loaded dense."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import exported, quantized, tiny_models
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from besa_cli.checkpoint import sparse_format
from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.hf import SparseConfig
from besa_cli.ops import affine
from besa_cli.ops.affine import Grid
from besa_cli.ops.kernels import native_tiles
from besa_cli.runtime.linear import PackedLinear, StreamedLinear
from besa_cli.runtime.matrix import CodedMatrix, QuantizedMatrix

LEVELS = ("torch", *native_tiles.supported())
# transformers says that the checkpoint's own configuration counts, apart from loading attributes as `packed`
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Sparse exports, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def directory(family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
        if (family, dtype) not in made:
            place = tmp_path_factory.mktemp(family)
            made[family, dtype] = exported.export(exported.stage(place, family, dtype=dtype), "sparse")
        return made[family, dtype]

    return directory


def loaded(directory: Path, *, packed: bool) -> PreTrainedModel:
    options = {"quantization_config": SparseConfig(packed=True)} if packed else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, **options)
    return model


def packed_linears(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, PackedLinear)]


def assert_alike(packed: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Logits agree as far as another order of summation in the dtype of the model allows."""
    tokens = tiny_models.tokens()
    with torch.no_grad():
        ours, theirs = packed(tokens).logits.float(), dense(tokens).logits.float()
    assert ours.dtype == theirs.dtype
    assert float((ours - theirs).norm() / theirs.norm()) < 4 * torch.finfo(dense.dtype).eps


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_architecture_gives_the_logits_of_the_dense_model(family: str, export: Callable[..., Path]) -> None:
    packed, dense = loaded(export(family), packed=True), loaded(export(family), packed=False)
    assert not packed_linears(dense)
    assert_alike(packed, dense)


def test_no_file_stays_mapped_in_plain_transformers(export: Callable[..., Path]) -> None:
    maps, directory = Path("/proc/self/maps"), export()
    if not maps.exists():
        pytest.skip("this system does not list what a process maps")
    model = loaded(directory, packed=True)
    assert packed_linears(model)
    assert str(directory) not in maps.read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", LEVELS)
def test_the_linears_of_a_llama_are_packed_and_generate_the_same_text(
    level: str, dtype: torch.dtype, export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESA_INSTRUCTIONS", level)
    packed, dense = loaded(export("llama", dtype), packed=True), loaded(export("llama", dtype), packed=False)
    linears = tiny_models.linear_names(dense, tiny_models.blocks_of("llama"))
    assert sorted(packed_linears(packed)) == sorted(name for block in linears for name in block)
    assert isinstance(packed.get_output_embeddings(), StreamedLinear)
    assert_alike(packed, dense)
    prompt = tiny_models.tokens(1, 5)
    texts = [model.generate(prompt, max_new_tokens=8, do_sample=False) for model in (packed, dense)]  # type: ignore[operator]
    assert texts[0].tolist() == texts[1].tolist()


def test_other_dtypes_of_the_model_multiply_the_same_values(export: Callable[..., Path]) -> None:
    load = AutoModelForCausalLM.from_pretrained
    packed = load(export(), dtype=torch.float32, quantization_config=SparseConfig(packed=True))
    dense = load(export(), dtype=torch.float32)
    assert packed_linears(packed)
    assert_alike(packed, dense)


def test_fp32_checkpoints_stay_dense(export: Callable[..., Path]) -> None:
    packed = loaded(export("llama", torch.float32), packed=True)
    dense = loaded(export("llama", torch.float32), packed=False)
    assert not packed_linears(packed)
    assert_alike(packed, dense)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (3, True)])
@pytest.mark.parametrize("level", LEVELS)
def test_quantized_stages_keep_their_codes_and_give_the_logits_of_the_dense_model(
    level: str, bits: int, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESA_INSTRUCTIONS", level)
    run = quantized.stage(exported.stage(tmp_path, "llama"), bits=bits, symmetric=symmetric)
    directory = exported.export(Run(run.path), "sparse")
    packed, dense = loaded(directory, packed=True), loaded(directory, packed=False)
    kind = QuantizedMatrix if level == "torch" else CodedMatrix
    assert packed_linears(packed)
    assert all(isinstance(module.matrix, kind) for module in packed.modules() if isinstance(module, PackedLinear))
    assert_alike(packed, dense)


def test_pipelines_take_the_same_argument(export: Callable[..., Path]) -> None:
    directory = export()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = []
    for options in ({}, {"quantization_config": SparseConfig(packed=True)}):
        made = pipeline("text-generation", model=str(directory), tokenizer=tokenizer, model_kwargs=options)
        texts.append(made("a b", max_new_tokens=5, do_sample=False))
    assert texts[0] == texts[1]


def test_a_packed_model_is_not_saved(export: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not serializable"):
        loaded(export(), packed=True).save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(("level", "said"), [("torch", 1), ("plain", 1), (None, 0)])
def test_one_line_says_that_it_is_slow(
    level: str | None,
    said: int,
    export: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if level is None and native_tiles.supported()[-1:] in ((), ("plain",)):
        pytest.skip("it is slow here")
    if level in LEVELS and level is not None:
        monkeypatch.setenv("BESA_INSTRUCTIONS", level)
    with caplog.at_level(logging.WARNING, logger="besa_cli"):
        loaded(export(), packed=True)
    assert sum("run slowly" in record.message for record in caplog.records) == said


def parts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 21, generator=generator).masked_fill(torch.rand(6, 21, generator=generator) < 0.5, 0.0)
    stored = sparse_format.encoded("up.weight", matrix.to(torch.bfloat16))
    return {name.removeprefix("up."): part for name, part in stored.items()}


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "a bit more": lambda stored: stored["weight_mask"][0].bitwise_not_(),
    "a bit beyond the columns": lambda stored: stored["weight_mask"][0, -1].bitwise_or_(1 << 6),
    "values cut": lambda stored: stored.update(weight_values=stored["weight_values"][:-1]),
    "no values": lambda stored: stored.pop("weight_values"),
    "a mask cut": lambda stored: stored.update(weight_mask=stored["weight_mask"][:-1]),
    "other sizes": lambda stored: stored["weight_shape"].add_(torch.tensor([0, 8])),
    "sizes whose product overflows": lambda stored: stored["weight_shape"].fill_(1 << 62),
    "negative sizes": lambda stored: stored["weight_shape"].neg_(),
    "infinity": lambda stored: stored["weight_values"].fill_(float("inf")),
    "integers": lambda stored: stored.update(weight_values=stored["weight_values"].short()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_hostile_parts_are_refused_before_a_kernel_sees_them(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = parts()
    DAMAGE[damage](stored)
    monkeypatch.setattr(native_tiles, "call", lambda *_, **__: pytest.fail("a kernel was called"))
    with pytest.raises(BesaError, match=r"^up\.weight is damaged"):
        PackedLinear(nn.Linear(21, 6)).pack(stored, "up.weight")


def coded_parts(bits: int = 4, *, symmetric: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 75, generator=generator)
    codes = affine.nearest(weight, Grid(bits=bits, group_size=32, symmetric=symmetric))
    codes = affine.pruned(codes, torch.rand(6, 75, generator=generator) < 0.5)
    stored = sparse_format.encoded_codes("up.weight", affine.dequantize(codes).bfloat16(), codes)
    return {name.removeprefix("up."): part for name, part in stored.items()}


CODES_DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "a bit more": lambda stored: stored["weight_mask"][0].bitwise_not_(),
    "codes cut": lambda stored: stored.update(weight_codes=stored["weight_codes"][:-1]),
    "more codes": lambda stored: stored.update(weight_codes=stored["weight_codes"].repeat(2)),
    "codes of the wrong dtype": lambda stored: stored.update(weight_codes=stored["weight_codes"].short()),
    "codes that stand for zero": lambda stored: stored["weight_codes"].fill_(int(stored["weight_zero"][0, 0]) * 17),
    "values beside codes": lambda stored: stored.update(weight_values=torch.ones(3, dtype=torch.bfloat16)),
    "no values": lambda stored: stored.pop("weight_values"),
    "scales cut": lambda stored: stored.update(weight_scale=stored["weight_scale"][:, :-1]),
    "more scales": lambda stored: stored.update(weight_scale=stored["weight_scale"].repeat(2, 1)),
    "no scales": lambda stored: stored.pop("weight_scale"),
    "infinite scales": lambda stored: stored["weight_scale"].fill_(float("inf")),
    "negative scales": lambda stored: stored["weight_scale"].neg_(),
    "zero points cut": lambda stored: stored.update(weight_zero=stored["weight_zero"][:1]),
    "zero points beyond the codes": lambda stored: stored["weight_zero"].fill_(16),
    "groups of no columns": lambda stored: stored["weight_grid"].copy_(torch.tensor([4, 0])),
    "groups wider than the matrix": lambda stored: stored["weight_grid"].copy_(torch.tensor([4, 1 << 62])),
    "narrower groups": lambda stored: stored["weight_grid"].copy_(torch.tensor([4, 16])),
    "more bits": lambda stored: stored["weight_grid"].copy_(torch.tensor([8, 32])),
    "bits that there are not": lambda stored: stored["weight_grid"].copy_(torch.tensor([5, 32])),
    "no grid": lambda stored: stored.pop("weight_grid"),
    "sizes whose product overflows": lambda stored: stored["weight_shape"].fill_(1 << 62),
    "other sizes": lambda stored: stored["weight_shape"].add_(torch.tensor([1, 0])),
}


@pytest.mark.parametrize("damage", CODES_DAMAGE)
def test_hostile_codes_are_refused_before_a_kernel_sees_them(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = coded_parts()
    CODES_DAMAGE[damage](stored)
    monkeypatch.setattr(native_tiles, "call", lambda *_, **__: pytest.fail("a kernel was called"))
    with pytest.raises(BesaError, match=r"^up\.weight is damaged"):
        PackedLinear(nn.Linear(75, 6)).pack(stored, "up.weight")


def test_codes_of_another_shape_than_the_model_has_are_refused() -> None:
    with pytest.raises(BesaError, match=r"up\.weight has the shape \(6, 75\), the model's is \(6, 74\)"):
        PackedLinear(nn.Linear(74, 6)).pack(coded_parts(), "up.weight")


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_stored_of_codes_is_counted_by_the_model(symmetric: bool) -> None:
    linear = PackedLinear(nn.Linear(75, 6, bias=False))
    linear.pack(coded_parts(symmetric=symmetric), "up.weight")
    packed = linear.matrix
    assert isinstance(packed, CodedMatrix | QuantizedMatrix)
    if isinstance(packed, CodedMatrix):
        parts = (packed.codes.tiles, packed.codes.scales, packed.codes.zeros)
        assert linear.weight.nbytes >= sum(part.nbytes for part in parts)
        addresses = range(packed.data.data_ptr(), packed.data.data_ptr() + packed.data.nbytes + 1)
        assert all(part.data_ptr() in addresses for part in parts if part.numel())


def test_a_weight_of_another_shape_than_the_model_has_is_refused() -> None:
    with pytest.raises(BesaError, match=r"up\.weight has the shape \(6, 21\), the model's is \(6, 20\)"):
        PackedLinear(nn.Linear(20, 6)).pack(parts(), "up.weight")


def test_inputs_that_the_kernels_do_not_take_are_refused() -> None:
    linear = PackedLinear(nn.Linear(21, 6))
    linear.pack(parts(), "up.weight")
    assert linear(torch.ones(2, 3, 21)).shape == (2, 3, 6)
    with pytest.raises(BesaError, match="packed weights run on the CPU in bf16, fp16 or fp32"):
        linear(torch.ones(1, 21, dtype=torch.float64))
