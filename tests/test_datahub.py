"""A hub that answers, one that refuses, one that never answers: each noticed at once, nothing tried twice."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from besa_cli import datahub
from besa_cli.errors import BesaError

FILE = datahub.RemoteFile(repository="some/texts", path="en/part.jsonl")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA = b'{"text": "a document"}\n'


class FakeHub(ThreadingHTTPServer):
    """A hub with one file; notes every request."""

    def __init__(self, *, status: int = 200, commit: str | None = COMMIT, delay: float = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.commit, self.delay = status, commit, delay
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
        self.send_header("Content-Length", str(len(DATA)))
        self.send_header("ETag", '"abc"')
        if hub.commit is not None:
            self.send_header("X-Repo-Commit", hub.commit)
        self.end_headers()
        if body:
            self.wfile.write(DATA)

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


def hub_at(endpoint: str, tmp_path: Path, *, offline: bool = False, timeout: float = 5) -> datahub.Hub:
    return datahub.Hub(endpoint=endpoint, offline=offline, timeout=timeout, cache=tmp_path / "hub")


def test_a_file_is_fetched_once_and_then_taken_from_the_cache(tmp_path: Path) -> None:
    notes: list[str] = []
    with serving(FakeHub()) as fake:
        fetched = datahub.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=notes.append)
        assert fetched.path.read_bytes() == DATA
        assert fetched.commit == COMMIT
        assert notes == [f"fetching en/part.jsonl of some/texts from {fake.endpoint}"]
        count = len(fake.requests)
        assert datahub.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=notes.append) == fetched
        assert len(fake.requests) == count
    assert datahub.fetch(FILE, hub_at("http://127.0.0.1:9", tmp_path, offline=True), notify=notes.append) == fetched
    assert len(notes) == 1


def test_a_closed_port_is_noticed_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(datahub.Unreachable, match=r"http://127\.0\.0\.1:9"):
        datahub.fetch(FILE, hub_at("http://127.0.0.1:9", tmp_path), notify=pytest.fail)
    assert time.monotonic() - began < 5


def test_a_hub_that_does_not_answer_is_given_up_in_time(tmp_path: Path) -> None:
    with serving(FakeHub(delay=10)) as fake:
        began = time.monotonic()
        with pytest.raises(datahub.Unreachable) as caught:
            datahub.fetch(FILE, hub_at(fake.endpoint, tmp_path, timeout=0.2), notify=pytest.fail)
        assert time.monotonic() - began < 9
        assert fake.endpoint in caught.value.reason


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_hub_that_refuses_is_asked_once(tmp_path: Path, status: int) -> None:
    with serving(FakeHub(status=status)) as fake:
        with pytest.raises(datahub.Unreachable, match=str(status)) as caught:
            datahub.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=pytest.fail)
        assert len(fake.requests) == 1
        assert "\n" not in caught.value.reason


def test_something_else_that_answers_is_no_hub(tmp_path: Path) -> None:
    with serving(FakeHub(commit=None)) as fake, pytest.raises(datahub.Unreachable, match="not a model hub"):
        datahub.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=pytest.fail)


def test_offline_asks_nobody(tmp_path: Path) -> None:
    with serving(FakeHub()) as fake:
        with pytest.raises(datahub.Unreachable, match="HF_HUB_OFFLINE"):
            datahub.fetch(FILE, hub_at(fake.endpoint, tmp_path, offline=True), notify=pytest.fail)
        assert fake.requests == []


def test_a_download_that_breaks_off_says_that_it_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def broken(*_: object, **__: object) -> str:
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with serving(FakeHub()) as fake, pytest.raises(BesaError, match="broke off: connection reset") as caught:
        datahub.fetch(FILE, hub_at(fake.endpoint, tmp_path), notify=lambda _: None)
    assert not isinstance(caught.value, datahub.Unreachable)
    assert "goes on where it stopped" in caught.value.hint
