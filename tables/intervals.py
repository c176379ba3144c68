"""Intervals of the coefficients and predictions of a linear or additive model of tables, noise included.

They are computed once, at the end of a run, from the released model, the run's public plan and its public held-out rows,
so that they cost no privacy. The run folder keeps what predictions need in `INTERVALS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from .coefficients import INTERCEPT, contrasts_of, is_unseen, means_of, spread
from .descent import Descent, Design, ModelEstimate, estimate
from .hazard_intervals import curve_columns, curves, law_of_times, public_rows
from .layouts import Array
from .outcomes import ClassLaw, NumberLaw, contrasts, softmax
from .run_steps import MIN_ROWS, NoInterval, steps_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..run.prepared_run import Run
    from ..server.checkpoint import State

LEVEL = 0.95
MAX_ROWS = 1_000  # public rows that stand for the distribution of the inputs
ROWS_PER_INPUT = 3  # of a public table whose residuals stand for those of all rows
NOT_INVERTED = (
    "the steps that lead from a true model to the released one could not be inverted; "
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
      names: of the outputs.
    """

    estimate: ModelEstimate
    inputs: Array
    residuals: Array
    outputs: Array
    names: Sequence[str]

    @property
    def linear(self) -> ModelEstimate:
        """Estimate of the coefficients of each score with its first offset."""
        fit, width = self.estimate, self.inputs.shape[1]
        if fit.coefficients.ndim > 1:
            return fit
        return replace(
            fit, coefficients=fit.coefficients[None, :width], covariance=fit.covariance[:width, :width]
        )

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
    law = LAWS.get(getattr(task.schema.outcome, "law", ""))
    if law is None:
        text = "there is no law of intervals for this kind of label; predict a number, a class or a time"
        raise NoInterval(text)
    steps, examples = steps_of(run, state), task.held_out()
    if task.schema.weight is not None:
        raise NoInterval("the weights of public rows are unknown; train without weight")
    if task.schema.group_weights is not None:
        raise NoInterval("weights by group are not of the class alone; train without them")
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
    weight, bias = (np.asarray(state.model[name], dtype=float) for name in task.schema.outcome.parameters)
    try:
        return law.fit(task.schema.outcome, PublicRun(steps, inputs, targets, weight, bias))
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise NoInterval(NOT_INVERTED) from error


@dataclass(frozen=True)
class PublicRun:
    """What is public of a run: its steps and its held-out rows, and the arrays of its released model.

    Attributes:
      steps: of the run.
      inputs: public rows with their 1 last, shape (m, d).
      targets: of these rows, shape (m, ...).
      weight: of the released model, shape (scores, d - 1).
      bias: shape (outputs,).
    """

    steps: Descent
    inputs: Array
    targets: Array
    weight: Array
    bias: Array

    @property
    def model(self) -> Array:
        """The released model, shape (scores, d), if each score has an offset of its own."""
        return np.hstack([self.weight, self.bias[:, None]])


def _fit_classes(label: Any, run: PublicRun) -> Fit:
    """Return the fit of a model of classes."""
    law = ClassLaw(len(run.bias), label.weights)
    result = estimate(Design(run.steps, run.inputs, law), law.basis.T @ run.model)
    return Fit(result, run.inputs, np.zeros(0), law.basis[1:] - law.basis[0], label.words[1:])


def _fit_number(label: Any, run: PublicRun) -> Fit:
    """Return the fit of a model of numbers."""
    law = law_of_number(run.inputs, run.targets)
    result = estimate(Design(run.steps, run.inputs, law), run.model)
    return Fit(result, run.inputs, np.abs(law.residuals), np.ones((1, 1)), [label.column.name])


def _fit_hazards(label: Any, run: PublicRun) -> Fit:
    """Return the fit of a model of hazards."""
    model = np.concatenate([run.weight[0], run.bias])
    law, inputs = law_of_times(label, run.targets), public_rows(run.inputs, len(label.ends))
    result = estimate(Design(run.steps, inputs, law), model)
    names = label.scores(run.weight, run.bias).names
    return Fit(result, inputs, np.zeros(0), np.ones((1, 1)), names)


def law_of_number(inputs: Array, targets: Array) -> NumberLaw:
    """Return the law of a number by the residuals of public rows, enlarged by the degrees of freedom of their fit.

    Args:
      inputs: public rows with their 1 last, shape (m, d).
      targets: scaled labels of these rows, shape (m,).

    Raises:
      NoInterval: there are fewer than `ROWS_PER_INPUT` rows for each independent input.
    """
    fit, _, rank, _ = np.linalg.lstsq(inputs, targets, rcond=None)
    if len(inputs) < ROWS_PER_INPUT * rank:
        needed = f"of a number it needs {ROWS_PER_INPUT} for each independent input, at least {ROWS_PER_INPUT * rank}"
        raise NoInterval(f"task.held_out_file has {len(inputs)} rows, and {needed}; or use task.model=linear")
    residuals = (targets - inputs @ fit) * math.sqrt(len(inputs) / (len(inputs) - rank))
    return NumberLaw(residuals)


