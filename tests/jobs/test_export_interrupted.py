"""An export that stops at any moment leaves nothing that looks finished, whatever its format."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support import exported, llamas, quantized, tiny_models

from besa_cli import exporters
from besa_cli.checkpoint import inspection
from besa_cli.checkpoint.runs import Run
from besa_cli.exporters import EXPORTERS
from besa_cli.jobs import import_
from besa_cli.jobs.export import ExportJob

FORMATS: list[tuple[str, Mapping[str, object]]] = [
    ("hf", {"shard_size": 20_000}),
    ("sparse", {}),
    ("sparse", {"compress": "zstd"}),
    ("compressed-tensors", {}),
    ("gguf", {"type": "BF16"}),
    ("gguf", {"type": "Q4_0"}),
]


def test_every_format_is_tried() -> None:
    assert {name for name, _ in FORMATS} == set(EXPORTERS)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A quantized stage that every format can hold."""
    return quantized.stage(llamas.stage(tmp_path_factory.mktemp("wide"), intermediate_size=96, head_dim=24))


def moments(job: ExportJob, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Do the job; yields a copy of the run directory as it was after each piece and before each flush to the disk."""
    place = job.directory.parent.parent
    copies: list[Path] = []

    def keep() -> None:
        copies.append(place.with_name(f"moment-{len(copies)}"))
        shutil.copytree(place, copies[-1])

    flush = os.fsync

    def flushed(file: int) -> None:
        keep()
        flush(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flushed)
        for _ in job.pieces():
            keep()
    yield from copies


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_killed_at_any_moment_nothing_looks_finished(
    name: str, options: Mapping[str, object], stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exported.copy_of(stage, tmp_path / "run")
    job = ExportJob(run, exporters.load(name, options))
    copies = list(moments(job, monkeypatch))
    whole = tiny_models.files(job.directory)
    unfinished = 0
    for copy in copies:
        seen = [path for path in copy.glob("export/*") if not path.name.startswith(".")]
        if seen:  # it was flushed after it had got its name
            assert [tiny_models.files(path) for path in seen] == [whole]
        else:
            unfinished += 1
            assert inspection.exports(Run(copy)) == []
    assert unfinished > job.number_of_pieces
    for copy in (copies[0], copies[len(copies) // 2], copies[unfinished - 1]):
        again = exported.export(Run(copy), name, **options)
        assert tiny_models.files(again) == whole
        assert {path.name for path in Run(copy).exports.iterdir()} - {f".{again.name}.private"} == {again.name}


@pytest.mark.parametrize(("name", "options"), FORMATS)
def test_every_file_is_on_the_disk_before_the_export_has_its_name(
    name: str, options: Mapping[str, object], stage: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exported.copy_of(stage, tmp_path / "run")
    flushed: set[int] = set()
    flush, rename = os.fsync, Path.rename

    def noted(file: int) -> None:
        flushed.add(os.fstat(file).st_ino)
        flush(file)

    at_that_moment: list[set[int]] = []

    def renamed(source: Path, target: Path) -> Path:
        at_that_moment.append(set(flushed))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    directory = exported.export(run, name, **options)
    assert len(at_that_moment) == 1
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert [path.name for path in files if path.stat().st_ino not in at_that_moment[0]] == []


@pytest.mark.parametrize("options", [{}, {"compress": "zstd"}])
def test_an_import_that_stops_leaves_no_stage(options: Mapping[str, object], stage: Run, tmp_path: Path) -> None:
    run = exported.copy_of(stage, tmp_path / "run")
    directory = exported.export(run, "sparse", **options)
    for number in range(3):
        shards = import_.ImportJob(directory, Run(tmp_path / "back")).shards()
        for _ in range(number + 1):
            next(shards)
        shards.close()
        assert Run(tmp_path / "back").newest() is None
    job = import_.ImportJob(directory, Run(tmp_path / "back"))
    list(job.shards())
    assert tiny_models.files(job.directory) == tiny_models.files(run.stage("quantized"))
