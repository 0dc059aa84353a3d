import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from besa_cli.app import app as application
from besa_cli.commands.shared import config_file, options
from besa_cli.commands.shared.config_file import origin
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
        data: Annotated[list[str] | None, typer.Option("--data")] = None,
        pack: Annotated[bool | None, typer.Option("--pack/--no-pack")] = None,
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
        ("sparsity: 0.5\ndata: {a: b}\n", 2, "is not a list of words"),
        ("device: [cpu]\n", 1, "is not a single word"),
        ("\nconfig: other.yaml\n", 2, "unknown option 'config'"),
        ("device: !!python/object/apply:os.getcwd []\n", 1, "broken YAML"),
        ("device: !!python/name:os.system ''\n", 1, "broken YAML"),
        ("run: r\nseed: !!int x\n", 2, "broken YAML"),
        ("seed: !!timestamp x\n", 1, "broken YAML"),
        ("data: [a, !!binary eA==]\n", 1, "broken YAML"),
        ("run: r\n? [a, b]\n: c\n", 2, "cannot be the name of an option"),
        (f"{'a' * 500}: c\n", 1, "cannot be the name of an option"),
        ("data: [[a]]\n", 1, "is not a list of words"),
        ("data: &a [*a]\n", 1, "is not a list of words"),
        ("run: r\ndata: {<<: [{a: b}]}\n", 2, "is not a list of words"),
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
    large = tmp_path / "large.yaml"
    large.write_text("# nothing\n" * 100_000)
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path in (tmp_path / "none.yaml", tmp_path, binary, large, pipe, Path("/dev/zero")):
        with pytest.raises(UsageError, match=str(path)):
            verb("--config", str(path))


@pytest.mark.parametrize("text", ["[" * 100_000, "data: " + "[" * 100_000, "a: {" * 50_000])
def test_nests_without_end_are_one_line(config: Callable[[str], str], text: str) -> None:
    path = config(text)
    with pytest.raises(UsageError, match=f"{path}.* (lists are nested|broken YAML)"):
        verb("--config", path)


@pytest.mark.parametrize("form", ["data: [{0}]\n", "data: {{<<: [{0}]}}\n"])
def test_aliases_of_aliases_are_not_multiplied(config: Callable[[str], str], form: str) -> None:
    """Thirty lines that stand for 10 ** 30 words, as a list and as merged mappings."""
    first = "a0: &a0 [x]\n" if "<<" not in form else "a0: &a0 {x: y}\n"
    line = "a{0}: &a{0} [{1}]\n" if "<<" not in form else "a{0}: &a{0} {{<<: [{1}]}}\n"
    text = first + "".join(line.format(step, ", ".join([f"*a{step - 1}"] * 10)) for step in range(1, 31))
    path = config(text + form.format("*a30"))
    began = time.monotonic()
    with pytest.raises(UsageError, match=path):
        verb("--config", path)
    assert time.monotonic() - began < 5


def test_an_alias_is_what_it_stands_for(config: Callable[[str], str]) -> None:
    found = verb("--config", config("run: &name other\ndata: [*name, *name]\n"))
    assert (found["run"], found["data"]) == (Path("other"), ["other", "other"])


@pytest.mark.parametrize("text", ["push-to: org/name", "push_to: org/name", "yes: true", "yes: no", "public: true"])
@pytest.mark.parametrize("section", ["{0}\n", "verb:\n  {0}\n"])
def test_consent_to_publish_is_not_read_from_a_file(config: Callable[[str], str], text: str, section: str) -> None:
    path = config(section.format(text))
    with pytest.raises(UsageError) as caught:
        config_file.read(Path(path))
    assert f"'{text.partition(':')[0]}' stands in {path}, line {section.count(chr(10))}" in caught.value.message
    assert "typed" in caught.value.message


def test_a_file_may_keep_private_what_is_pushed_but_not_make_it_public(config: Callable[[str], str]) -> None:
    assert config_file.read(Path(config("private: yes\n")))[0][0].value == "yes"
    for value in ("no", "False", "0", "off", "[true]"):
        with pytest.raises(UsageError, match="'private' stands in"):
            config_file.read(Path(config(f"private: {value}\n")))


def test_a_home_is_meant_by_a_tilde_wherever_a_path_comes_from(
    config: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, own_home: Path
) -> None:
    assert verb("--run=~/typed")["run"] == own_home / "typed"
    assert verb("--config", config("run: ~/file\n"))["run"] == own_home / "file"
    monkeypatch.setenv("BESA_RUN", "~/variable")
    assert verb()["run"] == own_home / "variable"
    (own_home / "c.yaml").write_text("device: cpu\n")
    assert verb("--config=~/c.yaml")["device"] == "cpu"
    monkeypatch.delenv("HOME")
    assert verb("--run=~nobody-of-this-name/x")["run"] == Path("~nobody-of-this-name/x")


def commands(group: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below a group, with the words that call it."""
    for name, below in group.commands.items():
        if hasattr(below, "commands"):
            yield from commands(below, *words, name)
        else:
            yield (*words, name), below


def test_every_path_of_every_command_knows_the_home(own_home: Path) -> None:
    seen = 0
    for words, command in commands(get_command(application)):
        for parameter in command.params:
            shown = str(parameter.metavar)
            if not any(part in shown for part in ("DIR", "FILE", "RUN")) or parameter.name in (
                "config",
                "data",
                "files",
            ):
                continue
            value = ["~/x"] if parameter.multiple or parameter.nargs == -1 else "~/x"
            context = typer.Context(command)
            found = parameter.process_value(context, value)
            assert str(found[0] if isinstance(found, list | tuple) else found) == str(own_home / "x"), (
                words,
                parameter,
            )
            seen += 1
    assert seen > 15


def test_numbers_that_cannot_be_meant_are_refused_before_any_work(workplace: Path, besa: Callable[..., Any]) -> None:
    for words, option in (
        (("prune", "--method", "besa"), "--epochs"),
        (("prune",), "--samples"),
        (("quantize", "--method", "clip"), "--epochs"),
        (("calibrate",), "--samples"),
        (("eval", "sample"), "--tokens"),
        (("eval", "tasks"), "--num-fewshot"),
    ):
        outcome = besa(*words, option, 10**18)
        assert (outcome.code, outcome.err.count("error: ")) == (2, 1)
        assert option in outcome.err
    assert list(workplace.iterdir()) == []


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
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "any.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        found = verb("--config", str(file))
    for name, value in values.items():
        assert found[name.replace("-", "_")] == value


def test_a_directory_of_weights_that_is_not_utf_8_is_refused_before_any_work(
    workplace: Path, besa: Callable[..., Any]
) -> None:
    """The library that reads and writes weights opens no such path; texts may lie there."""
    name = os.fsdecode(b"caf\xe9")
    for words in (("prune", "--run"), ("prune", "--model"), ("quantize", "--model"), ("import",), ("show",)):
        outcome = besa(*words, name)
        assert (outcome.code, outcome.err.count("error: ")) == (2, 1), words
        assert r"caf\xe9" in outcome.err
    assert list(workplace.iterdir()) == []
    assert verb("--data", name)["data"] == [name]
