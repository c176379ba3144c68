"""Rounds of DP-SGD at a client: on the ledger of its own records, or its part of one step on all clients' records.

In such a step each client sums the clipped gradients of its sampled records. The noise is added to the sum of all
(`privacy/mechanisms`), so that no client adds all of it. A client sends minus the learning rate times its sum of clipped
gradients: the strategy takes the mean as one client's update, so that FedAvg is SGD, FedAvgM adds momentum and FedAdam is
Adam. A step starts only from the released model. A second step within a round would start from a state with only a
client's own share of the noise, which is too little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from flwr.app import Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn

from ...base.refusal import Refusal
from ...messages import wire
from ...messages.client_settings import ClientSettings, training_settings
from ...messages.local_training import LocalTraining
from ...messages.record_settings import RecordPrivacy, StepTerms
from ...privacy.budget import Release, check_delta
from ...privacy.mechanisms.compression import Sketch
from ...privacy.mechanisms.private_sum import CohortSum, on_grid
from ...privacy.mechanisms.randomness import Randomness, Stream
from ...privacy.mechanisms.sum_spec import SumSpec
from ...privacy.plan import Plan
from ...strategies.record_plan import PoissonBatches
from ...tasks.batch_memory import AUTO
from ...tasks.data import Batches, Data, Union
from ...tasks.hardware import placed
from ...tasks.protocol import Objective
from ..extra import BLOCK, MODEL_PREFIX, OwnRound, extra_records
from ..private_update import compressed, record_sum_reply
from ..training.sgd import key_of_round, seed_layers
from ..workbench import Workbench
from .clipped import ClippedParameters
from .sketched import SketchedParameters, offsets_of
from .train import PrivateSteps, clipping, engine_of, train_privately

MECHANISM = "dp_sgd"  # of releases on a ledger


@dataclass(frozen=True)
class GradientClip:
    """Clipping of each record's gradient in a step.

    Attributes:
      max_grad_norm: largest L2 norm of a gradient; with a sketch, of its compressed values.
      gradients: `auto`, or a name of `ENGINES` in `train`.
      sketch: compression of a gradient before it is clipped; None clips whole gradients.
      examples_at_once: limit of the examples in memory, as of `trained_at_once`.
    """

    max_grad_norm: float
    gradients: str = "auto"
    sketch: Sketch | None = None
    examples_at_once: str = AUTO


def draw_records(records: int, joint: StepTerms, stream: Stream) -> NDArray[np.intp]:
    """Return the rows of a client's records that take part in a round, each drawn by its own secret coin.

    Args:
      records: number of the client's records.
      joint: settings of the step, with its sampling rate.
      stream: of this client and round; used for this draw only.
    """
    rate = joint.terms.sample_rate
    assert rate is not None
    return next(PoissonBatches(rate, 1).draw(records, stream))


def step(
    model: nn.Module,
    task: Objective,
    data: Batches,
    rows: NDArray[np.intp],
    clip: GradientClip,
    learning_rate: float,
    layout: wire.Layout,
) -> dict[str, NDArray[np.float64]]:
    """Return minus the learning rate times the sum of the rows' clipped gradients, by name; zeros for buffers.

    No noise is added: the private sum of all clients adds it. An example whose gradient is not finite adds nothing.

    Args:
      model: as the server sent it; its gradients are overwritten, its parameters do not change.
      task: gives the loss, a mean over a batch.
      data: source of the rows.
      rows: indices of the examples that take part.
      clip: clipping of each gradient.
      learning_rate: above 0.
      layout: shapes by name, in the order of the update.
    """
    sums = _clipped_sums(model, task, data, rows, clip, layout)
    return {
        name: sums[name] * -learning_rate if name in sums else np.zeros(shape)
        for name, shape in layout.items()
    }


def step_of(
    model: nn.Module,
    loss: Objective,
    settings: ClientSettings,
    content: RecordDict,
    data: Batches,
    rows: NDArray[np.intp],
) -> dict[str, NDArray[np.float64]]:
    """Return the contribution of these rows, without noise, to the sum of an instruction's round, by name.

    The model has the instruction's arrays already; other arguments as of `step`. In an audit, model and loss are those of
    `Workbench.model_of_step`, and the sum has a block of its canary records.
    """
    joint, layout = settings.step, wire.layout_of(wire.only_arrays(content))
    assert joint is not None
    sketch = wire.sketch_for(content, wire.sum_spec_of(content))
    factor = 1.0 if sketch is None else sketch.compression.clip_factor
    terms = joint.terms
    clip = GradientClip(
        max_grad_norm=terms.max_grad_norm * factor,
        gradients=terms.gradients,
        sketch=sketch,
        examples_at_once=settings.examples_at_once,
    )
    rate = training_settings(content, settings).learning_rate
    if not joint.canaries.count:
        return step(model, loss, data, rows, clip, rate, layout)
    # The observed model has the sent parameters under a prefix, and the block with one coordinate for each canary record.
    observed = {name: BLOCK if name == wire.CANARY_RECORDS else MODEL_PREFIX + name for name in layout}
    shapes = {observed[name]: shape for name, shape in layout.items()}
    update = step(model, loss, data, rows, clip, rate, shapes)
    return {name: update[observed[name]].reshape(shape) for name, shape in layout.items()}


def _parameters_of(
    parameters: Mapping[str, Tensor], clip: GradientClip, layout: wire.Layout
) -> ClippedParameters:
    """Return these parameters, by name, with the norm and the compression of a clip."""
    if clip.sketch is None:
        return ClippedParameters(parameters.values(), clip.max_grad_norm)
    offsets = offsets_of(list(parameters), layout, clip.sketch)
    return SketchedParameters(parameters.values(), clip.max_grad_norm, offsets, clip.sketch)


def _clipped_sums(
    model: nn.Module,
    task: Objective,
    data: Batches,
    rows: NDArray[np.intp],
    clip: GradientClip,
    layout: wire.Layout,
) -> dict[str, NDArray[np.float64]]:
    """Return the sums of the clipped gradients of these rows, float64, by parameter; zeros without rows."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not len(rows):
        return {name: np.zeros(tuple(p.shape)) for name, p in parameters.items()}
    engine = engine_of(clip.gradients, model, data, compressed=clip.sketch is not None)
    clipped = _parameters_of(parameters, clip, layout)
    with clipping(model, task, data, clipped, engine, clip.examples_at_once) as write_sums:
        write_sums(rows)
        sums: dict[str, Any] = {name: cast(Any, each).summed_grad for name, each in parameters.items()}
        return {name: each.detach().cpu().double().numpy() for name, each in sums.items()}


