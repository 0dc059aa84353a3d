"""State of one process: the options before the command, signals, and ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from besa_cli.system.ranks import Ranks


@dataclass
class ProcessSettings:
    """Settings of one process.

    Attributes
    ----------
    debug : bool
        Also show the traceback of an error.
    signals : list of int
        Signals that ended the run.
    failed : bool
        This rank has met an error and is about to end; `torchrun` may terminate it because another rank failed.
    ranks : Ranks, optional
        Ranks of a command that `torchrun` started several times.
    speaks : function to bool
        Called once, when something fails: return whether this process shows the error. Of several ranks one does.
    """

    debug: bool = False
    signals: list[int] = field(default_factory=list)
    failed: bool = False
    ranks: "Ranks | None" = None
    speaks: Callable[[], bool] = lambda: True


def ranks(context: typer.Context) -> "Ranks":
    """Return the ranks of this command; a single one if it was started once."""
    from besa_cli.system.ranks import Ranks

    settings = context.find_object(ProcessSettings)
    return (settings.ranks if settings else None) or Ranks()
