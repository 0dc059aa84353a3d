"""Notes to the user: one-line messages that are not errors."""

from collections.abc import Callable

Notify = Callable[[str], None]  # takes a one-line note; the console prints it
