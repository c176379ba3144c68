"""Pictures of an additive model of tables: shapes of its columns, heat maps of its pairs, and survival curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from ..base.charts import RIGHT, WIDTH, Chart, Line, Mark, Whisker, bars, label, picture, shortened, svg
from ..run.run_files import Fields
from .held_out import Band, bands

MAX_SHAPES = 12  # of an additive model, on the page; the JSON has all of them
MAX_WORDS = 24  # of one shape
ROOM = 1.1  # ends of the shapes' axis over the largest and smallest contribution
BASELINE = "plan"  # look of the curve where no column adds anything
CURVES = ("epsilon", "accuracy", "budget", "fourth")  # looks of one column's curves, and of their keys
# Of a heat map, in units of the SVG: margins, and height of a row.
BESIDE, ABOVE, BELOW, ROW = 96.0, 8.0, 42.0, 22.0
LETTER = 6.2  # width of a letter beside an axis
FEWEST_LETTERS = 4  # of a longer word's label: where they have no room, only every so many words have one
MOST_NUMBERS = 8  # columns of a heat map up to which its cells have numbers
STRONGEST = 0.55  # opacity of the largest contribution, on which its number can be read


def model_pictures(report: Fields) -> dict[str, str]:
    """Return the pictures of a report's model as SVG, by name; none of another model."""
    return _shapes(report) | _survival(report) | _attributions(report)


def _attributions(report: Fields) -> dict[str, str]:
    """Return what each column changes a prediction on average, a bar each; none where nothing is attributed."""
    rows = report.get("held_out", {}).get("attributions", [])[:MAX_SHAPES]
    if not rows or not rows[0]["mean"]:
        return {}
    title = "What each column changes the score of a prediction, on average"
    name, ends = "attributions", (0.0, ROOM * rows[0]["mean"])
    return {name: bars(name, title, [(each["column"], each["mean"]) for each in rows], ends)}


def _shapes(report: Fields) -> dict[str, str]:
    """Return each column's contribution to the score by name, all on one scale."""
    shapes = report["shapes"]["shapes"][:MAX_SHAPES] if report["shapes"] else []
    lowest = min((each["lowest"] for each in shapes), default=0.0)
    highest = max((each["highest"] for each in shapes), default=0.0)
    # A model that has learned nothing has no shape.
    ends = (lowest, highest) if lowest < highest else (-1.0, 1.0)
    return {
        f"shape-{index}": _shape(f"shape-{index}", each, ends, bands(report, each))
        for index, each in enumerate(shapes)
    }


def _shape(name: str, shape: Fields, ends: tuple[float, float], estimates: Sequence[Band]) -> str:
    """Return a column's contributions, by a number's bins, with their estimates and intervals, or by words or pairs."""
    title = f"What {shape['column']} adds to the score of {shape['score']}"
    values = shape["values"]
    if "levels" in shape:
        return _heat(name, title, shape, max(map(abs, ends)))
    if shape["words"] is not None:
        furthest = sorted(range(len(values)), key=lambda at: -abs(values[at]))[:MAX_WORDS]
        return bars(name, title, [(shape["words"][at], values[at]) for at in sorted(furthest)], ends)
    edges = shape["edges"]
    is_binned = len(values) < len(edges)  # else it has a value at each end, and a line between
    points = [*zip(edges, [*values, values[-1]][: len(edges)], strict=True)]
    lines = [Line([(edges[0], 0.0), (edges[-1], 0.0)], "plan"), Line(points, "accuracy", step=is_binned)]
    middles = [sum(pair) / 2 for pair in pairwise(edges)]
    points_with_ends = [
        (x, *each) for x, each in zip(middles, estimates, strict=False) if is_binned and each is not None
    ]
    intervals = [
        Whisker(x, max(low, ROOM * ends[0]), min(high, ROOM * ends[1]), "measured")
        for x, _, low, high in points_with_ends
    ]
    marks = [Mark(x, value, "measured") for x, value, _, _ in points_with_ends if ends[0] <= value <= ends[1]]
    bottom, top = (ROOM * each for each in ends)
    chart = Chart(
        name, title, shape["column"], "adds", lines, intervals, marks, top=top, bottom=bottom, from_zero=False
    )
    return svg(chart)


