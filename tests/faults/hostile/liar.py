"""A hub on this machine that answers what a case wants; imported before all that reads its address once."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer; its length may not be the body's, after which `more` comes so many `times`, with pauses."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: str | None = ""  # empty: the body's own; None: none is declared, the body ends with the line
    more: bytes = b""
    times: int = 0
    pause: float = 0.0


Change = Callable[[str, Answer], Answer]


def unchanged(path: str, answer: Answer) -> Answer:
    """The right answer."""
    return answer


class Hub:
    """What the one server of a campaign answers; a case sets `files` and `change`."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Hold nothing, and lie no more."""
        self.files: dict[str, bytes] = {}
        self.change: Change = unchanged

    def answer(self, path: str) -> Answer:
        """The answer to a path, as the case wants it."""
        return self.change(path, self._right(path))

    def _right(self, path: str) -> Answer:
        if not self.files:
            return Answer(status=404, headers={"X-Error-Code": "RepoNotFound"})
        if is_listing(path):
            siblings = [_sibling(name, content) for name, content in self.files.items()]
            text = json.dumps({"_id": "1", "id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings})
            return Answer(headers={"Content-Type": "application/json"}, body=text.encode())
        content = self.files.get(path.rpartition("/")[2])
        if content is None:
            return Answer(status=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{_tag(path, content)}"', "X-Repo-Commit": COMMIT}
        return Answer(headers=headers, body=content)


HUB = Hub()


def is_listing(path: str) -> bool:
    """Whether it is asked what the repository holds."""
    return path.startswith(f"/api/models/{REPO}")


def _tag(name: str, content: bytes) -> str:
    return (hashlib.sha256 if name.endswith(LARGE) else hashlib.sha1)(content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": _tag(name, content)[:40]}
    if name.endswith(LARGE):
        entry["lfs"] = {"sha256": _tag(name, content), "size": len(content), "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        answer = HUB.answer(unquote(urlsplit(self.path).path))
        self.close_connection = True
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.length is not None:
            self.send_header("Content-Length", answer.length or str(len(answer.body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if body:
            self._body(answer)

    def _body(self, answer: Answer) -> None:
        try:
            self.wfile.write(answer.body)
            for _ in range(answer.times):
                time.sleep(answer.pause)
                self.wfile.write(answer.more)
        except OSError:
            return  # nobody listens any more


def serve() -> str:
    """Start the server of the campaign; returns its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"
