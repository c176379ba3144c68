"""Faults put into a copy of the package on purpose: the suite must go red for every one of them."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("privacy", "strategies", "client", "server", "simulations", "configs")


@dataclass(frozen=True)
class Mutation:
    """One change to one file, and the tests of which at least one must fail."""

    file: str
    before: str
    after: str
    tests: str
    select: str


GRID_TESTS, SUM_TESTS = "test_server_private_grid.py", "test_privacy_private_sum.py"
MUTATIONS = {
    "noise removed": Mutation(
        "privacy/mechanisms/private_sum.py",
        "block += sample(sigma, block.size, stream)",
        "pass",
        SUM_TESTS,
        "claimed_scale",
    ),
    "noise scaled by a wrong clip": Mutation(
        "server/private_grid.py",
        "plan.noise_std / plan.clipping_norm, spec",
        "plan.noise_std, spec",
        GRID_TESTS,
        "planned_scale",
    ),
    "clip skipped at the client": Mutation(
        "privacy/mechanisms/private_sum.py",
        "factor = min(1.0, spec.aim(coordinates) / norm) if norm > 0 else 1.0",
        "factor = 1.0",
        SUM_TESTS,
        "keeps_its_direction",
    ),
    "clip skipped at the server": Mutation(
        "privacy/mechanisms/private_sum.py",
        "if spec.clipping_norm is not None and squared > float(spec.cells) ** 2:",
        "if False:",
        SUM_TESTS,
        "clips_again",
    ),
    "sampling fixed while accounted as Poisson": Mutation(
        "strategies/cohorts.py",
        "chosen = stream.uint64(len(population)) < np.uint64(int(self.rate * 2**64))",
        "chosen = np.argsort(np.argsort(stream.uint64(len(population)))) < self.rate * len(population)",
        "test_strategies_cohorts.py",
        "binomial",
    ),
    "ledger written after the release": Mutation(
        "server/private_grid.py",
        "self._privacy.ledger.reserve_new(self._release(number))\n        self._reserved",
        "pass\n        self._reserved",
        GRID_TESTS,
        "durable_before",
    ),
    "same noise in two rounds": Mutation(
        "server/private_grid.py",
        'self._randomness.stream("noise", number)',
        'self._randomness.stream("noise")',
        GRID_TESTS,
        "no_noise_repeats",
    ),
    "Poisson batches drawn with a fixed size": Mutation(
        "client/batches.py",
        "np.flatnonzero(stream.uint64(records) < np.uint64(int(self.sample_rate * 2**64)))",
        "np.argsort(stream.uint64(records))[: int(self.sample_rate * records)]",
        "test_client_training.py",
        "poisson_draws",
    ),
    "ledger not fsynced": Mutation(
        "privacy/ledger_store.py",
        "'FULL' if durable",
        "'NORMAL' if durable",
        "test_privacy_ledger.py",
        "synced_in_full",
    ),
    "metrics leave beside the sum": Mutation(
        "strategies/wire.py",
        "Message(RecordDict({VECTOR_RECORD: memory_arrays({VECTOR: vector})}), reply_to=message)",
        "Message(RecordDict({VECTOR_RECORD: memory_arrays({VECTOR: vector}), 'c': ConfigRecord({'x': 1})}), "
        "reply_to=message)",
        GRID_TESTS,
        "weighs_the_same",
    ),
}


def run_tests(tree: Path, tests: str, select: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return subprocess.run(
        [*command, f"tests/{tests}", "-k", select],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package that shadows the installed one."""
    copy = tmp_path / "fedveil"
    for room in (*ROOMS, "tests"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "__main__.py", "pyproject.toml", "py.typed"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_suite_goes_red(name: str, tree: Path) -> None:
    mutation = MUTATIONS[name]
    file = tree / mutation.file
    source = file.read_text()
    assert source.count(mutation.before) == 1, "the mutation no longer fits the code: mend it"
    file.write_text(source.replace(mutation.before, mutation.after))
    red = run_tests(tree, mutation.tests, mutation.select)
    assert red.returncode == 1, red.stdout[-2000:] + red.stderr[-2000:]
    assert " failed" in red.stdout
    file.write_text(source)
    green = run_tests(tree, mutation.tests, mutation.select)
    assert green.returncode == 0, green.stdout[-2000:] + green.stderr[-2000:]
