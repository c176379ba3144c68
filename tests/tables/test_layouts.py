"""Layouts of parameters: one score with offsets is a model of separate scores whose coefficients are equal."""

import numpy as np

from fedveil.tables.layouts import SeparateScores, SharedScore


def test_a_shared_score_is_separate_scores_with_equal_coefficients() -> None:
    draw = np.random.default_rng(0)
    inputs = np.hstack([draw.normal(size=(7, 2)), np.ones((7, 1))])
    separate, shared = SeparateScores(inputs, 3), SharedScore(inputs, np.array([-1.0, 0.0, 1.0]))
    spread = np.zeros((9, 5))  # from the parameters of one layout to those of the other
    for score in range(3):
        spread[3 * score : 3 * score + 2, :2] = np.eye(2)
        spread[3 * score + 2, 2 + score] = 1
    model, errors, blocks = draw.normal(size=5), draw.normal(size=(7, 3)), draw.normal(size=(7, 3, 3))
    gain, outcomes = draw.normal(size=(5, 5)), draw.normal(size=(7, 4, 3))
    assert np.allclose(shared.scores(model), separate.scores((spread @ model).reshape(3, 3)))
    assert np.allclose(shared.gradient(errors), spread.T @ separate.gradient(errors).ravel())
    assert np.allclose(shared.mean_outer(blocks), spread.T @ separate.mean_outer(blocks) @ spread)
    gradients = np.einsum("mkc,cd,md->mkcd", outcomes, np.ones((3, 3)), inputs).reshape(7, 4, 9) @ spread
    lengths = np.einsum("mkc,mkc->mk", outcomes, shared.dual(outcomes))
    assert np.allclose(lengths, (gradients**2).sum(2))
    moved = np.einsum("mkc,cmp->mkp", outcomes, shared.moved(gain))
    assert np.allclose(moved, gradients @ gain.T)
    assert shared.start.tolist() == [0.0, 0.0, -1.0, 0.0, 1.0] and separate.start.shape == (3, 3)
