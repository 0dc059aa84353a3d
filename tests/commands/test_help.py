import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from besa_cli.app import app
from besa_cli.commands.shared import panels

Besa = Callable[..., Any]  # conftest.Outcome

RECORDED = json.loads((Path(__file__).parent / "options.json").read_text(encoding="utf-8"))


def commands(command: Any, name: str = "besa") -> Iterator[tuple[str, Any]]:
    """Every command and every group, by all its words."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {word}")


NAMES = [name for name, _ in commands(get_command(app))]
LEAVES = [name for name, command in commands(get_command(app)) if not hasattr(command, "commands")]


def sections(text: str) -> dict[str, list[str]]:
    """The lines of each section of a help, by its title, without their indent."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if re.fullmatch(r"\w[\w ]*:", line):
            found[line[:-1]] = []
        elif line.startswith("  ") and found:
            found[list(found)[-1]].append(line[2:])
    return found


def called_by(words: list[str]) -> list[str]:
    """The commands that a command line calls; none of them runs."""
    called: list[str] = []
    program = get_command(app)
    for name, command in commands(program):
        command.callback = (lambda name=name, **_: called.append(name)) if name in LEAVES else None
    program.main(args=words, prog_name="besa", standalone_mode=False)
    return called


@pytest.mark.parametrize("name", NAMES)
def test_every_command_shows_three_examples_of_itself_that_parse(name: str, besa: Besa, workplace: Path) -> None:
    lines = sections(besa(*name.split()[1:], "--help").out)["Examples"]
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(name)
        words = shlex.split(line)
        for word in words:
            if word.endswith(".yaml"):
                (workplace / word).parent.mkdir(parents=True, exist_ok=True)
                (workplace / word).write_text("")
        (called,) = called_by(words[1:])
        assert line.startswith(called)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", NAMES)
def test_the_help_fits_the_terminal_and_states_no_default_that_is_none(
    name: str, columns: int, besa: Besa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = besa(*name.split()[1:], "--help").out
    assert max(map(len, text.splitlines())) <= columns
    assert not re.search(r"default:\s+\(?none", text, re.IGNORECASE)
    for lines in sections(text).values():
        starts = {len(line) - len(line.lstrip()) for line in lines} - {0}
        assert len(starts) <= 1, "the texts of a section do not begin in the same column"


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_is_in_its_panel_and_shown_once(name: str, besa: Besa) -> None:
    command = dict(commands(get_command(app)))[name]
    shown = sections(besa(*name.split()[1:], "--help").out)
    titles = {value.title for value in vars(panels).values() if isinstance(value, panels.Panel)}
    assert set(shown) - {"Arguments", "Examples"} <= titles
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    for option in options:
        assert option.rich_help_panel in titles, option.opts
        places = [title for title, lines in shown.items() for line in lines if line.split()[:1] == option.opts]
        assert places == [option.rich_help_panel], option.opts
    assert [line.split()[0] for line in shown["Output"] if line.startswith("--")][-1] == "--help"
    lines = [line for title in set(shown) & titles for line in shown[title] if line.startswith("--")]
    assert len(lines) == len(options) + 1  # --help


def test_options_and_their_defaults_are_the_recorded_ones() -> None:
    """A command line that somebody has in a script keeps its meaning; a new option is added to the record."""
    found = {}
    for name, command in commands(get_command(app)):
        found[name] = {
            "/".join([*parameter.opts, *parameter.secondary_opts]): parameter.default
            for parameter in command.params
            if "completion" not in parameter.name
        }
    assert json.loads(json.dumps(found, default=str)) == RECORDED


def test_lists_of_commands_show_whole_sentences(besa: Besa) -> None:
    for words in ((), ("eval",)):
        text = besa(*words, "--help").out
        assert "..." not in text.split("Commands:")[1].split("Examples:")[0]
        entries = re.split(r"\n  (?=\w)", text.split("Commands:")[1].split("\n\n")[0])[1:]
        assert all(entry.rstrip().endswith(".") for entry in entries)


def test_examples_are_the_lines_below_their_title() -> None:
    text = "Do it.\n\nMore of it.\n\nExamples:\n\n    besa one\n    besa two --three\n"
    assert panels.examples(text) == ["besa one", "besa two --three"]
    assert panels.examples("Do it.") == panels.examples(None) == []
