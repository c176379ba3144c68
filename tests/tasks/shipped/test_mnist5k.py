"""Features of MNIST digits: independence of other images, orientations, straightening."""

import numpy as np
import torch

from fedveil.tasks.shipped.mnist5k import gabor_filters, oriented_energies, straightened


def test_features_of_an_image_depend_on_that_image_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
    images[5] = 0
    features = oriented_energies(images)
    assert np.allclose(features[2], oriented_energies(images[2:3])[0], atol=1e-6)
    assert not features[5].any()
    assert np.isfinite(features).all()


def test_features_tell_orientations_apart() -> None:
    bars = np.zeros((2, 28, 28), np.uint8)
    bars[0, 6:22, 13:15] = 255
    bars[1, 13:15, 6:22] = 255
    upright, flat = oriented_energies(bars)
    assert upright @ flat < 0
    assert torch.allclose(gabor_filters().sum((1, 2, 3)), torch.zeros(8), atol=1e-6)


def test_straightening_takes_out_the_slant() -> None:
    image = np.zeros((1, 28, 28), np.float32)
    for row in range(6, 22):
        image[0, row, (row + 14) // 2 : (row + 14) // 2 + 2] = 1
    columns = np.arange(28)
    upper, lower = (
        (part @ columns / part.sum(1)).mean()
        for straight in [straightened(image)[0]]
        for part in (straight[6:14], straight[14:22])
    )
    assert abs(upper - lower) < 0.5
    upright = np.zeros((1, 28, 28), np.float32)
    upright[0, 6:22, 13:15] = 1
    assert np.allclose(straightened(upright), upright, atol=1e-5)
