"""Pictures of a report: the numbers of each chart."""

from __future__ import annotations

import math
from typing import Any

from ..run.run_files import Fields
from .charts import Chart, Line, Mark, Whisker, bars, svg
from .content import is_finite
from .page_text import step

GUESSING = ((0.0, 0.0), (1.0, 1.0))
MAX_SHAPES = 12  # of an additive model, on the page; the JSON has all of them
MAX_WORDS = 24  # of one shape
ROOM = 1.1  # above and below shapes


def pictures(report: Fields) -> dict[str, str]:
    """Return the charts of a report as SVG, by name, without empty charts."""
    charts = {
        "rounds": _rounds(report),
        "runs": _runs(report),
        "deltas": _deltas(report),
        "tests": _tests(report),
        "accuracy": _accuracy(report),
        "looks": _looks(report),
        "evaluations": _evaluations(report),
    }
    svgs = {name: svg(chart) for name, chart in charts.items() if chart is not None}
    return svgs | _shapes(report)


def _rounds(report: Fields) -> Chart | None:
    rows = [(row["round"], row["epsilon"]) for row in report["rounds"] if is_finite(row["epsilon"])]
    if not rows:
        return None
    lines = [Line(rows, "epsilon")]
    plan = [(mark, size) for mark, size in report["plan"] if is_finite(size)]
    if plan:
        lines.insert(0, Line(plan, "plan"))
    last = len(report["rounds"]) - 1
    pointer = f"/rounds/{last}/epsilon"
    marks = [Mark(*rows[-1], "epsilon", pointer, "epsilon")]
    refusals = (report["ledger"] or {}).get("refusals", [])
    marks += [Mark(each["round"], rows[-1][1], "refused", cross=True) for each in refusals if each["round"]]
    index = report["stamps"]["row"]
    target = None if index is None else report["privacy"][index]["target_epsilon"]
    if target is not None and target <= 2 * rows[-1][1]:
        end = max(rows[-1][0], plan[-1][0] if plan else 0)
        lines.append(Line([(0, target), (end, target)], "budget"))
    title = "Epsilon after each round of this run, and its budget"
    values: dict[str, Any] = {pointer: report["rounds"][last]["epsilon"]}
    return Chart("chart-rounds", title, "round", "epsilon", lines, (), marks, values, whole=True)


def _runs(report: Fields) -> Chart | None:
    ledger = report["ledger"]
    rows = [] if ledger is None else ledger["runs"]
    sizes = [(at + 1, row["epsilon_after"]) for at, row in enumerate(rows) if is_finite(row["epsilon_after"])]
    if not sizes or len(rows) == 1:  # of a single run the other chart says it all
        return None
    values: dict[str, Any] = {}
    marks: list[Mark] = []
    for at, row in enumerate(rows):
        if is_finite(row["epsilon_after"]):
            pointer = f"/ledger/runs/{at}/epsilon_after"
            values[pointer] = row["epsilon_after"]
            label = pointer if row["this"] or at == len(rows) - 1 else None
            marks.append(
                Mark(at + 1, row["epsilon_after"], "epsilon" if row["this"] else "other", label, "epsilon")
            )
    begin = (sizes[0][0] - 1, 0.0) if sizes[0][0] == 1 else sizes[0]
    lines = [Line([begin, *sizes], "epsilon", step=True)]
    budgets = [row["target_epsilon"] for row in rows if is_finite(row["target_epsilon"])]
    if budgets and budgets[-1] <= 2 * sizes[-1][1]:
        lines.append(Line([(0, budgets[-1]), (sizes[-1][0], budgets[-1])], "budget"))
    title = "Cumulative epsilon after each run on this ledger"
    return Chart("chart-runs", title, "run on this ledger", "epsilon", lines, (), marks, values, whole=True)


def _curve(report: Fields) -> tuple[str, Fields] | None:
    index = report["stamps"]["row"]
    if index is None or not report["privacy"][index]["curve"]:
        return None
    return f"/privacy/{index}", report["privacy"][index]


def _deltas(report: Fields) -> Chart | None:
    curve = _curve(report)
    if curve is None:
        return None
    pointer, row = curve
    points = [(delta, size) for delta, size in row["curve"]["epsilon"] if is_finite(size)]
    if not points:
        return None
    mark = Mark(row["delta"], row["epsilon"], "epsilon", f"{pointer}/epsilon", "epsilon", position="right")
    values: dict[str, Any] = {f"{pointer}/epsilon": row["epsilon"]}
    title = "Epsilon of the same guarantee at every delta"
    lines = [Line(points, "epsilon")]
    return Chart("chart-deltas", title, "delta", "epsilon", lines, (), [mark], values, logarithmic=True)


def _tests(report: Fields) -> Chart | None:
    curve = _curve(report)
    if curve is None:
        return None
    pointer, row = curve
    points = [(0.0, 0.0), *((rate, 1 - miss) for rate, miss in row["curve"]["trade_off"]), (1.0, 1.0)]
    ref = f"{pointer}/recognised"
    mark = Mark(report["false_positive"], row["recognised"], "epsilon", ref, "percent", position="beside")
    values: dict[str, Any] = {ref: row["recognised"]}
    lines = [Line(GUESSING, "plan"), Line(points, "epsilon")]
    title = "Largest true positive rate of a membership test, by false positive rate"
    across, up = "false positive rate", "true positive rate, at most"
    return Chart("chart-tests", title, across, up, lines, (), [mark], values, top=1.0, shares=True)


