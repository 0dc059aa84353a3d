"""The help of every command: panels, examples, and the recorded options and defaults.

`python tests/commands/test_help.py` records them again, in options.json.
"""

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
from besa_cli.jobs import prune, quantize, tune
from besa_cli.jobs.request import Request
from besa_cli.pruners import PRUNERS
from besa_cli.quantizers import QUANTIZERS

Besa = Callable[..., Any]  # conftest.Outcome

RECORD = Path(__file__).parent / "options.json"


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
    assert not re.search(r"default:\s+\(?None", text)
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


def options_and_defaults() -> dict[str, dict[str, Any]]:
    """Command → the names of its options and arguments → their defaults, as JSON has them."""
    found = {}
    for name, command in commands(get_command(app)):
        found[name] = {
            "/".join([*parameter.opts, *parameter.secondary_opts]): parameter.default
            for parameter in command.params
            if "completion" not in parameter.name
        }
    decoded: dict[str, dict[str, Any]] = json.loads(json.dumps(found, default=str))
    return decoded


def encoded(options: dict[str, dict[str, Any]]) -> str:
    """The text of options.json."""
    return json.dumps(options, indent=2, sort_keys=True) + "\n"


def test_options_and_their_defaults_are_the_recorded_ones() -> None:
    """A command line that somebody has in a script keeps its meaning; a new option is added to the record."""
    remedy = "if no script that somebody has changes its meaning, record: python tests/commands/test_help.py"
    assert options_and_defaults() == json.loads(RECORD.read_text(encoding="utf-8")), remedy


def test_the_record_is_what_its_writer_writes() -> None:
    assert RECORD.read_text(encoding="utf-8") == encoded(options_and_defaults())


def stated_numbers(command: str) -> dict[str, float]:
    """The options of a command whose help states a number as the default → that number."""
    found = {}
    program = get_command(app).commands[command]  # type: ignore[attr-defined]
    for parameter in program.params:
        _, said = parameter.get_help_record(program.make_context(command, [])) or ("", "")
        stated = re.search(r"\[default: \(?(\d+(?:\.\d+)?)\)?(?:; [^\]]*)?\]", " ".join(said.split()))
        if stated:
            found[parameter.name] = float(stated[1])
    return found


@pytest.mark.parametrize(
    ("command", "requests", "own"),
    [
        (
            "prune",
            [
                *(prune.request(method=name) for name in PRUNERS),
                prune.request(options={"bits": 4}),
                prune.request(global_epochs=1),
                prune.request(update="tune"),
            ],
            {"sparsity", "damping", "epochs", "batch_size", "lr", "d_coef", "candidates", "group_size", "clip_lr"},
        ),
        ("tune", [tune.request()], {"epochs", "lr"}),
        (
            "quantize",
            [quantize.request(method=name) for name in QUANTIZERS],
            {"bits", "group_size", "damping", "epochs", "batch_size", "lr"},
        ),
    ],
)
def test_a_default_that_the_help_states_as_a_number_is_that_of_every_method_with_the_option(
    command: str, requests: list[Request], own: set[str]
) -> None:
    """Options that say how samples are drawn belong to no method: tests/test_app.py has them.

    An option that is None in every manifest keeps its number elsewhere, and needs a test of its own.
    """
    stated = stated_numbers(command)
    assert own <= set(stated), "a default that the help stated is missing"
    manifests = [request.to_manifest() for request in requests]
    for name in set(stated) - {"samples", "seqlen"}:
        values = [manifest[name] for manifest in manifests if name in manifest]
        assert values, f"no method has --{name}"
        numbers = {float(str(value)) for value in values if value is not None}
        assert numbers == {stated[name]} or (not numbers and name not in own), name


def test_lists_of_commands_show_whole_sentences(besa: Besa) -> None:
    for words in ((), ("eval",)):
        text = besa(*words, "--help").out
        assert "..." not in text.split("Commands:")[1].split("Examples:")[0]
        entries = re.split(r"\n  (?=\w)", text.split("Commands:")[1].split("\n\n")[0])[1:]
        assert all(entry.rstrip().endswith(".") for entry in entries)


@pytest.mark.parametrize(
    ("stated", "shown"),
    [
        ("Text.  [default: (128); x<=1000000]", "Text.  [default: 128]"),
        ("Text.  [default: (1 (one)); 1<=x<=1000]", "Text.  [default: 1 (one); 1 to 1000]"),
        ("Text.  [env var: A; default: a; x>=0.0]", "Text.  [env var: A; default: a; 0 or more]"),
        ("Text.  [0<=x<=1000000]", "Text.  [0 or more]"),
        ("Text.  [x<=1000000]", "Text."),
        ("Text [of] it.", "Text [of] it."),
        ("Text.", "Text."),
    ],
)
def test_defaults_and_ranges_are_shown_as_a_person_writes_them(stated: str, shown: str) -> None:
    assert panels.in_words(stated) == shown


def test_what_is_rarely_used_comes_last(besa: Besa) -> None:
    titles = list(sections(besa("prune", "--help").out))
    assert titles[-2:] == ["Advanced", "Examples"]


def test_examples_are_the_lines_below_their_title() -> None:
    text = "Do it.\n\nMore of it.\n\nExamples:\n\n    besa one\n    besa two --three\n"
    assert panels.examples(text) == ["besa one", "besa two --three"]
    assert panels.examples("Do it.") == panels.examples(None) == []


if __name__ == "__main__":
    RECORD.write_text(encoded(options_and_defaults()), encoding="utf-8")
