"""Training a whole cohort of a small model at once: the same mathematics as one client after the other.

On a small model nearly all the time of a client is Python. Clients with equally many examples are stacked and
trained by one vectorised step each (`torch.func.vmap`): same batches, same order, same seeds, equal to the path of
single clients up to float rounding, which a test holds. Chosen when the model has few parameters; a model that
cannot be vectorised is trained client by client.
"""

from __future__ import annotations

import logging
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

logger = logging.getLogger("fedveil.client")

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
    start = {name: p.detach() for name, p in bench.model.named_parameters()}
    stacked = {name: p.unsqueeze(0) for name, p in start.items()}
    try:
        examples = bench.task.client_data(0)
        _step(bench)(stacked, examples.inputs[:1].unsqueeze(0), examples.targets[:1].unsqueeze(0), start, 0.0)
    except Exception:  # noqa: BLE001 (whatever the task's own code raises, single clients are told apart)
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
    cohort_sum = CohortSum(np.zeros(size))

    def add(group: list[int]) -> None:
        try:
            update, scalars = _train_group(bench, group, start, sgd, number)
        except Exception:
            if len(group) > 1:  # one of them fails, or they cannot be stacked: the others must not suffer
                for client in group:
                    add([client])
                return
            logger.exception("round failed at this client")
            return cohort_sum.drop("failed")
        _add_rows(cohort_sum, update, scalars, spec)

    for group in _of_one_size(bench, clients):
        for first in range(0, len(group), MAX_STACK):
            add(group[first : first + MAX_STACK])
    return cohort_sum


def _of_one_size(bench: Workbench, clients: Sequence[int]) -> list[list[int]]:
    """Return the clients in groups with equally many examples; one that cannot say how many stands alone."""
    alone: list[list[int]] = []
    by_records: dict[int, list[int]] = defaultdict(list)
    for client in clients:
        try:
            by_records[len(bench.task.client_data(client))].append(client)
        except Exception:  # noqa: BLE001 (it fails again, and is counted, when it trains)
            alone.append([client])
    return [*alone, *(group for _, group in sorted(by_records.items()))]


def _train_group(
    bench: Workbench, group: list[int], start: dict[str, Tensor], sgd: SGD, number: int
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float64]]]:
    examples = [bench.task.client_data(client) for client in group]
    records = len(examples[0])
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
    mean_losses = torch.stack(losses).mean(0).double().numpy()
    return update.numpy(), {WEIGHT: np.full(len(group), float(records)), TRAIN_LOSS: mean_losses}


def _step(bench: Workbench) -> Callable[..., tuple[dict[str, Tensor], Tensor]]:
    model, task = bench.model, bench.task

    def loss(weights: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return task.loss(functional_call(model, weights, (inputs,)), targets)

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
