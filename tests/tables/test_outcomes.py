"""Outcomes of a label: their gradients against differences and against torch."""

import numpy as np
import pytest
import torch

from fedveil.tables.outcomes import ClassLaw, HazardLaw, NumberLaw, Outcomes, clipped, contrasts

STEP = 1e-6
HAZARDS = HazardLaw(np.array([0.1, 0.3, 0.2]), np.array([-1.0, -0.5, 0.0]))
LAWS = [
    NumberLaw(np.array([0.3, -1.0, 0.1, 0.6])),
    ClassLaw(2),
    ClassLaw(4),
    ClassLaw(3, (1.0, 0.2, 0.5)),
    HAZARDS,
]


@pytest.mark.parametrize("law", LAWS, ids=["number", "two classes", "four classes", "weights", "hazards"])
@pytest.mark.parametrize("clip", [0.4, 1e9], ids=["clipped", "whole"])
def test_derivatives_of_the_mean_error_equal_differences(law: Outcomes, clip: float) -> None:
    stream = np.random.default_rng(0)
    scores, truth = stream.standard_normal((2, 4, law.scores))
    layout = law.layout(np.array([[0.1, 1.0], [1.1, 1.0], [-1.7, 1.0], [0.7, 1.0]]))

    def mean(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
        errors = law.errors(scores, truth)
        return np.einsum("mk,mkc->mc", errors.chances, clipped(errors, layout.dual(errors.errors), clip)[0])

    errors = law.errors(scores, truth)
    assert np.allclose(errors.chances.sum(1), 1)
    cut, weighted = clipped(errors, layout.dual(errors.errors), clip)
    assert np.sqrt((cut * layout.dual(cut)).sum(2).max()) <= clip + 1e-12
    by_truth = weighted @ errors.by_truth + np.einsum("mkc,mkb->mcb", cut, errors.slopes)
    for axis in range(law.scores):
        step = STEP * np.eye(law.scores)[axis]
        ahead, behind = mean(scores + step, truth), mean(scores - step, truth)
        assert np.allclose((weighted @ errors.by_score)[:, :, axis], (ahead - behind) / (2 * STEP), atol=1e-6)
        ahead, behind = mean(scores, truth + step), mean(scores, truth - step)
        assert np.allclose(by_truth[:, :, axis], (ahead - behind) / (2 * STEP), atol=1e-6)


def test_errors_of_classes_are_the_gradients_of_cross_entropy() -> None:
    law, scores = ClassLaw(3), np.random.default_rng(1).standard_normal((5, 2))
    logits = torch.tensor(scores @ law.basis.T, requires_grad=True)
    for label in range(3):
        loss = torch.nn.functional.cross_entropy(logits, torch.full((5,), label), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
        errors = law.errors(scores, scores).errors[:, label]
        assert np.allclose(errors @ law.basis.T, gradient.numpy())
        assert np.allclose(np.linalg.norm(errors, axis=1), gradient.norm(dim=1))


def test_contrasts_are_orthonormal_and_sum_to_zero() -> None:
    basis = contrasts(5)
    assert np.allclose(basis.T @ basis, np.eye(4)) and np.allclose(basis.sum(0), 0)
