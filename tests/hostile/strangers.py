"""What is not besa's in a run directory: links, the user's files, a model in a stage, what a killed command left."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.base import AGAIN, DRAWN, FLOAT, PPL
from hostile.frame import Case, Judged, Line, accepted, either, fine, line, refused
from hostile.runs import READERS, STAGE, unchanged

_RESTART = line(*AGAIN, "--restart")


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    yield from _links()
    yield from _foreign()
    yield from _left_over()


def _links() -> Iterator[Case]:
    """Links to a file of the user's where commands write."""
    written = ("pruned/timing.jsonl", ".holder.json", ".lock", "pruned.next", "eval/.eval.lock", ".eval.lock")
    for name in written:

        def harm(place: Path, name: str = name) -> None:
            path = place / "done" / name
            path.unlink(missing_ok=True)
            path.symlink_to(place / "mine" / "notes.txt")

        for reader, each in {
            "restart": _RESTART,
            "eval ppl": line(PPL[0], PPL[1], "rows.txt", *PPL[3:], "--run", "done"),
        }.items():

            def prepare(place: Path, harm: Callable[[Path], None] = harm) -> None:
                (place / "rows.txt").write_text("w9 w8 w7 " * 40)
                harm(place)

            yield Case(
                kind="links where commands write",
                name=f"{name}: {reader}",
                harm=prepare,
                lines=(each,),
                expect=either(),
            )
    directories = {
        "pruned": _RESTART,
        "calibration": _CALIBRATE,
        "export/hf": _EXPORT,
        "quantized": READERS["quantize"],
    }
    for name, each in directories.items():

        def elsewhere(place: Path, name: str = name) -> None:
            path = place / "done" / name
            target = place / "mine" / "folder"
            if path.exists():
                shutil.move(path, target)
            else:
                target.mkdir()
                (target / "notes.txt").write_text("mine")
            path.symlink_to(target)

        yield Case(
            kind="links where commands write",
            name=f"{name}: a directory elsewhere",
            harm=elsewhere,
            lines=(each,),
            expect=either(),
        )


_CALIBRATE = line(
    "calibrate", "--model", "m", "--data", "text.txt", "--samples", "3", "--seqlen", "8", "--run", "done", "--restart"
)


def _canary(name: str) -> Callable[[Path], None]:
    """Something of the user's in the run directory."""

    def harm(place: Path) -> None:
        path = place / "done" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("two years of work\n")

    return harm


def _source_inside(where: str, *, link: bool = False) -> Callable[[Path], None]:
    """The model lies, or is linked, below the stage that is to be replaced."""

    def harm(place: Path) -> None:
        target = place / "done" / where
        if link:
            target.symlink_to(place / "m")
            return
        shutil.copytree(place / "m", target)
        for path in sorted(target.iterdir()):
            path.rename(path.with_name(f"canary-{path.name}") if path.suffix == ".md" else path)
        (target / "canary.txt").write_text("of the model")

    return harm


def _only(directory: str, *names: str) -> Callable[[Path], None]:
    """A directory of the user's in a stage's place."""

    def harm(place: Path) -> None:
        shutil.rmtree(place / "done" / directory, ignore_errors=True)
        for name in names:
            path = place / "done" / directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("two years of work\n")

    return harm


_IMPORT = line("import", "kept", "--run", "done", "--restart")
_EXPORT = line("export", "--run", "done", "--restart")
_SPARSE = line("export", "--format", "sparse", "--run", "done", "--restart")
_QUANTIZE = line(*READERS["quantize"].words, "--restart")


