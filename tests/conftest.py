"""What every test gets: its own home, no settings of the person who runs it, and a way to run one command line."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several test processes share the machine

_HUB_HOME = tempfile.TemporaryDirectory(prefix="besa-tests-")
os.environ["HF_HOME"] = _HUB_HOME.name  # read when huggingface_hub is imported, hence not in a fixture

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("besa_cli.ops", "beartype.beartype")  # the shapes in the signatures are checked at every call


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` or `browser` where there is none."""
    if item.get_closest_marker("browser") and not shutil.which("chromium"):
        pytest.skip("there is no chromium")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one command line came to."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and cache directory, and none of the variables that change what a command does."""
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("BESA_CACHE", str(home / "cache"))
    for name in ("BESA_RUN", "BESA_DATA", "BESA_DEBUG", "COLUMNS", "FORCE_COLOR", "NO_COLOR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def besa(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs one command line in this process, in an empty current directory: `besa("show", path)`."""
    from besa_cli.app import main

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Outcome(code=code, out=out, err=err)

    return run
