"""The weights of `--data`, and the shares they give."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from besa_cli.errors import UsageError
from besa_cli.text import mixture

KNOWN = ("c4", "self")


def parsed(*values: str) -> list[tuple[str, Fraction | None]]:
    return [(source.name, source.weight) for source in mixture.parse(values, KNOWN)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("c4", ("c4", None)),
        ("c4:0.7", ("c4", Fraction(7, 10))),
        ("c4:3", ("c4", Fraction(3))),
        ("c4:.5", ("c4", Fraction(1, 2))),
        ("chat.jsonl:0.25", ("chat.jsonl", Fraction(1, 4))),
        ("a:b.jsonl", ("a:b.jsonl", None)),
        ("a:0.5.jsonl", ("a:0.5.jsonl", None)),
        ("a:0.5.jsonl:2", ("a:0.5.jsonl", Fraction(2))),
        ("dir:1/text.txt", ("dir:1/text.txt", None)),
        ("who:knows", ("who:knows", None)),
        (":0.5", (":0.5", None)),
    ],
)
def test_a_weight_stands_after_the_last_colon(workplace: Path, value: str, expected: tuple[str, Fraction]) -> None:
    assert parsed(value) == [expected]


def test_a_file_that_exists_is_taken_as_it_is_named(workplace: Path) -> None:
    (workplace / "notes:0.5").touch()
    assert parsed("notes:0.5") == [("notes:0.5", None)]
    assert parsed("notes:0.5:0.5") == [("notes:0.5", Fraction(1, 2))]


@pytest.mark.parametrize(
    "weight", ["0", "0.0", "-1", "-0.5", "nan", "NaN", "inf", "-inf", "1e3", "1_0", "0x1", "1/2", "", "half", "٣"]
)
def test_a_weight_that_is_not_a_positive_decimal_is_refused(workplace: Path, weight: str) -> None:
    with pytest.raises(UsageError, match="is not a decimal number above 0") as caught:
        parsed(f"c4:{weight}")
    assert f"'{weight}' of --data c4:{weight}" in caught.value.message


def test_weights_of_some_sources_and_sources_given_twice_are_refused(workplace: Path) -> None:
    with pytest.raises(UsageError, match=r"--data c4:0\.5 has a weight, --data self has none"):
        parsed("self", "c4:0.5")
    with pytest.raises(UsageError, match="--data c4 is given twice in a mixture"):
        parsed("c4:0.5", "self:1", "c4:0.2")
    assert parsed("c4", "c4") == [("c4", None)] * 2


@given(
    st.lists(st.decimals("0.001", "1000", places=3), min_size=1, max_size=6).map(
        lambda all_: [Fraction(w) for w in all_]
    ),
    st.integers(0, 500),
)
def test_shares_add_up_and_lie_within_one_of_the_exact_ones(weights: list[Fraction], total: int) -> None:
    counts = mixture.shares(weights, total)
    assert sum(counts) == total
    exact = [weight * total / sum(weights) for weight in weights]
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
    rounded_up = [share - int(share) for count, share in zip(counts, exact, strict=True) if count > share]
    rounded_down = [share - int(share) for count, share in zip(counts, exact, strict=True) if count <= share]
    assert not rounded_up or min(rounded_up) >= max(rounded_down, default=Fraction(0))


def test_shares_by_hand() -> None:
    assert mixture.shares([Fraction("0.7"), Fraction("0.3")], 10) == [7, 3]
    assert mixture.shares([Fraction(1)] * 3, 4) == [2, 1, 1]
    assert mixture.shares([Fraction("0.99"), Fraction("0.01")], 4) == [4, 0]