def _heat(name: str, title: str, shape: Fields, limit: float) -> str:
    """Return what each combination of a pair's levels adds: those of the first column upwards, of the second to the right.

    Args:
      name: unique on the page.
      title: description for readers who cannot see it.
      shape: of a pair, in a report's form.
      limit: contribution with the strongest colour, above 0.
    """
    up, across = shape["levels"]
    columns = _count(across)
    rows = len(shape["values"]) // columns
    wide, base = (WIDTH - BESIDE - RIGHT) / columns, ABOVE + ROW * rows
    parts: list[str] = []
    for index, value in enumerate(shape["values"]):
        row, column = divmod(index, columns)
        x, y = BESIDE + wide * column, base - ROW * (row + 1)
        look, opacity = ("loss", "gain")[value >= 0], STRONGEST * min(1.0, abs(value) / limit)
        size = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{ROW:g}"'
        parts.append(f'<rect class="cell {look}" {size} style="fill-opacity:{opacity:.2f}"/>')
        if columns <= MOST_NUMBERS:
            number = f"{value:.2f}".replace("-0.00", "0.00")
            parts.append(label(x + wide / 2, y + ROW / 2 + 4, number, "inner middle"))
    for at, word in _ticks(up, ROW, BESIDE - 24):
        parts.append(label(BESIDE - 6, base - ROW * at + 4, word, "tick end"))
    for at, word in _ticks(across, wide, wide):
        parts.append(label(BESIDE + wide * at, base + 15, word, "tick middle"))
    parts.append(label((BESIDE + WIDTH - RIGHT) / 2, base + BELOW - 6, across["column"], "label middle"))
    turned = f'x="11" y="{(ABOVE + base) / 2:g}" transform="rotate(-90 11 {(ABOVE + base) / 2:g})"'
    parts.append(f'<text class="label middle" {turned}>{escape(up["column"])}</text>')
    return picture(name, title + _extremes(shape), base + BELOW, parts)


def _count(level: Fields) -> int:
    """Return the number of a column's levels in a pair."""
    return len(level["words"]) if "words" in level else len(level["edges"]) - 1


def _ticks(level: Fields, size: float, room: float) -> list[tuple[float, str]]:
    """Return the labels of a column's levels with their places in levels: words in the middle, edges of bins between.

    Args:
      level: of a pair.
      size: of one level on the axis, in units of the SVG.
      room: for one label.
    """
    if "words" in level:
        fewest = min(max(map(len, level["words"])), FEWEST_LETTERS)
        every = math.ceil((fewest + 1) * LETTER / room)  # a letter's width is between two labels
        longest = max(fewest, int(every * room / LETTER) - 1)
        return [(at + 0.5, shortened(word, longest)) for at, word in enumerate(level["words"])][::every]
    edges = [f"{each:g}" for each in level["edges"]]
    every = 1 + int(room == size and max(map(len, edges)) * LETTER > size)
    return [(float(at), edge) for at, edge in enumerate(edges)][::every]


def _extremes(shape: Fields) -> str:
    """Return the combinations of a pair that add least and most, for readers who cannot see the picture."""
    cells = sorted(zip(shape["values"], shape["words"], strict=True))
    (low, least), (high, most) = cells[0], cells[-1]
    return f": least {low:.3g} at {least}, most {high:.3g} at {most}"


def _survival(report: Fields) -> dict[str, str]:
    """Return the survival curves by each column of a report with survival, by name."""
    survival: Fields = report.get("survival", {})
    baseline: list[Fields] = report.get("coefficients", {}).get("baseline", [])
    intervals = [Whisker(each["time"], each["low"], each["high"], "measured") for each in baseline]
    return {
        f"survival-{index}": _curves(f"survival-{index}", survival, each, intervals)
        for index, each in enumerate(survival.get("columns", []))
    }


def _curves(name: str, survival: Fields, column: Fields, intervals: Sequence[Whisker]) -> str:
    """Return the curves of a column's levels beside that where each column adds its mean.

    Args:
      name: unique on the page.
      survival: of a report.
      column: one of its columns.
      intervals: of the curve where each column adds its mean.
    """
    times = survival["times"]
    lines = [Line([*zip(times, survival["baseline"], strict=True)], BASELINE)]
    marks, texts = list[Mark](), list[str]()
    for curve, look in zip(column["curves"], CURVES, strict=False):
        points = [*zip(times, curve["survival"], strict=True)]
        lines.append(Line(points, look))
        marks.append(Mark(*points[-1], look))
        middle = len(points) // 2
        texts.append(
            f"{curve['of']}: {points[middle][1]:.0%} at {points[middle][0]:g}, {points[-1][1]:.0%} at {points[-1][0]:g}"
        )
    title = f"Survival until {survival['event']} by {column['column']}; {'; '.join(texts)}"
    return svg(
        Chart(name, title, survival["time"], "survival", lines, intervals, marks, top=1.0, shares_up=True)
    )
