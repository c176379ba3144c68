"""Intervals of the coefficients and predictions of a linear or additive model of tables, noise included.

They are computed once, at the end of a run, from the released model, the run's public plan and its public held-out rows,
so that they cost no privacy. The run folder keeps what predictions need in `INTERVALS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.durable_files import replace_file
from ..base.refusal import Refusal
from ..base.tensor_file import safetensors_parts
from ..run.files import INTERVALS, MODEL, RESULT
from ..run.run_files import read_object
from ..tasks.tables import Tables
from .coefficients import INTERCEPT, contrasts_of, spread
from .descent import Descent, Design, ModelEstimate, estimate
from .outcomes import Array, ClassLaw, NumberLaw, contrasts, softmax
from .run_steps import NoInterval, steps_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..run.prepared_run import Run
    from ..server.checkpoint import State

LEVEL = 0.95
MAX_ROWS = 2_000  # public rows that stand for the distribution of the inputs
MIN_ROWS = 50
ROWS_PER_INPUT = 3  # of a public table whose residuals stand for those of all rows
NOT_INVERTED = (
    "no model without noise leads to the released one: the noise is too large, or the clip too small; "
    "use more records, a larger epsilon or a larger privacy.max_grad_norm"
)
TINY = 1e-12  # least distance of a probability from 0 and 1
MAX_PARAMETERS = 400  # of a covariance matrix in memory, and of the time to invert the steps


def interval_fields(run: Run, state: State) -> Mapping[str, Any]:
    """Return the field `intervals` of a run's result, and write `INTERVALS`; nothing for a task without a linear score.

    Args:
      run: ended, on any task.
      state: after its last round.
    """
    task = run.federation.task
    if not isinstance(task, Tables) or task.hidden:
        return {}
    try:
        fit = _released(run, state, task)
    except NoInterval as reason:
        return {"intervals": {"reason": str(reason)}}
    replace_file(run.folder / INTERVALS, safetensors_parts(fit.arrays()), mode=None)
    return {"intervals": _report(task, fit)}


@dataclass(frozen=True)
class Fit:
    """Fit of the true model to the released one.

    Attributes:
      estimate: of its coefficients.
      inputs: public rows with their 1 last, shape (m, d).
      residuals: sizes of the public rows' residuals, shape (m,); empty for classes.
      outputs: reported functions of the scores, shape (outputs, scores): a number, or each class against the first one.
    """

    estimate: ModelEstimate
    inputs: Array
    residuals: Array
    outputs: Array

    def arrays(self) -> dict[str, Array]:
        """Return the arrays that predictions need, by name."""
        fit = self.estimate
        return {
            "coefficients": fit.coefficients,
            "covariance": fit.covariance,
            "span": np.ascontiguousarray(fit.span),
            "residuals": self.residuals,
        }


def _released(run: Run, state: State, task: Tables) -> Fit:
    """Return the fit of the true model; raise NoInterval with the reason for a run without intervals."""
    fit, _ = LAWS.get(getattr(task.schema.outcome, "law", ""), (None, None))
    if fit is None:
        raise NoInterval("there is no law of intervals for this kind of label; predict a number or a class")
    steps, examples = steps_of(run, state), task.held_out()
    if task.schema.weight is not None:
        raise NoInterval("the weights of public rows are unknown; train without weight")
    if task.weights:
        raise NoInterval("weights of classes move the scores; train without them")
    if task.schema.constrained:
        raise NoInterval("shapes with a direction or a bound follow no such law; remove monotone and bound")
    if not run.federation.held_out_public or len(examples) < MIN_ROWS:
        raise NoInterval(f"name at least {MIN_ROWS} public rows by task.held_out_file")
    if (size := sum(each.size for each in state.model.values())) > MAX_PARAMETERS:
        raise NoInterval(
            f"the model has {size} parameters, and at most {MAX_PARAMETERS} are inverted; use fewer bins"
        )
    rows = np.linspace(0, len(examples) - 1, min(len(examples), MAX_ROWS)).astype(int)
    inputs = np.hstack([examples.inputs.numpy()[rows].astype(float), np.ones((len(rows), 1))])
    targets = examples.targets.numpy()[rows].astype(float)
    arrays = {name: np.asarray(value, dtype=float) for name, value in state.model.items()}
    model = np.hstack([arrays["weight"], arrays["bias"][:, None]])
    try:
        return fit(steps, inputs, targets, model)
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise NoInterval(NOT_INVERTED) from error


def _fit_classes(steps: Descent, inputs: Array, targets: Array, model: Array) -> Fit:
    """Return the fit of a model of classes.

    Args:
      steps: of the run.
      inputs: public rows with their 1 last, shape (m, d).
      targets: of these rows, shape (m,).
      model: released model, shape (outputs, d).
    """
    law = ClassLaw(len(model))
    result = estimate(Design(steps, inputs, law), law.basis.T @ model)
    return Fit(result, inputs, np.zeros(0), law.basis[1:] - law.basis[0])


def _fit_number(steps: Descent, inputs: Array, targets: Array, model: Array) -> Fit:
    """Return the fit of a model of numbers; arguments as of `_fit_classes`."""
    law = law_of_number(inputs, targets)
    return Fit(estimate(Design(steps, inputs, law), model), inputs, np.abs(law.residuals), np.ones((1, 1)))


def law_of_number(inputs: Array, targets: Array) -> NumberLaw:
    """Return the law of a number by the residuals of public rows, enlarged by the degrees of freedom of their fit.

    Args:
      inputs: public rows with their 1 last, shape (m, d).
      targets: scaled labels of these rows, shape (m,).

    Raises:
      ArithmeticError: there are fewer than `ROWS_PER_INPUT` rows for each independent input.
    """
    fit, _, rank, _ = np.linalg.lstsq(inputs, targets, rcond=None)
    if len(inputs) < ROWS_PER_INPUT * rank:
        raise ArithmeticError("too few rows")
    residuals = (targets - inputs @ fit) * math.sqrt(len(inputs) / (len(inputs) - rank))
    return NumberLaw(residuals)


def _report(task: Tables, fit: Fit) -> dict[str, Any]:
    """Return the table of coefficients with their intervals, as JSON."""
    rows, half = list[dict[str, Any]](), _normal(LEVEL)
    label, each_contrast = task.schema.outcome, contrasts_of(task.schema, fit.inputs)
    factors, (offset, scale) = np.array([each.factors for each in each_contrast]), label.unit
    names = label.words[1:] or [each.name for each in label.columns]
    for name, output in zip(names, fit.outputs, strict=True):
        values, errors = spread(fit.estimate, factors, np.broadcast_to(output, (len(factors), len(output))))
        for contrast, value, error in zip(each_contrast, scale * values, half * scale * errors, strict=True):
            middle = value + offset * (contrast.column == INTERCEPT)
            ends = {"value": middle, "low": middle - error, "high": middle + error}
            of = {"score": name, "column": contrast.column, "of": contrast.of}
            rows.append(of | {end: _finite(number) for end, number in ends.items()})
    return {
        "confidence": LEVEL,
        "rows": len(fit.inputs),
        "clipped": round(fit.estimate.clipped_share, 4),
        "information": round(fit.estimate.information, 4),
        "coefficients": rows,
    }


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def interval_columns(folder: Path, task: Any, data: object, level: float) -> dict[str, NDArray[Any]]:
    """Return estimates of a run's predictions with their intervals, by column name, shape (n,) each.

    Of a number there are `estimate`, the mean of rows like this one without noise and clipping, with `low` and `high`, and
    `new_low` and `new_high` of a single new row. Of a class there are `estimate`, `low` and `high` of the probability of the
    class that the model predicts. They are NaN for a row with a word or a bin that no public row has.

    Args:
      folder: of the run.
      task: of the run.
      data: a table, a folder of tables, or a data frame.
      level: of the intervals, in (0, 1).

    Raises:
      Refusal: the run has no intervals, or the level is out of range.
    """
    if not 0 < level < 1:
        raise Refusal("--interval", level, "give a level above 0 and below 1, such as 0.95")
    path = folder / INTERVALS
    if not path.is_file():
        fields = read_object(folder / RESULT).get("intervals") or {}
        reason = fields.get(
            "reason", "its model is not linear; train with task=csv and task.model=linear or gam"
        )
        raise Refusal("--interval", str(folder), f"the run has no intervals: {reason}")
    from safetensors.numpy import load_file

    arrays, model = load_file(path), load_file(folder / MODEL)
    inputs = task.encode(data).numpy().astype(float)
    inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
    estimate = ModelEstimate(arrays["coefficients"], arrays["covariance"], arrays["span"], 0.0, 1.0)
    scores = inputs @ np.hstack([model["weight"], model["bias"][:, None]]).T.astype(float)
    _, columns = LAWS[task.schema.outcome.law]
    return columns(
        PredictedRows(estimate, inputs, scores, arrays["residuals"], task.schema.outcome.unit), level
    )


@dataclass(frozen=True)
class PredictedRows:
    """PredictedRows to predict.

    Attributes:
      estimate: of the true model.
      inputs: with their 1 last, shape (n, d).
      scores: outputs of the released model, shape (n, outputs).
      residuals: sizes of the public rows' residuals, shape (m,); empty for classes.
      unit: offset and scale of the label.
    """

    estimate: ModelEstimate
    inputs: Array
    scores: Array
    residuals: Array
    unit: tuple[float, float]


def _of_classes(rows: PredictedRows, level: float) -> dict[str, NDArray[Any]]:
    """Return the probability of the class that the model predicts, with its interval, which is symmetric in its log odds."""
    basis, classes = contrasts(rows.scores.shape[1]), rows.scores.argmax(1)
    chances = softmax(rows.inputs @ rows.estimate.coefficients.T @ basis.T)
    chance = np.clip(chances[np.arange(len(classes)), classes], TINY, 1 - TINY)
    slopes = (basis[classes] - chances @ basis) / (1 - chance)[:, None]  # of the log odds by the scores
    values, errors = spread(rows.estimate, rows.inputs, slopes)
    middle, half = np.where(np.isnan(values), np.nan, np.log(chance / (1 - chance))), _normal(level) * errors
    ends = {"estimate": middle, "low": middle - half, "high": middle + half}
    return {name: 1 / (1 + np.exp(-each)) for name, each in ends.items()}


def _of_numbers(rows: PredictedRows, level: float) -> dict[str, NDArray[Any]]:
    """Return the mean of rows like each row, with its interval and that of a new row."""
    (offset, scale), residuals = rows.unit, np.sort(rows.residuals)
    values, errors = spread(rows.estimate, rows.inputs, np.ones((len(rows.inputs), 1)))
    rank = min(math.ceil(level * (len(residuals) + 1)), len(residuals))  # of split conformal intervals
    half = _normal(level) * errors
    wide = np.hypot(half, residuals[rank - 1])
    ends = {"estimate": 0 * half, "low": -half, "high": half, "new_low": -wide, "new_high": wide}
    return {name: offset + scale * (values + each) for name, each in ends.items()}


def _normal(level: float) -> float:
    """Return half the width of a normal interval, in standard errors."""
    return NormalDist().inv_cdf((1 + level) / 2)


LAWS = {"classes": (_fit_classes, _of_classes), "number": (_fit_number, _of_numbers)}  # by `law` of a label
