"""`--config FILE.yaml`: any option of a command from a file; what is typed wins."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from besa_cli.errors import UsageError, unknown

_NULL = "tag:yaml.org,2002:null"


class _AsTyped(yaml.SafeLoader):
    """YAML whose scalars stay the characters in the file, so that they are read as if typed.

    (YAML 1.1 would make 124 of `nm: 2:4` and False of `data: no`.) An empty value, `~` and `null` mean "not given".
    """


_AsTyped.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] == _NULL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def apply(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values in a YAML file the defaults of the command that is being parsed (an eager option's callback).

    What is typed goes before an environment variable, that before the file, and that before the default. Keys are the
    options' long names, with ``-`` or ``_``.

    Raises
    ------
    UsageError
        The file cannot be read, is no mapping of options to values, or names an option that the command lacks.
    """
    if path is None or context.resilient_parsing:
        return path
    parameters = _parameters(context)
    values: dict[str, Any] = {}
    for key, value, line in _entries(path):
        parameter = parameters.get(key.replace("_", "-"))
        if parameter is None:
            error = unknown("option", key, parameters)
            raise UsageError(f"{error.message} in {path}, line {line}", error.hint)
        if parameter.name in values:
            raise UsageError(f"option '{key}' is given twice in {path}, line {line}", "keep one of them")
        many = parameter.multiple or parameter.nargs == -1
        if not _fits(value, many):
            raise UsageError(f"the value of '{key}' in {path}, line {line} is no {'list of words' if many else 'word'}")
        values[parameter.name] = [value] if many and isinstance(value, str) else value
    context.default_map = values
    return path


def origin(context: typer.Context, name: str) -> str:
    """Where a parameter's value came from, if it was a configuration file: `` (from FILE)``, else nothing."""
    source = context.get_parameter_source(name)
    if source is None or source.name != "DEFAULT_MAP":
        return ""
    return f" (from {context.params['config']})"


def _fits(value: object, many: bool) -> bool:
    if many and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return value is None or isinstance(value, str)


def _parameters(context: typer.Context) -> dict[str, Any]:
    """Every parameter of the command by the long name of its option (an argument: its own name)."""
    found = {}
    for parameter in context.command.params:
        long = [opt for opt in parameter.opts if opt.startswith("--")]
        name = long[0] if long else parameter.name
        found[name.lstrip("-").replace("_", "-")] = parameter
    return {name: parameter for name, parameter in found.items() if name != "config"}


def _entries(path: Path) -> Iterator[tuple[str, Any, int]]:
    """The keys and values of a YAML mapping, each with its line."""
    try:
        loader = _AsTyped(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            line = root.start_mark.line + 1
            raise UsageError(f"{path}, line {line}: not a mapping", "write one 'option: value' a line")
        for key, value in root.value:
            yield (
                str(loader.construct_object(key, deep=True)),
                loader.construct_object(value, deep=True),
                key.start_mark.line + 1,
            )
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "name a YAML file with --config") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read {path}: it is not UTF-8 text", "name a YAML file with --config") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(
            f"{path}, line {line}: broken YAML: {error.problem}", "write one 'option: value' a line"
        ) from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: broken YAML: {error}", "write one 'option: value' a line") from error
