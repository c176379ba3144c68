"""The closed form for plain Gaussian releases, against both accountants, and a ledger that needs no other."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, LaplaceDpEvent
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.accounting.events import Gaussian, event_to_json
from fedveil.privacy.accounting.gaussian import (
    composed,
    exact_epsilon,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
)
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.ledger import BudgetExhausted, Ledger, verify


@pytest.mark.parametrize("adjacency", Adjacency)
@pytest.mark.parametrize(("noise", "count", "delta"), [(1.0, 1, 1e-5), (5.0, 10, 1e-6), (300.0, 1, 1e-5)])
def test_closed_form_is_that_of_the_privacy_loss_distribution(adjacency, noise, count, delta):
    ours = exact_epsilon({text(GaussianDpEvent(noise)): count}, delta, adjacency)
    assert ours == pytest.approx(epsilon({GaussianDpEvent(noise): count}, delta, adjacency), rel=3e-6)


def test_epsilon_matches_published_answers():
    # Balle and Wang 2018, figure 1's setting: their analytic mechanism at epsilon 1, delta 1e-5 has sigma 3.7307.
    assert gaussian_epsilon(1 / 3.7307, 1e-5) == pytest.approx(1.0, abs=1e-4)
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf
    assert gaussian_epsilon(1e4, 1e-5) == math.inf


@given(st.floats(1e-2, 30.0), st.floats(0.01, 500.0))
def test_delta_falls_with_epsilon_and_is_a_probability(mu, size):
    deltas = [gaussian_delta(mu, size * k / 4) for k in range(5)]
    assert deltas == sorted(deltas, reverse=True) and deltas[-1] >= 0 and deltas[0] <= 1


@given(st.floats(0.05, 100), st.integers(1, 1000), st.sampled_from([1e-3, 1e-6, 1e-9, 1e-20]))
def test_the_epsilon_it_gives_holds_at_delta(noise, count, delta):
    mu = math.sqrt(count) / noise
    size = gaussian_epsilon(mu, delta)
    assert math.isinf(size) or gaussian_delta(mu, size) <= delta


def text(event):
    return json.dumps(event_to_json(event))


def test_it_says_nothing_of_another_kind_and_infinity_of_no_noise():
    gaussian = text(GaussianDpEvent(2.0))
    assert text(Gaussian(2.0)) == gaussian
    assert composed({gaussian: 8}) == 2.0
    assert composed({gaussian: 1, text(LaplaceDpEvent(2.0)): 1}) is None
    assert composed({gaussian: 1, text(LaplaceDpEvent(2.0)): 0}) == 0.25
    assert exact_epsilon({text(Gaussian(0.0)): 1}, 1e-5, Adjacency.ZERO_OUT) == math.inf


def release(number, noise=1.0):
    event = Gaussian(noise)
    return Release(Unit.CLIENT, "run", number, "private_sum 0", {Adversary.SERVER: event}, "system")


def test_a_ledger_of_gaussians_is_spent_exactly_to_its_budget(tmp_path):
    size = gaussian_epsilon(math.sqrt(3.0), 1e-5)
    path = tmp_path / "ledger"
    with Ledger.open(path, Budget(Unit.CLIENT, size, 1e-5), owner="o", simulated=False) as ledger:
        for number in range(3):
            ledger.reserve_new(release(number))
        assert ledger.epsilon() == pytest.approx(size, rel=1e-5)
        with pytest.raises(BudgetExhausted):
            ledger.reserve_new(release(3, 1000.0))
    assert verify(path).ok


ALONE = """
import sys
from pathlib import Path
from pathlib import Path
from fedveil.privacy.budget import Adversary, Budget, Release, Unit
from fedveil.privacy.accounting.events import Gaussian
from fedveil.privacy.ledger.ledger import BudgetExhausted, Ledger
with Ledger.open(Path(sys.argv[1]), Budget(Unit.CLIENT, 5.0, 1e-5), owner="o", simulated=False) as ledger:
    for number in range(3):
        try:
            ledger.reserve_new(Release(Unit.CLIENT, "r", number, "m", {Adversary.SERVER: Gaussian(1.0)}, "system"))
        except BudgetExhausted as spent:
            print(f"{spent.would_be:.3f}", "dp_accounting" in sys.modules)
"""


def test_no_accountant_is_loaded_for_it(tmp_path):
    command = [sys.executable, "-c", ALONE, str(tmp_path / "ledger")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["6.573 False"] * 2


PAGE = Path(__file__).parents[3] / "docs" / "epsilon.md"
WRONGLY, DELTA = 0.05, 1e-5  # of the table: share of others that a test wrongly suspects, and delta


@pytest.mark.parametrize("epsilon", ["0.1", "1", "3", "8"])
def test_the_page_on_epsilon_states_the_best_test_of_a_gaussian(epsilon: str) -> None:
    """By the trade-off of a Gaussian (Dong et al. 2019, arXiv:1905.02383), all rounded up."""
    value, mu = float(epsilon), gaussian_mu(float(epsilon), DELTA)
    shares = (
        norm.cdf(mu / 2),
        norm.cdf(norm.ppf(WRONGLY) + mu),
        (math.exp(value) + DELTA) / (1 + math.exp(value)),
    )
    row = " | ".join([epsilon, *(str(math.ceil(100 * share)) for share in shares)])
    assert f"\n| {row} |\n" in PAGE.read_text()
