"""Models from a hub: a small one on this machine, with all the ways in which a hub can fail.

The hub's library reads its environment when it is imported, so each call runs in a process of its own.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.hub_server import COMMIT, Hub, serve

from besa_cli.errors import BesaError
from besa_cli.models import answers

CALL = """
import json, sys
from besa_cli.errors import BesaError
from besa_cli.models import resolve, transfer
transfer.STALL_SECONDS = float(sys.argv[2])
notes, out = [], {}
try:
    model = resolve(sys.argv[1], notify=notes.append)
    out = {"directory": str(model.directory), "revision": model.revision, "kind": model.kind}
except BesaError as error:
    out = {"message": error.message, "hint": error.hint, "code": error.exit_code}
print(json.dumps(out | {"notes": notes, "torch": "torch" in sys.modules}))
"""


@dataclass
class Client:
    """Calls `resolve` in a fresh process, with a cache of its own for the hub's files."""

    home: Path
    endpoint: str

    def __call__(self, name: str, *, stall: float = 60, **variables: str) -> dict[str, object]:
        own = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.endpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        done = subprocess.run(
            [sys.executable, "-c", CALL, name, str(stall)],
            env=environment | own | variables,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        answer: dict[str, object] = json.loads(done.stdout)
        return answer


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    others = (
        "README.md",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/model.pth",
        "model.onnx",
        "run.py",
    )
    files |= dict.fromkeys(others, b"not needed")
    files |= {"tokenizer_config.json": b"{}", "tokenizer.json": b"{ }", "model.fp16.safetensors": b"not needed"}
    with serve(Hub(files)) as running:
        yield running


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Client:
    return Client(tmp_path / "hf", hub.endpoint)


def same_weights(directory: object, tiny: Path) -> bool:
    found, expected = load_file(Path(str(directory)) / "model.safetensors"), load_file(tiny / "model.safetensors")
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture
def closed() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


NEEDED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_only_what_is_needed_is_fetched_and_only_once(revision: str, hub: Hub, client: Client, tiny: Path) -> None:
    first = client("org/tiny" + revision)
    assert (first["kind"], first["revision"], first["torch"]) == ("hub", COMMIT, False)
    assert same_weights(first["directory"], tiny)
    assert sorted(name for name, _ in hub.bodies()) == sorted(NEEDED)
    hub.log.clear()
    again = client("org/tiny" + revision)
    assert (again["directory"], again["notes"]) == (first["directory"], [])
    assert hub.bodies() == []
    assert len(hub.requests()) <= 1


def test_chat_templates_of_a_folder_are_fetched_too(hub: Hub, client: Client) -> None:
    hub.files |= {"additional_chat_templates/tool_use.jinja": b"TOOLS", "additional_chat_templates/run.py": b"x"}
    folder = Path(str(client("org/tiny")["directory"])) / "additional_chat_templates"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"tool_use.jinja": b"TOOLS"}


def test_shards_are_found_by_the_index(hub: Hub, client: Client, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    del hub.files["model.safetensors"]
    shards = {path.name: path.read_bytes() for path in (tmp_path / "sharded").glob("model*")}
    hub.files |= shards
    answer = client("org/tiny")
    assert {path.name for path in Path(str(answer["directory"])).glob("*.safetensors")} == {
        name for name in shards if name.endswith(".safetensors")
    }
    del hub.files[next(name for name in shards if name.endswith("-of-00005.safetensors") or "00002" in name)]
    answer = Client(tmp_path / "fresh", hub.endpoint)("org/tiny")
    assert "lacks model-0000" in str(answer["message"])


def test_pickles_alone_are_converted(hub: Hub, client: Client, tiny: Path, tmp_path: Path) -> None:
    torch.save(load_file(tiny / "model.safetensors"), tmp_path / "weights")
    hub.files = {"config.json": hub.files["config.json"], "pytorch_model.bin": (tmp_path / "weights").read_bytes()}
    answer = client("org/tiny")
    assert same_weights(answer["directory"], tiny)
    assert answer["revision"] == COMMIT


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"README.md": b""}, "has no config.json"),
        ({"config.json": b"{}", "model-Q4.gguf": b""}, "neither safetensors nor pytorch_model.bin"),
        (
            {"config.json": b'{"quantization_config": {"quant_method": "awq"}}'},
            "already compressed (awq)",
        ),
        ({"config.json": b"{}", "model.safetensors": b"short"}, "not a safetensors file (5 bytes)"),
    ],
)
def test_what_a_repository_lacks_is_said(files: dict[str, bytes], said: str, hub: Hub, client: Client) -> None:
    hub.files = files
    answer = client("org/tiny")
    assert said in str(answer["message"])
    assert answer["hint"]
    assert answer["code"] == 1