def _foreign() -> Iterator[Case]:
    """Files of the user's where a command would begin anew."""
    found: list[tuple[str, Callable[[Path], None], Line]] = []
    for below in ("canary.txt", ".git/canary", "canary/notes.txt", "canary.safetensors", "codes/canary.txt"):
        name = f"pruned/{below}"
        found.append((f"{name}: prune --restart", _canary(name), _RESTART))
        found.append((f"{name}: import --restart", _kept(_canary(name)), _IMPORT))
    for name in ("calibration/canary.txt", "calibration/.git/canary"):
        found.append((f"{name}: calibrate --restart", _canary(name), _CALIBRATE))
    for name in ("export/hf/canary.txt", "export/hf/.git/canary"):
        found.append((f"{name}: export --restart", _canary(name), _EXPORT))
    found.append(("export/sparse/canary.txt: export --restart", _canary("export/sparse/canary.txt"), _SPARSE))
    found.append(("quantized/canary.txt: quantize --restart", _canary("quantized/canary.txt"), _QUANTIZE))
    for directory, each in {
        "pruned": _RESTART,
        "quantized": _QUANTIZE,
        "export/hf": _EXPORT,
        "export/sparse": _SPARSE,
    }.items():
        for names in ((".canary",), ("canary.txt",), ("canary/a.txt", "canary/b.txt"), (".git/canary", ".gitignore")):
            harm = _kept(_only(directory, *names)) if directory == "pruned" else _only(directory, *names)
            found.append((f"{directory} of {', '.join(names)}: {each.words[0]} --restart", harm, each))
            if directory == "pruned":
                plain = Line(words=each.words[:-1])
                found.append((f"{directory} of {', '.join(names)}: {each.words[0]}", harm, plain))
                found.append((f"{directory} of {', '.join(names)}: import --restart", harm, _IMPORT))
    for name, harm, each in found:
        yield Case(kind="files of the user's in a run", name=name, harm=harm, lines=(each,), expect=refused("done"))
    yield from _sources()


def _kept(harm: Callable[[Path], None]) -> Callable[[Path], None]:
    """The export is moved out of the run first, to be imported."""

    def moved(place: Path) -> None:
        shutil.copytree(place / "done" / "export" / "sparse", place / "kept")
        harm(place)

    return moved


def _sources() -> Iterator[Case]:
    for where, link in (("pruned/dense", False), ("pruned/dense", True), ("calibration/dense", False)):
        words = tuple(f"done/{where}" if word == "m" else word for word in (*AGAIN, "--restart"))
        each = _CALIBRATE if where.startswith("calibration") else line(*words)
        name = f"{'a link to ' * link}the model in {where}: --restart"
        harm = _source_inside(where, link=link)
        yield Case(kind="files of the user's in a run", name=name, harm=harm, lines=(each,), expect=refused("done"))

    def tokens(place: Path) -> None:
        (place / "r" / "calibration").mkdir(parents=True)
        (place / "r" / "calibration" / "tokens.safetensors").write_bytes(b"mine")

    def kept(judged: Judged) -> str:
        return "" if (judged.place / "r/calibration/tokens.safetensors").read_bytes() == b"mine" else "tokens are gone"

    def refused_and_kept(judged: Judged) -> str:
        return refused("tokens.safetensors")(judged) or kept(judged)

    words = ("prune", "--model", "m", "--method", "wanda", *DRAWN, *FLOAT, "--run", "r")
    for more in ((), ("--restart",)):
        name = f"foreign tokens: prune {' '.join(more)}"
        yield Case(
            kind="files of the user's in a run",
            name=name,
            harm=tokens,
            lines=(line(*words, *more),),
            expect=refused_and_kept,
        )


def _left_over() -> Iterator[Case]:
    """What a killed command leaves: the same command goes on, and the finished stage is never lost."""

    def replaced(place: Path) -> None:
        (place / STAGE).rename(place / "done" / ".pruned.replaced")

    def both(place: Path) -> None:
        shutil.copytree(place / STAGE, place / "done" / ".pruned.replaced")

    def beside(place: Path) -> None:
        shutil.copytree(place / STAGE, place / "done" / "pruned.next")

    def begun(place: Path) -> None:
        (place / "done" / "pruned.next").mkdir()

    def partial(place: Path) -> None:
        (place / STAGE / ".model-00002-of-00003.safetensors.7.partial").write_bytes(b"x" * 99)

    def unread(place: Path) -> None:
        (place / "done" / ".pruned.replaced").mkdir()
        (place / "done" / ".pruned.replaced" / "canary.txt").write_text("mine")

    left = {
        "only .replaced": replaced,
        "both": both,
        "a whole pruned.next": beside,
        "an empty pruned.next": begun,
        "a partial shard": partial,
    }
    for name, harm in left.items():
        for reader in ("prune again", "eval ppl", "export"):
            yield Case(
                kind="what was left over",
                name=f"{name}: {reader}",
                harm=harm,
                lines=(READERS[reader],),
                expect=accepted(unchanged if reader == "prune again" else fine),
            )
    yield Case(kind="what was left over", name="a foreign .replaced", harm=unread, lines=(_RESTART,), expect=either())
