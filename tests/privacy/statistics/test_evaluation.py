"""What clients say of a model on held-out rows: figures of features' table, intervals that hold, and zeros that are right."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.gaussian import gaussian_epsilon
from fedveil.privacy.statistics.evaluation import (
    BINS,
    FIGURES,
    LOSS_BOUND,
    METRIC,
    Evaluation,
    HeldOutMeans,
    evaluation_from_json,
)
from fedveil.privacy.statistics.holdout import hashes_of_rows, holdout_mask

ASKED = Evaluation("run evaluation", 0.2)
ALONE = replace(ASKED, figures=(METRIC,))


def summed(asked: Evaluation, clients: list[HeldOutMeans | None]) -> dict[str, np.ndarray]:
    parts = [asked.contribution(each) for each in clients]
    return {each.name: np.sum([part[each.name] for part in parts], axis=0) for each in asked.segments}


def noised(asked: Evaluation, sums: dict[str, np.ndarray], noise: float, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: cells + draw.normal(0, asked.sigma(noise), cells.shape) for name, cells in sums.items()}


def figures(asked: Evaluation, sums: dict[str, np.ndarray], noise: float, clients: float):
    return {each.name: each for _, told in asked.answers(sums, noise, clients) for each in told}


@pytest.mark.parametrize(
    ("clients", "noise", "points"),
    [(400, 5, 1.2), (400, 10, 2.5), (400, 20, 4.9), (2000, 5, 0.24), (2000, 10, 0.49), (2000, 20, 0.98)],
)
def test_mean_alone_is_as_wide_as_planned_before_the_query(clients: int, noise: float, points: float) -> None:
    half = ALONE.half_width(noise, clients)
    assert half == pytest.approx(1.96 * noise / (2 * clients), rel=1e-4)
    assert abs(100 * half - points) <= (0.051 if clients == 400 else 0.0051)  # the table has that many digits
    sums = summed(ALONE, [HeldOutMeans(0.6, 1.0)] * clients)
    told = figures(ALONE, sums, noise, clients)["accuracy"]
    assert told.value == pytest.approx(0.6) and told.high - told.value == pytest.approx(half)


@given(
    st.lists(
        st.none() | st.builds(HeldOutMeans, st.floats(allow_nan=True), st.floats(allow_nan=True)), max_size=5
    )
)
def test_no_part_of_a_client_is_longer_than_its_segment(clients: list[HeldOutMeans | None]) -> None:
    for each in clients:
        parts = ASKED.contribution(each)
        for segment in ASKED.segments:
            assert np.linalg.norm(parts[segment.name]) <= segment.bound == 1.0
    assert math.fsum(each.share or 0 for each in ASKED.segments) == pytest.approx(1.0)
    assert {each.purpose for each in ASKED.segments} == {"evaluation"}


def test_a_client_without_held_out_rows_is_nothing_in_every_figure() -> None:
    some = [HeldOutMeans(0.5 + 0.01 * n, 0.1 * n) for n in range(40)]
    told, others = (figures(ASKED, summed(ASKED, each), 1e-6, 50) for each in (some, [*some, *[None] * 10]))
    for name, figure in told.items():
        assert others[name].value == pytest.approx(figure.value, abs=1e-9)
    assert told["accuracy"].value == pytest.approx(np.mean([each.metric for each in some]), abs=1e-6)
    assert told["loss"].value == pytest.approx(np.mean([each.loss for each in some]), abs=1e-6)
    assert told["clients"].value == pytest.approx(40)


def test_a_model_that_diverged_is_the_worst_there_is() -> None:
    told = figures(ASKED, summed(ASKED, [HeldOutMeans(math.nan, math.inf)] * 9), 1e-6, 9)
    assert told["accuracy"].value == pytest.approx(0, abs=1e-6)
    assert told["loss"].value == pytest.approx(LOSS_BOUND, abs=1e-5)


def test_intervals_hold_the_truth_in_about_95_of_100() -> None:
    draw = np.random.default_rng(1)
    accuracies = draw.beta(9, 1, 400)
    clients: list[HeldOutMeans | None] = [
        HeldOutMeans(float(each), float(5 * (1 - each))) for each in accuracies
    ]
    truth = {
        "accuracy": accuracies.mean(),
        "loss": 5 * (1 - accuracies).mean(),
        "clients": 400.0,
        "worst decile": float(np.quantile(accuracies, 0.1)),
        "median": float(np.quantile(accuracies, 0.5)),
        "quartiles' distance": float(np.subtract(*np.quantile(accuracies, [0.75, 0.25]))),
    }
    sums, held = summed(ASKED, clients), dict.fromkeys(truth, 0)
    for seed in range(600):
        told = figures(ASKED, noised(ASKED, sums, 3.0, seed), 3.0, 400)
        for name, value in truth.items():
            held[name] += told[name].low <= value <= told[name].high
    for name in ("accuracy", "loss", "clients"):
        assert 0.93 <= held[name] / 600 <= 0.97, (name, held[name])
    for name in ("worst decile", "median", "quartiles' distance"):  # whole bins: they hold more often
        assert held[name] / 600 >= 0.93, (name, held[name])


def test_a_client_that_is_zeroed_moves_the_vector_by_its_norm_at_most() -> None:
    corners = [ASKED.contribution(HeldOutMeans(metric, loss)) for metric in (0.0, 1.0) for loss in (0.0, 9.0)]
    root = math.sqrt(1 / len(FIGURES))  # of each part, in clipping norms
    for each in corners:
        whole = math.fsum(float(np.sum(part**2)) for part in each.values())
        assert math.sqrt(whole) * root == pytest.approx(1.0)


def test_evaluation_round_trips_and_nothing_else_is_read() -> None:
    assert evaluation_from_json(ASKED.text) == ASKED
    for wrong in ("[]", "{", ASKED.text.replace("0.2", "2.0"), ASKED.text.replace('"loss"', '"lost"')):
        with pytest.raises(Refusal):
            evaluation_from_json(wrong)
    with pytest.raises(Refusal, match="metric"):
        Evaluation("x", 0.2, metric="loss")


def test_cost_of_one_evaluation_is_the_exact_gaussians() -> None:
    assert gaussian_epsilon(1 / 5.0, 1e-4) == pytest.approx(0.60, abs=0.02)


# --- which rows -----------------------------------------------------------------------------------------------------


def test_rows_are_held_out_by_content_and_not_by_position() -> None:
    draw = np.random.default_rng(0)
    rows, labels = draw.normal(size=(2000, 3)).astype(np.float32), draw.integers(0, 2, 2000)
    held = holdout_mask(hashes_of_rows([rows, labels]), 0.2)
    order = draw.permutation(2000)
    again = holdout_mask(hashes_of_rows([rows[order], labels[order]]), 0.2)
    np.testing.assert_array_equal(held[order], again)
    assert 0.17 < held.mean() < 0.23
    wider = holdout_mask(hashes_of_rows([rows, labels]), 0.3)
    assert wider[held].all()
    part = holdout_mask(
        hashes_of_rows([rows[:500], labels[:500]]), 0.2
    )  # another client that has some of them
    np.testing.assert_array_equal(part, held[:500])


@given(st.lists(st.integers(0, 2**64 - 1), max_size=6), st.floats(0.01, 0.99))
def test_a_client_with_two_rows_holds_one_out_and_trains_on_one(hashes: list[int], share: float) -> None:
    held = holdout_mask(np.array(hashes, np.uint64), share)
    assert held.shape == (len(hashes),)
    assert (held.any() and not held.all()) == (len(hashes) > 1)
    whole = holdout_mask(np.array(hashes, np.uint64), share, group_equal_rows=True)
    assert (whole.any() and not whole.all()) == (len({*hashes}) > 1)
    for value in {*hashes}:  # as those of a person
        assert len({bool(each) for each, here in zip(whole, hashes, strict=True) if here == value}) == 1


def test_bins_hold_their_lower_edge_and_the_last_one_both() -> None:
    cells = [
        ASKED.contribution(HeldOutMeans(each, 0))["clients by accuracy"] for each in (0.0, 0.05, 0.999, 1.0)
    ]
    assert [int(each.argmax()) for each in cells] == [0, 1, BINS - 1, BINS - 1]
