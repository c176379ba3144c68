"""Values of the owner's page: what runs cost, what policies allow, and what a damaged ledger leaves."""

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from fedveil.deployment.device.owner_desk import read_desk
from fedveil.deployment.owner_page import view
from fedveil.privacy.accounting.gaussian import gaussian_epsilon

APPROVALS = runpy.run_path(str(Path(__file__).parents[1] / "device" / "test_approvals.py"))
code_of, device_of, in_the_clear = (APPROVALS[name] for name in ("code_of", "device_of", "in_the_clear"))
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def device(made: Path) -> Any:
    """A device that has answered three rounds under noise 3."""
    device = device_of(made / "clients" / "c1")
    assert [code_of(device, in_the_clear(number=number)) for number in (1, 2, 3)] == [0, 0, 0]
    return device


def test_cost_of_a_run_is_that_of_its_rounds_together(device: Any) -> None:
    (row,) = view.run_costs(device.ledger.path, 1e-5)
    assert (row.name, row.releases) == ("spring", 3)
    assert row.epsilon == f"{gaussian_epsilon(math.sqrt(3) / 3, 1e-5):.3g}"
    ledger, records = view.data_sets(read_desk(device.bundle.folder))
    assert (records.name, list(records.runs)) == ("its records", []) and records.spent > ledger.spent
    assert ledger.spent + ledger.remaining == pytest.approx(8.0) and f"{ledger.spent:.3g}" == row.epsilon
    assert ledger.share == pytest.approx(100 * ledger.spent / 8.0)


def test_each_term_comes_with_the_limit_of_the_policy(device: Any) -> None:
    desk = read_desk(device.bundle.folder)
    ((request, _),) = desk.requests
    limits = {name: limit for name, _, limit in view.terms_of(request, desk.policy) if limit}
    assert limits["noise multiplier"] == "at least 1" and limits["clipping norm"] == "at most 2"
    assert limits["purposes beside training"] == "none" and limits["privacy"] == "any mode"


def test_damaged_ledger_leaves_the_rest_of_the_page(device: Any) -> None:
    device.ledger.path.write_bytes(b"damaged")
    text = view.overview(read_desk(device.bundle.folder), "owner", "token")
    assert "run spring" in text and "Nothing was spent" not in text and 'role="alert">ledger=' in text
