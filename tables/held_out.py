"""Figures of a released model on public held-out rows, each with an interval of level 0.95 for how few the rows are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..privacy.statistics.figure import NORMAL_95, Figure
from ..run.final_model import final_model
from ..tasks.tables import Tables, tables_of
from .outcomes import Array, softmax

if TYPE_CHECKING:
    from ..run.prepared_run import Run
    from ..server.checkpoint import State

CONFIDENCE = 0.95
MOST_EXPLAINED = 200  # rows whose predictions are attributed to columns
MOST_COLUMNS = 40  # with attributions in the result
BINS = 10  # of predicted probabilities
DRAWS, MOST_NUMBERS = 1000, 20_000_000  # of a bootstrap: samples, and numbers drawn for all of them
FEWEST_DRAWS = 200


def held_out_fields(run: Run, state: State) -> Mapping[str, Any]:
    """Return the field `held_out` of a run's result; nothing without public rows, or for another kind of label.

    Args:
      run: ended.
      state: after its last round.
    """
    import torch

    from ..tasks.arrays import holding
    from ..tasks.attribution import explained
    from ..tasks.batch_memory import outputs_apart

    task = tables_of(run.federation.task)
    figures = FIGURES.get(getattr(task.schema.outcome, "law", ""))
    examples = task.held_out()
    if figures is None or not run.federation.held_out_public or not len(examples):
        return {}
    model = task.model().eval()
    with holding(model, final_model(run.federation.task, state)):
        with torch.no_grad():
            outputs = outputs_apart(model, examples.inputs).double().numpy()
        contributions = explained(model, examples.inputs[:MOST_EXPLAINED], task.schema, classifies=True)
    targets = task.labels(examples.targets).numpy()
    fields = {**figures(outputs, targets, task), "attributions": _attributions(contributions)}
    return {"held_out": {"rows": len(targets), "confidence": CONFIDENCE, **fields}}


def _attributions(contributions: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """Return by column what it changes a prediction's score on average, without its sign, the largest first."""
    means = {
        name: float(np.abs(values).mean())
        for name, values in contributions.items()
        if name not in ("score", "at_baseline")
    }
    largest = sorted(means, key=lambda name: -means[name])[:MOST_COLUMNS]
    return [{"column": name, "mean": means[name]} for name in largest]


def wilson(name: str, hits: int, of: int) -> Figure:
    """Return a share with the interval of Wilson (1927), without a value if `of` is 0."""
    if not of:
        return Figure(name, math.nan, math.nan, math.nan)
    share, square = hits / of, NORMAL_95**2 / of
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return Figure(name, share, max(0.0, middle - half), min(1.0, middle + half))


def area_under_roc(name: str, scores: Array, positive: NDArray[np.bool_]) -> Figure:
    """Return the area under the ROC curve with the interval of DeLong et al. (1988), from midranks (Sun and Xu 2014).

    Where every positive has a higher score than every other row, the variance is 0; the interval is then Wilson's, of as many
    hits as the smaller class has rows.

    Args:
      name: of the figure.
      scores: shape (n,).
      positive: shape (n,).
    """
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return Figure(name, math.nan, math.nan, math.nan)
    ranks = _midranks(scores)
    above = (ranks[positive] - _midranks(scores[positive])) / zeros  # share of the others below each positive
    below = 1 - (ranks[~positive] - _midranks(scores[~positive])) / ones
    area = float(above.mean())
    if area in (0.0, 1.0) or ones < 2 or zeros < 2:
        end = wilson(name, round(area * min(ones, zeros)), min(ones, zeros))
        return Figure(name, area, min(area, end.low), max(area, end.high))
    half = NORMAL_95 * math.sqrt(above.var(ddof=1) / ones + below.var(ddof=1) / zeros)
    return Figure(name, area, max(0.0, area - half), min(1.0, area + half))


def _midranks(values: Array) -> Array:
    """Return the rank of each value from 1, the mean rank of equal ones, shape (n,)."""
    _, index, ties = np.unique(values, return_inverse=True, return_counts=True)
    return (ties.cumsum() - (ties - 1) / 2)[index]


