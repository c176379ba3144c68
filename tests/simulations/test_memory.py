"""Arrays of a model's size that a simulation holds at once, counted by tracemalloc: NumPy's, not torch's."""

import runpy
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import fedveil as fv

Wide = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "wide_task.py"))["Wide"]
WIDTH = 1500  # a model of 2.25 million parameters, beside which a run's other objects are small
# The global model before and after, the sum in float64; half a model is what audits keep, tables and history.
MOST = 5.0


class Peak:
    """Notes the most that was held after the first round."""

    def start(self, run: Any) -> None:
        del run

    def round(self, done: Any) -> None:
        if done.round == 1:
            tracemalloc.reset_peak()

    def end(self, ending: Any) -> None:
        del ending
        self.bytes = tracemalloc.get_traced_memory()[1]


@pytest.mark.parametrize("privacy", ["client_central", "none"])
def test_a_round_holds_few_copies_of_its_model(privacy: str, tmp_path: Path) -> None:
    run(8, privacy, tmp_path / "warm", Peak())  # what is imported on the way counts for nothing
    peak = Peak()
    tracemalloc.start(1)
    try:
        before = tracemalloc.get_traced_memory()[0]
        run(WIDTH, privacy, tmp_path / "run", peak)
    finally:
        tracemalloc.stop()
    assert (peak.bytes - before) / (4 * WIDTH**2) <= MOST


def run(width: int, privacy: str, folder: Path, peak: Peak) -> None:
    fv.simulate(
        Wide(width), privacy=privacy, cohort="all", num_rounds=3, folder=folder, seed=1, callbacks=[peak]
    )