@dataclass(frozen=True)
class LedgerRound:
    """Round of a client on the ledger of its own records, about to be charged.

    Attributes:
      record: record-level privacy of the client.
      ledger: name of the client's ledger.
      plan: of the round's steps.
      batches: stream of the batches.
      noise: stream of the noise.
      release: that is charged for all steps.
    """

    record: RecordPrivacy
    ledger: str
    plan: Plan
    batches: Stream
    noise: Stream
    release: Release


def ledger_round(
    content: RecordDict, client: int, bench: Workbench, settings: ClientSettings, records: int
) -> LedgerRound:
    """Return the round of a client.

    Args:
      content: the instruction.
      client: number of the client.
      bench: names the ledger of the client's records.
      settings: of the client, with record-level privacy.
      records: number of its records, at least 1.

    Raises:
      Refusal: delta is too large for the data.
    """
    record, (run, number) = settings.record, wire.read_round(content)
    assert record is not None
    terms, randomness = record.terms, Randomness(settings.seed)
    check_delta("privacy", terms.target_delta, records, "records", record.allow_large_delta)
    name = bench.ledger_name(client, settings, record)
    plan, event = bench.plan_of(name, records, settings, record)
    batches = randomness.stream("batches", number, client)
    noise = randomness.stream("dp-sgd noise", number, client)
    # The release has the client's number because clients with equal data share a ledger, and each is charged. It has the
    # attempt's number because another attempt at a round draws fresh noise; seeded noise repeats, at no further cost.
    attempt = wire.read_attempt(content) if settings.seed is None else 0
    mechanism = f"{MECHANISM} {client}" + (f" attempt {attempt}" if attempt else "")
    events = dict.fromkeys(plan.adversaries, event)
    release = Release(terms.budget.unit, run, number, mechanism, events, randomness.kind)
    return LedgerRound(record, name, plan, batches, noise, release)


