"""Scattering features: equality with kymatio's, and independence of the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fedveil.tasks.shipped import scattering


def test_scattering_is_kymatios() -> None:
    """The fixture is ScatteringTorch2D(J=2, shape=(28, 28)) of kymatio 0.3.0 on these images."""
    noise, shape = np.random.default_rng(7).random((2, 28, 28)).astype(np.float32)
    shape[:, :14] = 0
    shape[8:20, 14:] = 1
    images = torch.from_numpy(np.stack([noise, shape]))
    expected = torch.from_numpy(np.load(Path(__file__).parents[2] / "fixtures" / "kymatio_scattering.npy"))
    coefficients = scattering.Wavelets(28, 28)(images)
    assert coefficients.shape == expected.shape == (2, 81, 7, 7)
    assert (coefficients - expected).abs().max() < 1e-4
    assert scattering.normalised(coefficients) == pytest.approx(scattering.normalised(expected), abs=1e-3)
    alone = scattering.features(images[1:])
    assert torch.equal(scattering.features(images)[1:], alone)
    assert alone.float().unflatten(1, (27, -1)).mean(2).abs().max() < 1e-3


def test_a_part_of_a_set_is_transformed_as_the_whole_is() -> None:
    images = torch.rand(7, 28, 28, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(scattering.features(images, batch=3), scattering.features(images), atol=2e-3)
