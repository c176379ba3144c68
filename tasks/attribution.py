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
CARRIES: Mapping[str, str] = {
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
    """Refuse an unknown explainer, or one that contains other people's rows.

    Args:
      name: from `--explain`.

    Raises:
      Refusal: it is; the sentence gives the reason.
    """
    method = name.lower().replace("-", "_")
    if method in CARRIES:
        remedy = f"needs {CARRIES[method]}: that is a release without a ledger entry; use {METHOD}"
        raise Refusal("--explain", name, remedy)
    if method != METHOD:
        raise Refusal(
            "--explain", name, nearest(method, [METHOD, *CARRIES]).replace("known", f"use {METHOD}; known")
        )


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
    start, away = baseline.double(), inputs.double() - baseline.double()
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)
    total = torch.zeros_like(away)
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        here = (start + (node + 1) / 2 * away).requires_grad_()
        chosen = picked(exact(here), outputs)
        (slope,) = torch.autograd.grad(chosen.sum(), here)
        total += weight / 2 * slope
    return away * total


def _check_inputs(inputs: Tensor) -> None:
    if not inputs.is_floating_point():
        remedy = "are integers, such as token numbers; a gradient needs floating-point inputs"
        raise Refusal("data", str(inputs.dtype), remedy)


def picked(outputs: Tensor, which: Tensor | None) -> Tensor:
    """Return one output of each row, shape (n,).

    Args:
      outputs: of a model, shape (n,), (n, 1) or (n, outputs).
      which: shape (n,), int64; None with one output.
    """
    if which is None:
        return outputs.reshape(len(outputs), -1)[:, 0]
    return outputs.gather(1, which[:, None])[:, 0]


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
      schema: of tables, whose inputs are summed by column; None for arrays, whose inputs are named `input_0` and so on.
      classifies: whether outputs are logits of classes.
    """
    _check_inputs(inputs)
    baseline = inputs.new_zeros(inputs.shape[1:])
    with torch.no_grad():
        outputs = model(inputs)
        which = outputs.argmax(1) if classifies and outputs.dim() == 2 and outputs.shape[1] > 1 else None
        exact = copy.deepcopy(model).double().eval()
        score = picked(exact(inputs.double()), which)
        start = picked(exact(baseline.double()[None]).expand(len(inputs), *outputs.shape[1:]), which)
    parts = integrated_gradients(model, inputs, baseline, which).flatten(1)
    if schema is not None:
        middle, half = schema.unit
        score, start, parts = middle + half * score, middle + half * start, half * parts
    columns = {"score": score.numpy(), "at_baseline": start.numpy()}
    if schema is None:
        return columns | {f"input_{index}": column.numpy() for index, column in enumerate(parts.T)}
    widths = [column.width for column in schema.inputs]
    sums = [part.sum(1).numpy() for part in parts.split(widths, 1)]
    return columns | {column.name: each for column, each in zip(schema.inputs, sums, strict=True)}
