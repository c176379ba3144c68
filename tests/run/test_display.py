"""What a person sees of a run that is no terminal's."""

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.run.callbacks import RoundEnd, RunStart
from fedveil.run.display import Display


def test_a_round_that_released_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.start(RunStart("run", "title", Path("run"), 2, {"client": 3.0}, {}))
    display.round(ended(1, replies=4, invited=5, dropped={"late": 1}, abandoned=False))
    display.round(ended(2, replies=0, invited=5, dropped={"late": 5}, abandoned=True))
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.endswith("4 of 5 clients")
    assert second.endswith("0 of 5 clients  abandoned: nothing was released (late 5)")


def test_figures_by_group_do_not_fill_the_line_of_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.start(RunStart("run", "title", Path("run"), 1, {"client": 3.0}, {}))
    done = ended(1, replies=4, invited=5, dropped={}, abandoned=False)
    display.round(replace(done, metrics={**done.metrics, "groups/sex=f/accuracy": 0.4}))
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert "accuracy 0.5000" in line and "groups/" not in line


def test_a_display_keeps_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    display, model = Display(), np.zeros(8)
    display.start(RunStart("run", "title", Path("run"), 2, {"client": 3.0}, {}))
    done = ended(1, replies=4, invited=5, dropped={}, abandoned=False)
    display.round(replace(done, model={"weights": model}))
    kept = weakref.ref(model)
    del model, done
    display.round(ended(2, replies=4, invited=5, dropped={}, abandoned=False))
    assert kept() is None
    assert len(capsys.readouterr().out.splitlines()) == 3


def ended(number: int, **row: Any) -> RoundEnd:
    return RoundEnd(number, {"accuracy": 0.5}, {"client": float(number)}, row, {})
