"""Attribution of one prediction to its inputs, for its owner: integrated gradients (Sundararajan, Taly and Yan 2017, arXiv:1703.01365).

It needs only the model, the row and a declared baseline, but no other person's data: on the owner's device it costs no
epsilon.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..base.refusal import Refusal
from ..configs.strict import nearest

if TYPE_CHECKING:
    from .table_schema import Schema

METHOD = "integrated_gradients"
# Data that each of these explainers needs in addition to the model and the row.
NEEDED_DATA: Mapping[str, str] = {
    "kernel_shap": "background rows of the training data, which it stores",
    "deep_shap": "background rows of the training data, which it stores",
    "gradient_shap": "background rows of the training data, which it averages over",
    "expected_gradients": "rows of the training data, which it averages over",
    "tree_shap": "background rows of the training data, or counts of them in every leaf",
    "lime": "means and frequencies of the training data, which are not charged",
    "anchors": "rows of the training data, which it samples",
    "counterfactuals": "rows of the training data, which it searches",
}
STEPS = 50  # nodes of Gauss and Legendre, exact for polynomials of degree 99; captum's own default


def check_method(name: str) -> None:
    """Refuse a value of `--explain` that is unknown, or needs other people's rows."""
    method = name.lower().replace("-", "_")
    if method in NEEDED_DATA:
        remedy = f"needs {NEEDED_DATA[method]}: that is a release without a ledger entry; use {METHOD}"
        raise Refusal("--explain", name, remedy)
    if method != METHOD:
        remedy = nearest(method, [METHOD, *NEEDED_DATA]).replace("known", f"use {METHOD}; known")
        raise Refusal("--explain", name, remedy)


def integrated_gradients(
    model: nn.Module, inputs: Tensor, baseline: Tensor, outputs: Tensor | None
) -> Tensor:
    """Return each input's contribution to an output relative to a baseline, shape (n, ...), float64.

    The attributions of a row sum to its output minus the baseline's, up to the error of the integral, which is zero for
    a linear model: there they are w(x - b).

    Args:
      model: in evaluation mode; it is not changed.
      inputs: shape (n, ...), floating point.
      baseline: one row, shape (...).
      outputs: for each row the number of the explained output, shape (n,), int64; None for a model with one output.

    Raises:
      Refusal: inputs are integers, which have no gradient.
    """
    _check_inputs(inputs)
    exact = copy.deepcopy(model).double().eval()
    difference = inputs.double() - baseline.double()
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)  # on [-1, 1]
    mean_gradient = torch.zeros_like(difference)  # on the line from the baseline to each row
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        point = (baseline.double() + (node + 1) / 2 * difference).requires_grad_()
        explained_outputs = _select_outputs(exact(point), outputs)
        (gradient,) = torch.autograd.grad(explained_outputs.sum(), point)
        mean_gradient += weight / 2 * gradient
    return difference * mean_gradient


def _check_inputs(inputs: Tensor) -> None:
    if not inputs.is_floating_point():
        remedy = "are integers, such as token numbers; a gradient needs floating-point inputs"
        raise Refusal("data", str(inputs.dtype), remedy)


def _select_outputs(outputs: Tensor, numbers: Tensor | None) -> Tensor:
    """Return each row's output of the given number, shape (n,); `numbers` is None if there is only one output."""
    if numbers is None:
        return outputs.reshape(len(outputs), -1)[:, 0]
    return outputs.gather(1, numbers[:, None])[:, 0]


def explained(
    model: nn.Module, inputs: Tensor, schema: Schema | None, classifies: bool
) -> dict[str, NDArray[Any]]:
    """Return, by column name, each input's contribution to the score of the model's prediction, shape (n,) each.

    `at_baseline` is the score of the baseline: with a schema the middle of each number, or its mean if declared, no bin
    of a binned number and no word of a category; otherwise zeros. It and the contributions sum to `score`: the logit of
    the most likely class, or the number in its own unit, before it is clipped to its bounds.

    Args:
      model: in evaluation mode.
      inputs: shape (n, ...).
      schema: schema of tables, whose contributions are summed by column and by pair; None for arrays, with columns
        `input_0` etc.
      classifies: whether outputs for arrays are logits of classes; a schema's label says so itself.
    """
    _check_inputs(inputs)
    baseline = inputs.new_zeros(inputs.shape[1:])
    with torch.no_grad():
        outputs = model(inputs)
        if schema is not None:
            predicted = schema.outcome.explained(outputs)
        else:
            predicted = (
                outputs.argmax(1) if classifies and outputs.dim() == 2 and outputs.shape[1] > 1 else None
            )
        exact = copy.deepcopy(model).double().eval()
        outputs_at_baseline = exact(baseline.double()[None]).expand(len(inputs), *outputs.shape[1:])
        at_baseline = _select_outputs(outputs_at_baseline, predicted)
        score = _select_outputs(exact(inputs.double()), predicted)
    parts = integrated_gradients(model, inputs, baseline, predicted).flatten(1)
    if schema is None:
        columns = {"score": score.numpy(), "at_baseline": at_baseline.numpy()}
        return columns | {f"input_{index}": column.numpy() for index, column in enumerate(parts.T)}
    offset, scale = schema.unit
    columns = {
        "score": (offset + scale * score).numpy(),
        "at_baseline": (offset + scale * at_baseline).numpy(),
    }
    columns_and_pairs = (*schema.inputs, *schema.pairs)
    inputs_by_column = (scale * parts).split([each.width for each in columns_and_pairs], 1)
    for column, contributions in zip(columns_and_pairs, inputs_by_column, strict=True):
        columns[column.name] = contributions.sum(1).numpy()
    return columns
