"""Rounds of DP-SGD at many simulated clients at once, on small perceptrons, each on the ledger of its own records.

On a small model nearly all the time of a client is Python's. Here one step computes the gradients of all clients' examples,
in rows of (client, example); norms and clipped sums are those of book-keeping. Each client draws its batches and noise
from the streams that it has alone, so that its model is the one that it trains alone, up to rounding of the sums before
their noise. All ledgers of a stack are charged before its first step. A client that cannot be charged, or whose stack
fails, such as for a gradient that is not finite, is trained alone: its seeded noise is the same, and charged once.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from ...messages import wire
from ...messages.client_settings import training_settings
from ...messages.flower_adapter import name_message
from ...messages.local_training import LocalTraining
from ...privacy.ledger.ledger import Ledger
from ...privacy.mechanisms.discrete_gaussian import add_rows_on_lattice
from ...privacy.mechanisms.private_sum import CohortSum
from ...privacy.mechanisms.randomness import Randomness, Stream
from ...privacy.mechanisms.sum_spec import SumSpec
from ...strategies.record_plan import PoissonBatches
from ...tasks.data import Examples, in_tensors
from ...tasks.optimizers import own_optimizer
from ...tasks.protocol import own_training
from ..app import answer
from ..private_update import private_update
from ..training.cohort_training import (
    MAX_STACK,
    Product,
    add_rows,
    example_losses,
    forward,
    perceptron,
    stacked,
    stacked_layers,
)
from ..workbench import Workbench
from .rounds import LedgerRound, ledger_round
from .train import lattice_of

REMEDY = "stacked clients need tensors of equal shape and type"

logger = logging.getLogger("fedveil.client")


@dataclass(frozen=True)
class ChargedClient:
    """Client whose ledger has the round's reservation.

    Attributes:
      client: its number.
      examples: its own.
      round: that its ledger was charged for.
      ledger: open.
    """

    client: int
    examples: Examples
    round: LedgerRound
    ledger: Ledger

    @property
    def sampling(self) -> PoissonBatches:
        """Sampling of its batches."""
        return cast(PoissonBatches, self.round.plan.sampling)


def can_stack(bench: Workbench) -> bool:
    """Return whether these clients' rounds can be stacked: seeded DP-SGD on own ledgers, on the processor, of a small perceptron."""
    settings, record = bench.settings, bench.settings.record
    if not record or record.canaries or record.terms.gradients != "auto" or settings.loss_traces:
        return False
    if (
        Randomness(settings.seed).kind == "system"
        or settings.accelerator != "cpu"
        or not bench.task.simulated
    ):
        return False
    return _steps_are_plain(bench, settings.training) and stacked_layers(bench) != []


def _steps_are_plain(bench: Workbench, training: LocalTraining) -> bool:
    """Return whether a step adds the mean of noised gradients alone: plain SGD without a pull or a function of the task's own."""
    own = own_training(bench.task) or (training.optimizer.name == "auto" and own_optimizer(bench.task))
    return training.optimizer.plain and not training.proximal_mu and not own


def sum_cohort(
    bench: Workbench, content: RecordDict, clients: Sequence[int], spec: SumSpec, size: int
) -> CohortSum:
    """Return the sum of clients' vectors.

    Args:
      bench: that `can_stack`.
      content: the instruction.
      clients: numbers of the cohort's clients.
      spec: of the sum.
      size: coordinates of a vector.
    """
    cohort_sum, training = CohortSum(np.zeros(size)), training_settings(content, bench.settings)
    for first in range(0, len(clients), MAX_STACK):
        part, apart = clients[first : first + MAX_STACK], set(clients[first : first + MAX_STACK])
        if _steps_are_plain(bench, training):
            for _, group in groupby(_charged(bench, content, part), lambda each: each.sampling.steps):
                apart -= _add_group(bench, content, list(group), training, spec, cohort_sum)
        for client in part:
            if client in apart:
                wire.add_reply(cohort_sum, _alone(bench, content, client), spec)
    return cohort_sum


def _alone(bench: Workbench, content: RecordDict, client: int) -> Message:
    """Return the reply of a client that is trained alone, as its app gives it."""
    message = Message(content, client, "train")
    name_message(message, str(client))
    context = cast(Context, None)  # which nothing here reads
    return private_update(message, context, lambda order, _: answer(order, client, bench))


