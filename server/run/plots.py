"""The picture of a run: accuracy and epsilon against rounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACCURACY = "#1b6ca8"
EPSILON = "#c1440e"


def draw(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Write the curves of these rounds as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rounds = [row["round"] for row in history]
    figure, left = plt.subplots(figsize=(7, 4), dpi=120)
    name = "accuracy" if "accuracy" in history[-1] else next(k for k in history[-1] if k != "round")
    left.plot(rounds, [math.nan if row[name] is None else row[name] for row in history], color=ACCURACY)
    left.set_xlabel("round")
    left.set_ylabel(f"held-out {name}", color=ACCURACY)
    left.grid(alpha=0.25)
    left.set_title(title, fontsize=10)
    _draw_epsilon(left, rounds, history)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _draw_epsilon(left: Axes, rounds: list[int], history: list[dict[str, Any]]) -> None:
    units = ("client", "record")
    finite: dict[str, list[float]] = {
        unit: [row[f"epsilon_{unit}"] for row in history]
        for unit in units
        if all(isinstance(row.get(f"epsilon_{unit}"), float) for row in history)
    }
    if not finite:
        return
    right = left.twinx()
    for (unit, values), style in zip(finite.items(), ("-", "--"), strict=False):
        right.plot(rounds, values, color=EPSILON, linestyle=style, label=f"{unit} level")
    only = f" ({next(iter(finite))} level)" if len(finite) == 1 else ""
    right.set_ylabel(f"epsilon spent{only}", color=EPSILON)
    right.set_ylim(bottom=0)
    if len(finite) > 1:
        right.legend(loc="lower right", frameon=False)
