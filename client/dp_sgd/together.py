"""Step of DP-SGD on the records of all clients together: each client sums the clipped gradients of its sampled records.

The noise is added to the sum (`privacy/mechanisms`), so that no client adds all of it. A client sends minus the
learning rate times its sum of clipped gradients: the strategy takes the mean as one client's update, so that FedAvg is
SGD, FedAvgM adds momentum and FedAdam is Adam. A step starts only from the released model. A second step within a round
would start from a state with only a client's own share of the noise, which is too little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer
from torch import nn

from ...messages.client_settings import ClientSettings, training_settings
from ...messages.record_settings import StepTerms
from ...messages.wire import CANARY_RECORDS, Layout, layout_of, only_arrays, sketch_for, sum_spec_of
from ...privacy.mechanisms.compression import Sketch
from ...privacy.mechanisms.randomness import Stream
from ...strategies.record_plan import PoissonBatches
from ...tasks.data import Batches
from ...tasks.protocol import Objective
from ..extra import BLOCK, MODEL_PREFIX
from .sketched import SketchedOptimizer, offsets_of
from .train import clipping, engine_of, plain_sgd

ROWS = 2048  # of a step processed at a time, so that memory does not grow with the draw


@dataclass(frozen=True)
class GradientClip:
    """Clipping of each record's gradient in a step.

    Attributes:
      max_grad_norm: largest L2 norm of a gradient; with a sketch, of its compressed values.
      gradients: `auto`, or a name of `ENGINES` in `train`.
      sketch: compression of a gradient before it is clipped; None clips whole gradients.
    """

    max_grad_norm: float
    gradients: str = "auto"
    sketch: Sketch | None = None


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
    layout: Layout,
) -> dict[str, NDArray[np.float64]]:
    """Return minus the learning rate times the sum of the rows' clipped gradients, by name; zeros for buffers.

    An example whose gradient is not finite adds nothing.

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
    """Return the contribution of these rows to the sum of an instruction's round, by name; other arguments as of `step`.

    In an audit, model and loss are those of `Workbench.model_of_step`, and the sum has a block of its canary records.
    """
    joint, layout = settings.step, layout_of(only_arrays(content))
    assert joint is not None
    sketch = sketch_for(content, sum_spec_of(content))
    factor = 1.0 if sketch is None else sketch.compression.clip_factor
    terms = joint.terms
    clip = GradientClip(max_grad_norm=terms.max_grad_norm * factor, gradients=terms.gradients, sketch=sketch)
    rate = training_settings(content, settings).learning_rate
    if not joint.canaries.count:
        return step(model, loss, data, rows, clip, rate, layout)
    # The observed model has the sent parameters under a prefix, and the block with one coordinate for each canary record.
    observed = {name: BLOCK if name == CANARY_RECORDS else MODEL_PREFIX + name for name in layout}
    shapes = {observed[name]: shape for name, shape in layout.items()}
    update = step(model, loss, data, rows, clip, rate, shapes)
    return {name: update[observed[name]].reshape(shape) for name, shape in layout.items()}


def _optimizer_of(model: nn.Module, names: Sequence[str], clip: GradientClip, layout: Layout) -> DPOptimizer:
    """Return Opacus' optimiser that clips the gradients of the parameters with these names, and adds no noise."""
    norm = clip.max_grad_norm
    options: Any = {"noise_multiplier": 0.0, "max_grad_norm": norm, "expected_batch_size": 1}
    if clip.sketch is None:
        return DPOptimizer(plain_sgd(model), **options)
    offsets = offsets_of(names, layout, clip.sketch)
    return SketchedOptimizer(plain_sgd(model), offsets, clip.sketch, **options)


def _clipped_sums(
    model: nn.Module,
    task: Objective,
    data: Batches,
    rows: NDArray[np.intp],
    clip: GradientClip,
    layout: Layout,
) -> dict[str, NDArray[np.float64]]:
    """Return the sums of the clipped gradients of these rows, float64, by parameter; zeros without rows."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: np.zeros(tuple(p.shape)) for name, p in parameters.items()}
    if not len(rows):
        return totals
    engine = engine_of(clip.gradients, model, data, compressed=clip.sketch is not None)
    optimizer = _optimizer_of(model, list(parameters), clip, layout)
    with clipping(model, task, data, optimizer, engine) as write_sums:
        for start in range(0, len(rows), ROWS):
            write_sums(rows[start : start + ROWS])  # to `summed_grad` of each parameter
            for name, parameter in parameters.items():
                totals[name] += parameter.summed_grad.detach().cpu().numpy()  # pyright: ignore[reportAttributeAccessIssue]
    return totals
