"""Calls that small kernels make, held against kept counts: a figure of cost that no load on the machine disturbs.

Instruction counts would need valgrind, or a processor's counters, which a bare or a virtual machine does not have. What
makes these kernels slow is Python, and its calls are counted alike everywhere. Python versions differ a little: the kept
counts hold for all within the tolerance. `python tests/benchmarks/test_call_counts.py` prints new ones.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent

from fedveil.benchmarks.ours import run_ours as run_rounds
from fedveil.benchmarks.secagg import run_ours as run_sum
from fedveil.benchmarks.secagg_case import Case
from fedveil.benchmarks.stopwatch import Stopwatch
from fedveil.benchmarks.workload import Size
from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.mechanisms.discrete_gaussian import sample
from fedveil.privacy.mechanisms.private_sum import encode
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import SumSpec

TOLERANCE = 0.1
RELEASES = 50
STEP = PoissonSampledDpEvent(0.01, GaussianDpEvent(1.0))


def reserve_and_commit() -> None:
    """Reserve, commit and tell the epsilon of so many releases on one ledger."""
    budget = Budget(Unit.CLIENT, 8.0, 1e-5, Adjacency.ZERO_OUT)
    with (
        tempfile.TemporaryDirectory() as folder,
        Ledger.open(Path(folder) / "a.ledger", budget, owner="made", simulated=True) as ledger,
    ):
        for row in range(RELEASES):
            events = {Adversary.MODEL: STEP}
            release = Release(Unit.CLIENT, "run", row + 1, "private_sum", events, rng="seeded")
            ledger.reserve(release)
            ledger.commit(release.key)
            ledger.epsilon()


KERNELS: dict[str, Callable[[], Any]] = {
    "a ledger of 50 releases": reserve_and_commit,
    "epsilon of 10 to 59 rounds": lambda: [epsilon({STEP: n}, 1e-5) for n in range(10, 60)],
    "five rounds of 20 clients, stacked": lambda: run_rounds("tiny", Size(40, 20, 4), Stopwatch(), workers=1),
    "an encrypted sum of 8 clients": lambda: run_sum(
        Case(8, 7, 5, 2000, 0.25), np.full(2000, 0.01, np.float32)
    ),
    "an update on the lattice, and noise": lambda: (
        encode({"w": np.linspace(-1, 1, 200_000, dtype=np.float32)}, {}, SumSpec(1.0)),
        sample(2**20, 200_000, Randomness(1).stream("n")),
    ),
}
KEPT = {
    "a ledger of 50 releases": 108_949,
    "epsilon of 10 to 59 rounds": 51_253,
    "five rounds of 20 clients, stacked": 77_884,
    "an encrypted sum of 8 clients": 45_040,
    "an update on the lattice, and noise": 710,
}


def calls(kernel: Callable[[], Any]) -> int:
    """Return how many functions a kernel calls, Python's and C's; a first run fills the caches."""
    kernel()
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        kernel()
    finally:
        sys.setprofile(before)
    return count


@pytest.fixture(scope="module")
def counted() -> dict[str, int]:
    """Counts of a process of its own: what else a process has run makes calls too, when it collects garbage."""
    told = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True).stdout
    return json.loads(told)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_makes_hardly_more_calls_than_it_did(name: str, counted: dict[str, int]) -> None:
    assert counted[name] <= math.ceil(KEPT[name] * (1 + TOLERANCE))


def test_doubled_work_of_a_kernel_is_detected() -> None:
    name = "an update on the lattice, and noise"
    assert calls(lambda: [KERNELS[name]() for _ in range(2)]) > KEPT[name] * (1 + TOLERANCE)


if __name__ == "__main__":
    print(json.dumps({each: calls(kernel) for each, kernel in KERNELS.items()}, indent=2))
