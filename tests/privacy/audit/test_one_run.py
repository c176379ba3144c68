"""Lower bounds of one run: those of jax-privacy 2.0.0 on 252 cases, published values, guesses.

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

import numpy as np
import pytest

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.gaussian import last_true
from fedveil.privacy.audit.one_run import Guesses, gdp_refutes, guesses_at, steinke_p, steinke_refutes
from fedveil.privacy.audit.rates import Hits, rates_refute, worst_rates
from fedveil.privacy.audit.verdict import Verdict, by_many_runs, by_one_run, judge

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


DELTA = 1e-5


def lower(refutes, alpha: float = 0.05) -> float:
    return last_true(lambda epsilon: refutes(epsilon, alpha))


def test_steinke_by_the_plain_sum_of_the_theorem() -> None:
    """The binomial summed term by term, the excess searched over every i: nothing shared with the code."""
    made, right, epsilon, delta, canaries = 40, 33, 0.7, 1e-3, 60
    rate = math.exp(epsilon) / (1 + math.exp(epsilon))
    law = [math.comb(made, k) * rate**k * (1 - rate) ** (made - k) for k in range(made + 1)]
    tail = [math.fsum(law[max(k, 0) :]) for k in range(right + 1)]
    excess = max((tail[max(right - i, 0)] - tail[right]) / i for i in range(1, canaries + 1))
    expected = tail[right] + 2 * canaries * delta * excess
    assert steinke_p(Guesses(canaries, made, right), epsilon, delta) == pytest.approx(expected, rel=1e-12)


def test_p_values_match_published_ones() -> None:
    assert steinke_p(Guesses(1000, 500, 300), 0.2, DELTA) == pytest.approx(0.013772, abs=5e-7)
    assert steinke_p(Guesses(1000, 100, 90), 1.0, DELTA) == pytest.approx(0.000841, abs=5e-7)
    assert steinke_p(Guesses(1000, 500, 0), 0.2, DELTA) == 1
    assert steinke_p(Guesses(1000, 1000, 1000), 60.0, 0.0) == pytest.approx(1)


def test_bounds_match_published_ones() -> None:
    guesses = Guesses(1000, 400, 330)
    assert lower(partial(steinke_refutes, guesses, DELTA)) == pytest.approx(1.3284, abs=5e-5)
    assert lower(partial(gdp_refutes, guesses, DELTA)) == pytest.approx(2.2586, abs=5e-5)


def test_equal_scores_say_nothing() -> None:
    """An order among ties that follows the coins would refute any claim."""
    flat = np.zeros(500)
    assert guesses_at(flat, flat, 1.0).correct == 0
    assert guesses_at(np.ones(500), flat, 1.0).correct == 1000
    assert judge(by_one_run(flat, flat, DELTA), 0.1, 0.05).verdict is Verdict.CONSISTENT


def test_abstaining_keeps_the_surest() -> None:
    members, others = np.array([0.5, 9.0, -0.5, 8.0]), np.array([0.4, -9.0, 0.6, -8.0])
    assert guesses_at(members, others, 0.5) == Guesses(8, 4, 4)
    assert guesses_at(members, others, 1.0).correct == 6


def test_impossible_outcome_is_refused() -> None:
    for counts in ((10, 11, 5), (10, 5, 6), (10, 5, -1), (0, 0, 0)):
        with pytest.raises(Refusal, match="give a number"):
            Guesses(*counts)
    with pytest.raises(Refusal, match="fair coin"):
        by_one_run(np.zeros(600), np.zeros(400), DELTA)
    with pytest.raises(Refusal, match="at least 2 of canaries in"):
        by_one_run(np.zeros(1), np.zeros(1), DELTA, gaussian=True)
    with pytest.raises(Refusal, match="at least 4 runs"):
        by_many_runs(np.zeros(3), np.zeros(300), DELTA)
