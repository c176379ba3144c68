"""Our bounds beside those of jax-privacy 2.0.0, on 252 cases.

`oracles/jax_privacy_bounds.json` holds what it says, `oracles/jax_privacy_bounds.py` how to write that again. Where
jax-privacy is installed, as in CI, some rows are computed again; without it they are taken from the file alone.
"""

import json
import math
import runpy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedveil.privacy.accounting.gaussian import last_true
from fedveil.privacy.audit.one_run import Guesses, gdp_refutes, steinke_p, steinke_refutes
from fedveil.privacy.audit.rates import Hits, rates_refute, worst_rates

ORACLES = Path(__file__).parents[2] / "oracles"
TABLE: dict[str, Any] = json.loads((ORACLES / "jax_privacy_bounds.json").read_text())
ALPHA = TABLE["alpha"]
CLOSE = 3e-6  # both searches stop at about 1e-6


@pytest.mark.parametrize("canaries", [50, 200, 1000, 5000])
def test_one_run_bounds_are_those_of_jax_privacy(canaries: int) -> None:
    rows = [row for row in TABLE["one run"] if row[0] == canaries]
    assert len(rows) == 45
    for *counts, delta, p_values, steinke, curve in rows:
        guesses = Guesses(*counts)
        ours = [steinke_p(guesses, epsilon, delta) for epsilon in TABLE["epsilons"]]
        assert ours == pytest.approx(p_values, rel=1e-9, abs=1e-300), (counts, delta)
        for refutes, bound in ((steinke_refutes, steinke), (gdp_refutes, curve)):
            refutes_at = partial(refutes, guesses, delta, alpha=ALPHA)
            assert last_true(refutes_at) == pytest.approx(bound, abs=CLOSE), (refutes, counts, delta)


def test_bounds_of_many_runs_are_those_of_jax_privacy() -> None:
    assert len(TABLE["many runs"]) == 72
    for runs, false, missed, delta, bound in TABLE["many runs"]:
        rates = worst_rates(Hits(false, runs), Hits(missed, runs), ALPHA)
        found = last_true(partial(rates_refute, rates, delta))
        assert found == pytest.approx(bound, abs=CLOSE), (runs, false, missed, delta)
    assert sum(row[-1] > 1 for row in TABLE["many runs"]) > 20


@pytest.mark.skipif(find_spec("jax_privacy") is None, reason="pip install --no-deps jax-privacy==2.0.0")
def test_table_is_that_of_jax_privacy() -> None:
    oracle = runpy.run_path(str(ORACLES / "jax_privacy_bounds.py"))
    jax = oracle["auditing"]()
    assert TABLE["jax-privacy"] == oracle["VERSION"]
    for kind, compute, step in (("one run", oracle["one_run"], 31), ("many runs", oracle["many_runs"], 5)):
        for row in TABLE[kind][::step]:
            again = compute(jax, *row[:4])
            flat, expected = (
                [value for each in one for value in (each if isinstance(each, list) else [each])]
                for one in (again, row)
            )
            assert flat == pytest.approx(expected, rel=1e-9, abs=1e-9)
            assert all(map(math.isfinite, flat))
