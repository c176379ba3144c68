"""Memory of a long run, which each round adds little to: its line, its row of the audit, and its entry on the ledger."""

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import fedveil as fv

ROUNDS = 100


class Growth:
    """Notes what is held after ROUNDS rounds, and after twice as many."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}

    def start(self, run: Any) -> None:
        del run

    def round(self, done: Any) -> None:
        if done.round % ROUNDS == 0:
            gc.collect()
            self.held[done.round] = tracemalloc.get_traced_memory()[0]

    def end(self, ending: Any) -> None:
        del ending


@pytest.mark.parametrize(
    ("privacy", "keys", "most"),  # at first caches of the accountant grow, too; they are bounded
    [
        ("client_central", {"privacy.noise_multiplier": 20, "population": 20}, 12_000),
        pytest.param("record", {"privacy.noise_multiplier": 20}, 12_000, marks=pytest.mark.campaign),
    ],
)
def test_a_round_adds_little_to_memory(privacy: str, keys: dict[str, Any], most: int, tmp_path: Path) -> None:
    growth = Growth()
    keys = {"privacy.target_epsilon": None, "cohort.rate": 0.2, **keys}
    tracemalloc.start(1)
    try:
        fv.simulate(
            "digits",
            privacy=privacy,
            num_rounds=2 * ROUNDS,
            seed=1,
            folder=tmp_path / "run",
            callbacks=[growth],
            quiet=True,
            accept_vacuous=True,
            **{"task.num_clients": 20},
            measure_every=2 * ROUNDS,
            checkpoint_every=2 * ROUNDS,
            **keys,
        )
    finally:
        tracemalloc.stop()
    assert growth.held[2 * ROUNDS] - growth.held[ROUNDS] < most * ROUNDS
