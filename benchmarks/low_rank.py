"""Low-rank updates under a private sum, tried beside a mask and a projection of as many coordinates, on `mnist5k`.

``python -m fedveil.benchmarks.low_rank`` prints the table. It is no part of fedveil, since it gains nothing
(docs/evidence/benchmarks.md); this keeps the figure repeatable. As in PowerSGD (Vogels, Karimireddy and Jaggi 2019,
arXiv:1905.13727) clients send M Q for a public Q; the noisy sum is orthogonalised to P; they send M^T P, and the update is P
times that sum. Both sums are of one cohort: with noise z sqrt(2) on each their event is that of one Gaussian of
multiplier z.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..face import plan
from ..tasks.shipped.mnist5k import NUM_CLASSES, load
from .tables import Row, as_table

CLIENTS, RATE, ROUNDS, CLIP, LEARNING_RATE, EPOCHS = 400, 0.25, 100, 2.0, 20.0, 5
EPSILONS, SEEDS = (1.0, 3.0, 8.0), (0, 1, 2)
FIRST_CLIP = 0.3  # of M Q, over that of a whole update: the best of 1, 0.3 and 0.1
# From updates, shape (clients, d), noise multiplier and generator, the noisy mean update, shape (d,).
Mean = Callable[[Tensor, float, torch.Generator], Tensor]


def main() -> int:
    """Train under each way, epsilon and seed, and print the accuracies."""
    torch.set_num_threads(1)
    noises = [
        plan("mnist5k", privacy={"target_epsilon": epsilon})[0].noise_multiplier for epsilon in EPSILONS
    ]
    ways: list[tuple[str, int, Mean]] = [("whole", 2570, whole)]
    ways += [("mask 0.21", 540, partial(masked, 540)), ("rank 2", 542, partial(low_rank, 2))]
    ways += [("project 0.107", 276, partial(projected, 276)), ("rank 1", 276, partial(low_rank, 1))]
    rows: list[Row] = []
    for name, size, mean in ways:
        row: Row = {"way": name, "coordinates up": size}
        for epsilon, noise in zip(EPSILONS, noises, strict=True):
            found = [100 * accuracy(mean, noise, seed) for seed in SEEDS]
            row[f"epsilon {epsilon:g}"] = f"{statistics.fmean(found):.1f} ({min(found):.1f}-{max(found):.1f})"
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    print(as_table(rows))
    return 0


def accuracy(mean: Mean, noise: float, seed: int) -> float:
    """Return the held-out accuracy that federated averaging ends with.

    Args:
      mean: of a cohort's updates.
      noise: multiplier.
      seed: of draws and noise.
    """
    task, drawn = load(CLIENTS, seed=seed), torch.Generator().manual_seed(seed)
    data = [task.client_data(client) for client in range(CLIENTS)]
    inputs, targets = (
        torch.stack([each.inputs for each in data]),
        torch.stack([each.targets for each in data]),
    )
    model = torch.zeros(NUM_CLASSES, inputs.shape[-1] + 1)
    for _ in range(ROUNDS):
        cohort = (torch.rand(CLIENTS, generator=drawn) < RATE).nonzero().flatten()
        model = model + mean(updates(model, inputs[cohort], targets[cohort]), noise, drawn).view_as(model)
    held = task.held_out()
    outputs = held.inputs @ model[:, :-1].T + model[:, -1]
    return task.metrics(outputs, held.targets)["accuracy"]


def updates(model: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return each client's update of a softmax regression after its local epochs, shape (clients, d).

    Args:
      model: weights with the biases in the last column, shape (classes, features + 1).
      inputs: shape (clients, n, features).
      targets: shape (clients, n).
    """
    rows = torch.cat([inputs, torch.ones(*inputs.shape[:2], 1)], -1)
    wanted = torch.nn.functional.one_hot(targets, NUM_CLASSES).float()
    models = model.expand(len(inputs), -1, -1).clone()
    for _ in range(EPOCHS):
        wrong = torch.softmax(rows @ models.transpose(1, 2), -1) - wanted
        models -= LEARNING_RATE / inputs.shape[1] * wrong.transpose(1, 2) @ rows
    return (models - model).flatten(1)


def summed(vectors: Tensor, clip: float, noise: float, drawn: torch.Generator) -> Tensor:
    """Return the noisy mean of clipped vectors over the expected cohort.

    Args:
      vectors: shape (clients, k).
      clip: of each.
      noise: multiplier.
      drawn: gives the noise.
    """
    scale = (clip / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
    return ((vectors * scale).sum(0) + noise * clip * torch.randn(vectors.shape[1], generator=drawn)) / (
        RATE * CLIENTS
    )


def whole(vectors: Tensor, noise: float, drawn: torch.Generator) -> Tensor:
    """Return the mean of whole updates."""
    return summed(vectors, CLIP, noise, drawn)


def masked(size: int, vectors: Tensor, noise: float, drawn: torch.Generator) -> Tensor:
    """Return the mean by a public mask of so many coordinates, new in each round."""
    dimension = vectors.shape[1]
    kept, share = torch.randperm(dimension, generator=drawn)[:size], size / dimension
    out = torch.zeros(dimension)
    out[kept] = summed(vectors[:, kept], CLIP * math.sqrt(share), noise, drawn) / share
    return out


def projected(size: int, vectors: Tensor, noise: float, drawn: torch.Generator) -> Tensor:
    """Return the mean by so many public orthonormal directions, new in each round."""
    share = size / vectors.shape[1]
    basis, _ = torch.linalg.qr(torch.randn(vectors.shape[1], size, generator=drawn))
    return basis @ summed(vectors @ basis, CLIP * math.sqrt(share), noise, drawn) / share


def low_rank(rank: int, vectors: Tensor, noise: float, drawn: torch.Generator) -> Tensor:
    """Return the mean by two sums of a cohort: of M Q for a random public Q, and of M^T P; biases are in the second."""
    each = math.sqrt(2) * noise
    matrices = vectors.view(len(vectors), NUM_CLASSES, -1)
    weights, biases = matrices[..., :-1], matrices[..., -1]
    right, _ = torch.linalg.qr(torch.randn(weights.shape[-1], rank, generator=drawn))
    first = summed((weights @ right).flatten(1), FIRST_CLIP * CLIP, each, drawn)
    left, _ = torch.linalg.qr(first.view(NUM_CLASSES, rank))
    beside = torch.cat([(weights.transpose(1, 2) @ left).flatten(1), biases], 1)
    second = summed(beside, CLIP, each, drawn)
    found = left @ second[:-NUM_CLASSES].view(-1, rank).T
    return torch.cat([found, second[-NUM_CLASSES:, None]], 1).flatten()


if __name__ == "__main__":
    sys.exit(main())
