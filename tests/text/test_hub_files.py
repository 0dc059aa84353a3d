"""A hub that answers, one that refuses, one that never answers: each noticed at once, nothing tried twice."""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from besa_cli.errors import BesaError
from besa_cli.models import transfer
from besa_cli.text import hub_files

FILE = hub_files.RemoteFile(repository="some/texts", path="en/part.jsonl")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA = b'{"text": "a document"}\n'
TAG = hashlib.sha1(b"blob %d\0" % len(DATA) + DATA).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """A hub with one file; notes every request."""

    def __init__(self, *, status: int = 200, commit: str | None = COMMIT, delay: float = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.commit, self.delay, self.tag, self.more = status, commit, delay, TAG, 0
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub = self.server
        hub.requests.append(f"{self.command} {self.path}")
        time.sleep(hub.delay)
        self.send_response(hub.status)
        if not (hub.more and body):
            self.send_header("Content-Length", str(len(DATA)))
        self.send_header("ETag", f'"{hub.tag}"')
        if hub.commit is not None:
            self.send_header("X-Repo-Commit", hub.commit)
        self.end_headers()
        if body:
            self.wfile.write(DATA + b" " * hub.more)
            self.close_connection = bool(hub.more)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def hub_at(endpoint: str, tmp_path: Path, *, offline: bool = False, timeout: float = 5) -> hub_files.Hub:
    return hub_files.Hub(endpoint=endpoint, offline=offline, timeout=timeout, cache=tmp_path / "hub")


def test_a_file_is_fetched_once_and_then_taken_from_the_cache(tmp_path: Path) -> None:
    notes: list[str] = []
    with serving(FakeHub()) as fake:
        fetched = hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=notes.append)
        assert fetched.path.read_bytes() == DATA
        assert fetched.commit == COMMIT
        assert notes == [f"fetching en/part.jsonl of some/texts from {fake.endpoint}"]
        count = len(fake.requests)
        assert hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=notes.append) == fetched
        assert len(fake.requests) == count
    assert hub_files.fetch(FILE, hub_at("http://127.0.0.1:9", tmp_path, offline=True), notify=notes.append) == fetched
    assert len(notes) == 1


def test_a_closed_port_is_noticed_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(hub_files.Unreachable, match=r"http://127\.0\.0\.1:9"):
        hub_files.fetch(FILE, hub_at("http://127.0.0.1:9", tmp_path), notify=pytest.fail)
    assert time.monotonic() - began < 5


def test_a_hub_that_does_not_answer_is_given_up_in_time(tmp_path: Path) -> None:
    with serving(FakeHub(delay=10)) as fake:
        began = time.monotonic()
        with pytest.raises(hub_files.Unreachable) as caught:
            hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path, timeout=0.2), notify=pytest.fail)
        assert time.monotonic() - began < 9
        assert fake.endpoint in caught.value.reason


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_hub_that_refuses_is_asked_once(tmp_path: Path, status: int) -> None:
    with serving(FakeHub(status=status)) as fake:
        with pytest.raises(hub_files.Unreachable, match=str(status)) as caught:
            hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=pytest.fail)
        assert len(fake.requests) == 1
        assert "\n" not in caught.value.reason


def test_something_else_that_answers_is_no_hub(tmp_path: Path) -> None:
    with serving(FakeHub(commit=None)) as fake, pytest.raises(hub_files.Unreachable, match="not a model hub"):
        hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=pytest.fail)


def test_offline_asks_nobody(tmp_path: Path) -> None:
    with serving(FakeHub()) as fake:
        with pytest.raises(hub_files.Unreachable, match="HF_HUB_OFFLINE"):
            hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path, offline=True), notify=pytest.fail)
        assert fake.requests == []


def test_a_download_that_breaks_off_says_that_it_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(transfer, "_append", broken)
    with serving(FakeHub()) as fake, pytest.raises(BesaError, match=r"broke off after .*connection reset") as caught:
        hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=lambda _: None)
    assert not isinstance(caught.value, hub_files.Unreachable)
    assert "resumes the transfer" in caught.value.hint


@pytest.mark.parametrize("field", ["commit", "tag"])
@pytest.mark.parametrize("value", ["../../../../evil", "/tmp/besa-evil", "abc"])
def test_a_commit_or_tag_that_is_a_path_is_refused_before_anything_is_written(
    field: str, value: str, tmp_path: Path
) -> None:
    with serving(FakeHub()) as fake:
        setattr(fake, field, value)
        with pytest.raises(BesaError, match="which is not a digest"):
            hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=pytest.fail)
    assert list(tmp_path.iterdir()) == []


def test_other_content_than_the_tag_says_is_refused(tmp_path: Path) -> None:
    with serving(FakeHub()) as fake:
        fake.tag = "0" * 40
        with pytest.raises(BesaError, match=r"en/part\.jsonl of some/texts arrived damaged"):
            hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=lambda _: None)


def test_more_than_was_declared_is_refused(tmp_path: Path) -> None:
    with serving(FakeHub()) as fake:
        fake.more = 100_000
        with pytest.raises(BesaError, match=f"more than the {len(DATA)} bytes of en/part.jsonl of some/texts"):
            hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=lambda _: None)


def test_a_file_that_changed_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    with serving(FakeHub()) as fake:
        path = hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=lambda _: None).path
        path.resolve().write_bytes(DATA.upper())
        with pytest.raises(BesaError, match="is damaged"):
            hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path, offline=True), notify=pytest.fail)
        notes: list[str] = []
        assert hub_files.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=notes.append).path == path
    assert path.read_bytes() == DATA
    assert f"{path} is damaged; fetching it again" in notes


def test_without_a_home_nothing_is_fetched_into_a_directory_called_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with serving(FakeHub()) as fake, pytest.raises(BesaError, match="no home directory"):
        hub_files.fetch(FILE, hub_files.Hub(endpoint=fake.endpoint, offline=False), notify=pytest.fail)
    assert list(tmp_path.iterdir()) == []
