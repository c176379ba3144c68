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
    first, *second = capsys.readouterr().out.splitlines()[1:]
    assert first.endswith("4/5 clients")
    assert second[0].endswith("0/5 clients") and second[1] == "  abandoned: nothing was released (late 5)"


def test_figures_by_group_do_not_fill_the_line_of_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.start(RunStart("run", "title", Path("run"), 1, {"client": 3.0}, {}))
    done = ended(1, replies=4, invited=5, dropped={}, abandoned=False)
    display.round(replace(done, metrics={**done.metrics, "groups/sex=f/accuracy": 0.4}))
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert "accuracy 0.5000" in line and "groups/" not in line


def test_lines_of_a_round_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.start(RunStart("run", "title", Path("run"), 20, {"record": 3.0}, {}))
    metrics = {"accuracy": 0.2143, "loss": 5.3268, "perplexity": 205.7714, "bits_per_byte": 2.1221}
    done = replace(ended(20, replies=40, invited=40, dropped={}, abandoned=False), epsilon={"record": 2.9998})
    for count in (2, 4):
        display.round(replace(done, metrics=dict([*metrics.items()][:count])))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "round 20/20  accuracy 0.2143  loss 5.3268  record epsilon 3.000/3  40/40 clients",
        "round 20/20  accuracy 0.2143  loss 5.3268  perplexity 205.8",
        "  bits per byte 2.1221  record epsilon 3.000/3  40/40 clients",
    ]
    display.round(replace(done, metrics={**metrics, "perplexity": 3500.26, "balanced_accuracy": 0.5}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 80 and "perplexity 3500.3" in lines[0]


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


def test_a_process_says_a_promise_once_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    sentences = f"{'Recipients of the model ' * 6}learn almost the same. {'A test finds few. ' * 5}".strip()
    for rows, shown in ((({"round": 1},), []), ((), sentences.split()), ((), [])):
        Display(lambda: [sentences]).start(RunStart("run", "title", Path("run"), 2, {}, {}, rows))
        title, *lines = capsys.readouterr().out.splitlines()
        assert title == "title" and " ".join(lines).split() == shown
        assert max(map(len, lines), default=0) <= 80
