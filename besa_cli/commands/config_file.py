"""`--config FILE.yaml`: options of a command, or of the several commands of an experiment; what is typed wins."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
import yaml

from besa_cli.errors import UsageError, unknown

_NULL = "tag:yaml.org,2002:null"
_FORM = "write one 'option: value' a line"


class _AsTyped(yaml.SafeLoader):
    """YAML whose scalars stay the characters in the file, so that they are read as if typed.

    (YAML 1.1 would make 124 of `nm: 2:4` and False of `data: no`.) An empty value, `~` and `null` mean "not given".
    """


_AsTyped.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] == _NULL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class Entry:
    """One option in a file."""

    name: str
    value: Any
    line: int

    @property
    def option(self) -> str:
        """The option's long name without its dashes."""
        return self.name.replace("_", "-")


@dataclass(frozen=True)
class Section:
    """The options of one command."""

    line: int
    entries: list[Entry] = field(default_factory=list)


def apply(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values in a YAML file the defaults of the command that is being parsed (an eager option's callback).

    What is typed goes before an environment variable, that before the file, and that before the default. Keys are the
    options' long names, with ``-`` or ``_``. A key whose value is a mapping is a section: it names a command
    (``prune``, ``eval ppl``), and what it holds is for that command alone.

    Raises
    ------
    UsageError
        The file cannot be read, is no mapping of options to values, or names an option or a command that is not there.
    """
    if path is None or context.resilient_parsing:
        return path
    shared, sections = read(path)
    parameters, elsewhere = _parameters(context.command), set[str]()
    for name, section in sections.items():
        place = f"in {path}, line {section.line}"
        if name in parameters:
            raise _unfit(name, place, parameters[name])
        elsewhere |= set(_parameters(command(context, name, place)))
    entries = [entry for entry in shared if entry.option in parameters or entry.option not in elsewhere]
    own = sections.get(context.command_path.partition(" ")[2])
    context.default_map = _values(parameters, [*entries, *(own.entries if own else [])], path)
    return path


def read(path: Path) -> tuple[list[Entry], dict[str, Section]]:
    """What a file says for all commands, and its sections by the names of their commands, in the file's order.

    Raises
    ------
    UsageError
        The file cannot be read, is broken, or names one model for all sections: an `eval` would measure that model
        instead of what `prune` made of it.
    """
    shared, sections = [], {}
    with _explained(path):
        root, loader = _root(path)
        for key, node in root:
            entry = _entry(loader, key, node)
            if not isinstance(node, yaml.MappingNode):
                shared.append(entry)
            elif entry.name in sections:
                raise UsageError(f"section '{entry.name}' is given twice in {path}, line {entry.line}", "join the two")
            else:
                sections[entry.name] = Section(entry.line, [_entry(loader, *pair) for pair in node.value])
    for entry in shared:
        if sections and entry.option == "model":
            raise UsageError(
                f"'model' stands outside of the sections in {path}, line {entry.line}", "move it into 'prune:'"
            )
    return shared, sections


def command(context: typer.Context, name: str, place: str) -> Any:
    """The command with this name (``prune``, ``eval ppl``).

    Raises
    ------
    UsageError
        There is none; `place` says where the name stands.
    """
    found = context.find_root().command
    for word in name.split() or [name]:
        known = getattr(found, "commands", {})
        if word not in known:
            error = unknown("command", name, _names(context.find_root().command))
            raise UsageError(f"{error.message} {place}", error.hint)
        found = known[word]
    if hasattr(found, "commands"):
        raise UsageError(f"'{name}' {place} is several commands", f"name one: {', '.join(_names(found, f'{name} '))}")
    return found


def origin(context: typer.Context, name: str) -> str:
    """Where a parameter's value came from, if it was a configuration file: `` (from FILE)``, else nothing."""
    source = context.get_parameter_source(name)
    if source is None or source.name != "DEFAULT_MAP":
        return ""
    return f" (from {context.params['config']})"


def _names(group: Any, prefix: str = "") -> list[str]:
    """The names of all commands below a group."""
    found: list[str] = []
    for name, below in getattr(group, "commands", {}).items():
        found += _names(below, f"{prefix}{name} ") if hasattr(below, "commands") else [prefix + name]
    return found


def _values(parameters: Mapping[str, Any], entries: Iterable[Entry], path: Path) -> dict[str, Any]:
    """What the entries give the parameters, by the parameters' names."""
    values: dict[str, Any] = {}
    for entry in entries:
        place = f"in {path}, line {entry.line}"
        parameter = parameters.get(entry.option)
        if parameter is None:
            error = unknown("option", entry.name, parameters)
            raise UsageError(f"{error.message} {place}", error.hint)
        if parameter.name in values:
            raise UsageError(f"option '{entry.name}' is given twice {place}", "keep one of them")
        if not _fits(entry.value, parameter):
            raise _unfit(entry.name, place, parameter)
        single = isinstance(entry.value, str) and _takes_many(parameter)
        values[parameter.name] = [entry.value] if single else entry.value
    return values


def _takes_many(parameter: Any) -> bool:
    return bool(parameter.multiple or parameter.nargs == -1)


def _fits(value: object, parameter: Any) -> bool:
    if isinstance(value, list) and _takes_many(parameter):
        return all(isinstance(item, str) for item in value)
    return value is None or isinstance(value, str)


def _unfit(name: str, place: str, parameter: Any) -> UsageError:
    return UsageError(f"the value of '{name}' {place} is no {'list of words' if _takes_many(parameter) else 'word'}")


def _parameters(command: Any) -> dict[str, Any]:
    """Every parameter of the command by the long name of its option (an argument: its own name)."""
    found = {}
    for parameter in command.params:
        long = [opt for opt in parameter.opts if opt.startswith("--")]
        name = long[0] if long else parameter.name
        found[name.lstrip("-").replace("_", "-")] = parameter
    return {name: parameter for name, parameter in found.items() if name != "config"}


def _entry(loader: yaml.SafeLoader, key: yaml.Node, value: yaml.Node) -> Entry:
    found: Any = loader
    return Entry(
        str(found.construct_object(key, deep=True)),
        found.construct_object(value, deep=True),
        key.start_mark.line + 1,
    )


def _root(path: Path) -> tuple[list[tuple[yaml.Node, yaml.Node]], yaml.SafeLoader]:
    """The keys and values of the file's mapping, and what makes values of them."""
    loader = _AsTyped(path.read_text(encoding="utf-8"))
    root = loader.get_single_node()
    if root is None:
        return [], loader
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}, line {root.start_mark.line + 1}: not a mapping", _FORM)
    return root.value, loader


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """One line for every way in which a file cannot be read."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "name a YAML file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {path}: it is not UTF-8 text", "name a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{path}, line {line}: broken YAML: {error.problem}", _FORM) from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: broken YAML: {error}", _FORM) from error
