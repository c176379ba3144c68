"""Estimates of the true model from the released one: bias, sandwich, coverage, and the steps of a run."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedveil.benchmarks.intervals import Case, coverage, descended, labels_of, rows_of, steps_of, truth_of
from fedveil.tables.descent import PRIOR, Descent, Design, estimate, released_model
from fedveil.tables.intervals import law_of_number
from fedveil.tables.outcomes import ClassLaw, NumberLaw

WHOLE = Descent(
    rate=0.3, momentum=0.9, rounds=800, averaged=1, clip=math.inf, noise=0.0, share=1.0, records=500
)


def test_without_noise_a_number_has_the_robust_covariance_of_ols() -> None:
    stream = np.random.default_rng(2)
    inputs = rows_of(500, 4, stream)
    targets = inputs @ np.array([0.3, -0.2, 0.1, 0.2, 0.1]) + 0.2 * inputs[:, 0] * stream.standard_normal(500)
    fit, *_ = np.linalg.lstsq(inputs, targets, rcond=None)
    result = estimate(Design(WHOLE, inputs, NumberLaw(targets - inputs @ fit)), fit[None])
    bread = np.linalg.inv(inputs.T @ inputs)  # HC0: White 1980
    meat = inputs.T @ (inputs * ((targets - inputs @ fit) ** 2)[:, None])
    assert np.allclose(result.coefficients[0], fit)
    assert np.allclose(result.covariance, bread @ meat @ bread, rtol=1e-6)


def test_without_noise_classes_have_the_covariance_of_logistic_fits() -> None:
    stream = np.random.default_rng(3)
    inputs, truth = rows_of(500, 4, stream), np.array([[1.0, -0.5, 0.5, 0.3, -0.2]])
    steps = replace(WHOLE, rate=1.0, rounds=1500)
    result = estimate(
        Design(steps, inputs, ClassLaw(2)), truth / math.sqrt(2), math.inf
    )  # log odds are sqrt(2) times the score
    chances = 1 / (1 + np.exp(-inputs @ truth[0]))
    information = inputs.T @ (inputs * (chances * (1 - chances))[:, None])
    assert np.allclose(2 * result.covariance, np.linalg.inv(information), rtol=1e-5)


@pytest.mark.parametrize(
    ("classes", "weights"), [(2, ()), (3, ()), (2, (0.2, 1.0)), (3, (1.0, 0.3, 0.6))], ids=str
)
def test_estimate_inverts_clipping_and_few_rounds(classes: int, weights: tuple[float, ...]) -> None:
    case = replace(Case(classes), epsilon=8.0, columns=4)
    steps, public = replace(steps_of(case), rounds=40, averaged=5), rows_of(400, 4, np.random.default_rng(4))
    law = ClassLaw(classes, weights)
    truth = law.basis.T @ truth_of(case)
    design = Design(steps, public, law)
    released = released_model(design, truth)
    assert np.abs(released - truth).max() > 0.2
    assert np.allclose(estimate(design, released, math.inf).coefficients, truth, atol=1e-3)


def test_a_path_of_rows_with_their_labels_is_that_of_the_steps() -> None:
    stream, case = np.random.default_rng(5), Case(0, records=300, columns=4)
    steps = replace(steps_of(case), noise=0.0, share=1.0, rounds=30)
    inputs, truth = rows_of(300, 4, stream), truth_of(case)
    scores = inputs @ truth[0]  # without errors
    exact = released_model(Design(steps, inputs, NumberLaw(np.zeros(300))), truth)
    assert np.allclose(exact, descended(steps, inputs, scores, 0, stream))


def test_class_weights_have_the_sandwich_of_a_weighted_fit() -> None:
    stream, weights = np.random.default_rng(8), np.array([0.25, 1.0])
    inputs, truth = rows_of(400, 3, stream), np.array([0.8, -0.5, 0.4, -0.3])
    law = ClassLaw(2, weights.tolist())
    steps = replace(WHOLE, rate=1.0, rounds=1500, records=400)
    moved = truth + np.array([0, 0, 0, math.log(4)])  # one class weighs four times as much
    result = estimate(Design(steps, inputs, law), moved[None] / math.sqrt(2), math.inf)
    assert np.allclose(
        math.sqrt(2) * result.coefficients[0], truth, atol=3e-3
    )  # a hundredth of a standard error
    true, fit = (1 / (1 + np.exp(-inputs @ each)) for each in (truth, moved))
    # White 1982: the Hessian of the weighted loss, and the variance of its gradients under the true chances.
    bread = inputs.T @ (inputs * ((0.25 * (1 - true) + true) * fit * (1 - fit))[:, None])
    meat = inputs.T @ (inputs * (0.25**2 * (1 - true) * fit**2 + true * (1 - fit) ** 2)[:, None])
    inverse = np.linalg.inv(bread)
    assert np.allclose(2 * result.covariance, inverse @ meat @ inverse, rtol=0.01, atol=1e-4)


def test_a_direction_without_public_rows_is_unseen() -> None:
    inputs = rows_of(100, 4, np.random.default_rng(6))
    inputs[:, 2] = 0.0
    result = estimate(
        Design(replace(WHOLE, rounds=50), inputs, NumberLaw(np.ones(100))), np.full((1, 5), 0.1)
    )
    assert result.span.shape == (5, 4) and result.coefficients[0, 2] == pytest.approx(0.0)


@pytest.mark.parametrize(("classes", "weights"), [(0, ()), (2, ()), (2, (0.25, 1.0))], ids=str)
def test_intervals_cover_the_true_model(classes: int, weights: tuple[float, ...]) -> None:
    # 12 federations with fixed seeds: a guard; `python -m fedveil.benchmarks.intervals 300` measures.
    case = Case(classes, records=400, public=100, columns=4, epsilon=3.0, weights=weights)
    shares = coverage(case, 12, seed=7)
    assert shares.failures == 0
    assert shares.coefficients >= 0.88 and 0.88 <= shares.predictions <= 0.995


def test_clipping_of_skewed_errors_leaves_no_bias() -> None:
    stream, case = (
        np.random.default_rng(8),
        Case(0, records=40_000, public=4000, columns=4, shape="exponential"),
    )
    steps, truth = replace(steps_of(case), noise=0.0, rounds=60), truth_of(case)
    inputs, public = rows_of(40_000, 4, stream), rows_of(4000, 4, stream)
    released = descended(steps, inputs, labels_of(case, truth, inputs, stream), 0, stream)
    result = estimate(
        Design(steps, public, law_of_number(public, labels_of(case, truth, public, stream))), released
    )
    bias = np.abs(released - truth).max()
    assert bias > 0.02 and np.abs(result.coefficients - truth).max() < bias / 2
    assert np.abs(law_of_number(public, public[:, 0]).residuals).max() < 1e-9


def test_a_smooth_shape_of_few_rows_has_an_estimate_under_the_prior() -> None:
    case, stream = Case(2, records=300, public=80, epsilon=1.0, bins=16), np.random.default_rng(9)
    steps, truth, inputs = steps_of(case), truth_of(case), case.rows(300, stream)
    released = descended(steps, inputs, labels_of(case, truth, inputs, stream), 2, stream)
    law = ClassLaw(2)
    result = estimate(Design(steps, case.rows(80, stream), law), law.basis.T @ released)
    deviations = np.sqrt(np.diag(result.covariance))
    assert result.information < 0.01 and deviations.max() <= PRIOR + 1e-9
    assert np.abs(result.coefficients - law.basis.T @ truth).max() < 4 * deviations.max()