def _charged(bench: Workbench, content: RecordDict, clients: Sequence[int]) -> list[ChargedClient]:
    """Charge clients' ledgers at once, and return those that can be stacked, in ascending order of their steps."""
    rounds: list[tuple[int, Examples, LedgerRound]] = []
    for client in clients:
        with suppress(Exception):  # raised again where the client trains alone, and answered there
            data = bench.data_of(client, bench.settings)
            if not len(data) or client in bench.settings.canary_clients:
                continue
            bench.private_model(data)
            examples = in_tensors(data, "client_data", client, REMEDY)
            rounds.append((client, examples, ledger_round(content, client, bench, bench.settings, len(data))))
    group: list[ChargedClient] = []
    try:
        with bench.writing_at_once():
            for client, examples, own in rounds:
                with suppress(Exception):
                    ledger = bench.open_ledger(own.ledger, bench.settings, own.record)
                    ledger.reserve_new(own.release)
                    group.append(ChargedClient(client, examples, own, ledger))
    except Exception:
        logger.exception("%d clients cannot be charged at once, and are charged one by one", len(rounds))
        return []
    return sorted(group, key=lambda each: each.sampling.steps)


def _add_group(
    bench: Workbench,
    content: RecordDict,
    group: Sequence[ChargedClient],
    training: LocalTraining,
    spec: SumSpec,
    cohort_sum: CohortSum,
) -> set[int]:
    """Train charged clients that take equally many steps, and add them to the sum; return their numbers, none on failure."""
    try:
        update = _train(bench, content, group, training)
        with bench.writing_at_once():
            for each in group:
                each.ledger.commit(each.round.release.key)
    except Exception:
        logger.exception("%d clients cannot be trained at once, and are trained one by one", len(group))
        return set()
    counts = np.array([len(each.examples) for each in group], np.float64)
    values = {
        each.name: np.full(len(group), np.nan) for each in spec.segments
    }  # a missing one counts as the centre
    add_rows(cohort_sum, update, {**values, wire.WEIGHT: counts}, spec, wire.sketch_for(content, spec))
    return {each.client for each in group}


def _train(
    bench: Workbench, content: RecordDict, group: Sequence[ChargedClient], training: LocalTraining
) -> NDArray[np.float32]:
    """Return the updates of a group, one in each row, in the order of the instruction's arrays.

    Raises:
      FloatingPointError: a gradient or a sum is not finite.
    """
    arrays = wire.only_arrays(content)
    start = {name: torch.from_numpy(np.array(wire.view(arrays[name]))) for name in wire.layout_of(arrays)}
    weights = stacked(start, len(group))
    sizes = {
        name: p.numel() for name, p in bench.model.named_parameters()
    }  # in the order of one client's noise
    inputs = torch.cat([each.examples.inputs for each in group])
    targets = torch.cat([each.examples.targets for each in group])
    first = np.cumsum([0, *(len(each.examples) for each in group[:-1])])  # row of each client's first example
    layers, clip = perceptron(bench.model, inputs.dim() == 2), group[0].round.plan.clipping_norm
    noise = [_noise_of(each, sum(sizes.values())) for each in group]
    draws = [each.sampling.draw(len(each.examples), each.round.batches) for each in group]
    for batches in zip(*draws, strict=True):
        rows, mask = _padded(first, batches)
        outputs, products = forward(layers, weights, inputs[rows].unflatten(0, mask.shape))
        losses = example_losses(bench.task, outputs, targets[rows].unflatten(0, mask.shape))
        backward = torch.autograd.grad(losses.sum(), [each.outputs for each in products])
        with torch.no_grad():
            sums = _clipped_sums(products, backward, mask, clip)
            flat = torch.cat([sums[name].flatten(1) for name in sizes], 1)
            _make_means(flat, noise)
            for name, mean in zip(sizes, flat.split([*sizes.values()], 1), strict=True):
                weights[name].add_(mean.view_as(weights[name]), alpha=-training.learning_rate)
    moves = [(weights[name] - value.unsqueeze(0)).flatten(1) for name, value in start.items()]
    return torch.cat(moves, 1).numpy()


