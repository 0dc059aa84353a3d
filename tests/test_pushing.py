"""`besa export --push-to`: asked first, refused before any work where it cannot be, and the very files."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exported
import huggingface_hub
import pytest
import typer

from besa_cli import pushing
from besa_cli.errors import BesaError

Besa = Callable[..., Any]  # conftest.Outcome


class Recorder:
    """Stands for the hub's client; notes what it is asked."""

    def __init__(self) -> None:
        self.made: list[tuple[str, bool]] = []
        self.uploaded: list[tuple[str, set[str]]] = []

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.made.append((repo, private))
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.uploaded.append((repo_id, {path.name for path in folder_path.iterdir()}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: recorder)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return recorder


@pytest.mark.parametrize("private", ["--private", "--public"])
def test_the_files_of_the_export_are_pushed(private: str, workplace: Path, besa: Besa, hub: Recorder) -> None:
    run = exported.stage(workplace)
    outcome = besa("export", "--run", run.path, "--push-to", "org/name", "--yes", private)
    assert outcome.code == 0, outcome.err
    assert hub.made == [("org/name", private == "--private")]
    assert hub.uploaded == [("org/name", {path.name for path in (run.exports / "hf").iterdir()})]
    assert "https://hub/org/name" in outcome.err


class Terminal(io.StringIO):
    """Somebody who could answer sits before it."""

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_and_a_yes_nothing_is_exported(workplace: Path, besa: Besa, hub: Recorder) -> None:
    run = exported.stage(workplace)
    outcome = besa("export", "--run", run.path, "--push-to", "org/name")
    assert outcome.code == 2
    assert "--yes" in outcome.err
    assert not run.exports.exists()


def test_nothing_is_pushed_without_a_yes(
    workplace: Path, besa: Besa, hub: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = exported.stage(workplace)
    asked: list[str] = []

    def answer_no(text: str, **_: object) -> bool:
        asked.append(text)
        return False

    monkeypatch.setattr(typer, "confirm", answer_no)
    monkeypatch.setattr("sys.stdin", Terminal())
    outcome = besa("export", "--run", run.path, "--push-to", "org/name")
    assert outcome.code == 0
    assert "not pushed" in outcome.err
    assert "org/name" in asked[0]
    assert hub.made == hub.uploaded == []
    assert (run.exports / "hf" / "export.json").exists()


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("org/na me", "t", "cannot be the name of a repository"),
        ("name", "t", "cannot be the name of a repository"),
        ("org/name", None, "hf auth login"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_any_work(
    repo: str, token: str | None, said: str, workplace: Path, besa: Besa, hub: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    run = exported.stage(workplace)
    outcome = besa("export", "--run", run.path, "--push-to", repo, "--yes")
    assert outcome.code in (1, 2)
    assert said in outcome.err
    assert not run.exports.exists()


def test_a_hub_that_breaks_off_leaves_the_export(
    tmp_path: Path, hub: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        raise ConnectionError("no line")

    monkeypatch.setattr(hub, "upload_folder", broken)
    with pytest.raises(BesaError, match="was not pushed: cannot reach the hub"):
        pushing.push(tmp_path, "org/name", private=True)