def _accuracy(report: Fields) -> Chart | None:
    name = report["metric"]
    rows = [
        (row["epsilon"], row["metrics"][name])
        for row in report["rounds"]
        if name in row["metrics"] and is_finite(row["epsilon"])
    ]
    across = "epsilon spent"
    if not rows:
        rows = [(row["round"], row["metrics"][name]) for row in report["rounds"] if name in row["metrics"]]
        across = "round"
    if not rows:
        return None
    last = len(report["rounds"]) - 1
    values: dict[str, Any] = {}
    marks = [Mark(*rows[-1], "accuracy")]
    if name in report["rounds"][last]["metrics"]:
        pointer = f"/rounds/{last}/metrics/{step(str(name))}"
        values[pointer] = report["rounds"][last]["metrics"][name]
        marks = [Mark(*rows[-1], "accuracy", pointer)]
    lowest, highest = (pick(y for _, y in rows) for pick in (min, max))
    share = lowest >= 0 and highest <= 1
    # Shares are shown in the part of 0 to 1 where they lie: an axis from 0 would flatten what differs.
    return Chart(
        "chart-accuracy",
        f"Held-out {name} by {across}",
        across,
        f"held-out {name}",
        [Line(rows, "accuracy")],
        marks=marks,
        values=values,
        top=1.0 if share else None,
        bottom=math.floor(10 * lowest) / 10 if share and lowest < 1 else 0.0,
        whole=across == "round",
    )


def _looks(report: Fields) -> Chart | None:
    looks = [each for each in report["looks"] if is_finite(each["epsilon"])]
    if not looks:
        return None
    claimed = [(each["round"], each["claimed"]) for each in looks if is_finite(each["claimed"])]
    ceiling = [(each["round"], each["ceiling"]) for each in looks if is_finite(each["ceiling"])]
    highest = max([y for _, y in claimed] + [each["high"] for each in looks if is_finite(each["high"])])
    intervals = [
        Whisker(each["round"], each["low"], each["high"], "measured")
        for each in looks
        if is_finite(each["low"]) and is_finite(each["high"])
    ]
    marks = [Mark(each["round"], each["epsilon"], "measured") for each in looks]
    lines = [Line(ceiling, "ceiling"), Line(claimed, "epsilon")]
    title = "Claimed epsilon, epsilon measured by canaries with interval, and largest measurable epsilon, by round"
    return Chart(
        "chart-looks", title, "round", "epsilon", lines, intervals, marks, {}, top=1.3 * highest, whole=True
    )


def _evaluations(report: Fields) -> Chart | None:
    """Return the first figure of each evaluation at clients with its interval, where there were several."""
    rows = [
        (each["round"], each["answers"][0]["figures"][0])
        for each in report["evaluations"]
        if each["answers"] and each["answers"][0]["figures"]
    ]
    figures = [(number, figure) for number, figure in rows if figure["value"] is not None]
    if len(figures) < 2:
        return None
    name = report["evaluations"][0]["answers"][0]["name"]
    index = next(at for at in reversed(range(len(rows))) if rows[at] == figures[-1])
    pointer = f"/evaluations/{index}/answers/0/figures/0/value"
    last = figures[-1][1]["value"]
    return Chart(
        "chart-evaluations",
        f"{name} on the clients' own records, by round",
        "round",
        f"{name}, at clients",
        [Line([(number, figure["value"]) for number, figure in figures], "accuracy")],
        [Whisker(number, figure["low"], figure["high"], "measured") for number, figure in figures],
        [Mark(figures[-1][0], last, "accuracy", pointer, "figure")],
        {pointer: last},
        top=1.0 if all(0 <= figure["value"] <= 1 for _, figure in figures) else None,
        whole=True,
    )


def _shapes(report: Fields) -> dict[str, str]:
    """Return each column's contribution to the score by name, all on one scale."""
    shapes = report["shapes"]["shapes"][:MAX_SHAPES] if report["shapes"] else []
    ends = (
        min((each["lowest"] for each in shapes), default=0.0),
        max((each["highest"] for each in shapes), default=0.0),
    )
    if ends[0] == ends[1]:  # a model that has learned nothing
        ends = -1.0, 1.0
    return {f"shape-{index}": _shape(f"shape-{index}", each, ends) for index, each in enumerate(shapes)}


def _shape(name: str, shape: Fields, ends: tuple[float, float]) -> str:
    """Return a column's contributions, by a number's bins or by words."""
    title = f"What {shape['column']} adds to the score of {shape['score']}"
    values = shape["values"]
    if shape["words"] is not None:
        furthest = sorted(range(len(values)), key=lambda at: -abs(values[at]))[:MAX_WORDS]
        return bars(name, title, [(shape["words"][at], values[at]) for at in sorted(furthest)], ends)
    edges = shape["edges"]
    straight = len(values) == len(edges)  # of a number without bins
    points = [*zip(edges, [*values, values[-1]][: len(edges)], strict=True)]
    lines = [Line([(edges[0], 0.0), (edges[-1], 0.0)], "plan"), Line(points, "accuracy", step=not straight)]
    bottom, top = (ROOM * each for each in ends)
    return svg(Chart(name, title, shape["column"], "adds", lines, top=top, bottom=bottom, from_zero=False))