def _padded(first: NDArray[np.intp], batches: Sequence[NDArray[np.intp]]) -> tuple[Tensor, Tensor]:
    """Return the rows of all clients' batches, padded to one width, and a mask of those that are no padding.

    Args:
      first: row of each client's first example, shape (clients,).
      batches: of each client, indices of its examples.

    Returns:
      Shapes (clients * n,) and (clients, n), n at least 1.
    """
    sizes = np.array([len(batch) for batch in batches])
    mask = np.arange(max(1, sizes.max())) < sizes[:, None]
    rows = np.repeat(first[:, None], mask.shape[1], 1)
    rows[mask] += np.concatenate(batches)
    return torch.from_numpy(rows.ravel()), torch.from_numpy(mask)


@dataclass(frozen=True)
class StackedNoise:
    """Noise of one client on its clipped sums.

    Attributes:
      sigma, step: standard deviation in steps of the lattice, and size of a step; see `lattice_of`.
      expected: size of a batch, by which a noised sum is divided.
      stream: from which the noise is drawn.
    """

    sigma: int
    step: float
    expected: int
    stream: Stream


def _noise_of(one: ChargedClient, coordinates: int) -> StackedNoise:
    """Return a client's noise on a sum of so many coordinates, as `NoisedParameters` adds it."""
    plan = one.round.plan
    sigma, step = lattice_of(plan.noise_std / plan.clipping_norm, plan.clipping_norm, coordinates)
    expected = max(1, round(one.sampling.sample_rate * len(one.examples)))
    return StackedNoise(sigma, step, expected, one.round.noise)


def _make_means(sums: Tensor, noise: Sequence[StackedNoise]) -> None:
    """Turn clients' clipped sums, shape (clients, coordinates), into means with noise, in place.

    Raises:
      FloatingPointError: a sum is not finite.
    """
    if not bool(sums.sum().isfinite()):
        raise FloatingPointError("a clipped sum is not finite")
    rows_of = defaultdict[tuple[int, float], list[int]](list)  # whose noise has one distribution
    for row, each in enumerate(noise):
        rows_of[each.sigma, each.step].append(row)
    for (sigma, step), rows in rows_of.items():
        if sigma:
            block = sums[rows].numpy()
            add_rows_on_lattice(block, sigma, step, [noise[row].stream for row in rows])
            sums[rows] = torch.from_numpy(block)
    sums.div_(torch.tensor([[float(each.expected)] for each in noise], dtype=sums.dtype))


def _clipped_sums(
    products: Sequence[Product], backward: Sequence[Tensor], mask: Tensor, norm: float
) -> Mapping[str, Tensor]:
    """Return each client's sum of its examples' clipped gradients, by name of the parameter, shape (clients, ...).

    Args:
      products: of the linear layers, as `forward` returns them.
      backward: gradients of their outputs for the sum of all examples' losses.
      mask: whether a row is an example of the client's batch, shape (clients, n); the others are padding.
      norm: largest norm of an example's gradient.

    Raises:
      FloatingPointError: an example's gradient is not finite.
    """
    squares = of_inputs = torch.zeros(mask.shape, dtype=torch.float64)
    for product, gradient in zip(products, backward, strict=True):
        own = product.inputs.double().square().sum(1)
        of_inputs = torch.maximum(of_inputs, own)
        squares = squares + gradient.double().square().sum(1) * (own + product.biased)
    norms = squares.sqrt()
    # In float32, in which a client alone leaves out what is not finite.
    if not bool(torch.stack([squares, of_inputs])[:, mask].float().isfinite().all()):
        raise FloatingPointError("an example's gradient is not finite")
    factors = ((norm / (norms + 1e-6)).clamp(max=1.0) * mask).float()  # as Opacus clips
    sums: dict[str, Tensor] = {}
    for product, gradient in zip(products, backward, strict=True):
        clipped = gradient * factors.unsqueeze(1)
        sums[f"{product.name}weight"] = clipped @ product.inputs.transpose(1, 2)
        if product.biased:
            sums[f"{product.name}bias"] = clipped.sum(2)
    return sums