@pytest.mark.parametrize(
    ("name", "refusal", "said", "remedy"),
    [
        ("org/tiny", (403, "GatedRepo"), "org/tiny is gated", "hf auth login"),
        ("org/tiny", (401, "GatedRepo"), "org/tiny is gated", "hf auth login"),
        ("org/tiny", (401, "RepoNotFound"), "does not exist on .* or is private", "hf auth login"),
        ("org/tiny", (401, ""), "does not exist on .* or is private", "hf auth login"),
        ("org/tiny", (503, ""), "the hub answered 503", "try again later"),
        ("org/tony", None, "there is no model org/tony", "check the spelling"),
        ("org/tiny@nowhere", None, "org/tiny has no revision 'nowhere'", "branches and tags"),
    ],
)
def test_each_refusal_has_its_own_line(
    name: str, refusal: tuple[int, str] | None, said: str, remedy: str, hub: Hub, client: Client
) -> None:
    hub.refusal = refusal
    answer = client(name)
    assert re.search(said, str(answer["message"]))
    assert remedy in str(answer["hint"])


def test_a_gated_file_says_how_to_log_in(hub: Hub, client: Client) -> None:
    hub.file_refusal = (403, "GatedRepo")
    answer = client("org/tiny")
    assert answer["message"] == "org/tiny is gated"
    assert "hf auth login" in str(answer["hint"])


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_a_hub_out_of_reach_is_noticed_and_the_cache_stands_in(
    kind: str, hub: Hub, client: Client, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    nowhere = request.getfixturevalue(kind)
    begun = time.monotonic()
    answer = Client(tmp_path / "empty", nowhere)("org/tiny")
    assert time.monotonic() - begun < 20  # with the start of a process on a busy machine; three tries would be 24
    assert f"cannot reach the hub at {nowhere} for org/tiny" in str(answer["message"])
    if kind == "closed":
        whole = client("org/tiny")["directory"]
        offline = Client(client.home, nowhere)("org/tiny")
        assert offline["directory"] == whole
        assert "using the cached copy" in str(offline["notes"])
        assert Client(client.home, nowhere)(f"org/tiny@{COMMIT}")["notes"] == []


def test_offline_mode_uses_the_cache_alone(hub: Hub, client: Client) -> None:
    answer = client("org/tiny", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids the network" in str(answer["message"])
    assert hub.requests() == []
    whole = client("org/tiny")["directory"]
    hub.log.clear()
    assert client("org/tiny", HF_HUB_OFFLINE="1")["directory"] == whole
    assert hub.requests() == []


def test_a_cut_line_is_said_and_the_next_call_goes_on(hub: Hub, client: Client, tiny: Path) -> None:
    size = len(hub.files["model.safetensors"])
    hub.cut_after, hub.dies = 50_000, True
    answer = client("org/tiny")
    assert "broke off after" in str(answer["message"])
    assert "run the same command again: it resumes the transfer" in str(answer["hint"])
    assert "is not complete in" in str(client("org/tiny", HF_HUB_OFFLINE="1")["message"])
    hub.dead, hub.cut_after = False, None
    hub.log.clear()
    answer = client("org/tiny")
    assert same_weights(answer["directory"], tiny)
    assert hub.bodies() == [("model.safetensors", "bytes=50000-")]
    assert size > 50_000


def test_a_line_that_is_cut_now_and_then_is_taken_up_again(hub: Hub, client: Client, tiny: Path) -> None:
    hub.cut_after = 50_000
    answer = client("org/tiny")
    assert "directory" in answer, answer
    assert same_weights(answer["directory"], tiny)
    size = len(hub.files["model.safetensors"])
    spans = [span for name, span in hub.bodies() if name == "model.safetensors"]
    assert spans == [None, *(f"bytes={start}-" for start in range(50_000, size, 50_000))]


def test_a_hub_that_leaves_without_a_word_is_asked_again(hub: Hub, client: Client, tiny: Path) -> None:
    hub.tired = True
    answer = client("org/tiny")
    assert "directory" in answer, answer
    assert same_weights(answer["directory"], tiny)
    assert [name for name, _ in hub.bodies()].count("model.safetensors") == 1


def test_a_transfer_that_stands_still_is_given_up(hub: Hub, client: Client, tiny: Path) -> None:
    hub.cut_after, hub.stall = 50_000, threading.Event()
    begun = time.monotonic()
    answer = client("org/tiny", stall=2)
    assert time.monotonic() - begun < 30  # the transfer alone would wait for 60
    assert "nothing received in 2 s" in str(answer["message"])
    hub.stall.set()
    hub.cut_after = None
    assert same_weights(client("org/tiny")["directory"], tiny)


def test_a_damaged_part_of_an_earlier_run_is_found_out(hub: Hub, client: Client, tiny: Path) -> None:
    hub.cut_after, hub.dies = 50_000, True
    client("org/tiny")
    part = next(client.home.rglob("*.besa.incomplete"))
    part.write_bytes(b"\x00" * part.stat().st_size)
    hub.dead, hub.cut_after = False, None
    assert "arrived damaged" in str(client("org/tiny")["message"])
    assert same_weights(client("org/tiny")["directory"], tiny)


def outside(home: Path) -> set[str]:
    """What lies in the cache's home beside this model's own place there."""
    places = ("hub/models--org--tiny", "hub/.locks")
    found = {str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir()}
    inside = {name for name in found if name.startswith(places)}
    assert all(".." not in name for name in found)
    return {name for name in found - inside if not name.startswith(("hub/CACHEDIR", "hub/version"))}


@pytest.mark.parametrize("value", ["../../../../evil", "/tmp/besa-evil", 5])
def test_a_commit_that_is_a_path_is_refused_before_anything_is_written(value: object, hub: Hub, client: Client) -> None:
    hub.lies = {"sha": value}
    answer = client("org/tiny")
    assert "which is not a digest" in str(answer["message"])
    assert not client.home.exists()


@pytest.mark.parametrize(
    "value", ["..", "", "a" * 39, "A" * 40, "0" * 40 + "/x", "\u0661" * 40, f"{COMMIT}\n", None, 1.5]
)
def test_only_forty_or_sixty_four_hexadecimal_digits_are_a_digest(value: object) -> None:
    with pytest.raises(BesaError, match="which is not a digest"):
        answers.digest(value, "it")
    assert answers.digest("0a" * 20, "it") == "0a" * 20
    assert answers.digest("0a" * 32, "it") == "0a" * 32


@pytest.mark.parametrize("header", ["commit", "etag", "linked"])
@pytest.mark.parametrize("value", ["../../../../evil", "/tmp/besa-evil", "f" * 40])
def test_a_header_that_is_a_path_or_another_commit_is_refused(
    header: str, value: str, hub: Hub, client: Client
) -> None:
    hub.lies = {header: value}
    answer = client("org/tiny")
    said = "arrived damaged" if value == "f" * 40 and header != "commit" else "the hub states"
    assert said in str(answer["message"])
    assert outside(client.home) == set()
    assert not list(client.home.rglob("config.json"))
    assert not Path("/tmp/besa-evil").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"rfilename": "../../config.json"},
        {"rfilename": "/tmp/config.json"},
        {"rfilename": "a/../b"},
        {"rfilename": ""},
        {"rfilename": "a\x00b"},
        {"rfilename": 5},
        {"rfilename": "config.json", "size": -1},
        {"rfilename": "config.json", "size": "many"},
        {"rfilename": "config.json", "size": 1.5},
        {"rfilename": "config.json", "lfs": {"sha256": "../../x"}},
        {"rfilename": "config.json", "lfs": 5},
        5,
    ],
)
def test_a_listing_that_names_what_cannot_be_a_file_is_refused(entry: object) -> None:
    with pytest.raises(BesaError, match=r"listing of org/tiny|not a digest"):
        answers._listing({"sha": COMMIT, "siblings": [entry]}, "org/tiny")


