"""The colours of a report can be told apart from their ground, and its frontier is what no model beats."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from besa_cli.report import figures
from besa_cli.report.figures import Point

STYLE = (Path(figures.__file__).parent / "style.css").read_text(encoding="utf-8")
LINEAR_TO_LMS = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
LMS_TO_LAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip


def schemes() -> dict[str, dict[str, str]]:
    """The colours of the light and of the dark page."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    found = {
        name: dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", part))
        for name, part in (("light", light), ("dark", dark))
    }
    assert found["light"].keys() == found["dark"].keys()
    return found


def linear(color: str) -> np.ndarray:
    channels = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(first: np.ndarray, second: np.ndarray) -> float:
    """The ratio of WCAG 2."""
    high, low = sorted((float(each @ [0.2126, 0.7152, 0.0722]) for each in (first, second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def mixed(low: str, high: str, share: float) -> np.ndarray:
    """`color-mix(in oklab, …)`."""
    labs = [LMS_TO_LAB @ np.cbrt(LINEAR_TO_LMS @ linear(color)) for color in (low, high)]
    lab = (1 - share) * labs[0] + share * labs[1]
    return np.linalg.solve(LINEAR_TO_LMS, np.linalg.solve(LMS_TO_LAB, lab) ** 3).clip(0, 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_series_have_the_contrast_that_reading_needs(scheme: str) -> None:
    colors = schemes()[scheme]
    for ground in ("paper", "card"):
        for name in ("ink", "soft", "link"):
            assert contrast(linear(colors[name]), linear(colors[ground])) >= 4.5, (name, ground)
        for number in range(7):
            assert contrast(linear(colors[f"s{number}"]), linear(colors[ground])) >= 3
    assert contrast(linear(colors["warn"]), linear(colors["warn-ink"])) >= 4.5
    for tint in range(101):
        ink = colors["heat-hi" if tint > 65 else "heat-ink"]
        assert contrast(linear(ink), mixed(colors["heat0"], colors["heat1"], tint / 100)) >= 4.5, tint


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8))
def test_the_frontier_is_what_no_other_model_beats(places: list[tuple[int, int]]) -> None:
    points = [Point(name=str(number), number=number, megabytes=x, loss=y) for number, (x, y) in enumerate(places)]
    found = {(point.megabytes, point.loss) for point in figures.frontier(points)}
    expected = {(x, y) for x, y in places if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in places)}
    assert found == expected
