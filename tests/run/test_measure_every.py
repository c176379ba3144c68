"""Rounds after which the model is measured on public held-out data."""

import signal
from pathlib import Path

import pytest
from shared.runs import json_lines

import fedveil as fv
from fedveil.configs.settings import settings_from_overrides
from fedveil.evidence.content import report_of
from fedveil.evidence.page import page_of
from fedveil.run.run_files import read_run
from fedveil.simulations.simulate import simulate


class Interruption:
    """Callback that interrupts a run after its first round."""

    def start(self, run: object) -> None: ...

    def round(self, done: fv.RoundEnd) -> None:
        if done.round == 1:
            signal.raise_signal(signal.SIGTERM)

    def end(self, ending: object) -> None: ...


def test_rounds_between_measurements_have_no_metrics(tmp_path: Path) -> None:
    every = fv.simulate("digits", num_rounds=5, seed=0, quiet=True, folder=tmp_path / "every")
    some = fv.simulate("digits", num_rounds=5, seed=0, quiet=True, folder=tmp_path / "some", measure_every=2)
    assert ["accuracy" in row for row in json_lines(tmp_path / "some/metrics.jsonl")] == [
        False,
        True,
        False,
        True,
        True,
    ]
    assert some.metrics == every.metrics
    assert (tmp_path / "some/model.safetensors").read_bytes() == (
        tmp_path / "every/model.safetensors"
    ).read_bytes()


def test_a_run_that_ends_early_is_measured_at_its_end(tmp_path: Path) -> None:
    keys = settings_from_overrides(["num_rounds=4", "seed=0", "measure_every=3"])
    ended = simulate(keys, tmp_path / "run", quiet=True, callbacks=[Interruption()]).result
    assert ended["status"] == "interrupted"
    assert "accuracy" not in json_lines(tmp_path / "run/metrics.jsonl")[-1]
    assert 0 < ended["metrics"]["accuracy"] <= 1


def test_screen_and_page_show_the_measured_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fv.simulate("digits", num_rounds=4, seed=0, folder=tmp_path / "run", measure_every=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round")]
    assert ["accuracy" in line for line in lines] == [False, True, False, True]
    assert "accuracy" in page_of(report_of(read_run(tmp_path / "run")))