def reliability(chances: Array, hits: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Return by bin of predicted probability how many rows it has, their mean prediction and the share of hits.

    Args:
      chances: predicted probability of a hit, shape (n,).
      hits: shape (n,).
    """
    bins = _bins(chances)
    rows = list[dict[str, Any]]()
    for number in np.unique(bins).tolist():
        inside = bins == number
        share = wilson("", int(hits[inside].sum()), int(inside.sum()))
        ends = {"observed": share.value, "low": share.low, "high": share.high}
        rows.append({"count": int(inside.sum()), "predicted": float(chances[inside].mean()), **ends})
    return rows


def calibration_error(chances: Array, hits: NDArray[np.bool_]) -> Figure:
    """Return the expected calibration error (Guo et al. 2017) with the basic bootstrap's interval, which corrects its bias."""
    bins, misses = _bins(chances), hits - chances

    def error(counts: Array) -> float:
        return float(np.abs(np.bincount(bins, counts * misses)).sum() / counts.sum())

    value = error(np.ones(len(hits)))
    low, high = _quantiles([error(counts) for counts in _samples(len(hits))])
    return Figure("calibration error", value, max(0.0, 2 * value - high), max(0.0, 2 * value - low))


def _bins(chances: Array) -> NDArray[np.int64]:
    return np.minimum((chances * BINS).astype(np.int64), BINS - 1)


def _samples(rows: int) -> list[Array]:
    """Return how often each row is in each sample of a bootstrap, the same at every call."""
    stream = np.random.default_rng(0)  # of a public figure, so that a run's report stays the same
    draws = max(FEWEST_DRAWS, min(DRAWS, MOST_NUMBERS // rows))
    return [np.bincount(stream.integers(rows, size=rows), minlength=rows).astype(float) for _ in range(draws)]


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def of_classes(outputs: Array, targets: NDArray[Any], words: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, recalls, areas under ROC curves and calibration of a model of classes, as JSON.

    Args:
      outputs: logits, shape (n, classes).
      targets: shape (n,).
      words: names of the classes.
    """
    chances, answers = softmax(outputs), outputs.argmax(1)
    hits = answers == targets
    figures = [wilson("accuracy", int(hits.sum()), len(hits))]
    binary = len(words) == 2
    for number, name in ((1, "sensitivity"), (0, "specificity")) if binary else [*enumerate(words)]:
        inside = targets == number
        text = name if binary else f"recall of {name}"
        figures.append(wilson(text, int(hits[inside].sum()), int(inside.sum())))
    for number, name in ((1, "auc"),) if binary else [*enumerate(words)]:
        text = name if binary else f"auc of {name}"
        scores = outputs[:, 1] - outputs[:, 0] if binary else chances[:, number]
        figures.append(area_under_roc(text, scores, targets == number))
    predicted, true = (chances[:, 1], targets == 1) if binary else (chances.max(1), hits)
    figures.append(calibration_error(predicted, true))
    of = words[1] if binary else "the predicted class"
    return {
        "figures": [each.plain for each in figures],
        "reliability": {"of": of, "bins": reliability(predicted, true)},
    }


def of_numbers(outputs: Array, targets: NDArray[Any], scale: float) -> dict[str, Any]:
    """Return the mean absolute error and the share of explained variance of a model of numbers, with bootstrap intervals.

    Args:
      outputs: shape (n, 1).
      targets: shape (n,).
      scale: of the label's unit.
    """
    values = targets.astype(float)
    errors = outputs[:, 0] - values

    def figures(counts: Array) -> tuple[float, float]:
        share = counts / counts.sum()
        variance = share @ (values - share @ values) ** 2
        return scale * float(share @ np.abs(errors)), 1 - float(share @ errors**2) / (variance or math.nan)

    points = figures(np.ones(len(values)))
    samples = zip(*(figures(counts) for counts in _samples(len(values))), strict=True)
    names = ("mean_absolute_error", "r2")
    ends = [
        Figure(name, value, *_quantiles(each))
        for name, value, each in zip(names, points, samples, strict=True)
    ]
    return {"figures": [each.plain for each in ends]}


FIGURES: Mapping[str, Callable[[Array, NDArray[Any], Tables], dict[str, Any]]] = {
    "classes": lambda outputs, targets, task: of_classes(outputs, targets, task.schema.outcome.words),
    "number": lambda outputs, targets, task: of_numbers(outputs, targets, task.schema.outcome.unit[1]),
}  # by `law` of a label