@pytest.mark.parametrize("body", [b"[]", b"[" * 100_000, b"\xff", b"{}"])
def test_an_answer_that_is_no_listing_is_one_line(body: bytes, hub: Hub, client: Client) -> None:
    hub.lies = {"listing": body}
    answer = client("org/tiny")
    assert answer["code"] == 1
    assert answer["hint"]
    assert not client.home.exists()


def test_a_file_of_another_size_or_digest_than_listed_is_refused(hub: Hub, client: Client) -> None:
    listed = hub.listing()["siblings"]
    assert isinstance(listed, list)
    hub.lies = {"siblings": [{**each, "size": each["size"] + 1} for each in listed]}
    assert "but its listing states" in str(client("org/tiny")["message"])
    hub.lies = {"length": "99999999999999"}
    assert "but its listing states" in str(client("org/tiny")["message"])
    other = {"sha256": "0" * 64}
    hub.lies = {"siblings": [{**each, "lfs": other} if "lfs" in each else each for each in listed]}
    assert "but its listing states" in str(client("org/tiny")["message"])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_more_than_was_declared_is_refused_at_once(name: str, hub: Hub, client: Client) -> None:
    hub.endless = name
    begun = time.monotonic()
    answer = client("org/tiny")
    assert time.monotonic() - begun < 30
    assert f"sends more than the {len(hub.files[name])} bytes of {name} of org/tiny" in str(answer["message"])
    assert sum(path.stat().st_size for path in client.home.rglob("*") if path.is_file()) < 1_000_000


