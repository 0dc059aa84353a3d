"""Checkpoint directories: whole, broken, and of pickles."""

import io
import json
import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from besa_cli.errors import BesaError
from besa_cli.models import pickled as pickled_checkpoints
from besa_cli.models import resolve


def weights(directory: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        merged |= load_file(file)
    return merged


def pickled(source: Path, target: Path, *, shards: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """The same model as the old releases stored it."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    items = [(name, value.to(dtype)) for name, value in weights(source).items()]
    if shards == 1:
        torch.save(dict(items), target / "pytorch_model.bin", **options)
        return target
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = dict(items[number::shards])
        torch.save(part, target / name, **options)
        weight_map |= dict.fromkeys(part, name)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def sharded(source: Path, target: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target, max_shard_size="60KB")
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


def test_a_directory_is_used_as_it_is(tiny: Path, notes: list[str], cache: Path) -> None:
    model = resolve(str(tiny), notify=notes.append)
    assert (model.kind, model.directory, notes) == ("local", tiny, [])
    assert not cache.exists()


def test_shards_are_used_as_they_are_and_a_missing_one_is_named(tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = sharded(tiny, tmp_path / "sharded")
    assert resolve(str(path), notify=notes.append).directory == path
    lost = sorted(path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(BesaError, match=f"{path} lacks {lost.name}"):
        resolve(str(path), notify=notes.append)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_cut_off_shard_is_named(keep: int, tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = sharded(tiny, tmp_path / "sharded")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(BesaError, match=str(shard)):
        resolve(str(path), notify=notes.append)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no config.json"),
        ("{", "cannot read .*config.json"),
        ("[]", "does not hold a JSON object"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', r"already compressed \(gptq\)"),
        ('{"model_type": "llama"}', "holds no weights"),
    ],
)
def test_what_a_directory_lacks_is_said(text: str | None, said: str, tmp_path: Path, notes: list[str]) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(BesaError, match=said) as caught:
        resolve(str(tmp_path), notify=notes.append)
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "link to itself"])
def test_what_is_no_file_is_refused_at_once(name: str, kind: str, tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = shutil.copytree(tiny, tmp_path / "m")
    (path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to(path / name if kind == "link to itself" else "/dev/zero")
    if kind == "link to itself" and not name.startswith("model"):
        assert resolve(str(path), notify=notes.append).directory == path  # as if it were not there
        return
    with pytest.raises(BesaError, match=str(path / name)):
        resolve(str(path), notify=notes.append)


def test_a_pipe_is_not_taken_for_a_model(tmp_path: Path, notes: list[str]) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(BesaError, match=r"m\.gguf is a pipe, not a file"):
        resolve(str(tmp_path / "m.gguf"), notify=notes.append)


MARKS = {
    "hf_quant_config.json": ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "FP8"),
    "quantize_config.json": ({"bits": 4, "group_size": 128}, "4"),
    "quant_config.json": ({"w_bit": 4, "zero_point": True}, "4"),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_side_file_that_tells_of_few_bits_is_believed(
    name: str, tiny: Path, tmp_path: Path, notes: list[str]
) -> None:
    path = shutil.copytree(tiny, tmp_path / "m")
    told, method = MARKS[name]
    (path / name).write_text(json.dumps(told))
    with pytest.raises(BesaError, match=rf"already compressed \({name}: {method}\)"):
        resolve(str(path), notify=notes.append)


def test_few_bits_of_the_cache_alone_leave_the_weights_dense(tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = shutil.copytree(tiny, tmp_path / "m")
    told = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (path / "hf_quant_config.json").write_text(json.dumps(told))
    assert resolve(str(path), notify=notes.append).directory == path


def test_chat_templates_of_a_folder_go_into_the_conversion(tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = pickled(tiny, tmp_path / "old")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    made = resolve(str(path), notify=notes.append).directory
    assert (made / "additional_chat_templates" / "tool_use.jinja").read_text() == "TOOLS"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pickles_become_the_same_model_once(
    shards: int, dtype: torch.dtype, tiny: Path, tmp_path: Path, notes: list[str]
) -> None:
    path = pickled(tiny, tmp_path / "old", shards=shards, dtype=dtype)
    model = resolve(str(path), notify=notes.append)
    assert [note for note in notes if "once" in note] == notes
    assert len(notes) == 1
    expected = {name: value.to(dtype) for name, value in weights(tiny).items()}
    found = weights(model.directory)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in expected)
    loaded = AutoModelForCausalLM.from_pretrained(model.directory)
    assert loaded.dtype == dtype
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert resolve(str(path), notify=notes.append) == model
    assert len(notes) == 1


def test_pickles_in_the_oldest_format_and_with_shared_weights(tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = pickled(tiny, tmp_path / "old")
    shared = weights(tiny)
    shared["lm_head.weight"] = shared["model.embed_tokens.weight"]
    torch.save(shared, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = weights(resolve(str(path), notify=notes.append).directory)
    assert torch.equal(found["lm_head.weight"], shared["model.embed_tokens.weight"])
    assert found.keys() == shared.keys()


def test_a_changed_pickle_is_converted_again(tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = pickled(tiny, tmp_path / "old")
    first = resolve(str(path), notify=notes.append).directory
    changed = {name: value + 1 for name, value in weights(tiny).items()}
    torch.save(changed, path / "pytorch_model.bin")
    second = resolve(str(path), notify=notes.append).directory
    assert first != second
    assert torch.equal(weights(second)["lm_head.weight"], changed["lm_head.weight"])


def test_a_damaged_conversion_is_made_again(tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = pickled(tiny, tmp_path / "old")
    made = resolve(str(path), notify=notes.append).directory
    whole = (made / "model.safetensors").read_bytes()
    (made / "model.safetensors").write_bytes(whole[:-3])
    assert resolve(str(path), notify=notes.append).directory == made
    assert (made / "model.safetensors").read_bytes() == whole
    assert any("damaged" in note for note in notes)


def test_safetensors_win_over_pickles(tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = tmp_path / "both"
    shutil.copytree(tiny, path)
    (path / "pytorch_model.bin").write_bytes(b"never opened")
    assert resolve(str(path), notify=notes.append).directory == path


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_with_code_in_it_is_not_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    path = pickled(tiny, tmp_path / "old")
    torch.save({"lm_head.weight": torch.ones(2), "extra": Evil()}, path / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BesaError, match=r"pytorch_model.bin holds more than tensors"):
        resolve(str(path), notify=notes.append)
    assert not (tmp_path / "ran").exists()


def expanded() -> object:
    return {"lm_head.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}


def quantized() -> object:
    return {"lm_head.weight": torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        torch.zeros(2),
        5,
        None,
        {"a": 1},
        {"lm_head.weight": torch.eye(3).to_sparse()},
        {"lm_head.weight": torch.empty(2, device="meta")},
        {"lm_head.weight": torch.zeros(2, dtype=torch.complex128)},
        {"__metadata__": torch.zeros(2)},
        {"": torch.zeros(2)},
        {"\x1b[2J": torch.zeros(2)},
        {"a\ud800": torch.zeros(2)},
        {"a" * 100_000: torch.zeros(2)},
        {5: torch.zeros(2)},
        {("a", "b"): torch.zeros(2)},
        expanded,
        quantized,
        lambda: dict.fromkeys(map(str, range(1000)), torch.zeros(10_000)),
    ],
)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_what_a_pickle_holds_beside_dense_tensors_by_name_is_refused(
    content: Any, form: str, tiny: Path, tmp_path: Path, notes: list[str], cache: Path
) -> None:
    path = pickled(tiny, tmp_path / "old")
    value = content() if callable(content) else content
    torch.save(value, path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(BesaError, match=r"pytorch_model\.bin") as caught:
        resolve(str(path), notify=notes.append)
    assert "Error" not in caught.value.message
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir()]


@pytest.mark.parametrize("form", ["zip", "around the zip's parts", "legacy"])
def test_pickles_with_any_byte_changed_are_read_or_one_line(form: str, tmp_path: Path, cache: Path) -> None:
    """Bytes of the pickle itself: names, sizes, opcodes, references; those of the numbers make another model."""
    whole = io.BytesIO()
    torch.save(
        {"a.weight": torch.zeros(3, 4), "b": torch.ones(2)}, whole, _use_new_zipfile_serialization=form != "legacy"
    )
    chance = random.Random(0)
    file, said = tmp_path / "pytorch_model.bin", list[str]()
    for _ in range(300):
        if form != "zip":
            data = bytearray(whole.getvalue())
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            file.write_bytes(data)
        else:
            changed_archive(whole, file, chance)
        try:
            assert pickled_checkpoints._load(file)
        except BesaError as error:
            said.append(error.message)
    assert len(said) > 100
    assert all(str(file) in line for line in said)


def changed_archive(whole: io.BytesIO, file: Path, chance: random.Random) -> None:
    """The same archive with up to three bytes of its pickle changed."""
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            data = bytearray(source.read(name))
            for _ in range(chance.randrange(1, 4) if name.endswith("data.pkl") else 0):
                data[chance.randrange(len(data))] = chance.randrange(256)
            target.writestr(name, bytes(data))


def test_a_packed_archive_is_not_unpacked(tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = pickled(tiny, tmp_path / "old")
    whole = io.BytesIO()
    torch.save({"lm_head.weight": torch.zeros(1 << 22)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as to:
        for name in source.namelist():
            to.writestr(name, source.read(name))
    with pytest.raises(BesaError, match="its parts are compressed or overlap"):
        resolve(str(path), notify=notes.append)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "pytorch_model-00001-of-00002.bin"])
def test_a_pipe_beside_or_in_place_of_pickles_is_not_waited_for(
    name: str, tiny: Path, tmp_path: Path, notes: list[str]
) -> None:
    path = pickled(tiny, tmp_path / "old", shards=2)
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with pytest.raises(BesaError, match=str(path / name) if "bin" not in name else name):
        resolve(str(path), notify=notes.append)


def test_a_tensor_in_two_pickles_is_refused(tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = pickled(tiny, tmp_path / "old", shards=2)
    for file in sorted(path.glob("*.bin")):
        torch.save({"lm_head.weight": torch.ones(2)}, file)
    with pytest.raises(BesaError, match=r"00002-of-00002\.bin holds lm_head\.weight, which another file"):
        resolve(str(path), notify=notes.append)


@pytest.mark.parametrize("keep", [0, 10, 5000, -100])
def test_a_cut_off_pickle_is_named(keep: int, tiny: Path, tmp_path: Path, notes: list[str], cache: Path) -> None:
    path = pickled(tiny, tmp_path / "old")
    file = path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BesaError, match=str(file)):
        resolve(str(path), notify=notes.append)
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir()]


def test_a_missing_pickle_is_named(tiny: Path, tmp_path: Path, notes: list[str]) -> None:
    path = pickled(tiny, tmp_path / "old", shards=3)
    (path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(BesaError, match=r"lacks pytorch_model-00002-of-00003\.bin"):
        resolve(str(path), notify=notes.append)


def test_a_cache_that_cannot_be_written_is_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BesaError, match=f"cannot write .*{tmp_path}/file/cache"):
        resolve(str(pickled(tiny, tmp_path / "old")), notify=notes.append)
