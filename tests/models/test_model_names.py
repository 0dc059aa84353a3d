"""Which kind of model a name stands for, and what is said of names that stand for none."""

import subprocess
import sys
from pathlib import Path

import pytest

from besa_cli.errors import BesaError, UsageError
from besa_cli.models import DEMO, resolve


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "nowhere.gguf", "some/where.gguf"]
)
def test_a_path_that_is_not_there_is_named(name: str, notes: list[str]) -> None:
    with pytest.raises(BesaError, match=r"no model at /.*where") as caught:
        resolve(name, notify=notes.append)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", ["smollm2-135", "smolm2-135m", "SmolLM2-135M"])
def test_a_misspelt_demo_name_is_guessed(name: str, notes: list[str]) -> None:
    with pytest.raises(UsageError, match=f"unknown model '{name}'") as caught:
        resolve(name, notify=notes.append)
    assert f"did you mean '{DEMO}'?" in caught.value.hint


@pytest.mark.parametrize(
    "name", ["", "a b/c", "a/b/c", "a/b@", "~nobody-here/x", "a" * 5000, "@main", "https://host/a/b"]
)
def test_a_name_of_no_kind_is_refused(name: str, notes: list[str]) -> None:
    with pytest.raises(BesaError):
        resolve(name, notify=notes.append)


def test_what_exists_is_a_path_before_it_is_a_hub_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: list[str]
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    model = resolve("org/name", notify=notes.append)
    assert (model.kind, model.directory, model.revision) == ("local", tmp_path / "org" / "name", None)


def test_the_module_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'gguf', 'huggingface_hub', 'numpy', 'safetensors'}"
    code = f"import sys, besa_cli.models; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
