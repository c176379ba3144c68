"""Step of DP-SGD on the records of all clients together: each client sums the clipped gradients of its sampled records.

The noise is added to the sum (`privacy/mechanisms`), so that no client adds all of it. A client sends minus the
learning rate times its sum of clipped gradients: the strategy takes the mean as one client's update, so that FedAvg is
SGD, FedAvgM adds momentum and FedAdam is Adam. A step starts only from the released model. A second step within a round
would start from a state with only a client's own share of the noise, which is too little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from torch import nn

from ...messages.client_settings import ClientSettings, StepTerms, training_settings
from ...messages.wire import CANARY_RECORDS, Layout, layout_of, only_arrays, sketch_for, sum_spec_of
from ...privacy.mechanisms.randomness import Stream
from ...strategies.record_plan import PoissonBatches
from ...tasks.data import Batches
from ...tasks.protocol import Objective
from ..extra import BLOCK, MODEL_PREFIX
from .sketched import SketchedOptimizer, offsets_of
from .train import chosen_engine, clipping, plain_sgd

_engines: WeakKeyDictionary[nn.Module, dict[tuple[str, bool], str]] = WeakKeyDictionary()
ROWS = 2048  # of a step processed at a time, so that memory does not grow with the draw


def draw_records(records: int, joint: StepTerms, stream: Stream) -> NDArray[np.intp]:
    """Return the records of a client that take part in a round, each drawn by its own secret coin.

    Args:
      records: of the client.
      joint: of the step.
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
    joint: StepTerms,
    learning_rate: float,
    layout: Layout,
) -> dict[str, NDArray[np.float64]]:
    """Return minus the learning rate times the sum of the rows' clipped gradients, by name; zeros for buffers.

    An example whose gradient is not finite adds nothing.

    Args:
      model: as the server sent it; its gradients are overwritten, its parameters do not change.
      task: gives the loss, a mean over a batch.
      data: that the rows are of.
      rows: indices of the examples that take part.
      joint: of the step; clipping norm and engine.
      learning_rate: of the step, above 0.
      layout: shapes by name, in the order of the update.
    """
    sums = _clipped_sums(model, task, data, rows, joint, layout)
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
    """Return the contribution of these rows to a round's sum: the step, and the block of an observer's extra records.

    Args:
      model: as the server sent it, with the block if there are extra records.
      loss: of both.
      settings: of the step.
      content: the instruction.
      data: source of the rows, extra records included.
      rows: indices of the examples that take part.
    """
    joint, layout = settings.step, layout_of(only_arrays(content))
    assert joint is not None
    sketch = sketch_for(content, sum_spec_of(content))
    if sketch is not None:
        factor = sketch.compression.clip_factor
        clipped = replace(joint.terms, max_grad_norm=joint.terms.max_grad_norm * factor)
        joint = replace(joint, terms=clipped, sketch=sketch)
    rate = training_settings(content, settings).learning_rate
    if not joint.canaries.count:
        return step(model, loss, data, rows, joint, rate, layout)
    inside = {name: BLOCK if name == CANARY_RECORDS else MODEL_PREFIX + name for name in layout}
    shapes = {inside[name]: shape for name, shape in layout.items()}
    update = step(model, loss, data, rows, joint, rate, shapes)
    return {name: update[inside[name]].reshape(shape) for name, shape in layout.items()}


def _optimizer_of(model: nn.Module, names: Sequence[str], joint: StepTerms, layout: Layout) -> DPOptimizer:
    inner = plain_sgd(model)
    options: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": joint.terms.max_grad_norm,
        "expected_batch_size": 1,
    }
    if joint.sketch is None:
        return DPOptimizer(inner, **options)
    return SketchedOptimizer(inner, offsets_of(names, layout, joint.sketch), joint.sketch, **options)


def _clipped_sums(
    model: nn.Module, task: Objective, data: Batches, rows: NDArray[np.intp], joint: StepTerms, layout: Layout
) -> dict[str, NDArray[np.float64]]:
    """Return the sums of the clipped gradients of these rows, float64, by parameter; zeros without rows."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: np.zeros(tuple(p.shape)) for name, p in parameters.items()}
    if not len(rows):
        return totals
    engines = _engines.setdefault(model, {})  # choosing an engine takes as long as a round's one step
    gradients, is_compressed = key = joint.terms.gradients, joint.sketch is not None
    engine = engines[key] = engines.get(key) or chosen_engine(gradients, model, data, is_compressed)
    optimizer = _optimizer_of(model, list(parameters), joint, layout)
    with clipping(model, task, data, optimizer, engine) as clip:
        for start in range(0, len(rows), ROWS):
            clip(rows[start : start + ROWS])  # writes `summed_grad` of each parameter
            for name, parameter in parameters.items():
                totals[name] += parameter.summed_grad.detach().cpu().numpy()  # pyright: ignore[reportAttributeAccessIssue]
    return totals
