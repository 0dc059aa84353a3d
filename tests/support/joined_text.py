"""Texts of any length, in one piece."""

from besa_cli.text.spool import Text, parts


def joined(text: Text) -> str:
    """The whole text, also where the program would read it in parts."""
    return "".join(parts(text))
