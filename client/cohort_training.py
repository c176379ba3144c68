"""Training a whole cohort of a small model at once: the same mathematics as one client after the other.

On a small model nearly all the time of a client is Python. Clients with equally many examples are stacked and
trained by one vectorised step each (`torch.func.vmap`): same batches, same order, same seeds, equal to the path of
single clients up to float rounding, which a test holds. Chosen when the model has few parameters; a model that
cannot be vectorised is trained client by client.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from ..privacy.mechanisms.private_sum import CohortSum, SumSpec, encode_rows
from ..privacy.mechanisms.randomness import Randomness
from ..strategies.wire import WEIGHT, layout_of, only_arrays, read_round, view
from .app import TRAIN_LOSS, Workbench, training_settings
from .training import SGD, batches_of

MAX_PARAMETERS = 50_000  # above, one client's matrix products fill a core and stacking gains nothing
MAX_STACK = 128  # clients at a time, so that memory does not grow with the cohort


def can_vectorise(bench: Workbench) -> bool:
    """Return whether this task's cohorts are trained at once."""
    parameters = list(bench.model.parameters())
    few = sum(p.numel() for p in parameters) <= MAX_PARAMETERS
    only_parameters = len(parameters) == len(bench.model.state_dict()) and all(
        p.requires_grad for p in parameters
    )
    return bench.settings.record is None and few and only_parameters and _traces(bench)


def _traces(bench: Workbench) -> bool:
    """Return whether a vectorised step of this model runs at all."""
    examples = bench.task.client_data(0)
    start = {name: p.detach() for name, p in bench.model.named_parameters()}
    stacked = {name: p.unsqueeze(0) for name, p in start.items()}
    try:
        _step(bench)(stacked, examples.inputs[:1].unsqueeze(0), examples.targets[:1].unsqueeze(0), start, 0.0)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    return True


def sum_cohort(
    bench: Workbench, content: RecordDict, clients: Sequence[int], spec: SumSpec, size: int
) -> CohortSum:
    """Train these clients from the instruction's arrays and return the sum of their vectors, shape (size,)."""
    sgd = training_settings(content, bench.settings)
    _, number = read_round(content)
    arrays = only_arrays(content)
    start = {name: torch.from_numpy(np.array(view(arrays[name]))) for name in layout_of(arrays)}
    by_records: dict[int, list[int]] = defaultdict(list)
    for client in clients:
        by_records[len(bench.task.client_data(client))].append(client)
    cohort_sum = CohortSum(np.zeros(size))
    for records, group in sorted(by_records.items()):
        for first in range(0, len(group), MAX_STACK):
            part = group[first : first + MAX_STACK]
            update, losses = _train_group(bench, part, records, start, sgd, number)
            scalars = {WEIGHT: np.full(len(part), float(records)), TRAIN_LOSS: losses}
            _add_rows(cohort_sum, update, scalars, spec)
    return cohort_sum


def _train_group(
    bench: Workbench, group: list[int], records: int, start: dict[str, Tensor], sgd: SGD, number: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    examples = [bench.task.client_data(client) for client in group]
    inputs = torch.stack([e.inputs for e in examples])
    targets = torch.stack([e.targets for e in examples])
    randomness = Randomness(bench.settings.seed)
    orders = [
        list(batches_of(records, sgd, lambda c=client: randomness.stream("shuffle", number, c).generator()))
        for client in group
    ]
    weights = {
        name: value.unsqueeze(0).repeat(len(group), *([1] * value.dim())) for name, value in start.items()
    }
    step = _step(bench)
    rows = torch.arange(len(group)).unsqueeze(1)
    losses: list[Tensor] = []
    for position in range(len(orders[0])):
        index = torch.from_numpy(np.stack([order[position] for order in orders]))
        gradients, loss = step(weights, inputs[rows, index], targets[rows, index], start, sgd.proximal_mu)
        for name, value in weights.items():
            value.sub_(gradients[name], alpha=sgd.learning_rate)
        losses.append(loss)
    update = torch.cat([(value - start[name]).flatten(1) for name, value in weights.items()], dim=1)
    return update.numpy(), torch.stack(losses).mean(0).double().numpy()


def _step(bench: Workbench) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    def loss(weights: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return bench.task.loss(functional_call(bench.model, weights, (inputs,)), targets)

    vectorised = vmap(grad_and_value(loss))

    def step(
        weights: dict[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        start: dict[str, Tensor],
        proximal_mu: float,
    ) -> tuple[dict[str, Tensor], Tensor]:
        gradients, value = vectorised(weights, inputs, targets)
        if proximal_mu:
            gradients = {
                name: g + proximal_mu * (weights[name] - start[name]) for name, g in gradients.items()
            }
        return gradients, value.detach()

    return step


def _add_rows(
    cohort_sum: CohortSum, update: NDArray[np.float32], scalars: dict[str, NDArray[np.float64]], spec: SumSpec
) -> None:
    finite = np.isfinite(update).all(axis=1)
    for _ in range(int((~finite).sum())):
        cohort_sum.drop("failed")
    rows = encode_rows(update[finite], {name: values[finite] for name, values in scalars.items()}, spec)
    cohort_sum.total += rows.sum(axis=0)
    cohort_sum.replies += len(rows)
