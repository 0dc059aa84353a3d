"""Bad input through the command line: one line with value, place and remedy, before any work, and nothing is lost."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import tiny_models

from besa_cli.checkpoint import preflight
from besa_cli.stream import walk

Besa = Callable[..., Any]  # conftest.Outcome


class Place(NamedTuple):
    """A working directory with a tiny model ``m``, token rows, a short text, and a finished run ``done``."""

    besa: Besa
    directory: Path

    def prune(self, *words: object, model: object = "m", run: str = "r") -> Any:
        """`besa prune` on a fresh run directory with small token rows, if nothing else is said."""
        drawn = () if "--data" in words else ("--data", "rows.jsonl", "--samples", 2, "--seqlen", 12)
        return self.besa("prune", "--model", model, "--run", run, "--dtype", "float32", *drawn, *words)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.add_tokenizer(
        tiny_models.checkpoint(tmp_path_factory.mktemp("model"), dtype=torch.bfloat16, shard_size="20KB")
    )


@pytest.fixture
def place(besa: Besa, model: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(model, workplace / "m")
    tiny_models.rows_file(workplace / "rows.jsonl", tiny_models.tokens(2, 12))
    (workplace / "short.txt").write_text("w5 w6 w7 w8")

    def no_work(*_: object, **__: object) -> Iterator[None]:
        raise AssertionError("the walk over the blocks began")

    monkeypatch.setattr(walk, "compress", no_work)
    return Place(besa, workplace)


def refused(outcome: Any, code: int, *said: str) -> None:
    """Exit code, nothing on stdout, one error line that says all of `said`, and one hint."""
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    *notes, error, hint = outcome.err.splitlines()
    assert error.startswith("error: "), outcome.err
    assert hint.startswith("hint: "), outcome.err
    assert len(hint) > len("hint: ")
    assert not any(line.startswith(("Traceback", "error:")) for line in notes)
    for words in said:
        assert words in error + hint


USAGE = [
    (("--method", "sparsegpt", "--damping", "nan"), ("nan", "--damping")),
    (("--preset", "authors", "--sparsity", "0.7"), ("--sparsity 0.7", "--preset authors can learn: 0.376 to 0.624")),
    (("--sparsity", "1.0"), ("--sparsity 1.0", "[0, 1)")),
    (("--sparsity", "-0.1"), ("--sparsity -0.1", "[0, 1)")),
    (("--sparsity", "1.5"), ("--sparsity 1.5", "[0, 1)")),
    (("--sparsity", "nan"), ("--sparsity nan", "[0, 1)")),
    (("--sparsity", "half"), ("half", "--sparsity")),
    (("--method", "wnada"), ("unknown method 'wnada'", "did you mean 'wanda'?")),
    (("--method", "xyzzy"), ("unknown method 'xyzzy'", "known: besa, wanda, sparsegpt, magnitude")),
    (("--method", "wanda", "--granularity", "row"), ("--granularity is not an option of --method wanda", "besa")),
    (("--method", "besa", "--damping", "0.1"), ("--damping is not an option of --method besa", "sparsegpt")),
    (("--method", "besa", "--nm", "2:4"), ("--nm is not an option of --method besa", "wanda, sparsegpt, magnitude")),
    (("--method", "wanda", "--nm", "2:4", "--sparsity", "0.5"), ("--nm 2:4 and --sparsity 0.5",)),
    (("--method", "wanda", "--nm", "5:4"), ("--nm '5:4'", "2:4")),
    (("--method", "wanda", "--nm", "4"), ("--nm '4'", "2:4")),
    (("--method", "wanda", "--nm", "0:4"), ("--nm '0:4'", "2:4")),
    (("--granularity", "rows"), ("--granularity 'rows'", "neither row nor layer nor a number")),
    (("--epochs", "0"), ("--epochs", "0")),
    (("--samples", "0"), ("--samples 0",)),
    (("--seqlen", "1"), ("--seqlen 1",)),
    (("--device", "tpu"), ("'tpu'", "--device")),
]


@pytest.mark.parametrize(("words", "said"), USAGE, ids=[" ".join(words) for words, _ in USAGE])
def test_wrong_options(words: tuple[str, ...], said: tuple[str, ...], place: Place) -> None:
    refused(place.prune(*words), 2, *said)
    assert not (place.directory / "r" / "pruned").exists()


def test_sparsity_and_method_are_looked_at_before_the_model(place: Place) -> None:
    refused(place.prune("--sparsity", "2", model="no/such-model"), 2, "--sparsity 2")
    refused(place.prune("--method", "besaa", model="no/such-model"), 2, "did you mean 'besa'?")
    assert not (place.directory / "r").exists()


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("./nowhere", 1, ("nowhere", "no model at")),
        ("nowhere.gguf", 1, ("nowhere.gguf", "no model at")),
        ("smollm2-135n", 2, ("unknown model 'smollm2-135n'", "did you mean 'smollm2-135m'?")),
        ("short.txt", 1, ("short.txt",)),
    ],
)
def test_a_missing_model(name: str, code: int, said: tuple[str, ...], place: Place) -> None:
    refused(place.prune(model=name), code, *said)
    assert not (place.directory / "r").exists()


@pytest.mark.parametrize("kind", ["bert", "t5", "unknown", "no layers"])
def test_not_a_decoder(kind: str, place: Place) -> None:
    directory = place.directory / "other"
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    if kind == "t5":
        config = transformers.T5Config(vocab_size=128, d_model=32, num_layers=2, num_heads=4)
        transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(directory)
    else:
        transformers.AutoModel.from_config(transformers.BertConfig(vocab_size=128, **sizes)).save_pretrained(directory)
    if kind == "unknown":
        (directory / "config.json").write_text('{"model_type": "wondrous"}')
    if kind == "no layers":
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, "num_hidden_layers": 0}))
    tiny_models.add_tokenizer(directory)
    said = "num_hidden_layers: 0" if kind == "no layers" else "causal language models"
    refused(place.prune(model="other"), 1, "other", said)
    refused(place.besa("eval", "ppl", "short.txt", "--model", "other", "--seqlen", 2), 1, said)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return path.name


BAD_FILES = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\n", "holds no text"),
    "empty.jsonl": (b"", "holds no text"),
    "binary.txt": (b"abc\0\x01\x02", "is a binary file"),
    "binary.jsonl": (b"\x7fELF\0\0", "is a binary file"),
    "latin.txt": ("é".encode("latin-1") * 40, "not UTF-8"),
    "broken.jsonl": (b'{"text": "w5"}\n{"text": ', "line 2: broken JSON"),
    "fieldless.jsonl": (b'{"words": "w5"}\n', "no 'text' field"),
    "rows.jsonl": (b'{"input_ids": [1, 2, 300, 4]}\n', "token id 300 is outside the model's vocabulary of 128"),
    "empty.parquet": (b"", "holds no text"),
    "binary.parquet": (b"PAR1\0\0\0", "is not a whole parquet file"),
    "wide.txt": ("w5 w6 ".encode("utf-16"), "is UTF-16 text, not UTF-8"),
    "digits.jsonl": (b'{"text": "w5"}\n{"text": "w5", "n": ' + b"9" * 5000 + b"}", "line 2: broken JSON"),
    "deep.jsonl": (b'{"text": "w5"}\n' + b'{"a":' * 100_000, "line 2: broken JSON"),
    "padded.jsonl": (
        b'{"input_ids": [0, 0, 3, 4], "attention_mask": [0, 0, 1, 1]}\n',
        "2 token ids without the padding",
    ),
    "picture.png": (b"\x89PNG", "picture.png"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_data_files(name: str, place: Place) -> None:
    content, said = BAD_FILES[name]
    write(place.directory / name, content)
    outcome = place.prune("--data", name, "--samples", 1, "--seqlen", 4)
    refused(outcome, outcome.code, name, said)
    assert outcome.code in (1, 2)
    assert not (place.directory / "r" / "pruned").exists()
    if name.endswith(".txt"):
        refused(place.besa("eval", "ppl", name, "--model", "m", "--seqlen", 4), 1, name, said)


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.jsonl", "pipe.jsonl.gz", "pipe.parquet"])
def test_a_pipe_in_the_place_of_a_data_file_is_not_waited_for(name: str, place: Place) -> None:
    os.mkfifo(place.directory / name)
    refused(place.prune("--data", name, "--samples", 1, "--seqlen", 4), 1, f"{name} is not a file")
    refused(place.besa("eval", "ppl", name, "--model", "m", "--seqlen", 4), 1, f"{name} is not a file")


def test_names_that_are_not_utf8_stand_in_manifests(place: Place) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (place.directory / name).write_text("w5 w6 w7 " * 30)
    words = ("calibrate", "--model", "m", "--data", name, "--samples", 1, "--seqlen", 4, "--run", "r")
    for _ in range(2):  # made, and reused
        outcome = place.besa(*words)
        assert outcome.code == 0, outcome.err
    manifest = json.loads((place.directory / "r" / "calibration" / "besa.json").read_text())
    assert manifest["options"]["data"] == [r"caf\xe9.txt"]
    assert manifest["sources"][0]["file"] == r"caf\xe9.txt"


@pytest.mark.parametrize("words", [(), ("--restart",)])
def test_what_a_calibration_directory_holds_of_the_users_stays(words: tuple[str, ...], place: Place) -> None:
    source = place.directory / "r" / "calibration" / "mine.txt"
    source.parent.mkdir(parents=True)
    source.write_text("w5 w6 w7 " * 30)
    drawn = ("--data", source, "--samples", 1, "--seqlen", 4, *words)
    refused(place.prune(*drawn), 1, "was not made by besa: it holds mine.txt")
    refused(place.besa("calibrate", "--model", "m", "--run", "r", *drawn), 1, "was not made by besa: it holds mine.txt")
    assert source.read_text() == "w5 w6 w7 " * 30
    assert [path.name for path in source.parent.iterdir()] == ["mine.txt"]


def test_fewer_long_documents_than_needed(place: Place) -> None:
    lines = [{"text": " ".join(["w5"] * length)} for length in (3, 4, 30)]
    (place.directory / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = place.prune("--data", "short.txt", "--samples", 2, "--seqlen", 12)
    refused(outcome, 1, "12", "--pack")
    outcome = place.prune("--data", "docs.jsonl", "--samples", 40, "--seqlen", 40, "--no-pack")
    refused(outcome, 1, "40")


def test_fewer_token_rows_than_needed(place: Place) -> None:
    outcome = place.prune("--data", "rows.jsonl", "--samples", 3, "--seqlen", 12)
    refused(outcome, 1, "rows.jsonl: 2 rows", "--samples 3", "--samples 2 or less")
    outcome = place.prune("--data", "rows.jsonl", "--samples", 2, "--seqlen", 13)
    refused(outcome, 1, "rows.jsonl, line 1: 12 token ids", "--seqlen 13")


def test_a_length_over_the_models_maximum(place: Place) -> None:
    refused(
        place.prune("--seqlen", tiny_models.LONGEST + 1), 2, "--seqlen 65", f"--seqlen {tiny_models.LONGEST} or less"
    )
    outcome = place.besa("eval", "ppl", "short.txt", "--model", "m", "--seqlen", 65)
    refused(outcome, 2, "--seqlen 65", f"--seqlen {tiny_models.LONGEST} or less")


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard(keep: int, place: Place) -> None:
    shard = shards(place.directory / "m")[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(place.prune(), 1, str(shard), "fetch")
    refused(place.besa("eval", "ppl", "short.txt", "--model", "m", "--seqlen", 2), 1, str(shard))


def test_a_missing_shard(place: Place) -> None:
    shard = shards(place.directory / "m")[1]
    shard.unlink()
    refused(place.prune(), 1, shard.name, str(place.directory / "m"))


def test_a_missing_tensor(place: Place) -> None:
    shard = shards(place.directory / "m")[1]
    tensors = load_file(shard)
    name = next(key for key in tensors if key.endswith("proj.weight"))
    lost = tensors.pop(name)
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(place.prune(), 1, str(shard), name)
    index = place.directory / "m" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"][name]
    index.write_text(json.dumps(table))
    refused(place.prune(), 1, name, "lacks the tensor")
    save_file({**tensors, name: lost[:-1].contiguous()}, shard, metadata={"format": "pt"})
    refused(place.prune(), 1, name, f"has the shape {list(lost[:-1].shape)}", f"needs {list(lost.shape)}")
    save_file({**tensors, name: lost[:1].contiguous()}, shard, metadata={"format": "pt"})
    refused(place.prune(), 1, name, "has the shape")  # though it could be broadcast


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(value: float, place: Place) -> None:
    shard = shards(place.directory / "m")[1]
    tensors = load_file(shard)
    name = next(key for key in tensors if key.endswith("proj.weight"))
    tensors[name][1, 2] = value
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(place.prune(), 1, name, str(place.directory / "m"), "1 values that are NaN or infinite")
    assert not (place.directory / "r" / "pruned").exists()


def test_too_little_disk_space(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(place.prune(), 1, str(Path("r", "pruned")), "needs 0 MB, its disk has 0 MB free", "--run")
    assert not (place.directory / "r" / "pruned").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_fills_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real small file system, the estimate being too low: what was finished stays, and the run goes on later."""
    monkeypatch.undo()
    monkeypatch.chdir(place.directory)
    disk = place.directory / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=56k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        refused(place.prune(run=str(disk / "r")), 1, "needs 0 MB")
        with monkeypatch.context() as patch:
            patch.setattr(preflight, "require_space", lambda directory, needed: None)
            outcome = place.prune("--method", "wanda", run=str(disk / "r"))
        refused(outcome, 1, "cannot write", "No space left on device", "free disk space")
        outcome = place.prune("--method", "wanda", run=str(disk / "other"))
        refused(outcome, 1, "cannot write", "tokens.safetensors", "No space left on device")
        assert (disk / "r" / "pruned" / "besa.json").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        outcome = place.prune("--method", "wanda", run=str(disk / "r"))
        assert outcome.code == 0, outcome.err
        whole = place.prune("--method", "wanda", run="whole")
        assert whole.code == 0, whole.err
        assert tiny_models.files(disk / "r" / "pruned") == tiny_models.files(place.directory / "whole" / "pruned")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_directory_that_cannot_be_written(place: Place) -> None:
    (place.directory / "r").write_text("a file")
    refused(place.prune(), 1, "cannot write r", "--run")
    assert (place.directory / "r").read_text() == "a file"
    refused(place.prune(run="r/below"), 1, "r/below", "--run")
    (place.directory / "s").mkdir()
    (place.directory / "s" / "pruned").write_text("a file")
    refused(place.prune(run="s"), 1, str(Path("s", "pruned")), "--run")
    assert (place.directory / "s" / "pruned").read_text() == "a file"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '{"status": "complete"}'])
