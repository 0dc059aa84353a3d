"""A small imitation of the Hugging Face hub on this machine: listings, files with ranges, refusals, and cut lines."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")


@dataclass
class Hub:
    """What the hub holds and how it behaves; a test changes it while it runs.

    `refusal` is (status, error code) for listings, `file_refusal` the same for files. After `cut_after` bytes of a
    large file's body the line is cut (once `stall` is set, if there is one); if it `dies` of that, it is `dead` and
    answers nothing any more. If it is `tired`, it leaves a connection after a large file, without a word, when the next
    question comes.

    A hostile one answers with what `lies` holds: "sha", "siblings" and "listing" (the whole body) in its listings,
    "commit", "etag", "linked", "location" and "length" in the headers of files. `endless` names a file, or "listing",
    whose body does not end, in one-byte pieces every `drip` seconds if that is set.
    """

    files: dict[str, bytes]
    repo: str = "org/tiny"
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    refusal: tuple[int, str] | None = None
    file_refusal: tuple[int, str] | None = None
    cut_after: int | None = None
    stall: threading.Event | None = None
    dies: bool = False
    dead: bool = False
    tired: bool = False
    lies: dict[str, Any] = field(default_factory=dict)
    endless: str = ""
    drip: float = 0
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def bodies(self) -> list[tuple[str, str | None]]:
        """The files whose content was asked for, with the range."""
        return [
            (path.rsplit("/", 1)[1], span) for method, path, span in self.log if method == "GET" and "/resolve/" in path
        ]

    def requests(self) -> list[str]:
        """The listings and files that were asked for; the hub's library has other questions of its own."""
        return [path for _, path, _ in self.log if path.startswith("/api/models/") or "/resolve/" in path]

    def listing(self) -> dict[str, object]:
        siblings: list[dict[str, object]] = []
        for name, content in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": tag(name, content)[:40]}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": tag(name, content), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        told = {"_id": "1", "id": self.repo, "modelId": self.repo, "sha": COMMIT, "siblings": siblings}
        return {**told, **{name: self.lies[name] for name in ("sha", "siblings") if name in self.lies}}


def tag(name: str, content: bytes) -> str:
    if name.endswith(LARGE):
        return sha256(content).hexdigest()
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    asleep = False
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        if self.hub.dead or self.asleep:
            self.close_connection = True
            return
        if path.startswith("/api/models/"):
            self.listing(path.removeprefix("/api/models/"))
        else:
            repo, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            self.file(repo, revision, name, body=body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def listing(self, path: str) -> None:
        repo, _, revision = path.partition("/revision/")
        if self.hub.refusal:
            return self.refuse(*self.hub.refusal)
        if repo != self.hub.repo:
            return self.refuse(404, "RepoNotFound")
        if revision and revision not in (*self.hub.branches, *self.hub.branches.values()):
            return self.refuse(404, "RevisionNotFound")
        text = self.hub.lies.get("listing", json.dumps(self.hub.listing()).encode())
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        if self.hub.endless == "listing":
            self.end_headers()
            return self.go_on(text)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def file(self, repo: str, revision: str, name: str, *, body: bool) -> None:
        content = self.hub.files.get(name)
        if self.hub.file_refusal:
            return self.refuse(*self.hub.file_refusal)
        if repo != self.hub.repo or content is None:
            return self.refuse(404, "EntryNotFound")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        told = self.hub.lies
        if self.hub.endless != name or not body:
            self.send_header("Content-Length", str(told.get("length", len(content) - start)))
        self.send_header("ETag", f'"{told.get("etag", tag(name, content))}"')
        for header, key in (("X-Linked-Etag", "linked"), ("Location", "location"), ("X-Xet-Hash", "xet")):
            if key in told:
                self.send_header(header, told[key])
        self.send_header("X-Repo-Commit", told.get("commit", COMMIT))
        self.end_headers()
        if body and self.hub.endless == name:
            self.go_on(content[start:])
        elif body:
            self.body(name, content[start:])

    def go_on(self, content: bytes) -> None:
        """Answer without an end, until nobody listens."""
        self.close_connection = True
        pieces = itertools.chain([content], itertools.repeat(b" " * 65536))
        if self.hub.drip:
            pieces = itertools.chain((content[at : at + 1] for at in range(len(content))), itertools.repeat(b" "))
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(self.hub.drip)

    def body(self, name: str, content: bytes) -> None:
        self.asleep = self.hub.tired and name.endswith(LARGE)
        if self.hub.cut_after is None or len(content) <= self.hub.cut_after or not name.endswith(LARGE):
            self.wfile.write(content)
            return
        self.wfile.write(content[: self.hub.cut_after])
        self.wfile.flush()
        if self.hub.stall is not None:
            self.hub.stall.wait(60)
        self.hub.dead = self.hub.dies
        self.close_connection = True


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
