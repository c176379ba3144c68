"""Test of record-level claims by canary records: an estimate, lower bounds, a ceiling, and p-values.

Scores are log likelihood ratios, Gaussian with one variance if every batch is the whole data set. With secretly sampled
batches they have a heavier tail, and so lie below the Gaussian curve through (epsilon, delta) in its body, which the
tests use. The tests are then conservative, as a unit test verifies on a grid.
"""

import math

import numpy as np

from ...base.refusal import Refusal
from ..accounting.gaussian import gaussian_mu
from ..budget import Budget
from .alarms import Check
from .normality import accuracy_p, estimate, right_of_median, separation
from .one_run import Scores
from .round_rows import RECORDS, Rows
from .run_audit import INTERVAL_ALPHA, Measured
from .verdict import by_one_run, judge

GAUSSIAN, STEINKE = "Mahloujifar et al., Gaussian", "Steinke et al."  # names of `verdict`'s methods


def measure_records(members: Scores, others: Scores, budget: Budget, number: int) -> Measured | None:
    """Return the measurement after round `number` by scores of canary records; None if they are few, or their coins unfair."""
    try:
        methods = by_one_run(members, others, budget.target_delta, gaussian=True)
    except Refusal:
        return None
    # The estimate's interval replaces the first method's bound, which no row stores: only its ceiling is used.
    whole, *bounds = judge(methods, budget.target_epsilon, INTERVAL_ALPHA).findings
    apart, mu = separation(members, others), gaussian_mu(budget.target_epsilon, budget.target_delta)
    point = estimate(apart, budget.target_delta, INTERVAL_ALPHA)
    accuracy = accuracy_p(right_of_median(members, others), len(members) + len(others), mu)
    p_values = {Check.RECORDS: apart.p_value(mu), Check.RECORDS_ACCURACY: accuracy}
    lower = {each.method: each.lower for each in bounds}
    return Measured(
        number, budget.target_epsilon, point.epsilon, point.low, point.high, whole.ceiling, p_values, lower
    )


def write(row: Rows, measured: Measured) -> None:
    """Write the measurement by canary records into the row of its round.

    Args:
      row: row of the round, shape (), which is changed.
      measured: what `measure_records` returned.
    """
    tests = (measured.p_values[Check.RECORDS], measured.p_values[Check.RECORDS_ACCURACY])
    bounds = (measured.lower[GAUSSIAN], measured.lower[STEINKE])
    row["records"] = (measured.epsilon, measured.low, measured.high, measured.ceiling, *bounds, *tests)


def read(row: Rows, claimed: float) -> Measured | None:
    """Return the measurement that `write` wrote; None if canary records were not measured.

    Args:
      row: row of the round, shape ().
      claimed: epsilon that their owners claim.
    """
    values = dict(zip(RECORDS, np.asarray(row["records"]).tolist(), strict=True))
    if math.isnan(values["ceiling"]):
        return None
    p_values = {Check.RECORDS: values["t_p"], Check.RECORDS_ACCURACY: values["accuracy_p"]}
    lower = {GAUSSIAN: values["gaussian"], STEINKE: values["steinke"]}
    epsilon, low, high, ceiling = (values[name] for name in ("epsilon", "low", "high", "ceiling"))
    return Measured(int(row["round"]), claimed, epsilon, low, high, ceiling, p_values, lower)
