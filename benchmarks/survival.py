"""Figures of survival questions: what their intervals cover, and how often the log-rank test rejects.

`python -m fedveil.benchmarks.survival` prints the table of docs/evidence/questions.md, of 500 populations a line.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..privacy.statistics.columns import Bins
from ..privacy.statistics.figure import Figure
from ..privacy.statistics.survival import SURVIVAL, Survival

MEAN = 30.0  # months of the control's exponential survival
END, BINS = 60.0, 12  # of the question
CENSORED = 80.0  # months within which a row is censored at any time, evenly
ARMS = ("control", "treated")
# Rows, standard deviation of a cell's noise, and the treated rows' mean over the control's
CASES = (
    (400, 0.0, 1.0),
    (1000, 5.0, 1.0),
    (2000, 5.0, 1.5),
    (5000, 10.0, 1.0),
    (5000, 30.0, 1.0),
    (20000, 30.0, 1.1),
)


@dataclass(frozen=True)
class Coverage:
    """Shares over simulated populations.

    Attributes:
      curve: of the curves' intervals that contain the population's survival.
      median: of the medians' intervals that contain its median; NaN without any.
      rejected: of the log-rank tests below 5 %.
      width: mean width of a curve's interval.
    """

    curve: float
    median: float
    rejected: float
    width: float


def question() -> Survival:
    """Return the question of this benchmark: a dozen bins of five months, two arms."""
    edges = tuple(np.linspace(0, END, BINS + 1).tolist())
    return Survival(Bins("months", edges=edges), Bins("event", words=("0", "1")), (Bins("arm", words=ARMS),))


def population(rows: int, ratio: float, draw: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Return the columns of rows with exponential times and even censoring.

    Args:
      rows: of both arms.
      ratio: mean of the treated over that of the control.
      draw: source of the rows.
    """
    treated = draw.random(rows) < 0.5
    time, censoring = draw.exponential(np.where(treated, MEAN * ratio, MEAN)), draw.uniform(0, CENSORED, rows)
    return {
        "months": np.minimum(time, censoring),
        "event": (time <= censoring).astype(int),
        "arm": np.array(ARMS)[treated.astype(int)],
    }


def coverage(rows: int, sigma: float, ratio: float, populations: int) -> Coverage:
    """Return what the intervals cover over so many populations.

    Args:
      rows: of a population.
      sigma: standard deviation of the noise on each cell, in rows.
      ratio: mean survival of the treated over that of the control.
      populations: drawn anew, each with noise of its own.
    """
    kind, draw = question(), np.random.default_rng(rows)
    means = {arm: MEAN * factor for arm, factor in zip(ARMS, (1.0, ratio), strict=True)}
    curve, median = list[bool](), list[bool]()
    widths, rejected = list[float](), list[bool]()
    for _ in range(populations):
        cells = kind.count(population(rows, ratio, draw))[0]
        for each in kind.answer(cells + sigma * draw.normal(size=cells.shape), sigma):
            if not each.has_value:
                continue
            if each.name.startswith(SURVIVAL):
                end, arm = each.name.removeprefix(SURVIVAL).split(", ")
                curve.append(_contains(each, math.exp(-float(end) / means[arm])))
                widths.append(each.high - each.low)
            elif each.name.startswith("median"):
                truth = math.log(2) * means[each.name.removeprefix("median, ")]
                median.append(_contains(each, truth) or (bool(each.words) and each.low <= truth))
            elif each.name.startswith("log-rank"):
                rejected.append(each.value < 0.05)
    shares = (float(np.mean(each)) if each else math.nan for each in (curve, median, rejected, widths))
    return Coverage(*shares)


def _contains(figure: Figure, truth: float) -> bool:
    return figure.low <= truth <= figure.high


def table(cases: Sequence[tuple[int, float, float]], populations: int) -> list[str]:
    """Return a line of Markdown a case."""
    lines = [
        "| rows | noise on a cell | ratio of means | curves covered | medians covered | log-rank below 5 % | width |",
        "|---|---|---|---|---|---|---|",
    ]
    for rows, sigma, ratio in cases:
        own = coverage(rows, sigma, ratio, populations)
        shares = f"{own.curve:.1%} | {own.median:.1%} | {own.rejected:.1%}".replace("%", " %")
        lines.append(f"| {rows} | {sigma:g} | {ratio:g} | {shares} | {own.width:.3f} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.survival", description=__doc__)
    parser.add_argument("--populations", type=int, default=500, help="of each line")
    print(*table(CASES, parser.parse_args().populations), sep="\n")


if __name__ == "__main__":
    main()
