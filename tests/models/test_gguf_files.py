"""GGUF files written tensor by tensor from a known model must give that model back."""

import functools
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa_cli.errors import BesaError
from besa_cli.models import resolve
from besa_cli.models.gguf import file_header

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEADS = {"attn_q": 4, "attn_k": 2}
Type = gguf.GGMLQuantizationType


def renamed(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in outer:
        return f"{outer[name]}.weight"
    _, _, block, inner, _ = name.replace("self_attn.", "self_attn:").replace("mlp.", "mlp:").split(".")
    return f"blk.{block}.{NAMES[inner.replace(':', '.')]}.weight"


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two numbers that turn together side by side; transformers keeps them half a head apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path: Path, weights: dict[str, torch.Tensor], kind: Type, *, architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(96)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(33 + number) for number in range(93)] + ['!"', "<s>", "</s>"])
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(94)
    writer.add_eos_token_id(95)
    for name, value in weights.items():
        short = renamed(name)
        data = value.float().numpy()
        if (inner := short.split(".")[-2]) in HEADS:
            data = rotary_order(data, HEADS[inner])
        used = kind if data.ndim == 2 else Type.F32
        writer.add_tensor(short, gguf.quantize(data, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tiny: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Type.F32, torch.float32), (Type.F16, torch.float16), (Type.BF16, torch.bfloat16), (Type.Q8_0, torch.bfloat16)],
)
def test_the_model_comes_back(
    kind: Type, dtype: torch.dtype, source: dict[str, torch.Tensor], tmp_path: Path, notes: list[str]
) -> None:
    path = write(tmp_path / "tiny.gguf", source, kind)
    model = resolve(str(path), notify=notes.append)
    assert model.kind == "gguf"
    found = load_file(model.directory / "model.safetensors")
    assert found.keys() == source.keys()
    for name, value in source.items():
        stored = value.float().numpy()
        if value.ndim == 2:
            stored = gguf.dequantize(gguf.quantize(stored, kind), kind)
        assert torch.equal(found[name], torch.from_numpy(stored.copy()).to(dtype)), name
    loaded = AutoModelForCausalLM.from_pretrained(model.directory)
    assert loaded.dtype == dtype
    assert loaded.config.rms_norm_eps == 1e-6
    assert not hasattr(loaded.config, "quantization_config")
    assert not loaded.config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(model.directory)('a!"')["input_ids"] == [64, 93]
    assert resolve(str(path), notify=notes.append) == model
    assert len(notes) == 1


def test_a_tied_head_is_stored_once(source: dict[str, torch.Tensor], tmp_path: Path, notes: list[str]) -> None:
    tied = {name: value for name, value in source.items() if name != "lm_head.weight"}
    model = resolve(str(write(tmp_path / "tied.gguf", tied, Type.F32)), notify=notes.append)
    assert load_file(model.directory / "model.safetensors").keys() == tied.keys()
    loaded = AutoModelForCausalLM.from_pretrained(model.directory)
    assert torch.equal(loaded.lm_head.weight, source["model.embed_tokens.weight"])


def test_the_same_file_gives_the_same_bytes(
    source: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    path = write(tmp_path / "tiny.gguf", source, Type.Q8_0)
    first = resolve(str(path), notify=notes.append).directory
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "another"))
    second = resolve(str(path), notify=notes.append).directory
    assert first != second
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_missing_tensor_is_named(source: dict[str, torch.Tensor], tmp_path: Path, notes: list[str]) -> None:
    lacking = {name: value for name, value in source.items() if "layers.1.mlp.up_proj" not in name}
    path = write(tmp_path / "lacking.gguf", lacking, Type.F32)
    with pytest.raises(BesaError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve(str(path), notify=notes.append)


def test_numbers_that_half_precision_cannot_hold_are_named(
    source: dict[str, torch.Tensor], tmp_path: Path, notes: list[str]
) -> None:
    large = source | {"model.norm.weight": torch.full((64,), 1e6)}
    path = write(tmp_path / "large.gguf", large, Type.F16)
    with pytest.raises(BesaError, match=r"model\.norm\.weight"):
        resolve(str(path), notify=notes.append)


def test_an_architecture_that_cannot_be_read_is_named(
    source: dict[str, torch.Tensor], tmp_path: Path, notes: list[str]
) -> None:
    path = write(tmp_path / "odd.gguf", source, Type.F32, architecture="rwkv6")
    with pytest.raises(BesaError, match="holds a 'rwkv6' model") as caught:
        resolve(str(path), notify=notes.append)
    assert "llama" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"GG", b"not a model at all", b"\x00" * 64])
def test_other_files_are_refused(content: bytes, tmp_path: Path, notes: list[str]) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    with pytest.raises(BesaError, match=f"{path} is not a GGUF file"):
        resolve(str(path), notify=notes.append)


@functools.cache
def whole() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        weights = {"model.norm.weight": torch.ones(64), "lm_head.weight": torch.ones(96, 64)}
        return write(Path(folder) / "some.gguf", weights, Type.Q8_0).read_bytes()


def test_the_header_says_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    path.write_bytes(whole())
    header = file_header.read(path)
    assert header.architecture == "llama"
    assert {name: (tensor.kind, tensor.shape) for name, tensor in header.tensors.items()} == {
        "output_norm.weight": ("F32", (64,)),
        "output.weight": ("Q8_0", (96, 64)),
    }
    wanted = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if name[:5] != "GGUF."}
    assert {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in header.fields.items()
    } == wanted


def test_a_type_that_is_not_the_stored_one_is_refused(tmp_path: Path) -> None:
    """The first of two tensors then ends before the place where the second begins."""
    weights = {"lm_head.weight": torch.ones(96, 64), "model.norm.weight": torch.ones(64)}
    path = write(tmp_path / "some.gguf", weights, Type.Q8_0)
    stored = b"output.weight" + struct.pack("<IQQI", 2, 64, 96, Type.Q8_0)
    path.write_bytes(path.read_bytes().replace(stored, stored[:-4] + struct.pack("<I", Type.Q4_0)))
    with pytest.raises(BesaError, match=r"bytes before output_norm\.weight belong to no tensor"):
        file_header.read(path)


@settings(max_examples=100, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused_in_one_line(fraction: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.gguf"
        path.write_bytes(whole()[: int(fraction * (len(whole()) - 31))])  # the end is padding to a multiple of 32
        with pytest.raises(BesaError, match=f"{path} is (cut off or damaged|not a GGUF file)"):
            file_header.read(path)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(4, 600), value=st.integers(0, 255))
def test_a_changed_byte_never_ends_in_a_traceback(place: int, value: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed.gguf"
        changed = bytearray(whole())
        changed[place] = value
        path.write_bytes(bytes(changed))
        said = ""
        try:
            found = file_header.read(path).tensors
        except BesaError as error:
            found, said = {}, error.message
        assert found or str(path) in said
