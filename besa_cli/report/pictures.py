"""Pictures of drawings: SVG for a page, whose colours follow the page's theme, and PNG files."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from besa_cli.errors import BesaError, reading
from besa_cli.report.figures import Drawing, Theme
from besa_cli.system import disk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGN = "besa report"  # in every file that a report consists of

_SERIES = 7
_LIGHT = Theme(
    ink="#1c2733",
    line="#c3ccd6",
    series=("#0b6bcb", "#c2410c", "#15803d", "#8b2fd6", "#be123c", "#0e7490", "#854d0e"),
)
# colours that stand for variables of the page's style sheet
_VARIABLES = {"#0a0b01": "--ink", "#0a0b02": "--rule", **{f"#0a0b1{n}": f"--s{n}" for n in range(_SERIES)}}
_PAGE = Theme(ink="#0a0b01", line="#0a0b02", series=tuple(f"#0a0b1{n}" for n in range(_SERIES)))
_TIP = "tip: "  # prefix of the ids of artists that have a tooltip
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_DPI = 200
_HEAD = 1024  # bytes of a file in which the sign is looked for


def installed() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def svg(drawing: Drawing, number: int) -> str:
    """Return a drawing as an SVG element; `number` makes the ids in it unique on the page."""
    text = io.StringIO()
    with _figure(drawing, _PAGE) as figure:
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(text.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    _label(root, drawing, number)
    marked = ElementTree.tostring(root, encoding="unicode")
    for color, variable in _VARIABLES.items():
        marked = marked.replace(color, f"var({variable})")
    return marked


def _label(root: ElementTree.Element, drawing: Drawing, number: int) -> None:
    """Give the picture a name for readers who do not see it, tooltips, and ids of its own."""
    prefix = f"f{number}-"
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    for element in list(root.iter()):
        own = element.attrib.pop("id", None)
        if own is not None and own.startswith(_TIP):
            tip = ElementTree.Element(f"{{{_SVG}}}title")
            tip.text = own.removeprefix(_TIP)
            element.insert(0, tip)
        elif own is not None:
            element.set("id", prefix + own)
        for key, value in element.attrib.items():
            if key == _XLINK and value.startswith("#"):
                element.set(key, f"#{prefix}{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}"))
    root.set("role", "img")
    root.set("aria-label", f"{drawing.title}. {drawing.about}")


def require_own(file: Path, option: str, *, force: bool) -> None:
    """Require that a file of a report can be written: nothing is in its place, or a file of a report.

    Raises
    ------
    BesaError
        Another file is there, or the place cannot be written.
    """
    if file.is_dir():
        raise BesaError(f"{option} {file} is a directory", "name a file in it")
    if not file.parent.is_dir() and option == "--output":
        raise BesaError(
            f"cannot write {file}: the directory {file.parent} does not exist", "create it, or name another file"
        )
    _require_writable(file.parent, option)
    if file.exists() and not force and not _is_own(file):
        raise BesaError(f"{file} exists and is not of a report", "name another place, or replace it with --force")


def _require_writable(directory: Path, option: str) -> None:
    try:
        disk.require_writable(directory)
    except BesaError as error:
        raise BesaError(error.message, f"name another place with {option}") from error


def _is_own(file: Path) -> bool:
    disk.require_regular(file)
    with reading(file), file.open("rb") as opened:
        return SIGN.encode() in opened.read(_HEAD)


def require_png(directory: Path) -> None:
    """Require that figures can be written as PNG to a directory, which need not exist.

    Raises
    ------
    BesaError
        matplotlib is not installed, or the directory cannot be written.
    """
    if not installed():
        raise BesaError("--png needs matplotlib, which is not installed", "pip install 'besa-cli[plot]'")
    if directory.exists() and not directory.is_dir():
        raise BesaError(f"--png {directory} is a file, not a directory", "name another directory")
    _require_writable(directory, "--png")


def png_file(drawing: Drawing, directory: Path) -> Path:
    """Return the file of a drawing."""
    return directory / f"{drawing.name}.png"


def write_png(drawing: Drawing, directory: Path) -> Path:
    """Write a drawing as a PNG file, whose first bytes say that it is of a report, and return it."""
    file = png_file(drawing, directory)
    with _figure(drawing, _LIGHT) as figure:
        figure.suptitle(drawing.title)
        disk.publish(
            file,
            lambda temporary: figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": SIGN}),
        )
    return file


@contextmanager
def _figure(drawing: Drawing, theme: Theme) -> "Iterator[Figure]":
    """Draw on a new figure in the style of reports; the style holds while the figure is in use."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "axes.edgecolor": theme.line,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": theme.ink,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "grid.color": theme.line,
        "grid.linewidth": 0.5,
        "legend.fontsize": 9.5,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
        "svg.fonttype": "none",
        "svg.hashsalt": SIGN,
        "text.color": theme.ink,
        "text.parse_math": False,  # names may hold a $
        "xtick.color": theme.line,
        "xtick.labelcolor": theme.ink,
        "ytick.color": theme.line,
        "ytick.labelcolor": theme.ink,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # of names in scripts that the font lacks
        figure = Figure(figsize=drawing.size, layout="constrained")
        drawing.draw(figure.subplots(), theme)
        yield figure
