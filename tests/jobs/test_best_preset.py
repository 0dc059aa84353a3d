"""`--preset best` stands for options that can be given one by one."""

from typing import Any

import pytest

from besa_cli.errors import UsageError
from besa_cli.jobs import prune


def test_it_is_a_pass_over_the_whole_model() -> None:
    best = prune.request(options={"preset": "best", "epochs": 2}, sparsity=0.6)
    assert best == prune.request(options={"epochs": 2}, sparsity=0.6, global_epochs=1)


@pytest.mark.parametrize("given", [{"global_epochs": 0}, {"global_epochs": 3}, {"update": "solve"}])
def test_what_is_given_wins(given: dict[str, Any]) -> None:
    rest: dict[str, Any] = {"global_epochs": 1} | given
    assert prune.request(options={"preset": "best"}, **given) == prune.request(**rest)


def test_it_is_of_besa_and_not_for_grids() -> None:
    with pytest.raises(UsageError, match="--preset best and --bits 4 exclude each other"):
        prune.request(options={"preset": "best", "bits": 4})
    with pytest.raises(UsageError, match="--preset"):
        prune.request(method="wanda", options={"preset": "best"})
