from pathlib import Path
from typing import Any

import pytest

from besa_cli.calibration.request import CalibrationRequest
from besa_cli.checkpoint.runs import Run
from besa_cli.commands.shared import calibration_source
from besa_cli.console import Console
from besa_cli.errors import UsageError
from besa_cli.models import Model

MODEL = Model(name="model", kind="local", directory=Path("model"), revision=None)


def test_a_request_gives_what_was_asked_for_and_nothing_else() -> None:
    assert CalibrationRequest(seed=3, data_dir=Path("texts"), shared=Path("set")).given() == {}
    asked = CalibrationRequest(data=["c4"], samples=0, seqlen=16, pack=False)
    assert asked.given() == {"data": ["c4"], "samples": 0, "seqlen": 16, "pack": False}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"samples": 4}, "samples"),
        ({"pack": False, "seqlen": 16}, "seqlen"),
        ({"data": ["c4"], "pack": True}, "data"),
        ({"text_column": "a"}, "text-column"),
    ],
)
def test_a_finished_set_and_options_that_draw_one_exclude_each_other(
    workplace: Path, options: dict[str, Any], named: str
) -> None:
    request = CalibrationRequest(shared=Path("set"), **options)
    with pytest.raises(UsageError, match=f"--calibration set and --{named} exclude each other"):
        calibration_source.calibration(MODEL, Run(Path("run")), request, Console(json=False), restart=False)
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (CalibrationRequest(shared=Path("set"), samples=4), "--calibration set"),
        (CalibrationRequest(data=["c4", "ptb"]), "--data c4 ptb"),
        (CalibrationRequest(pack=False), "--no-pack"),
        (CalibrationRequest(text_column="body"), "--text-column body"),
    ],
)
def test_a_method_without_samples_refuses_options_that_draw_them(request_: CalibrationRequest, said: str) -> None:
    with pytest.raises(UsageError, match=f"{said} has no effect with --method rtn"):
        calibration_source.refuse_samples(request_, "rtn")
    calibration_source.refuse_samples(CalibrationRequest(seed=3, data_dir=Path("texts")), "rtn")
