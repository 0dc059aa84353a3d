"""The script that counts what the layout and the wording of the package are judged by."""

from pathlib import Path

import pytest

from benchmarks.checks import counts

APP = '''
from typing import Any

from besa_cli import disk, ops
from besa_cli.ops.masks import rows

class Job:
    """Whatever it is: not a question word."""

    def run(self, sparsity: Any, other: Any) -> dict[str, Any]:
        """How it runs."""
        from besa_cli.disk import read
        return {"sparsity": 1}
'''
FILES = {
    "README.md": "four",
    "besa_cli/__init__.py": '"""Those that begin so."""\n',
    "besa_cli/app.py": APP,
    "besa_cli/disk.py": "import json\nfrom besa_cli import __version__\nclass Job:\n  pass\nclass File:\n  pass\n",
    "besa_cli/ops/__init__.py": "",
    "besa_cli/ops/masks.py": "from besa_cli.ops import scores\nfrom besa_cli.disk import Any\nscores.of(sparsity=1)\n",
    "besa_cli/ops/scores.py": "# sparsity, Any\ntext = 'sparsity'\n",
    "benchmarks/speed.py": '"""Where time goes."""\n',
    "tests/test_app.py": 'def test_it():\n    """Which one."""\n',
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_every_count_is_that_of_the_text(checkout: Path) -> None:
    assert counts.counts(checkout) == {
        "modules at the top level": 3,
        "rooms (modules and packages at the top level)": 4,
        "import arrows between rooms": 3,  # app to disk, app to ops, ops to disk
        "class names that are given more than once": 1,
        "lines with `Any` outside imports": 1,
        "files with the identifier `sparsity`": 2,
        "bytes of README.md": 4,
        "docstrings in besa_cli/ with a question word first": 2,
        "docstrings in benchmarks/ with a question word first": 1,
        "docstrings in tests/ with a question word first": 1,
    }


def test_a_line_is_printed_for_each(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts.main([str(checkout)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(counts.counts(checkout))
    assert lines[0].split(maxsplit=1) == ["3", "modules at the top level"]


def test_the_checkout_of_the_script_is_counted_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    counts.main([])
    size = (Path(__file__).parents[2] / "README.md").stat().st_size
    assert f"{size:>7,}  bytes of README.md" in capsys.readouterr().out