def test_a_damaged_manifest(text: str, place: Place) -> None:
    manifest = place.directory / "r" / "pruned" / "besa.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(text)
    refused(place.prune(), 1, str(Path("r", "pruned", "besa.json")))
    refused(place.besa("eval", "ppl", "short.txt", "--run", "r", "--seqlen", 2), 1, "besa.json")
    assert manifest.read_text() == text


def test_a_model_without_a_tokenizer(place: Place) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place.directory / "m" / name).unlink()
    refused(place.prune("--data", "short.txt", "--samples", 1, "--seqlen", 4), 1, "has no tokenizer", "input_ids")
    refused(place.besa("eval", "ppl", "short.txt", "--model", "m", "--seqlen", 2), 1, "has no tokenizer")


def test_a_finished_run_is_untouched_by_refusals(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(place.directory)
    outcome = place.prune("--method", "wanda")
    assert outcome.code == 0, outcome.err
    before = tiny_models.files(place.directory / "r", without=())
    for words in (("--method", "wand"), ("--method", "magnitude"), ("--sparsity", "3"), ("--data", "none.txt")):
        assert place.prune(*words).code in (1, 2)
    assert place.prune("--method", "wanda", "--restart", model="./nowhere").code == 1
    assert tiny_models.files(place.directory / "r", without=()) == before
