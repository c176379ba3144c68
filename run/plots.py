"""Picture of a plan: its guarantees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..privacy.accounting.curve import PrivacyCurve

GUESSING = "#777777"


def draw_guarantees(curves: Mapping[str, PrivacyCurve], path: Path) -> None:
    """Write guarantees, by unit, as a picture: epsilon against delta, and the least error rates of a test for one unit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120)
    epsilon_axes, error_axes = figure.subplots(1, 2)
    for unit, each in curves.items():
        epsilon_axes.plot(*zip(*each.epsilon, strict=True), marker="o", ms=3, label=f"one {unit}")
        error_axes.plot(*zip((0.0, 1.0), *each.trade_off, (1.0, 0.0), strict=True), marker="o", ms=3)
    error_axes.plot((0, 1), (1, 0), color=GUESSING, linestyle="--", label="guessing")
    epsilon_axes.set(xscale="log", xlabel="delta", ylabel="epsilon", ylim=(0, None))
    error_axes.set(xlabel="false positive rate of any test", ylabel="least false negative rate")
    for axes in (epsilon_axes, error_axes):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
