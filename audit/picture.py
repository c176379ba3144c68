"""Picture of an audit: measured and claimed epsilon against rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..privacy.audit.run_audit import Measured

CLAIMED, MEASURED, CEILING = "#c1440e", "#1b6ca8", "#777777"
HEADROOM = 1.6  # above the largest relevant number; a ceiling may lie outside the picture


def draw_audit(looks: Sequence[Measured], path: Path, title: str) -> None:
    """Write an audit's measurements as a PNG: claimed epsilon, measured with its interval, and the ceiling.

    Args:
      looks: at least one, in the order of their rounds.
      path: of the picture.
      title: one line above it.
    """
    from matplotlib.figure import Figure

    rounds = [each.round for each in looks]
    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    top = HEADROOM * max(
        value for each in looks for value in (each.claimed, each.high) if math.isfinite(value)
    )
    axes.plot(
        rounds, [each.claimed for each in looks], color=CLAIMED, marker="o", ms=3, label="claimed, at most"
    )
    shown = [min(each.epsilon, top) for each in looks]
    errors = [
        [value - min(each.low, top) for value, each in zip(shown, looks, strict=True)],
        [min(each.high, top) - value for value, each in zip(shown, looks, strict=True)],
    ]
    axes.errorbar(
        rounds,
        shown,
        errors,
        color=MEASURED,
        marker="s",
        ms=4,
        lw=0,
        elinewidth=1.2,
        capsize=3,
        label="measured by canaries, 95 %",
    )
    ceiling = [min(each.ceiling, 2 * top) for each in looks]
    axes.plot(rounds, ceiling, color=CEILING, linestyle="--", label="could have been shown")
    blind = [each.ceiling <= each.claimed for each in looks]
    axes.fill_between(
        rounds, 0, top, where=blind, color=CEILING, alpha=0.12, lw=0, step="mid", label="too weak to tell"
    )
    axes.set_xlabel("round")
    axes.set_ylabel("epsilon")
    axes.set_ylim(0, top)
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=10)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
