"""Classification task: labelled examples in memory, dealt to clients by a partition. Most shipped tasks use it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap

import numpy as np
import torch
from torch import Tensor, nn

from ..base.refusal import Refusal
from .data import Examples, check_examples, only, stretch
from .partition import Indices, Partition


@dataclass(frozen=True)
class Classification:
    """`Task` over public data, with cross-entropy as its loss and accuracy as its metric.

    Attributes:
      train: all clients' examples, one client after the other.
      test: held-out examples.
      shares: for each client, where its examples lie in `train`.
      build: returns a new model.
      simulated: as in `Task`.
      weights: public weight of each class in the loss; empty if all are 1.
    """

    train: Examples
    test: Examples
    shares: tuple[slice, ...]
    build: Callable[[], nn.Module]
    simulated: bool = True
    weights: tuple[float, ...] = ()

    @property
    def num_clients(self) -> int:
        return len(self.shares)

    def model(self) -> nn.Module:
        return self.build()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.weights:
            return self.losses(outputs[None], targets[None])[0]
        return nn.functional.cross_entropy(outputs, targets)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropies(outputs, targets, self.weights)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": (outputs.argmax(dim=-1) == targets).float().mean().item()}

    def client_data(self, client: int) -> Examples:
        if not 0 <= client < self.num_clients:
            raise Refusal("client", client, f"clients run from 0 to {self.num_clients - 1}")
        return stretch(self.train, self.shares[client])

    def client_size(self, client: int) -> int:
        return self.shares[client].stop - self.shares[client].start

    def held_out(self) -> Examples:
        return self.test


def cross_entropies(outputs: Tensor, targets: Tensor, weights: Sequence[float] = ()) -> Tensor:
    """Return each client's mean cross-entropy, shape (clients,).

    Args:
      outputs: logits, shape (clients, n, classes).
      targets: shape (clients, n).
      weights: weight of an example by its target, at most 1, since its gradient is clipped after weighting; empty if
        all are 1. The mean is over the number of examples, so that no example's part depends on another. With more
        weights than classes, a target encodes class and group (`tables.weighted_task`): its class is the remainder.
    """
    num_classes, codes = outputs.shape[-1], targets.flatten()
    labels = codes % num_classes if len(weights) > num_classes else codes
    losses = nn.functional.cross_entropy(outputs.flatten(0, 1), labels, reduction="none")
    if weights:
        losses = losses * torch.tensor(weights, device=targets.device)[codes]
    return losses.view(targets.shape).mean(1)


def classification(
    train: Examples,
    test: Examples,
    num_classes: int,
    partition: Partition,
    build: Callable[[], nn.Module],
    groups: Indices | None = None,
) -> Classification:
    """Return a `Classification`; refuse data as `check_examples` and `Partition.shares` do.

    Args:
      train: all clients' examples.
      test: held-out examples.
      num_classes: targets run from 0 to num_classes - 1.
      partition: of `train` among clients.
      build: returns a new model.
      groups: natural owner of each training example, shape (len(train),); None if unknown.
    """
    check_examples(train, num_classes, "training data")
    check_examples(test, num_classes, "held-out data")
    shares = partition.shares(train.targets.numpy(), groups)
    ends = np.cumsum([0, *map(len, shares)]).tolist()
    return Classification(
        only(train, np.concatenate(shares)), test, tuple(starmap(slice, pairwise(ends))), build
    )


def softmax_regression(features: int, classes: int) -> nn.Module:
    """Return a linear softmax model that starts at zero, where every class is equally likely.

    Args:
      features: dimension of an input.
      classes: number of outputs.
    """
    # On the meta device first, to keep the global random state; `to_empty` would import sympy.
    layer = nn.Linear(features, classes, device="meta")
    layer.weight = nn.Parameter(torch.zeros(classes, features))
    layer.bias = nn.Parameter(torch.zeros(classes))
    return layer


def class_metrics(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return accuracy, the mean of the classes' recalls, and of two classes the area under the ROC curve.

    A model that always predicts a frequent class has a high accuracy, but a low mean of recalls.

    Args:
      outputs: shape (n, classes).
      targets: shape (n,), whole numbers below `classes`.
    """
    hits = (outputs.argmax(-1) == targets).double()
    present = targets.unique()
    recalls = torch.stack([hits[targets == each].mean() for each in present])
    metrics = {"accuracy": float(hits.mean()), "balanced_accuracy": float(recalls.mean())}
    if outputs.shape[-1] == 2 and len(present) == 2:
        metrics["auc"] = _area_under_roc(outputs[:, 1].double() - outputs[:, 0].double(), targets)
    return metrics


def _area_under_roc(scores: Tensor, targets: Tensor) -> float:
    """Return the probability that an example of class 1 has a higher score than one of class 0, ties counted half.

    It is computed from the ranks of class 1 (Hanley and McNeil 1982); scores and targets have shape (n,).
    """
    _, index, ties = scores.unique(return_inverse=True, return_counts=True)
    ranks = (ties.cumsum(0) - (ties - 1) / 2.0)[index]  # from 1; the mean rank of equal scores
    ones = int(targets.sum())
    pairs_won = float(ranks[targets == 1].sum()) - ones * (ones + 1) / 2
    return pairs_won / (ones * (len(targets) - ones))