def test_a_listing_without_end_is_given_up(hub: Hub, client: Client) -> None:
    hub.endless = "listing"
    begun = time.monotonic()
    answer = client("org/tiny")
    assert time.monotonic() - begun < 30
    assert re.search("is larger than|no answer in 8 s", str(answer["message"]))


@pytest.mark.parametrize("name", ["listing", "config.json", "model.safetensors"])
def test_a_byte_now_and_then_is_given_up(name: str, hub: Hub, client: Client) -> None:
    hub.endless, hub.drip = name, 0.1
    begun = time.monotonic()
    answer = client("org/tiny", stall=3)
    assert time.monotonic() - begun < 40
    assert re.search(r"no answer in 8 s|B received in 3 s", str(answer["message"]))


@pytest.mark.parametrize("revision", ["../../evil", "a/../../b", "..", "a//b", "."])
def test_a_revision_that_is_a_path_is_refused(revision: str, hub: Hub, client: Client) -> None:
    assert "is not a valid revision" in str(client(f"org/tiny@{revision}")["message"])
    assert hub.requests() == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_bit_changed_in_the_cache_is_found_and_the_file_fetched_again(
    name: str, hub: Hub, client: Client, tiny: Path
) -> None:
    file = Path(str(client("org/tiny")["directory"])) / name
    whole = file.read_bytes()
    client("org/tiny")
    times = file.stat()
    file.resolve().write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "is damaged" in str(client("org/tiny", HF_HUB_OFFLINE="1")["message"])
    hub.log.clear()
    answer = client("org/tiny")
    assert f"{file} is damaged; fetching it again" in str(answer["notes"])
    assert file.read_bytes() == whole
    assert [name for name, _ in hub.bodies()] == [name]


def test_what_is_fetched_lies_where_the_library_of_the_hub_finds_it(hub: Hub, client: Client) -> None:
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    directory = Path(str(client("org/tiny")["directory"]))
    found = try_to_load_from_cache("org/tiny", "config.json", cache_dir=client.home / "hub", revision="main")
    assert found == str(directory / "config.json")
    scanned = scan_cache_dir(client.home / "hub")
    assert not scanned.warnings
    (repo,) = scanned.repos
    assert {file.file_name for revision in repo.revisions for file in revision.files} == NEEDED


@pytest.mark.parametrize(("header", "value"), [("commit", "../../evil"), ("etag", "../../evil"), ("linked", "f" * 64)])
def test_the_library_of_the_hub_is_stopped_when_an_answer_is_another_than_before(
    header: str, value: str, hub: Hub
) -> None:
    """It fetches files that are too large for a plain download, and asks for tag and commit itself."""
    from huggingface_hub import close_session, get_hf_file_metadata, get_session

    url, hooks = f"{hub.endpoint}/org/tiny/resolve/{COMMIT}/config.json", get_session().event_hooks
    known = str(get_hf_file_metadata(url).etag)
    with answers.guarded(known, COMMIT):
        assert get_hf_file_metadata(url).etag == known
        hub.lies = {header: value}
        close_session()  # as the library does when a connection fails
        with pytest.raises(BesaError, match=f"the hub states .*{value}"):
            get_hf_file_metadata(url)
    hub.lies = {header: value}
    with answers.guarded(), contextlib.suppress(BesaError):
        get_hf_file_metadata(url)
        assert value == "f" * 64  # any digest will do
    assert get_session().event_hooks == hooks
