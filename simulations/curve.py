"""The picture of a run: accuracy and epsilon against rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ACCURACY = "#1b6ca8"
EPSILON = "#c1440e"


def draw(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Write the curves of these rounds as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rounds = [row["round"] for row in history]
    figure, left = plt.subplots(figsize=(7, 4), dpi=120)
    name = "accuracy" if "accuracy" in history[-1] else next(k for k in history[-1] if k not in ("round",))
    left.plot(rounds, [row[name] for row in history], color=ACCURACY)
    left.set_xlabel("round")
    left.set_ylabel(f"held-out {name}", color=ACCURACY)
    left.grid(alpha=0.25)
    right = left.twinx()
    for unit, style in (("client", "-"), ("record", "--")):
        values = [row.get(f"epsilon_{unit}") for row in history]
        if all(isinstance(value, float) for value in values):
            right.plot(rounds, values, color=EPSILON, linestyle=style, label=f"{unit} level")
    right.set_ylabel("epsilon spent", color=EPSILON)
    right.set_ylim(bottom=0)
    if right.get_legend_handles_labels()[0]:
        right.legend(loc="lower right", frameon=False)
    left.set_title(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
