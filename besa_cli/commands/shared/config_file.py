"""Files of `--config`: options of one command, or of the commands of an experiment; typed options win."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
import yaml

from besa_cli.errors import BesaError, UsageError, unknown
from besa_cli.system import disk

_NULL = "tag:yaml.org,2002:null"
_TAGS = {_NULL, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))}
_FORM = "write one 'option: value' per line"
_LARGEST = 1 << 18  # bytes of a file
_LONGEST = 80  # characters of an option's or a command's name

# Consent to publish must be typed: the values that a file may give these options.
_CONSENT = {"push-to": (None,), "yes": (None,), "public": (None,), "private": (None, "true", "yes", "on", "1")}


class _AsTyped(yaml.SafeLoader):
    """YAML loader that keeps scalars as the characters in the file, as if they were typed.

    YAML 1.1 would read `nm: 2:4` as 124 and `data: no` as False. An empty value, `~` and `null` mean "not given".
    """


_AsTyped.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] == _NULL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class ConfigEntry:
    """Option in a file, with its line."""

    name: str
    value: Any
    line: int

    @property
    def option(self) -> str:
        """Long name of the option without its dashes."""
        return self.name.replace("_", "-")


@dataclass(frozen=True)
class Section:
    """Options of one command in a file."""

    line: int
    entries: list[ConfigEntry] = field(default_factory=list)


def apply(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values in a YAML file the defaults of the command that is being parsed; callback of an eager option.

    Typed options win over environment variables, those over the file, and the file over the defaults. Keys are the
    long names of options, with ``-`` or ``_``. A key whose value is a mapping is a section: it names a command
    (``prune``, ``eval ppl``) and holds options of that command only.

    Raises
    ------
    UsageError
        The file cannot be read, is not a mapping of options to values, or names an unknown option or command.
    """
    if path is None or context.resilient_parsing:
        return path
    path = Path(os.path.expanduser(path))  # noqa: PTH111  (Path.expanduser fails without a home)
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


def read(path: Path) -> tuple[list[ConfigEntry], dict[str, Section]]:
    """Read a file: the options for all commands, and the sections by the names of their commands, in the file's order.

    Raises
    ------
    UsageError
        The file cannot be read, is broken, consents to publish a model, or names one model for all sections: `eval`
        would then measure that model instead of the pruned one.
    """
    shared, sections = [], {}
    with _explained(path):
        for key, node in _root(path):
            entry = _entry(key, node, path)
            if not isinstance(node, yaml.MappingNode):
                shared.append(entry)
            elif entry.name in sections:
                raise UsageError(f"section '{entry.name}' is given twice in {path}, line {entry.line}", "merge the two")
            else:
                sections[entry.name] = Section(entry.line, [_entry(name, value, path) for name, value in node.value])
    for entry in shared:
        if sections and entry.option == "model":
            raise UsageError(
                f"'model' stands outside the sections in {path}, line {entry.line}", "move it into 'prune:'"
            )
    return shared, sections


def command(context: typer.Context, name: str, place: str) -> Any:
    """Return the command with this name (``prune``, ``eval ppl``).

    Parameters
    ----------
    context : Context
        Of any command of the program.
    name : str
    place : str
        File and line of the name, for the error.

    Raises
    ------
    UsageError
        The name is unknown, or that of a group of commands.
    """
    current = context.find_root().command
    for word in name.split() or [name]:
        known = getattr(current, "commands", {})
        if word not in known:
            error = unknown("command", name, _names(context.find_root().command))
            raise UsageError(f"{error.message} {place}", error.hint)
        current = known[word]
    if hasattr(current, "commands"):
        members = ", ".join(_names(current, f"{name} "))
        raise UsageError(f"'{name}' {place} is a group of commands", f"name one of them: {members}")
    return current


def origin(context: typer.Context, name: str) -> str:
    """Return `` (from FILE)`` if a parameter's value came from a configuration file, else an empty string."""
    source = context.get_parameter_source(name)
    if source is None or source.name != "DEFAULT_MAP":
        return ""
    return f" (from {context.params['config']})"


def _names(group: Any, prefix: str = "") -> list[str]:
    """Return the names of all commands below a group."""
    names: list[str] = []
    for name, below in getattr(group, "commands", {}).items():
        names += _names(below, f"{prefix}{name} ") if hasattr(below, "commands") else [prefix + name]
    return names


def _values(parameters: Mapping[str, Any], entries: Iterable[ConfigEntry], path: Path) -> dict[str, Any]:
    """Return the values of the entries by the names of their parameters."""
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
    kind = "a list of words" if _takes_many(parameter) else "a single word"
    return UsageError(f"the value of '{name}' {place} is not {kind}")


def _parameters(command: Any) -> dict[str, Any]:
    """Return the parameters of a command, without `--config`, by the long name of the option or the argument's name."""
    parameters = {}
    for parameter in command.params:
        long = [opt for opt in parameter.opts if opt.startswith("--")]
        name = long[0] if long else parameter.name
        parameters[name.lstrip("-").replace("_", "-")] = parameter
    return {name: parameter for name, parameter in parameters.items() if name != "config"}


def _entry(key: yaml.Node, node: yaml.Node, path: Path) -> ConfigEntry:
    """Read one key and its value; objects, nested collections and copies are not constructed."""
    line = key.start_mark.line + 1
    if not isinstance(key, yaml.ScalarNode) or len(key.value) > _LONGEST:
        raise UsageError(f"{path}, line {line}: a key that cannot be the name of an option or command", _FORM)
    entry = ConfigEntry(key.value, _value(node, path), line)
    allowed = _CONSENT.get(entry.option)
    if allowed is not None and (entry.value.lower() if isinstance(entry.value, str) else entry.value) not in allowed:
        raise UsageError(
            f"'{entry.name}' stands in {path}, line {line}, but consent to publish a model must be typed",
            f"remove it from the file and type --{entry.option}",
        )
    return entry


def _value(node: yaml.Node, path: Path) -> str | list[str] | yaml.Node | None:
    """Return the value as it would be typed, or the node itself if it cannot be the value of an option."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else []
    for item in (node, *nodes):
        if isinstance(item, yaml.Node) and item.tag not in _TAGS:
            line = item.start_mark.line + 1
            raise UsageError(f"{path}, line {line}: broken YAML: tags are not allowed: {item.tag[:80]}", _FORM)
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else str(node.value)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in nodes):
        return [item.value for item in nodes]
    return node


def _root(path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the keys and values of the file's mapping."""
    root = _AsTyped(disk.read_text(path, _LARGEST)).get_single_node()
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}, line {root.start_mark.line + 1}: not a mapping", _FORM)
    return list(root.value)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn every error of reading a file into a usage error of one line."""
    try:
        yield
    except UsageError:
        raise
    except BesaError as error:
        raise UsageError(error.message, "name a YAML file") from error
    except RecursionError as error:
        raise UsageError(f"{path}: lists are nested too deeply", _FORM) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{path}, line {line}: broken YAML: {error.problem}", _FORM) from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: broken YAML: {error}", _FORM) from error
