from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from besa_cli.commands import options
from besa_cli.commands.config_file import origin
from besa_cli.errors import UsageError


def verb(*arguments: str) -> dict[str, Any]:
    """The values that one command with all kinds of options gets from these words."""
    app = typer.Typer()
    found: dict[str, Any] = {}

    @app.command()
    def command(
        texts: Annotated[list[str] | None, typer.Argument()] = None,
        sparsity: Annotated[float, typer.Option(min=0, max=1)] = 0.5,
        nm: Annotated[str | None, typer.Option("--nm")] = None,
        batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
        data: options.DataOption = None,
        pack: options.PackOption = None,
        device: options.DeviceOption = "auto",
        run: options.RunOption = options.DEFAULT_RUN,
        as_json: options.JsonOption = False,
        config: options.ConfigOption = None,
    ) -> None:
        values = locals()
        found.update({name: value for name, value in values.items() if name != "found"})

    get_command(app).main(args=list(arguments), prog_name="verb", standalone_mode=False)
    return found


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "options.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_every_kind_of_option_comes_from_the_file(config: Callable[[str], str]) -> None:
    path = config(
        "sparsity: 0.7\nnm: 2:4\nbatch-size: 8\ndata: [c4, my.txt]\npack: no\ndevice: cpu\nrun: other\njson: true\n"
        "texts: wikitext2\n"
    )
    found = verb("--config", path)
    assert found == {
        "texts": ["wikitext2"],
        "sparsity": 0.7,
        "nm": "2:4",  # not 124, as YAML 1.1 reads it
        "batch_size": 8,
        "data": ["c4", "my.txt"],
        "pack": False,
        "device": "cpu",
        "run": Path("other"),
        "as_json": True,
        "config": Path(path),
    }


def test_what_is_typed_wins_wherever_it_stands(config: Callable[[str], str]) -> None:
    path = config("sparsity: 0.7\ndata: [c4]\npack: true\nbatch_size: 8\n")
    found = verb("--sparsity", "0.6", "--config", path, "--no-pack", "--data", "a.txt", "--data", "b.txt")
    assert (found["sparsity"], found["data"], found["pack"]) == (0.6, ["a.txt", "b.txt"], False)
    assert found["batch_size"] == 8


def test_the_environment_stands_between_file_and_typed(
    config: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config("run: file\n")
    monkeypatch.setenv("BESA_RUN", "environment")
    assert verb("--config", path)["run"] == Path("environment")
    assert verb("--config", path, "--run", "typed")["run"] == Path("typed")
    monkeypatch.delenv("BESA_RUN")
    assert verb("--config", path)["run"] == Path("file")


@pytest.mark.parametrize("text", ["", "# nothing\n", "sparsity:\n", "sparsity: ~\n", "sparsity: null\n"])
def test_an_empty_value_leaves_the_default(config: Callable[[str], str], text: str) -> None:
    assert verb("--config", config(text))["sparsity"] == 0.5


def test_an_unknown_option_names_file_line_and_the_nearest(config: Callable[[str], str]) -> None:
    path = config("device: cpu\nsparsty: 0.7\n")
    with pytest.raises(UsageError) as caught:
        verb("--config", path)
    assert caught.value.message == f"unknown option 'sparsty' in {path}, line 2"
    assert "did you mean 'sparsity'?" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("- sparsity\n", 1, "not a mapping"),
        ("sparsity\n", 1, "not a mapping"),
        ("sparsity: 0.5\n  device: [\n", 2, "broken YAML"),
        ("sparsity: 0.5\nbatch-size: 1\nbatch_size: 2\n", 3, "is given twice"),
        ("sparsity: 0.5\ndata: {a: b}\n", 2, "no list of words"),
        ("device: [cpu]\n", 1, "is no word"),
        ("\nconfig: other.yaml\n", 2, "unknown option 'config'"),
        ("device: !!python/object/apply:os.getcwd []\n", 1, "broken YAML"),
    ],
)
def test_a_file_that_cannot_be_meant_is_one_line(config: Callable[[str], str], text: str, line: int, what: str) -> None:
    path = config(text)
    with pytest.raises(UsageError) as caught:
        verb("--config", path)
    assert f"{path}, line {line}" in caught.value.message
    assert what in caught.value.message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path, binary):
        with pytest.raises(UsageError, match=str(path)):
            verb("--config", str(path))


@pytest.mark.parametrize(
    ("option", "value"), [("sparsity", "1.5"), ("batch-size", "many"), ("device", "gpu"), ("pack", "x")]
)
def test_a_wrong_value_is_a_usage_error_of_that_option(config: Callable[[str], str], option: str, value: str) -> None:
    path = config(f"{option}: {value}\n")
    with pytest.raises(typer.BadParameter) as caught:
        verb("--config", path)
    error = caught.value
    assert error.exit_code == 2
    assert error.param is not None
    assert f"--{option}" in error.param.opts
    context = cast(typer.Context, error.ctx)
    assert origin(context, error.param.name) == f" (from {path})"
    assert origin(context, "nm") == ""


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "sparsity": st.floats(0, 1),
            "nm": st.from_regex(r"[0-9]{1,2}:[0-9]{1,2}", fullmatch=True),
            "batch-size": st.integers(),
            "data": st.lists(
                st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1), min_size=1
            ),
            "pack": st.booleans(),
        },
    )
)
def test_what_is_dumped_as_yaml_is_read_back(values: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: yaml.safe_dump(values))
        found = verb("--config", "any.yaml")
    for name, value in values.items():
        assert found[name.replace("-", "_")] == value
