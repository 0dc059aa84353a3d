"""`besa export --push-to`: asked first, refused before any work where it cannot be, and the very files."""

import io
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import typer
from support import exported

from besa_cli.errors import BesaError
from besa_cli.jobs import push
from besa_cli.models import answers, hub_errors

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
    assert (hub.made, hub.uploaded) == ([], [])
    assert (run.exports / "hf" / "export.json").exists()


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("org/na me", "t", "is not a valid repository name"),
        ("name", "t", "is not a valid repository name"),
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
        push.push(tmp_path, "org/name", private=True)


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("asked", ["create_repo", "upload_folder"])
def test_a_hub_that_does_not_answer_is_given_up(
    asked: str, tmp_path: Path, hub: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(push, "_COMMIT_SECONDS", 0.3)
    monkeypatch.setattr(hub, asked, lambda *_, **__: threading.Event().wait(30))
    with pytest.raises(BesaError, match=r"was not pushed: cannot reach the hub .*: no answer within 0 s"):
        push.push(tmp_path, "org/name", private=True)


def test_no_request_of_the_hubs_library_waits_for_ever(
    silent: str, tmp_path: Path, hub: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the library has closed its client and made another."""
    from huggingface_hub import close_session, get_session

    hooks, seconds = get_session().event_hooks, get_session().timeout
    monkeypatch.setattr(push, "_LINE_SECONDS", 0.3)
    try:
        push.push(tmp_path, "org/name", private=True)
        close_session()
        assert get_session().event_hooks == hooks
        with pytest.raises(hub_errors.transport()):
            get_session().post(silent, json={})
    finally:
        answers.set_clients(hooks, seconds)


def test_an_answer_that_cannot_be_understood_is_one_line(
    tmp_path: Path, hub: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*_: object, **__: object) -> None:
        raise KeyError("url")

    monkeypatch.setattr(hub, "create_repo", odd)
    with pytest.raises(BesaError, match="was not pushed: cannot read what the hub answers for org/name: 'url'"):
        push.push(tmp_path, "org/name", private=True)