def train_on_ledger(
    content: RecordDict,
    client: int,
    bench: Workbench,
    settings: ClientSettings,
    data: Data,
    training: LocalTraining,
) -> None:
    """Train the bench's model, which has the instruction's arrays, on a client's data, which are on the bench's device.

    The ledger of the client's records is charged before the first step, and stays charged if training fails.

    Raises:
      BudgetExhausted: the ledger does not allow the round.
      Refusal: the ledger cannot be used, or delta is too large for the data.
    """
    charge = ledger_round(content, client, bench, settings, len(data))
    record, plan, release = charge.record, charge.plan, charge.release
    if record.canaries:
        begin, path = extra_records().begin_round, record.ledger_path(charge.ledger)
        randomness = Randomness(settings.seed)
        private_round = begin(bench.model, bench.task, data, plan, record.canaries, randomness, path)
    else:
        private_round = OwnRound(bench.model, bench.task, data)
    engine = engine_of(record.terms.gradients, private_round.model, private_round.examples)
    after, limit = private_round.after_step, settings.examples_at_once
    steps = PrivateSteps(plan, charge.batches, charge.noise, after, limit)
    with bench.open_ledger(charge.ledger, settings, record) as ledger:
        ledger.reserve_new(release)
        model, loss, examples = private_round.model, private_round.loss, private_round.examples
        train_privately(model, loss, examples, training, steps, engine)
        private_round.keep(release.round)
        ledger.commit(release.key)


def step_round(message: Message, client: int, bench: Workbench, settings: ClientSettings) -> Message:
    """Return the reply with one client's contribution to the step; noise and charge are those of the whole sum.

    Arguments as of `train_round`, where `settings.step` is not None.

    Raises:
      Refusal: the sum does not allow contributions of this norm.
    """
    step, content = settings.step, message.content
    assert step is not None
    _, number = wire.read_round(content)
    _begin_step(bench, client, content, settings)
    _check_norm(step.terms.max_grad_norm, content, settings)
    data = bench.records_of(client, settings)
    rows = draw_records(len(data), step, Randomness(settings.seed).stream("batches", number, client))
    examples = placed(data, bench.device)
    model, loss = bench.model_of_step(settings)
    update = step_of(model, loss, settings, content, examples, rows)
    bench.require_base()
    return record_sum_reply(message, update)


def _begin_step(bench: Workbench, client: int, content: RecordDict, settings: ClientSettings) -> None:
    """Check that DP-SGD can train the bench's model, load the instruction's arrays, and seed what its layers draw."""
    data, arrays = bench.data_of(client, settings), wire.views(wire.only_arrays(content))
    arrays.pop(wire.CANARY_RECORDS, None)
    bench.private_model(data)
    bench.receive(arrays)
    _, number = wire.read_round(content)
    seed_layers(key_of_round(settings.seed, number), client, data, bench.device)


def _check_norm(norm: float, content: RecordDict, settings: ClientSettings) -> None:
    """Check that a record's part, learning rate times clipped gradient, stays within the bound for which the sum has noise."""
    rate, spec = training_settings(content, settings).learning_rate, wire.sum_spec_of(content)
    factor = 1.0 if spec.compression is None else spec.compression.clip_factor
    if spec.unit_norm is None or norm * rate * factor > spec.unit_norm:
        remedy = f"times the learning rate it exceeds the sum's norm of a record's part, {spec.unit_norm}"
        raise Refusal("privacy.max_grad_norm", norm, remedy)


def union_of(bench: Workbench) -> Union:
    """Return the records of all clients of the bench's task."""
    parts = tuple(bench.records_of(client, bench.settings) for client in range(bench.task.num_clients))
    return Union(parts, tuple(int(n) for n in np.cumsum([0, *(len(each) for each in parts)])))


def sum_of_union(
    bench: Workbench, union: Union, content: RecordDict, clients: Sequence[int], spec: SumSpec, size: int
) -> CohortSum:
    """Return the sum of these clients' contributions, in one pass over their drawn records.

    The drawn records are those that the clients would draw one by one. The sum is rounded to the lattice once instead
    of once for each client, so the two results differ by rounding; layers with random draws, such as Dropout, use one
    generator for all clients.

    `union` holds the records of all clients, not of these alone; other arguments as of `sum_cohort`.
    """
    settings, (_, number) = bench.settings, wire.read_round(content)
    assert settings.step is not None
    _begin_step(bench, 0, content, settings)
    randomness = Randomness(settings.seed)
    rows: list[NDArray[np.intp]] = []  # of the union
    for client in clients:
        coins = randomness.stream("batches", number, client)
        rows.append(union.first[client] + draw_records(len(union.parts[client]), settings.step, coins))
    examples = placed(cast(Data, union), bench.device)
    model, loss = bench.model_of_step(settings)
    update = step_of(model, loss, settings, content, examples, np.concatenate(rows))
    sent = compressed(update, content, spec)
    assert sum(value.size for value in sent.values()) == size
    return CohortSum(on_grid(sent, spec), len(clients))
