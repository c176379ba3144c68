"""Table of `jax_privacy_bounds.json`: lower bounds on epsilon as jax-privacy 2.0.0 (Apache-2.0) has them.

    pip install --no-deps jax-privacy==2.0.0
    python tests/oracles/jax_privacy_bounds.py > tests/oracles/jax_privacy_bounds.json

Its module `auditing` needs NumPy, SciPy and dp_accounting alone and is loaded without its package, which
would import jax. Its `epsilon_from_gdp` is left out: in this version it refutes true claims (98 of 100 at
epsilon 1). Nothing here is computed by fedveil.
"""

import importlib.util
import itertools
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

VERSION = "2.0.0"
ALPHA = 0.05
CANARIES = (50, 200, 1000, 5000)
SHARES = (1.0, 0.25, 0.05)  # of the canaries that are guessed
RIGHT = (0.5, 0.6, 0.8, 0.96, 1.0)  # of the guesses
DELTAS = (1e-9, 1e-5, 1e-3)
EPSILONS = (0.1, 1.0, 4.0)
RUNS = (40, 400, 4000)  # with the target in, and as many without
RATES = ((0.5, 0.5), (0.1, 0.3), (0.3, 0.1), (0.01, 0.05), (0.0, 0.5), (0.0, 0.0))  # false alarms, misses


def auditing() -> ModuleType:
    package = importlib.util.find_spec("jax_privacy")
    if package is None or package.origin is None or version("jax-privacy") != VERSION:
        sys.exit(f"pip install --no-deps jax-privacy=={VERSION}")
    spec = importlib.util.spec_from_file_location(
        "jax_privacy_auditing", Path(package.origin).with_name("auditing.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def one_run(jax: ModuleType, canaries: int, made: int, right: int, delta: float) -> list[Any]:
    """Return the row of guesses: p at each of EPSILONS, bounds of Steinke et al. and of Mahloujifar et al."""
    counts = (canaries, made, right)
    p_values = [float(jax._one_run_p_value(*counts, epsilon, delta)) for epsilon in EPSILONS]
    bounds = [
        float(bound(0.0, *counts, ALPHA, delta)) for bound in (jax._epsilon_one_run, jax._epsilon_one_run_fdp)
    ]
    return [*counts, delta, p_values, *bounds]


def many_runs(jax: ModuleType, runs: int, false: int, missed: int, delta: float) -> list[Any]:
    """Return the row of many runs: the bound from Clopper and Pearson's limits, the larger way round."""
    scores = [[float(n < above) for n in range(runs)] for above in (runs - missed, false)]  # 1 says member
    at = jax.Explicit(0.5)
    auditor = jax.CanaryScoreAuditor(*scores)
    bound = auditor.epsilon_clopper_pearson(ALPHA, delta, one_sided=False, threshold_strategy=at)
    return [runs, false, missed, delta, float(bound)]


def table() -> dict[str, Any]:
    jax = auditing()
    guesses = (
        (canaries, made := max(1, int(share * canaries)), int(right * made), delta)
        for canaries, share, right, delta in itertools.product(CANARIES, SHARES, RIGHT, DELTAS)
    )
    counts = (
        (runs, int(false * runs), int(missed * runs), delta)
        for runs, (false, missed), delta in itertools.product(RUNS, RATES, (0.0, *DELTAS))
    )
    return {
        "jax-privacy": VERSION,
        "alpha": ALPHA,
        "epsilons": EPSILONS,
        "one run": [one_run(jax, *each) for each in guesses],
        "many runs": [many_runs(jax, *each) for each in counts],
    }


def as_text(made: dict[str, Any]) -> str:
    """Return JSON with a line for each row."""
    parts = [
        f'"{key}": [\n' + ",\n".join(map(json.dumps, value)) + "\n]"
        if isinstance(value, list)
        else f'"{key}": {json.dumps(value)}'
        for key, value in made.items()
    ]
    return "{" + ",\n".join(parts) + "}"


if __name__ == "__main__":
    print(as_text(table()))
