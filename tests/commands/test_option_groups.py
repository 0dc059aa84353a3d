from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command

from besa_cli.calibration.request import CalibrationRequest
from besa_cli.commands.shared import option_groups
from besa_cli.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Base:
    inherited: int = 1
    untouched: str = "no option"


@dataclass(frozen=True, kw_only=True)
class Group(Base):
    inherited: Annotated[int, typer.Option("--inherited")] = 2
    name: Annotated[str | None, typer.Option("--called", envvar="CALLED")] = None


def parse(*words: str) -> tuple[dict[str, Any], list[str]]:
    """The arguments that a command with a group is called with, and its options in the order of its help."""
    app = typer.Typer()
    values: dict[str, Any] = {}

    @app.command()
    @option_groups.expand
    def command(
        context: typer.Context,
        *,
        first: Annotated[int, typer.Option("--first")] = 0,
        name: Group,
        last: Annotated[bool, typer.Option("--last/--not-last")] = False,
    ) -> None:
        """Help of the command."""
        values.update(first=first, group=name, last=last, command=context.command.name)

    program = get_command(app)
    assert program.help == "Help of the command."
    program.main(args=list(words), prog_name="command", standalone_mode=False)
    return values, [
        parameter.opts[0] for parameter in program.params if parameter.name in (*values, "inherited", "name")
    ]


def test_a_group_becomes_its_options_where_it_stands() -> None:
    values, order = parse("--inherited", "5", "--called", "x", "--last")
    assert values == {"first": 0, "group": Group(inherited=5, name="x"), "last": True, "command": "command"}
    assert order == ["--first", "--inherited", "--called", "--last"]


def test_options_of_a_group_keep_their_defaults_and_their_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse()[0]["group"] == Group(inherited=2, untouched="no option", name=None)
    monkeypatch.setenv("CALLED", "y")
    assert parse()[0]["group"].name == "y"


def test_a_field_that_is_no_option_cannot_be_typed() -> None:
    with pytest.raises(typer.TyperException, match="--untouched"):
        parse("--untouched", "x")


def test_options_that_were_not_given_are_left_out() -> None:
    assert option_groups.given(a=None, b=0, c=False, d="") == {"b": 0, "c": False, "d": ""}


def test_the_placement_of_a_stage_has_the_seed_and_the_set_of_its_samples(workplace: Path) -> None:
    calibration = CalibrationRequest(shared=Path("set"), seed=7)
    compute = option_groups.ComputeGroup(device="cpu", dtype="float32", max_memory="2KiB")
    assert compute.placement(calibration) == {
        "device": "cpu",
        "dtype": "float32",
        "seed": 7,
        "calibration": str(workplace.resolve() / "set"),
        "max_memory": 2048,
    }
    assert option_groups.ComputeGroup().placement(CalibrationRequest()) == {
        "device": "auto",
        "dtype": "auto",
        "seed": 0,
        "calibration": None,
        "max_memory": None,
    }
    with pytest.raises(UsageError, match="--max-memory 'much'"):
        option_groups.ComputeGroup(max_memory="much").placement(calibration)
