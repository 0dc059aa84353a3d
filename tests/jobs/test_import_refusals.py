"""Sparse exports of strangers: whatever is wrong in one, it is a refusal in one line, and nothing is left behind.

All digests are made to fit unless it is a digest that is wrong.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import exported

from besa_cli.checkpoint.runs import Run
from besa_cli.errors import BesaError
from besa_cli.jobs import import_
from besa_cli.system.disk import sha256_file

SHARD = "sparse-00002-of-00003.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
Harm = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = exported.stage(tmp_path_factory.mktemp("made"))
    exported.export(run, "sparse")
    exported.export(run, "sparse", compress="zstd")
    return run


@pytest.fixture
def export(made: Run, tmp_path: Path) -> Path:
    shutil.copytree(made.exports / "sparse", tmp_path / "export")
    return tmp_path / "export"


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    how(value)
    path.write_text(json.dumps(value))


def sign(export: Path) -> None:
    """Make every digest fit."""

    def weights(index: dict[str, Any]) -> None:
        digests = index["metadata"]["sha256"]
        digests |= {name: sha256_file(export / name) for name in digests if (export / name).is_file()}

    def files(manifest: dict[str, Any]) -> None:
        for name in manifest["files"]:
            path = export / name
            if path.is_file():
                manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}

    change(export / "sparse.safetensors.index.json", weights)
    change(export / "export.json", files)


def imported(export: Path, place: Path) -> Path:
    job = import_.ImportJob(export, Run(place))
    list(job.shards())
    return job.directory


def refused(export: Path, place: Path) -> str:
    with pytest.raises(BesaError) as caught:
        imported(export, place)
    assert not (place / "pruned").exists()
    assert caught.value.hint
    return caught.value.message


def part(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Harm:
    def harm(export: Path) -> None:
        tensors = load_file(export / SHARD)
        tensors[f"{UP}_{name}"] = how(tensors[f"{UP}_{name}"])
        save_file(tensors, export / SHARD)

    return harm


def added(**parts: torch.Tensor) -> Harm:
    def harm(export: Path) -> None:
        tensors = load_file(export / SHARD) | {f"{UP}_{name}".removesuffix("_"): value for name, value in parts.items()}
        save_file(tensors, export / SHARD)
        names = dict.fromkeys((f"{UP}_{name}".removesuffix("_") for name in parts), SHARD)
        change(export / "sparse.safetensors.index.json", lambda index: index["weight_map"].update(names))

    return harm


def flipped(mask: torch.Tensor) -> torch.Tensor:
    mask[0, 0] ^= 1
    return mask


def swapped(mask: torch.Tensor) -> torch.Tensor:
    return mask.flip(0)


def padded(mask: torch.Tensor) -> torch.Tensor:
    mask[0, -1] |= 128
    return mask


def exchanged(export: Path) -> None:
    one, other = export / SHARD, export / SHARD.replace("00002", "00003")
    (export / "aside").write_bytes(one.read_bytes())
    one.write_bytes(other.read_bytes())
    other.write_bytes((export / "aside").read_bytes())
    (export / "aside").unlink()


CODES = {
    "codes": torch.zeros(3, dtype=torch.uint8),
    "scale": torch.ones(32, 1, dtype=torch.float16),
    "grid": torch.tensor([4, 32]),
}
PARTS: dict[str, Harm] = {
    "a bit of the mask": part("mask", flipped),
    "rows of the mask": part("mask", swapped),
    "the mask is full": part("mask", lambda mask: mask.fill_(255)),
    "the mask is wider": part("mask", lambda mask: torch.cat([mask, mask], 1)),
    "the mask is int64": part("mask", lambda mask: mask.long()),
    "the mask is flat": part("mask", lambda mask: mask.view(-1)),
    "values are ints": part("values", lambda values: values.to(torch.int64)),
    "values are of another dtype": part("values", lambda values: values.half()),
    "values are fewer": part("values", lambda values: values[1:]),
    "values are a matrix": part("values", lambda values: values.unsqueeze(0)),
    "values are NaN": part("values", lambda values: values.fill_(float("nan"))),
    "values are zero": part("values", lambda values: values.zero_()),
    "the shape is turned": part("shape", lambda shape: shape.flip(0)),
    "the shape is huge": part("shape", lambda shape: shape.fill_(1 << 62)),
    "the shape is negative": part("shape", lambda shape: -shape),
    "the shape is three": part("shape", lambda shape: torch.cat([shape, shape[:1]])),
    "the shape is floats": part("shape", lambda shape: shape.float()),
    "the shape is nothing": part("shape", lambda shape: shape.zero_()),
    "the weight is there twice": added(**{"": torch.zeros(2, 2)}),
    "codes in a pruned stage": added(**CODES),
    "codes without a grid": added(codes=CODES["codes"], scale=CODES["scale"]),
    "a grid of floats": added(**CODES | {"grid": torch.tensor([4.5, 32.0])}),
    "a grid of 5 bits": added(**CODES | {"grid": torch.tensor([5, 32])}),
    "a grid of 2^40 bits": added(**CODES | {"grid": torch.tensor([1 << 40, 32])}),
    "a grid of three": added(**CODES | {"grid": torch.tensor([4, 32, 1])}),
    "scales that are infinite": added(**CODES | {"scale": torch.full((32, 1), torch.inf, dtype=torch.float16)}),
    "scales without codes": added(scale=CODES["scale"]),
    "blocks are exchanged": exchanged,
    "a file is empty": lambda export: (export / SHARD).write_bytes(b""),
    "a file has no tensors": lambda export: save_file({}, export / SHARD),
}


@pytest.mark.parametrize("what", PARTS)
def test_wrong_parts_are_refused_though_all_digests_fit(what: str, export: Path, tmp_path: Path) -> None:
    PARTS[what](export)
    sign(export)
    refused(export, tmp_path / "run")


INDEX, STAGE, MANIFEST = "sparse.safetensors.index.json", "stage/model.safetensors.index.json", "stage/besa.json"


def put(*path: Any) -> Callable[[dict[str, Any]], object]:
    """Set a field, given by its keys; the last of `path` is the value."""
    *above, last, value = path

    def harm(found: dict[str, Any]) -> None:
        for key in above:
            found = found[key]
        found[last] = value

    return harm


def without(*path: str) -> Callable[[dict[str, Any]], object]:
    *above, last = path

    def harm(found: dict[str, Any]) -> None:
        for key in above:
            found = found[key]
        del found[last]

    return harm


def everywhere(new: Callable[[str], str]) -> Callable[[dict[str, Any]], object]:
    return lambda found: found["weight_map"].update({name: new(file) for name, file in found["weight_map"].items()})


FIELDS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no digests": (INDEX, without("metadata", "sha256")),
    "no metadata": (INDEX, without("metadata")),
    "no digest of a file": (INDEX, without("metadata", "sha256", SHARD)),
    "a digest of null": (INDEX, put("metadata", "sha256", SHARD, None)),
    "a digest of 3": (INDEX, put("metadata", "sha256", SHARD, "abc")),
    "digests in a list": (INDEX, put("metadata", "sha256", ["a"])),
    "no table": (INDEX, without("weight_map")),
    "an empty table": (INDEX, put("weight_map", {})),
    "a tensor in another file": (INDEX, put("weight_map", f"{UP}_mask", "sparse-00003-of-00003.safetensors")),
    "a file outside": (INDEX, put("weight_map", f"{UP}_mask", "../sparse-00003-of-00003.safetensors")),
    "a file with a line feed": (INDEX, put("metadata", "sha256", "sparse-00001-of-00003.safetensors\n", "0" * 64)),
    "a file twice": (INDEX, put("metadata", "sha256", f"{SHARD}.zst", "0" * 64)),
    "a size below zero": (INDEX, put("metadata", "total_size", -1)),
    "a size of text": (INDEX, put("metadata", "total_size", "1")),
    "the stage's shards outside": (STAGE, everywhere(lambda file: f"../{file}")),
    "the stage's shards absolute": (STAGE, everywhere(lambda file: f"/tmp/{file}")),
    "the stage's shards nameless": (STAGE, everywhere(lambda file: "")),
    "a tensor in another shard": (STAGE, put("weight_map", UP, "model-00003-of-00003.safetensors")),
    "a shard too many": (STAGE, put("weight_map", "more", "model-00004-of-00003.safetensors")),
    "the stage's table a list": (STAGE, put("weight_map", [])),
    "the stage's table null": (STAGE, put("weight_map", None)),
    "the stage's size 0": (STAGE, put("metadata", "total_size", 0)),
    **{f"no {name}": (MANIFEST, without(name)) for name in ("stage", "status", "digest", "format", "blocks", "counts")},
    "a stage elsewhere": (MANIFEST, put("stage", "../../x")),
    "a stage of a list": (MANIFEST, put("stage", ["pruned"])),
    "a newer stage": (MANIFEST, put("format", 99)),
    "a status of its own": (MANIFEST, put("status", "done")),
    "another digest": (MANIFEST, put("digest", "0" * 64)),
    "a digest that is a number": (MANIFEST, put("digest", 5)),
    "more blocks": (MANIFEST, put("blocks", 3)),
    "10^9 blocks": (MANIFEST, put("blocks", 10**9)),
    "blocks of text": (MANIFEST, put("blocks", "2")),
    "no zeros": (MANIFEST, put("counts", "zeros", 0)),
    "more weights": (MANIFEST, put("counts", "weights", 10**12)),
    "counts of text": (MANIFEST, put("counts", "pruned", "many")),
    "a newer export": ("export.json", put("format", 99)),
    "an export of format 0": ("export.json", put("format", 0)),
    "an export of format true": ("export.json", put("format", True)),
    "another command": ("export.json", put("command", "prune")),
    "an unfinished export": ("export.json", put("status", "running")),
    "an export of another stage": ("export.json", put("source", "digest", "0" * 64)),
    "an export of other counts": ("export.json", put("counts", "zeros", 1)),
    "an export in another format": ("export.json", put("options", "format", "hf")),
    "files null": ("export.json", put("files", None)),
    "files in a list": ("export.json", put("files", ["a"])),
    "a file of nothing": ("export.json", put("files", "stage/besa.json", {})),
    "a file of below zero bytes": ("export.json", put("files", "stage/besa.json", "bytes", -1)),
    "a file beside": ("export.json", put("files", "stage/../../canary", {"bytes": 1, "sha256": "0" * 64})),
    "a directory": ("export.json", put("files", "stage/", {"bytes": 1, "sha256": "0" * 64})),
    "sizes null": ("export.json", put("sizes", None)),
    "a report of another block": ("stage/model-00002-of-00003.json", put("index", 1)),
    "a report of other zeros": ("stage/model-00002-of-00003.json", put("linears", 0, "zeros", 1)),
    "a report of another linear": ("stage/model-00002-of-00003.json", put("linears", 0, "name", "../x")),
    "a report of another digest": ("stage/model-00002-of-00003.json", put("digest", "0" * 64)),
}


@pytest.mark.parametrize("what", FIELDS)
def test_wrong_fields_are_refused_though_all_digests_fit(what: str, export: Path, tmp_path: Path) -> None:
    file, how = FIELDS[what]
    (tmp_path / "canary").write_text("x")
    if file != INDEX:
        change(export / file, how)
    if file != "export.json":
        sign(export)
    if file == INDEX:
        change(export / file, how)
    refused(export, tmp_path / "run")


@pytest.mark.parametrize("file", [INDEX, "export.json", STAGE, MANIFEST, "stage/model-00002-of-00003.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"[" * 100_000, b'{"format": 1, "format": 1}', b"\xff"])
def test_what_is_not_the_file_at_all_is_refused(file: str, content: bytes, export: Path, tmp_path: Path) -> None:
    (export / file).write_bytes(content)
    if file not in (INDEX, "export.json"):
        sign(export)
    refused(export, tmp_path / "run")


@pytest.mark.parametrize("file", [SHARD, INDEX, MANIFEST, "stage/config.json", "stage/model-00003-of-00003.json"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "nothing", "a link to nothing", "a link to a device"])
def test_what_is_not_an_ordinary_file_is_refused_at_once(kind: str, file: str, export: Path, tmp_path: Path) -> None:
    path = export / file
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to("/dev/zero" if kind == "a link to a device" else "nowhere")
    refused(export, tmp_path / "run")


def test_a_file_that_is_far_too_long_is_not_read(export: Path, tmp_path: Path) -> None:
    os.truncate(export / SHARD, 1 << 40)
    assert f"{SHARD} is damaged: it has 1099511627776 bytes" in refused(export, tmp_path / "run")


def test_files_that_no_list_names_are_not_taken(export: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (export / "stage" / "evil.py").write_text("x")
    (export / "stage" / "more.json").write_text("{}")
    (export / "stage" / "model.safetensors").write_bytes(b"x")
    (export / "stage" / "notes.txt").symlink_to(tmp_path / "secret")
    expected = {path.name for path in exported_names(export)}
    assert {path.name for path in imported(export, tmp_path / "run").iterdir()} == expected


def exported_names(export: Path) -> set[Path]:
    """The small files that the list names, and the shards."""
    listed = json.loads((export / "export.json").read_text())["files"]
    small = {Path(name) for name in listed if name.startswith("stage/")}
    return small | {Path(f"model-0000{number}-of-00003.safetensors") for number in (1, 2, 3)}


@pytest.mark.parametrize(
    "name", ["stage/evil.py", "stage/model.safetensors", "stage/export.json", "stage/.hidden.json"]
)
def test_a_listed_file_that_no_stage_holds_is_not_taken(name: str, export: Path, tmp_path: Path) -> None:
    (export / name).write_text("{}")
    change(export / "export.json", put("files", name, {"bytes": 0, "sha256": "0" * 64}))
    sign(export)
    assert not (imported(export, tmp_path / "run") / Path(name).name).exists()


def test_without_the_list_a_link_brings_nothing_in(export: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (export / "export.json").unlink()
    (export / "stage" / "notes.txt").symlink_to(tmp_path / "secret")
    assert not (imported(export, tmp_path / "run") / "notes.txt").exists()


def test_an_export_of_links_as_the_hubs_cache_keeps_it_is_imported(made: Run, export: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(path for path in export.rglob("*") if path.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert {path.name for path in imported(export, tmp_path / "run").iterdir()} >= {"besa.json", "config.json"}


@pytest.mark.parametrize("signed", [False, True])
def test_a_file_that_expands_to_gigabytes_is_not_expanded(signed: bool, made: Run, tmp_path: Path) -> None:
    export = tmp_path / "export"
    shutil.copytree(made.exports / "sparse-zstd", export)
    with pyarrow.CompressedOutputStream(str(export / f"{SHARD}.zst"), "zstd") as stream:
        for _ in range(500):
            stream.write(bytes(1 << 20))
    if signed:
        sign(export)
    assert SHARD in refused(export, tmp_path / "run")
    assert sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()) < 1 << 20


def test_a_stage_that_lost_a_shard_is_not_that_stage_already(export: Path, tmp_path: Path) -> None:
    stage = imported(export, tmp_path / "run")
    assert import_.ImportJob(export, Run(tmp_path / "run")).done
    shard = stage / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    tensors[UP][0] = 1.0
    save_file(tensors, shard)
    with pytest.raises(BesaError, match="damaged or was changed"):
        import_.ImportJob(export, Run(tmp_path / "run"))
    shard.unlink()
    with pytest.raises(BesaError, match=shard.name):
        import_.ImportJob(export, Run(tmp_path / "run"))
    job = import_.ImportJob(export, Run(tmp_path / "run"), restart=True)
    list(job.shards())
    assert shard.exists()


def test_import_replaces_nothing_that_is_not_a_stage(made: Run, export: Path, tmp_path: Path) -> None:
    place = tmp_path / "run" / "pruned"
    place.mkdir(parents=True)
    (place / "model.safetensors").write_text("mine")
    for restart in (False, True):
        with pytest.raises(BesaError, match="was not made by besa"):
            import_.ImportJob(export, Run(tmp_path / "run"), restart=restart)
    assert (place / "model.safetensors").read_text() == "mine"


def test_import_does_not_replace_the_export_that_it_reads(export: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    export.rename(tmp_path / "run" / "pruned")
    with pytest.raises(BesaError, match="which is being read, is in it"):
        import_.ImportJob(tmp_path / "run" / "pruned", Run(tmp_path / "run"), restart=True)


@pytest.mark.parametrize("where", ["pruned", ".pruned.partial"])
def test_import_names_a_file_in_the_way_and_leaves_it(where: str, export: Path, tmp_path: Path) -> None:
    if where == "pruned":
        imported(export, tmp_path / "run")
    else:
        (tmp_path / "run" / where).mkdir(parents=True)
    (tmp_path / "run" / where / "notes.txt").write_text("mine")
    with pytest.raises(BesaError, match=r"notes\.txt"):
        import_.ImportJob(export, Run(tmp_path / "run"), restart=True)
    assert (tmp_path / "run" / where / "notes.txt").read_text() == "mine"


def test_chat_templates_in_their_folder_go_out_and_come_back(made: Run, tmp_path: Path) -> None:
    run = exported.copy_of(made, tmp_path / "run")
    template = Path("additional_chat_templates") / "tool_use.jinja"
    (run.stage("pruned") / template).parent.mkdir()
    (run.stage("pruned") / template).write_text("TOOLS")
    directory = exported.export(run, "sparse")
    assert (directory / template).read_text() == "TOOLS"
    assert (imported(directory, tmp_path / "back") / template).read_text() == "TOOLS"