def _report(task: Tables, fit: Fit) -> dict[str, Any]:
    """Return the table of coefficients with their intervals, as JSON."""
    rows, half, label = list[dict[str, Any]](), _normal(LEVEL), _label(task)
    each_contrast = contrasts_of(task.schema, fit.inputs)
    factors, (offset, scale) = np.array([each.factors for each in each_contrast]), label.unit
    for name, output in zip(fit.names, fit.outputs, strict=True):
        values, errors = spread(fit.linear, factors, np.broadcast_to(output, (len(factors), len(output))))
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
        **LAWS[label.law].fields(task, fit),
    }


def _label(task: Tables) -> Any:
    """Return the label of a task, with the attributes that its law needs."""
    return task.schema.outcome


def _baseline(task: Tables, fit: Fit) -> dict[str, Any]:
    """Return the survival where each column adds its mean, with its intervals, as JSON."""
    ends = _label(task).ends
    bands = curves(fit.estimate, means_of(task.schema)[None], len(ends), _normal(LEVEL))
    rows = zip(ends, *(band[0].tolist() for band in bands), strict=True)
    return {
        "baseline": [
            {"time": end, "value": _finite(value), "low": _finite(low), "high": _finite(high)}
            for end, value, low, high in rows
        ]
    }


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def interval_columns(folder: Path, task: Any, data: object, level: float) -> dict[str, NDArray[Any]]:
    """Return estimates of a run's predictions with their intervals, by column name, shape (n,) each.

    Of a time there are the median time and the survival at the end of each interval as `..._estimate`, `..._low` and `..._high`.
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
    label = task.schema.outcome
    return LAWS[label.law].columns(PredictedRows(estimate, inputs, model, arrays["residuals"], label), level)


@dataclass(frozen=True)
class PredictedRows:
    """Rows to predict.

    Attributes:
      estimate: of the true model.
      inputs: with their 1 last, shape (n, d).
      model: arrays of the released model by name.
      residuals: sizes of the public rows' residuals, shape (m,); empty for classes.
      label: of the model.
    """

    estimate: ModelEstimate
    inputs: Array
    model: Mapping[str, Array]
    residuals: Array
    label: Any


def _of_classes(rows: PredictedRows, level: float) -> dict[str, NDArray[Any]]:
    """Return the probability of the class that the model predicts, with its interval, which is symmetric in its log odds."""
    weight, bias = rows.model["weight"], rows.model["bias"]
    scores = rows.inputs @ np.hstack([weight, bias[:, None]]).T.astype(float)
    basis, classes = contrasts(scores.shape[1]), scores.argmax(1)
    chances = softmax(rows.inputs @ rows.estimate.coefficients.T @ basis.T)
    chance = np.clip(chances[np.arange(len(classes)), classes], TINY, 1 - TINY)
    slopes = (basis[classes] - chances @ basis) / (1 - chance)[:, None]  # of the log odds by the scores
    values, errors = spread(rows.estimate, rows.inputs, slopes)
    middle, half = np.where(np.isnan(values), np.nan, np.log(chance / (1 - chance))), _normal(level) * errors
    ends = {"estimate": middle, "low": middle - half, "high": middle + half}
    return {name: 1 / (1 + np.exp(-each)) for name, each in ends.items()}


def _of_numbers(rows: PredictedRows, level: float) -> dict[str, NDArray[Any]]:
    """Return the mean of rows like each row, with its interval and that of a new row."""
    (offset, scale), residuals = rows.label.unit, np.sort(rows.residuals)
    values, errors = spread(rows.estimate, rows.inputs, np.ones((len(rows.inputs), 1)))
    rank = min(math.ceil(level * (len(residuals) + 1)), len(residuals))  # of split conformal intervals
    half = _normal(level) * errors
    wide = np.hypot(half, residuals[rank - 1])
    ends = {"estimate": 0 * half, "low": -half, "high": half, "new_low": -wide, "new_high": wide}
    return {name: offset + scale * (values + each) for name, each in ends.items()}


def _normal(level: float) -> float:
    """Return half the width of a normal interval, in standard errors."""
    return NormalDist().inv_cdf((1 + level) / 2)


def _of_times(rows: PredictedRows, level: float) -> dict[str, NDArray[Any]]:
    """Return the median time and the survival at the end of each interval, with their intervals."""
    bands = curves(rows.estimate, rows.inputs, len(rows.label.ends), _normal(level))
    columns = curve_columns(rows.label, bands)
    unseen = is_unseen(rows.inputs, rows.estimate.span)
    return {name: np.where(unseen, np.nan, values) for name, values in columns.items()}


@dataclass(frozen=True)
class Law:
    """Law of a label.

    Attributes:
      fit: returns the fit of the true model; raises ArithmeticError where there is none.
      columns: returns estimates of predictions with their intervals of a level.
      fields: returns more fields of the report.
    """

    fit: Callable[[Any, PublicRun], Fit]
    columns: Callable[[PredictedRows, float], dict[str, NDArray[Any]]]
    fields: Callable[[Tables, Fit], Mapping[str, Any]] = lambda task, fit: {}


LAWS = {
    "classes": Law(_fit_classes, _of_classes),
    "number": Law(_fit_number, _of_numbers),
    "hazards": Law(_fit_hazards, _of_times, _baseline),
}  # by `law` of a label
