"""What the options before the verb say, and what one process of a command knows of itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from besa_cli.system.ranks import Ranks


@dataclass
class ProcessSettings:
    """Settings of one command line.

    Attributes
    ----------
    debug : bool
        Show the traceback of an error, too.
    signals : list of int
        Those that ended the run.
    failed : bool
        One of several ranks has met an error, and is about to end; `torchrun` may terminate it for that of another.
    ranks : Ranks, optional
        The ranks of a command that `torchrun` started several times.
    speaks : function to bool
        Asked once, when something fails: whether this process says so. Of several ranks one does.
    """

    debug: bool = False
    signals: list[int] = field(default_factory=list)
    failed: bool = False
    ranks: "Ranks | None" = None
    speaks: Callable[[], bool] = lambda: True


def ranks(context: typer.Context) -> "Ranks":
    """The ranks of this command; one alone where it was started once."""
    from besa_cli.system.ranks import Ranks

    settings = context.find_object(ProcessSettings)
    return (settings.ranks if settings else None) or Ranks()
