"""What is not besa's in a run directory: links, the user's files, a model in a stage, what a killed command left."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from faults.hostile.base import AGAIN, PPL, PRUNE
from faults.hostile.frame import Case, Harm, Judged, accepted, either, fine, line, refused, several
from faults.hostile.harms import linked, written
from faults.hostile.runs import READERS, STAGE, unchanged

_RESTART = line(*AGAIN, "--restart")
_CALIBRATE = line(
    "calibrate", "--model", "m", "--data", "text.txt", "--samples", "3", "--seqlen", "8", "--run", "done", "--restart"
)
_IMPORT = line("import", "kept", "--run", "done", "--restart")
_EXPORT = line("export", "--run", "done", "--restart")
_SPARSE = line("export", "--format", "sparse", "--run", "done", "--restart")
_QUANTIZE = line(*READERS["quantize"].words, "--restart")
_OTHER_TEXT = line(PPL[0], PPL[1], "other.txt", *PPL[3:], "--run", "done")
_MINE = "two years of work\n"
_KIND = "files of the user's in a run"


def cases(base: Path) -> Iterator[Case]:
    """All of them."""
    yield from _links()
    yield from _beside()
    yield from _alone()
    yield from _sources()
    yield from _tokens()
    yield from _left_over()


def _both(*harms: Harm) -> Harm:
    """One harm after the other."""

    def harm(place: Path) -> None:
        for each in harms:
            each(place)

    return harm


def _moved(directory: str) -> Harm:
    """A directory of the run that is a link to one of the user's."""

    def harm(place: Path) -> None:
        path, target = place / "done" / directory, place / "mine" / "folder"
        if path.exists():
            shutil.move(path, target)
        else:
            written("mine/folder/notes.txt", _MINE)(place)
        path.symlink_to(target)

    return harm


def _links() -> Iterator[Case]:
    """Links to what is the user's where commands write."""
    kind = "links where commands write"
    files = ("pruned/timing.jsonl", ".holder.json", ".lock", "pruned.next", "eval/.eval.lock", ".eval.lock")
    for name in files:
        harm = _both(written("other.txt", "w9 w8 w7 " * 40), linked(f"done/{name}", "mine/notes.txt"))
        yield from several(kind, {f"{name}: restart": harm}, _RESTART, expect=either())
        yield from several(kind, {f"{name}: eval ppl": harm}, _OTHER_TEXT, expect=either())
    for name, each in {
        "pruned": _RESTART,
        "export/hf": _EXPORT,
        "quantized": READERS["quantize"],
    }.items():
        yield from several(kind, {f"{name}: a directory elsewhere": _moved(name)}, each, expect=either())


def _kept(place: Path) -> None:
    """The export is copied out of the run, to be imported."""
    shutil.copytree(place / "done" / "export" / "sparse", place / "kept")


def _beside() -> Iterator[Case]:
    """Files of the user's beside what a command would make anew."""
    for names, each in (
        (("pruned/canary.txt", "pruned/.git/canary", "pruned/canary/notes.txt", "pruned/codes/canary.txt"), _RESTART),
        (("pruned/canary.txt", "pruned/.git/canary", "pruned/canary.safetensors"), _IMPORT),
        (("calibration/canary.txt", "calibration/.git/canary"), _CALIBRATE),
        (("export/hf/canary.txt", "export/hf/.git/canary"), _EXPORT),
        (("export/sparse/canary.txt", "export/sparse/stage/canary.txt"), _SPARSE),
        (("quantized/canary.txt",), _QUANTIZE),
    ):
        harms = {f"{name}: {each.words[0]}": _both(_kept, written(f"done/{name}", _MINE)) for name in names}
        yield from several(_KIND, harms, each, expect=refused("done"))


def _alone() -> Iterator[Case]:
    """A directory of the user's in the place of what a command would make."""
    contents = ((".canary",), ("canary.txt",), ("canary/a.txt", "canary/b.txt"), (".git/canary", ".gitignore"))
    for directory, each in (
        ("pruned", _RESTART),
        ("pruned", line(*AGAIN)),
        ("pruned", _IMPORT),
        ("quantized", _QUANTIZE),
        ("export/hf", _EXPORT),
        ("export/sparse", _SPARSE),
    ):
        for names in contents:

            def empty(place: Path, directory: str = directory) -> None:
                shutil.rmtree(place / "done" / directory, ignore_errors=True)

            files = (written(f"done/{directory}/{name}", _MINE) for name in names)
            said = f"{directory} of {', '.join(names)}: {each.words[0]} {'--restart' * ('--restart' in each.words)}"
            yield from several(_KIND, {said: _both(_kept, empty, *files)}, each, expect=refused("done"))


def _sources() -> Iterator[Case]:
    """The model lies, or is linked, in what is to be replaced."""

    def copied(where: str) -> Harm:
        def harm(place: Path) -> None:
            shutil.copytree(place / "m", place / where)
            (place / where / "canary.txt").write_text(_MINE)

        return harm

    for where in ("done/pruned/dense", "done/calibration/dense"):
        words = _CALIBRATE.words if "calibration" in where else _RESTART.words
        each = line(*(where if word == "m" else word for word in words))
        yield from several(_KIND, {f"the model in {where}": copied(where)}, each, expect=refused("done"))
        yield from several(_KIND, {f"the model linked into {where}": linked(where, "m")}, each, expect=refused("done"))


def _tokens() -> Iterator[Case]:
    """Tokens that no manifest tells of."""
    name = "r/calibration/tokens.safetensors"

    def kept(judged: Judged) -> str:
        gone = (judged.place / name).read_text() != _MINE
        return "the tokens are gone" if gone else refused("tokens.safetensors")(judged)

    for more in ((), ("--restart",)):
        said = f"foreign tokens: prune {' '.join(more)}"
        yield from several(_KIND, {said: written(name, _MINE)}, line(*PRUNE, *more), expect=kept)


def _left_over() -> Iterator[Case]:
    """What a killed command leaves: the same command goes on, and the finished stage is never lost."""
    left: dict[str, Harm] = {
        "only .replaced": lambda place: (place / STAGE).rename(place / "done" / ".pruned.replaced"),
        "both": lambda place: shutil.copytree(place / STAGE, place / "done" / ".pruned.replaced"),
        "a whole pruned.next": lambda place: shutil.copytree(place / STAGE, place / "done" / "pruned.next"),
        "an empty pruned.next": lambda place: (place / "done" / "pruned.next").mkdir(),
        "a partial shard": written(f"{STAGE}/.model-00002-of-00003.safetensors.7.partial", "x" * 99),
    }
    for reader in ("prune again", "eval ppl", "export"):
        harms = {f"{name}: {reader}": harm for name, harm in left.items()}
        expect = accepted(unchanged if reader == "prune again" else fine)
        yield from several("what was left over", harms, READERS[reader], expect=expect)
    foreign = {"a foreign .replaced": written("done/.pruned.replaced/canary.txt", _MINE)}
    yield from several("what was left over", foreign, _RESTART, expect=either())
