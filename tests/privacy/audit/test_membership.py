"""Membership inference: definitions by brute force, and intervals that cover."""

import math

import numpy as np
import pytest
from scipy import stats

from fedveil.base.refusal import Refusal
from fedveil.privacy.audit.membership import Likelihoods, auc, late_fall, lira, logit, rmia, tpr_at


def test_rmia_is_the_share_of_the_population_that_is_beaten() -> None:
    rng = np.random.default_rng(1)
    (target, reference), (z_target, z_reference) = rng.random((2, 20)), rng.random((2, 50))
    for a in (0.3, 1.0):
        ratio = target / ((1 + a) / 2 * reference + (1 - a) / 2)
        z_ratio = z_target / ((1 + a) / 2 * z_reference + (1 - a) / 2)
        expected = np.mean(ratio[:, None] / z_ratio > 1, axis=1)
        assert rmia(Likelihoods(target, reference), Likelihoods(z_target, z_reference), a) == pytest.approx(
            expected
        )


def test_lira_is_the_ratio_of_two_gaussians() -> None:
    rng = np.random.default_rng(2)
    shadows, target = rng.standard_normal((8, 30)), rng.standard_normal(30)
    inside = np.argsort(rng.random((8, 30)), axis=0) < 4
    centres = [np.array([shadows[held[:, i], i].mean() for i in range(30)]) for held in (inside, ~inside)]
    spreads = [
        math.sqrt(
            sum(((shadows[held[:, i], i] - centre[i]) ** 2).sum() for i in range(30)) / (8 * 30 / 2 - 30)
        )
        for held, centre in zip((inside, ~inside), centres, strict=True)
    ]
    logs = [stats.norm.logpdf(target, c, s) for c, s in zip(centres, spreads, strict=True)]
    assert lira(target, shadows, inside) == pytest.approx(logs[0] - logs[1])
    with pytest.raises(Refusal, match="train more"):
        lira(target, shadows, np.ones_like(inside))


def test_attacks_with_references_beat_the_loss_on_uneven_records() -> None:
    """Records differ more from each other than membership changes one: the case that the references are for."""
    rng = np.random.default_rng(3)
    records, gain = 1500, 1.0
    hard = 2 * rng.standard_normal(records)
    member = rng.random(records) < 0.5

    def model(inside: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(hard + gain * inside + 0.5 * rng.standard_normal(records))))

    inside = np.argsort(rng.random((8, records)), axis=0) < 4
    shadows = np.array([model(held) for held in inside])
    target = model(member)
    none = np.zeros(records, bool)
    z = Likelihoods(model(none), model(none))
    scores = {
        "loss": np.log(target),
        "rmia": rmia(Likelihoods(target, model(none)), z),
        "lira": lira(logit(target), logit(shadows), inside),
    }
    found = {name: auc(each[member], each[~member]).value for name, each in scores.items()}
    assert found["loss"] < 0.65
    assert found["rmia"] > 0.7
    assert found["lira"] > 0.85


def test_auc_is_mann_whitneys_with_delongs_interval() -> None:
    rng = np.random.default_rng(4)
    members, others = np.round(rng.standard_normal(40) + 0.8, 1), np.round(rng.standard_normal(60), 1)
    found = auc(members, others)
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    spread = math.sqrt(wins.mean(1).var(ddof=1) / 40 + wins.mean(0).var(ddof=1) / 60)
    assert found.value == pytest.approx(wins.mean())
    assert found.low == pytest.approx(wins.mean() - 1.959964 * spread, abs=1e-6)
    assert found.high == pytest.approx(wins.mean() + 1.959964 * spread, abs=1e-6)


def test_perfect_separation_is_not_reported_as_certain() -> None:
    found = auc(np.ones(20), np.zeros(30))
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.8 < found.low < 0.9


@pytest.mark.parametrize("fpr", [0.01, 0.1])
def test_the_rate_at_few_false_positives_is_covered(fpr: float) -> None:
    rng = np.random.default_rng(5)
    true, count = stats.norm.sf(stats.norm.isf(fpr) - 1.5), 200
    found = [tpr_at(fpr, rng.standard_normal(400) + 1.5, rng.standard_normal(1500)) for _ in range(count)]
    assert sum(each.low <= true <= each.high for each in found) >= 0.95 * count - 3
    assert abs(np.median([each.value for each in found]) - true) < 0.03
    assert all(each.low <= each.value <= each.high for each in found)


def test_too_few_records_leave_a_rate_open() -> None:
    rng = np.random.default_rng(6)
    found = tpr_at(0.001, rng.standard_normal(100) + 9, rng.standard_normal(1000))
    assert (found.low, found.value) == (0.0, 1.0)
    many = tpr_at(0.001, rng.standard_normal(100) + 9, rng.standard_normal(20_000))
    assert many.low > 0.9


def test_false_positive_rate_stays_below_its_level() -> None:
    others = np.arange(1000.0)
    assert tpr_at(0.01, np.full(10, 989.5), others).value == 1.0
    assert tpr_at(0.01, np.full(10, 989.0), others).value == 0.0


def test_late_learnt_record_stands_out_and_an_unlearnt_one_does_not() -> None:
    known_at_once, by_heart, never = [2.0, 0.1, 0.1, 0.1], [2.0, 4.0, 3.0, 0.1], [2.0, 4.0, 5.0, 6.0]
    scores = late_fall(np.array([known_at_once, by_heart, never]).T)
    assert scores == pytest.approx([0.475, 2.175, -1.75])
