"""Pictures of a run: accuracy and epsilon against rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.round_line import AT_CLIENTS, main_metric
from ..privacy.accounting.curve import Pairs, PrivacyCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCURACY = "#1b6ca8"
EPSILON = "#c1440e"
GUESSING = "#777777"


def draw_run(
    history: list[dict[str, Any]], privacy: Sequence[Mapping[str, Any]], path: Path, title: str
) -> None:
    """Write the figure of `curve` as a PNG."""
    curve(history, privacy, title).savefig(path)


def curve(history: list[dict[str, Any]], privacy: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Return a figure of held-out accuracy and epsilon against rounds and, with a guarantee, epsilon against delta.

    Args:
      history: lines of metrics.jsonl, one a round, at least one.
      privacy: as in result.json.
      title: above the axes.
    """
    from matplotlib.figure import Figure  # without pyplot, whose backend is the caller's

    rounds = [row["round"] for row in history]
    curves = _curves(privacy)
    figure = Figure(figsize=(11, 4) if curves else (7, 4), dpi=120)
    main_axes, *delta_axes = figure.subplots(1, 2, width_ratios=(3, 2)) if curves else [figure.subplots()]
    held_out = main_metric(history)
    at_clients = (key for row in history for key in row if key.startswith(AT_CLIENTS))
    name = held_out or next(at_clients, None)
    if name is not None:
        values = [math.nan if row.get(name) is None else row[name] for row in history]
        main_axes.plot(rounds, values, color=ACCURACY, marker="o", ms=2)  # of a single round there is no line
        main_axes.set_ylabel(f"held-out {name}" if held_out else name, color=ACCURACY)
    main_axes.locator_params("x", integer=True, min_n_ticks=1)
    main_axes.set_xlabel("round")
    main_axes.grid(alpha=0.25)
    main_axes.set_title(title, fontsize=10)
    _draw_epsilon(main_axes, rounds, history)
    for axes in delta_axes:
        _draw_deltas(axes, curves)
        axes.set_title("the guarantee at every delta", fontsize=10)
        for unit, row in _rows_of_model(privacy).items():
            at = "epsilon {:.3g} at delta {:g}".format(row["epsilon"], row["delta"])
            axes.plot(row["delta"], row["epsilon"], "o", color="black", ms=4, label=f"one {unit}: {at}")
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def _rows_of_model(privacy: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return each unit's privacy loss against the model's adversary, if it has a curve."""
    return {row["unit"]: row for row in privacy if row["adversary"] == "model" and row.get("curve")}


def _curves(privacy: Sequence[Mapping[str, Any]]) -> dict[str, Pairs]:
    """Return pairs (delta, epsilon) by unit, for each unit with a guarantee in the model."""
    curves = {unit: row["curve"]["epsilon"] for unit, row in _rows_of_model(privacy).items()}
    return {unit: tuple((delta, float(each)) for delta, each in pairs) for unit, pairs in curves.items()}


def _draw_deltas(axes: Axes, curves: Mapping[str, Pairs]) -> None:
    """Draw epsilon against delta for each unit."""
    for unit, pairs in curves.items():
        axes.plot(*zip(*pairs, strict=True), marker="o", ms=3, label=f"one {unit}")
    axes.set(xscale="log", xlabel="delta", ylabel="epsilon", ylim=(0, None))
    axes.grid(alpha=0.25)


def _draw_epsilon(axes: Axes, rounds: list[int], history: list[dict[str, Any]]) -> None:
    """Draw the epsilon of each unit with a guarantee against rounds, on a second axis."""
    finite: dict[str, list[float]] = {}
    for unit in ("client", "record"):
        values = [row.get(f"epsilon_{unit}") for row in history]
        numbers = [each for each in values if isinstance(each, float) and math.isfinite(each)]
        if numbers == values:
            finite[unit] = numbers
    if not finite:
        return
    epsilon_axes = axes.twinx()
    for (unit, values), style in zip(finite.items(), ("-", "--"), strict=False):
        epsilon_axes.plot(rounds, values, style, color=EPSILON, marker="o", ms=2, label=f"{unit} level")
    only = f" ({next(iter(finite))} level)" if len(finite) == 1 else ""
    epsilon_axes.set_ylabel(f"epsilon spent{only}", color=EPSILON)
    epsilon_axes.set_ylim(bottom=0)
    if len(finite) > 1:
        epsilon_axes.legend(loc="lower right", frameon=False)


def draw_guarantees(curves: Mapping[str, PrivacyCurve], path: Path) -> None:
    """Write guarantees, by unit, as a picture: epsilon against delta, and the least error rates of a test for one unit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120)
    epsilon_axes, error_axes = figure.subplots(1, 2)
    _draw_deltas(epsilon_axes, {unit: each.epsilon for unit, each in curves.items()})
    for each in curves.values():
        error_axes.plot(*zip((0.0, 1.0), *each.trade_off, (1.0, 0.0), strict=True), marker="o", ms=3)
    error_axes.plot((0, 1), (1, 0), color=GUESSING, linestyle="--", label="guessing")
    error_axes.set(xlabel="false positive rate of any test", ylabel="least false negative rate")
    error_axes.grid(alpha=0.25)
    for axes in (epsilon_axes, error_axes):
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
