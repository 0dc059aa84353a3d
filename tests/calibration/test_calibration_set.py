"""A calibration set is what its options say, makes itself again byte for byte, and is refused when it was changed."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.joined_text import joined
from torch import Tensor

from besa_cli.calibration import calibration_set, drawing, sampling
from besa_cli.errors import BesaError, UsageError
from besa_cli.evaluation import texts
from besa_cli.models import cache
from besa_cli.text import corpora, hub_files

HUB = hub_files.Hub(endpoint="http://127.0.0.1:9", offline=True)
DEMO = next(
    cache.root().glob("models/smollm2-135m-*/tokenizer.json"), None
)  # the user's own cache: looked for at import


class Bytes:
    """A tokenizer of bytes: id = byte, and an end token."""

    eos_token_id: int | None = 256

    def __call__(self, text: str, *, verbose: bool) -> Mapping[str, Any]:
        assert not verbose
        return {"input_ids": list(text.encode("utf-8"))}


def build(
    *data: object,
    samples: int = 3,
    seqlen: int = 8,
    seed: int = 0,
    pack: bool | None = None,
    max_length: int | None = None,
    vocab_size: int = 257,
    notes: list[str] | None = None,
) -> calibration_set.CalibrationSet:
    return calibration_set.build(
        calibration_set.CalibrationOptions(
            data=tuple(map(str, data)), samples=samples, seqlen=seqlen, seed=seed, pack=pack
        ),
        Bytes(),
        tokenizer_digest="t" * 64,
        max_length=max_length,
        vocab_size=vocab_size,
        data_dir=None,
        notify=pytest.fail if notes is None else notes.append,
        hub=HUB,
    )


def write_rows(path: Path, rows: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number:04}" for number in range(100)))
    return path


# --- token rows


def test_token_rows_are_the_samples(tmp_path: Path) -> None:
    rows = [[10 * row + column for column in range(8)] for row in range(5)]
    made = build(write_rows(tmp_path / "rows.jsonl", rows))
    assert made.tokens.dtype == torch.int64
    assert made.tokens.tolist() == rows[:3]
    assert made.manifest["sampling"] == "token rows"
    assert made.manifest["sources"][0]["rows"] == 3


def test_longer_rows_are_cut_and_files_follow_each_other(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [list(range(12))])
    two = write_rows(tmp_path / "two.jsonl", [list(range(20, 29)), list(range(30, 38))])
    assert build(one, two).tokens.tolist() == [list(range(8)), list(range(20, 28)), list(range(30, 38))]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1] * 8] * 2, "2 rows of token ids, fewer than --samples 3"),
        ([[1] * 8, [1] * 7, [1] * 8], "line 2: 7 token ids, fewer than --seqlen 8"),
        ([[1] * 8, [1] * 8, [*[1] * 7, 257]], "line 3: token id 257 is outside the model's vocabulary of 257"),
        ([[-1, *[1] * 7]] * 3, "line 1: token id -1 is outside"),
        ([[1.0] * 8] * 3, "line 1: 'input_ids' is not a list of integers"),
        ([[True] * 8] * 3, "line 1: 'input_ids' is not a list of integers"),
    ],
)
def test_bad_token_rows_are_one_line_with_the_place(tmp_path: Path, rows: list[list[int]], message: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BesaError) as caught:
        build(path)
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.hint


def write_masked(path: Path, *rows: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_padding_at_the_ends_of_a_row_is_no_part_of_it(tmp_path: Path) -> None:
    path = write_masked(
        tmp_path / "rows.jsonl",
        {"input_ids": [0, 0, *range(1, 9)], "attention_mask": [0, 0] + [1] * 8, "labels": [-100] * 10},
        {"input_ids": [*range(11, 20), 0], "attention_mask": [True] * 9 + [False], "token_type_ids": [0] * 10},
        {"input_ids": list(range(21, 29)), "attention_mask": [1] * 8},
        {"input_ids": list(range(31, 39))},
    )
    notes: list[str] = []
    made = build(path, samples=4, notes=notes)
    assert made.tokens.tolist() == [list(range(first, first + 8)) for first in (1, 11, 21, 31)]
    assert notes == [f"{path}: removed padding (attention_mask 0) from 2 of 4 rows"]
    assert made.manifest["sources"][0]["padded"] == 2


def test_rows_without_padding_say_nothing_of_it(tmp_path: Path) -> None:
    rows = [{"input_ids": [1] * 8, "attention_mask": [1] * 8}] * 3
    assert "padded" not in build(write_masked(tmp_path / "rows.jsonl", *rows)).manifest["sources"][0]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([0, 0, 0] + [1] * 7, "line 1: 7 token ids without the padding, fewer than --seqlen 8"),
        ([0] * 10, "line 1: the row is all padding"),
        ([1] * 5 + [0] + [1] * 4, "masks tokens inside the row (token 5)"),
        ([1] * 9, "not a list of one 0 or 1 per token id"),
        ([1.0] * 10, "not a list of one 0 or 1 per token id"),
        (["1"] * 10, "not a list of one 0 or 1 per token id"),
        ([[1] * 10] * 10, "not a list of one 0 or 1 per token id"),
        ("1111111111", "not a list of one 0 or 1 per token id"),
        ({}, "not a list of one 0 or 1 per token id"),
        ([2] * 10, "holds numbers other than 0 and 1"),
        ([-1] + [1] * 9, "holds numbers other than 0 and 1"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path: Path, mask: object, message: str) -> None:
    path = write_masked(tmp_path / "rows.jsonl", *[{"input_ids": [1] * 10, "attention_mask": mask}] * 3)
    with pytest.raises(BesaError) as caught:
        build(path)
    assert message in caught.value.message
    assert f"{path}, line 1" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("ids", [["1"] * 8, [None] * 8, [[1] * 8], {"a": 1}, "12345678", 8, None, [1e3] * 8])
def test_rows_of_other_things_than_numbers_are_refused(tmp_path: Path, ids: object) -> None:
    path = write_masked(tmp_path / "rows.jsonl", *[{"input_ids": ids}] * 3)
    with pytest.raises(BesaError, match="line 1: 'input_ids' is not a list of integers"):
        build(path)


@pytest.mark.parametrize("token", [10**30, 2**63, -(2**63) - 1, 10**4000])
def test_ids_beyond_every_vocabulary_are_refused(tmp_path: Path, token: int) -> None:
    path = write_masked(tmp_path / "rows.jsonl", *[{"input_ids": [token] * 8}] * 3)
    with pytest.raises(BesaError, match=r"line 1: token id .* is outside the model's vocabulary of 257") as caught:
        build(path)
    assert len(caught.value.message) < 400


def test_token_rows_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--pack"):
        build(write_rows(tmp_path / "rows.jsonl", [[1] * 8] * 3), pack=True)


# --- text


def test_windows_of_a_long_text_are_drawn(text: Path) -> None:
    made = build(text, samples=5)
    whole = text.read_text()
    assert made.tokens.shape == (5, 8)
    for row in made.tokens.tolist():
        assert bytes(row).decode() in whole
    assert made.manifest["sampling"] == "documents"
    assert made.manifest["sources"] == [
        {"asked": "text.txt", "source": "file", "file": "text.txt", "sha256": digest_of(text), "documents": 1}
    ]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_all_sources_are_one_pool(tmp_path: Path) -> None:
    paths = [tmp_path / f"{letter}.txt" for letter in "ab"]
    for path in paths:
        path.write_text(path.stem * 1000)
    made = build(*paths, samples=40)
    assert {bytes(row).decode() for row in made.tokens.tolist()} == {"a" * 8, "b" * 8}
    assert made.manifest["documents"] == 2


def test_packed_text_is_shuffled_and_joined_by_the_end_token(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in ("one", "two", "three", "four", "five")))
    with pytest.raises(BesaError, match="0 of 5 documents are longer than --seqlen 8") as caught:
        build(path, samples=2)
    assert "--pack" in caught.value.hint
    made = build(path, samples=2, pack=True)
    words = "".join(chr(token) if token < 256 else " " for token in made.tokens.flatten().tolist()).split(" ")
    assert set(words[:-1]) <= {"one", "two", "three", "four", "five"}
    assert list(sampling.shuffled(["one", "two", "three", "four", "five"], 0))[: len(words) - 1] == words[:-1]
    assert (made.manifest["sampling"], made.manifest["separator"]) == ("packed", 256)
    with pytest.raises(BesaError, match="fill 2 windows of --seqlen 8, fewer than --samples 3"):
        build(path, samples=3, pack=True)


def test_the_stand_in_for_c4_is_packed_and_the_manifest_tells() -> None:
    notes: list[str] = []
    made = build("c4", samples=4, seqlen=64, notes=notes)
    assert len(notes) == 1
    assert notes[0].startswith("c4 cannot be reached")
    assert notes[0].endswith("using bundled text instead, packed to full windows")
    assert made.manifest["sampling"] == "packed"
    assert made.manifest["options"]["pack"] is None
    (source,) = made.manifest["sources"]
    assert (source["asked"], source["source"], source["file"]) == ("c4", "bundled", corpora.C4_SAMPLE)
    assert source["sha256"] == corpora.BUNDLED[corpora.C4_SAMPLE]


def test_books_follow_only_when_the_sample_is_used_up() -> None:
    documents = corpora.bundled("bundled").documents
    tokens = sum(len(joined(text).encode()) for text in documents) + len(documents) - 1  # bytes and the ends between
    whole = tokens // 4096 - sampling.HELD_OUT
    within = build("bundled", samples=whole, seqlen=4096)
    assert [source["file"] for source in within.manifest["sources"]] == [corpora.C4_SAMPLE]
    beyond = build("bundled", samples=whole + 1, seqlen=4096)
    assert [source["file"] for source in beyond.manifest["sources"]] == [corpora.C4_SAMPLE, corpora.BOOKS[0]]
    assert torch.equal(beyond.tokens[:whole], within.tokens)
    assert within.held_out is not None
    assert torch.equal(beyond.tokens[whole], within.held_out[0])
    with pytest.raises(BesaError, match="too little text: 1005 documents"):
        build("bundled", samples=10**5, seqlen=4096)


def test_without_packing_the_bundled_sample_is_drawn_from() -> None:
    made = build("bundled", samples=20, seqlen=256, pack=False)
    documents = [joined(text).encode() for text in corpora.bundled("bundled").documents]
    for row in made.tokens.tolist():
        assert any(bytes(row) in document for document in documents)
    assert [source["file"] for source in made.manifest["sources"]] == [corpora.C4_SAMPLE]


# --- what cannot be meant


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "--samples 0 is too few"),
        ({"samples": -3}, "--samples -3 is too few"),
        ({"seqlen": 1}, "--seqlen 1 is too short"),
        ({"seed": -1}, "--seed -1 is negative"),
    ],
)
def test_numbers_outside_their_range_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibration_set.CalibrationOptions(**change)  # type: ignore[arg-type]


def test_a_window_longer_than_the_model_takes_is_refused_before_any_text_is_read() -> None:
    with pytest.raises(UsageError, match="--seqlen 9 exceeds the 8 tokens") as caught:
        build("nowhere", seqlen=9, max_length=8)
    assert "--seqlen 8" in caught.value.hint


def test_the_longest_window_that_the_model_takes_is_fine(text: Path) -> None:
    assert build(text, max_length=8).tokens.shape == (3, 8)


def test_a_tokenizer_of_another_model_is_refused(text: Path) -> None:
    with pytest.raises(BesaError, match="is outside the model's vocabulary of 50: the tokenizer does not match"):
        build(text, vocab_size=50)


# --- digests and the manifest


def test_the_same_options_make_the_same_bytes(text: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        calibration_set.save(build(text, seed=4), tmp_path / name)
    for file in ("tokens.safetensors", "besa.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert build(text, seed=5).digest != build(text, seed=4).digest


def test_the_manifest_says_all_that_made_the_set(text: Path) -> None:
    manifest = build(text, seed=4).manifest
    assert (manifest["format"], manifest["stage"], manifest["status"]) == (1, "calibration", "complete")
    options = {"data": [str(text)], "samples": 3, "seqlen": 8, "seed": 4, "pack": None}
    assert manifest["options"] == options
    assert (manifest["samples"], manifest["seqlen"], manifest["seed"]) == (3, 8, 4)
    assert manifest["tokenizer_digest"] == "t" * 64
    assert set(manifest["versions"]) == {"besa", "datasets", "tokenizers", "transformers"}
    assert json.loads(json.dumps(manifest)) == manifest
    assert str(text.parent) not in json.dumps({key: value for key, value in manifest.items() if key != "options"})


def naive_digest(tokens: Tensor) -> str:
    digest = hashlib.sha256()
    for row in tokens.tolist():
        for token in row:
            digest.update(token.to_bytes(8, "little", signed=True))
    return digest.hexdigest()


token_tensors = st.integers(1, 4).flatmap(
    lambda columns: st.lists(
        st.lists(st.integers(0, 2**40), min_size=columns, max_size=columns), min_size=1, max_size=4
    )
)


@given(rows=token_tensors, data=st.data())
def test_the_digest_is_of_the_ids_and_of_each_of_them(rows: list[list[int]], data: st.DataObject) -> None:
    tokens = torch.tensor(rows)
    digest = calibration_set.tokens_digest(tokens)
    assert digest == naive_digest(tokens)
    assert calibration_set.tokens_digest(tokens.t().contiguous().t()) == digest
    row, column = (data.draw(st.integers(0, size - 1)) for size in tokens.shape)
    tokens[row, column] += 1
    assert calibration_set.tokens_digest(tokens) != digest


# --- the directory


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "set"


def test_a_set_is_read_as_it_was_written(text: Path, tmp_path: Path) -> None:
    made = build(text)
    calibration_set.save(made, tmp_path / "run" / "calibration")
    read = calibration_set.load(tmp_path / "run" / "calibration")
    assert torch.equal(read.tokens, made.tokens)
    assert read.tokens.dtype == torch.int64
    assert read.manifest == made.manifest
    assert read.digest == made.digest
    assert {path.name for path in (tmp_path / "run" / "calibration").iterdir()} == {"besa.json", "tokens.safetensors"}


@pytest.mark.parametrize("name", ["tokens.safetensors", "mine.txt", ".git", ".tokens.safetensors.swp"])
def test_what_is_not_a_set_stays(text: Path, place: Path, name: str) -> None:
    place.mkdir()
    (place / name).write_text("precious")
    for _ in range(2):
        with pytest.raises(BesaError, match=f"was not made by besa: it holds {re.escape(name)}") as caught:
            calibration_set.save(build(text), place)
        assert caught.value.hint
        assert {path.name: path.read_text() for path in place.iterdir()} == {name: "precious"}
    assert [path.name for path in place.parent.iterdir() if path.is_dir()] == ["set"]


@pytest.mark.parametrize("name", ["mine.txt", "model", ".hidden"])
def test_a_set_with_something_of_the_users_beside_it_is_not_replaced(text: Path, place: Path, name: str) -> None:
    calibration_set.save(build(text, seed=1), place)
    (place / name).mkdir()
    (place / name / "file").write_text("precious")
    with pytest.raises(BesaError, match=f"is not replaced: it holds {re.escape(name)}/file"):
        calibration_set.save(build(text, seed=2), place)
    assert calibration_set.load(place).manifest["seed"] == 1
    assert (place / name / "file").read_text() == "precious"


@pytest.mark.parametrize("manifest", ["{", '{"stage": "pruned"}', "{}", "[]"])
def test_only_what_says_that_it_is_a_set_is_replaced(text: Path, place: Path, manifest: str) -> None:
    calibration_set.save(build(text), place)
    (place / "besa.json").write_text(manifest)
    with pytest.raises(BesaError, match="set"):
        calibration_set.save(build(text), place)
    assert (place / "besa.json").read_text() == manifest


def test_files_behind_links_are_not_written_to(text: Path, place: Path, tmp_path: Path) -> None:
    calibration_set.save(build(text, seed=1), place)
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes((place / "tokens.safetensors").read_bytes())
    (place / "tokens.safetensors").unlink()
    (place / "tokens.safetensors").symlink_to(mine)
    before = mine.read_bytes()
    calibration_set.save(build(text, seed=2), place)
    assert mine.read_bytes() == before
    assert not (place / "tokens.safetensors").is_symlink()


def test_a_set_may_go_into_an_empty_directory_behind_a_link(text: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    place.symlink_to(tmp_path / "disk")
    calibration_set.save(build(text), place)
    assert place.is_symlink()
    assert calibration_set.load(place).digest == build(text).digest


def test_what_is_not_ours_in_the_place_of_the_next_set_stays(text: Path, place: Path) -> None:
    beside = place.with_name(".set.next")
    beside.mkdir()
    (beside / "mine.txt").write_text("precious")
    with pytest.raises(BesaError, match=r"\.set\.next was not made by besa: it holds mine\.txt"):
        calibration_set.save(build(text), place)
    assert (beside / "mine.txt").read_text() == "precious"


def test_a_first_set_is_whole_or_absent(text: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration_set, "write_json", dies)
    with pytest.raises(KeyboardInterrupt):
        calibration_set.save(build(text), place)
    monkeypatch.undo()
    assert not place.exists()
    calibration_set.save(build(text), place)
    assert calibration_set.load(place).digest == build(text).digest


def test_a_set_may_be_written_over_another(text: Path, tmp_path: Path) -> None:
    calibration_set.save(build(text, seed=1), tmp_path / "set")
    calibration_set.save(build(text, seed=2), tmp_path / "set")
    assert calibration_set.load(tmp_path / "set").digest == build(text, seed=2).digest


def test_a_set_serves_until_the_one_that_replaces_it_is_whole(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration_set.save(build(text, seed=1), tmp_path / "set")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration_set, "write_json", dies)
    with pytest.raises(KeyboardInterrupt):
        calibration_set.save(build(text, seed=2), tmp_path / "set")
    assert calibration_set.load(tmp_path / "set").manifest["seed"] == 1
    monkeypatch.undo()
    calibration_set.save(build(text, seed=2), tmp_path / "set")
    assert calibration_set.load(tmp_path / "set").manifest["seed"] == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["set"]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2])
def test_killed_while_a_set_takes_the_place_of_another(
    number: int, moment: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration_set.save(build(text, seed=1), tmp_path / "set")
    rename, left = Path.rename, [number]

    def dies(path: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] == 0 and moment == "before":
            raise KeyboardInterrupt
        found = rename(path, target)
        if left[0] == 0:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        calibration_set.save(build(text, seed=2), tmp_path / "set")
    monkeypatch.undo()
    calibration_set.recover(tmp_path / "set")
    assert calibration_set.load(tmp_path / "set").manifest["seed"] == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["set"]


def change_manifest(directory: Path, **changes: object) -> None:
    path = directory / "besa.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_changed_token_is_noticed(text: Path, place: Path) -> None:
    calibration_set.save(build(text), place)
    tokens = safetensors.torch.load_file(place / "tokens.safetensors")["tokens"]
    tokens[1, 2] ^= 1
    safetensors.torch.save_file({"tokens": tokens}, place / "tokens.safetensors")
    with pytest.raises(BesaError, match=r"tokens\.safetensors was changed"):
        calibration_set.load(place)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "pruned"}, "is not what besa wrote"),
        ({"stage": None}, "stage: input should be a valid string, not None"),
        ({"format": 2}, "has format 2, this besa .* reads 1"),
        ({"samples": "3"}, "samples: input should be a valid integer, not '3'"),
        ({"sources": [{"asked": 1}]}, r"sources\.0\.asked: "),
        ({"documents": -1}, "documents: input should be greater than or equal to 0, not -1"),
        ({"samples": 4}, "does not have the shape"),
        ({"seqlen": 9}, "does not have the shape"),
        ({"tokens_digest": "0" * 64}, "was changed"),
    ],
)
def test_what_is_no_set_of_ours_is_refused(text: Path, place: Path, changes: dict[str, object], message: str) -> None:
    calibration_set.save(build(text), place)
    change_manifest(place, **changes)
    with pytest.raises(BesaError, match=message) as caught:
        calibration_set.load(place)
    assert str(place) in caught.value.message
    assert "besa calibrate" in caught.value.hint


def test_missing_and_cut_files_are_named(text: Path, place: Path) -> None:
    with pytest.raises(BesaError, match="no calibration set in"):
        calibration_set.load(place)
    calibration_set.save(build(text), place)
    tokens = place / "tokens.safetensors"
    whole = tokens.read_bytes()
    for damaged in (whole[:-8], whole[:20], b""):
        tokens.write_bytes(damaged)
        with pytest.raises(BesaError, match=r"tokens\.safetensors is cut short"):
            calibration_set.load(place)
    safetensors.torch.save_file({"other": torch.zeros(1)}, tokens)
    with pytest.raises(BesaError, match=r"tokens\.safetensors"):
        calibration_set.load(place)
    tokens.unlink()
    with pytest.raises(BesaError, match=r"tokens\.safetensors is missing"):
        calibration_set.load(place)
    (place / "besa.json").write_text("{")
    with pytest.raises(BesaError, match=r"besa\.json is not what besa wrote"):
        calibration_set.load(place)


def test_a_directory_that_cannot_be_written_is_named(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BesaError, match=r"cannot make .*file: a file is in its place"):
        calibration_set.save(build(text), tmp_path / "file")


# --- with the demo model's tokenizer


@pytest.fixture
def demo(tmp_path: Path) -> drawing.SampleTokenizer:
    if DEMO is None:
        pytest.skip("the demo model is not in the user's cache")
    from transformers import AutoTokenizer

    for path in DEMO.parent.glob("*.json"):
        shutil.copy(path, tmp_path)
    tokenizer: drawing.SampleTokenizer = AutoTokenizer.from_pretrained(tmp_path)
    return tokenizer


def test_wikitext2_has_the_published_number_of_tokens(demo: drawing.SampleTokenizer) -> None:
    text = texts.evaluation_text("wikitext2", data_dir=None, hub=hub_files.from_environment(), notify=pytest.fail).text
    assert len(demo(joined(text), verbose=False)["input_ids"]) == 304_986


def test_the_rows_of_protocol_a_are_drawn_again(demo: drawing.SampleTokenizer) -> None:
    made = calibration_set.build(
        calibration_set.CalibrationOptions(data=("bundled",), samples=128, seqlen=512, seed=0, pack=False),
        demo,
        tokenizer_digest="",
        max_length=None,
        vocab_size=49152,
        data_dir=None,
        notify=pytest.fail,
    )
    assert made.digest == "b2c209e079f4fccb9acfe14e5f16ba3d95e33a22ec33b0e9c664bd68feaeb8a6"
