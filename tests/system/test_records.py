"""Files of besa's own: a field that is wrong is named, whatever is wrong with it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import pytest
from typing_extensions import TypedDict

from besa_cli.errors import BesaError
from besa_cli.system import records


@dataclass(frozen=True, kw_only=True)
class Point:
    x: int
    weight: float = 0.5


@records.strict
class Shape(TypedDict):
    name: str
    points: tuple[Point, ...]
    size: NotRequired[float]


WHOLE: dict[str, Any] = {"name": "line", "points": [{"x": 1}, {"x": 2, "weight": 1}], "size": 2}


def written(directory: Path, text: str) -> Path:
    (directory / "shape.json").write_text(text, encoding="utf-8")
    return directory / "shape.json"


def test_a_whole_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    found = records.read(Shape, written(tmp_path, json.dumps({**WHOLE, "newer": [1]})))
    assert found == {"name": "line", "points": (Point(x=1), Point(x=2, weight=1.0)), "size": 2.0, "newer": [1]}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": None}, "name: input should be a valid string, not None"),
        ({"name": 7}, "name: "),
        ({"points": [{"x": "1"}]}, "points.0.x: input should be a valid integer, not '1'"),
        ({"points": [{"x": True}]}, "points.0.x: "),
        ({"points": [{"x": 1.5}]}, "points.0.x: "),
        ({"points": [{}]}, "points.0.x is missing"),
        ({"size": float("nan")}, "size: input should be a finite number, not nan"),
        ({"size": float("inf")}, "size: "),
        ({"points": {"a" * 1000: 1}}, "points: "),
    ],
)
def test_the_field_that_is_wrong_is_named(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = written(tmp_path, json.dumps({**WHOLE, **changed}))
    with pytest.raises(BesaError) as caught:
        records.read(Shape, path)
    assert caught.value.message.startswith(f"{path} is not what besa wrote: {said}")
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"name": ' + "1" * 10_000 + "}", '{"a": "\ud83d"}']
)
def test_what_is_not_json_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "shape.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(BesaError, match=r"shape\.json"):
        records.read(Shape, path)
