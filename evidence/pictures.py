"""Pictures of a report: the numbers of each chart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from ..base.charts import Caption, Chart, Line, Mark, Points, Whisker, svg
from ..privacy.statistics.survival import SURVIVAL
from ..run.run_files import Fields
from .held_out import reliability
from .memorisation import EXPOSURE
from .model_pictures import model_pictures
from .page_text import is_finite, step, text_of

GUESSING = ((0.0, 0.0), (1.0, 1.0))  # true by false positives of a test that guesses
LOOKS = ("accuracy", "epsilon")  # of the curve of this run, and of the run to compare it with
CURVES = (
    "epsilon",
    "accuracy",
    "plan",
    "budget",
)  # looks of the first groups' curves; the table has all of them
SHIFT, MARGIN = 0.006, 0.15  # between intervals at one time, and beside the curves' ends, over the last time


def pictures(report: Fields) -> dict[str, str]:
    """Return the charts of a report as SVG, by name, without empty charts."""
    charts = {
        "rounds": _rounds(report),
        "runs": _runs(report),
        "deltas": _deltas(report),
        "tests": _tests(report),
        "accuracy": _accuracy(report),
        "looks": _looks(report),
        "exposure": _exposure(report),
        "memorisation": _memorisation(report, "bits"),
        "quality": _memorisation(report, "quality"),
        "evaluations": _evaluations(report),
        "reliability": reliability(report),
    }
    svgs = {name: svg(chart) for name, chart in charts.items() if chart is not None}
    return svgs | model_pictures(report)


def _label(value: object, pointer: str, form: str = "plain") -> Caption:
    """Return the label of a value of the report, as `text_of` writes it."""
    return Caption(text_of(value, form), pointer, form)


def _rounds(report: Fields) -> Chart | None:
    """Return the epsilon after each round beside the plan's, refusals, and the budget if it is at most twice the last."""
    rows = [(row["round"], row["epsilon"]) for row in report["rounds"] if is_finite(row["epsilon"])]
    if not rows:
        return None
    plan = [(number, epsilon) for number, epsilon in report["plan"] if is_finite(epsilon)]
    lines = [Line(plan, "plan"), Line(rows, "epsilon")]
    last = len(report["rounds"]) - 1
    label = _label(report["rounds"][last]["epsilon"], f"/rounds/{last}/epsilon", "epsilon")
    marks = [Mark(*rows[-1], "epsilon", label)]
    refusals = (report["ledger"] or {}).get("refusals", [])
    marks += [Mark(each["round"], rows[-1][1], "refused", cross=True) for each in refusals if each["round"]]
    index = report["stamps"]["row"]
    target = None if index is None else report["privacy"][index]["target_epsilon"]
    if target is not None and target <= 2 * rows[-1][1]:
        end = max(rows[-1][0], plan[-1][0] if plan else 0)
        lines.append(Line([(0, target), (end, target)], "budget"))
    title = "Epsilon after each round of this run, and its budget"
    return Chart("chart-rounds", title, "round", "epsilon", lines, (), marks, whole=True)


def _runs(report: Fields) -> Chart | None:
    """Return the ledger's epsilon after each of its runs; None for a single run, which `_rounds` shows."""
    rows = report["ledger"]["runs"] if report["ledger"] else []
    points: list[tuple[float, float]] = []
    marks: list[Mark] = []
    for index, row in enumerate(rows):
        number, epsilon = index + 1, row["epsilon_after"]
        if is_finite(epsilon):
            points.append((number, epsilon))
            look = "epsilon" if row["this"] else "other"
            label = _label(epsilon, f"/ledger/runs/{index}/epsilon_after", "epsilon")
            marks.append(Mark(number, epsilon, look, label if row["this"] or number == len(rows) else None))
    if not points or len(rows) == 1:
        return None
    last_run, last_epsilon = points[-1]
    points.insert(0, (0, 0.0) if points[0][0] == 1 else points[0])
    lines = [Line(points, "epsilon", step=True)]
    budgets = [row["target_epsilon"] for row in rows if is_finite(row["target_epsilon"])]
    if budgets and budgets[-1] <= 2 * last_epsilon:
        lines.append(Line([(0, budgets[-1]), (last_run, budgets[-1])], "budget"))
    title = "Cumulative epsilon after each run on this ledger"
    return Chart("chart-runs", title, "run on this ledger", "epsilon", lines, (), marks, whole=True)


def _main_row(report: Fields) -> Fields:
    """Return the row of the first guarantee, if it has a curve; empty otherwise."""
    index = report["stamps"]["row"]
    return report["privacy"][index] if index is not None and report["privacy"][index]["curve"] else {}


def _deltas(report: Fields) -> Chart | None:
    """Return the epsilon of the first guarantee at every delta."""
    row = _main_row(report)
    points = (
        [(delta, epsilon) for delta, epsilon in row["curve"]["epsilon"] if is_finite(epsilon)] if row else ()
    )
    if not points:
        return None
    label = _label(row["epsilon"], f"/privacy/{report['stamps']['row']}/epsilon", "epsilon")
    mark = Mark(row["delta"], row["epsilon"], "epsilon", label, position="right")
    title = "Epsilon of the same guarantee at every delta"
    lines = [Line(points, "epsilon")]
    return Chart("chart-deltas", title, "delta", "epsilon", lines, (), [mark], logarithmic=True)


def _tests(report: Fields) -> Chart | None:
    """Return the most true positives that the first guarantee leaves to a membership test, by false positives."""
    row = _main_row(report)
    if not row:
        return None
    points = [(0.0, 0.0), *((rate, 1 - miss) for rate, miss in row["curve"]["trade_off"]), (1.0, 1.0)]
    label = _label(row["recognised"], f"/privacy/{report['stamps']['row']}/recognised", "percent")
    mark = Mark(report["false_positive"], row["recognised"], "epsilon", label, position="beside")
    lines = [Line(GUESSING, "plan"), Line(points, "epsilon")]
    title = "Largest true positive rate of a membership test, by false positive rate"
    across, up = "false positive rate", "true positive rate, at most"
    return Chart("chart-tests", title, across, up, lines, (), [mark], top=1.0, shares=True)


def _accuracy(report: Fields) -> Chart | None:
    """Return the main metric on held-out data by the spent epsilon or, without a finite one, by the round."""
    name = report["metric"]
    measured = [row for row in report["rounds"] if name in row["metrics"]]
    across = "epsilon spent"
    points = [(row["epsilon"], row["metrics"][name]) for row in measured if is_finite(row["epsilon"])]
    if not points:
        across = "round"
        points = [(row["round"], row["metrics"][name]) for row in measured]
    if not points:
        return None
    last = len(report["rounds"]) - 1
    label = None
    if name in report["rounds"][last]["metrics"]:
        label = _label(report["rounds"][last]["metrics"][name], f"/rounds/{last}/metrics/{step(str(name))}")
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    top, bottom = None, 0.0
    if lowest >= 0 and highest <= 1:  # an axis from 0 would flatten how shares differ
        top, bottom = 1.0, math.floor(10 * lowest) / 10 if lowest < 1 else 0.0
    return Chart(
        "chart-accuracy",
        f"Held-out {name} by {across}",
        across,
        f"held-out {name}",
        [Line(points, "accuracy")],
        marks=[Mark(*points[-1], "accuracy", label)],
        top=top,
        bottom=bottom,
        whole=across == "round",
    )


def _looks(report: Fields) -> Chart | None:
    """Return the audit's measurements with their intervals, beside the claim and the largest measurable epsilon."""
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
        "chart-looks", title, "round", "epsilon", lines, intervals, marks, top=1.3 * highest, whole=True
    )


@dataclass(frozen=True)
class Exposed:
    """Exposure of the secrets of one kind.

    Attributes:
      copies: number of clients that hold one.
      at: pointer to its figures.
      bits: mean exposure.
      unplanted: mean exposure of secrets that no client holds.
      limit: largest possible exposure.
    """

    copies: int
    at: str
    bits: float
    unplanted: float
    limit: float


def exposed(report: Fields) -> list[Exposed]:
    """Return the exposures of a report's secrets in ascending order of their copies; none without secrets."""
    rows: list[Exposed] = []
    for index, each in enumerate((report["audit"] or {}).get("by_heart", ())):
        values = each.get("shown") or {}
        figures: list[Any] = [values.get(name) for name in ("bits", "unplanted", "limit")]
        if each["name"].startswith(EXPOSURE) and all(map(is_finite, figures)):
            copies = int(each["name"].removeprefix(EXPOSURE))
            rows.append(Exposed(copies, f"/audit/by_heart/{index}/shown", *figures))
    return sorted(rows, key=lambda row: row.copies)


def _exposure(report: Fields) -> Chart | None:
    """Return the exposure of secrets by the number of their copies, beside that of none, and the largest possible."""
    rows = exposed(report)
    if not rows:
        return None
    marks = [
        Mark(row.copies, row.bits, "measured", _label(row.bits, f"{row.at}/bits", "decimal")) for row in rows
    ]
    ends = (0, rows[-1].copies)
    levels = [(rows[-1].unplanted, "plan"), (rows[-1].limit, "ceiling")]
    lines = [Line([(end, level) for end in ends], look) for level, look in levels]
    lines.append(Line([(row.copies, row.bits) for row in rows], "accuracy"))
    title = "Exposure of secrets by the number of clients that hold one, beside secrets that none holds"
    across, up = "clients that hold a secret", "exposure in bits"
    return Chart("chart-exposure", title, across, up, lines, (), marks, whole=True)


def _memorisation(report: Fields, kind: Literal["bits", "quality"]) -> Chart | None:
    """Return the exposure by round of the secrets with most copies, or the quality, a line for each run; None without any."""
    memorisation: Fields = report.get("memorisation") or {}
    pairs = zip(LOOKS, memorisation.get("curves", ()), strict=False)  # an only run has the first look
    curves: list[tuple[str, Points]] = [(look, each[kind]) for look, each in pairs if each[kind]]
    if not curves:
        return None
    lines = [Line(points, look) for look, points in curves]
    marks = [Mark(x, y, look) for look, points in curves for x, y in points[-1:]]
    if kind == "quality":
        name = memorisation["metric"]
        return Chart(
            "chart-quality", f"Held-out {name} by round", "round", name, lines, (), marks, whole=True
        )
    end = max(points[-1][0] for _, points in curves)
    levels = [(memorisation["chance"], "plan"), (memorisation["limit"], "ceiling")]
    lines = [*(Line([(0, level), (end, level)], look) for level, look in levels), *lines]
    title = "Exposure of secrets by round, beside that of chance and the largest possible"
    return Chart("chart-memorisation", title, "round", "exposure in bits", lines, (), marks, whole=True)


def _evaluations(report: Fields) -> Chart | None:
    """Return the first figure of each evaluation at clients with its interval; None for fewer than two figures."""
    rows = [
        (each["round"], each["answers"][0]["figures"][0])
        for each in report["evaluations"]
        if each["answers"] and each["answers"][0]["figures"]
    ]
    figures = [(number, figure) for number, figure in rows if figure["value"] is not None]
    if len(figures) < 2:
        return None
    name = report["evaluations"][0]["answers"][0]["name"]
    index = max(at for at, row in enumerate(rows) if row == figures[-1])
    pointer = f"/evaluations/{index}/answers/0/figures/0/value"
    last = figures[-1][1]["value"]
    return Chart(
        "chart-evaluations",
        f"{name} on the clients' own records, by round",
        "round",
        f"{name}, at clients",
        [Line([(number, figure["value"]) for number, figure in figures], "accuracy")],
        [Whisker(number, figure["low"], figure["high"], "measured") for number, figure in figures],
        [Mark(figures[-1][0], last, "accuracy", _label(last, pointer, "figure"))],
        top=1.0 if all(0 <= figure["value"] <= 1 for _, figure in figures) else None,
        whole=True,
    )


def curves(answer: Fields, at: str) -> str:
    """Return the survival curves of an answer with their intervals as SVG; empty where the noise left none.

    Args:
      answer: in a report's form.
      at: pointer to the answer.
    """
    groups = _curves_of(answer)
    if not groups:
        return ""
    lines: list[Line] = []
    whiskers: list[Whisker] = []
    marks: list[Mark] = []
    last = max(end for points in groups for _, end in points)
    for number, (points, look) in enumerate(zip(groups, CURVES, strict=False)):
        figures = [(end, answer["figures"][index]) for index, end in points]
        lines.append(Line([(0.0, 1.0), *((end, each["value"]) for end, each in figures)], look))
        shift = SHIFT * number * last  # so that intervals at one time lie next to each other
        whiskers += [Whisker(end + shift, each["low"], each["high"], "measured") for end, each in figures]
        end, figure = figures[-1]
        label = _label(figure["value"], f"{at}/figures/{points[-1][0]}/value", "share")
        marks.append(Mark(end, figure["value"], look, label, position="beside"))
    lines.append(Line([(0.0, 0.0), (last * (1 + MARGIN), 0.0)], "plan"))
    name, title = f"chart-survival{at.replace('/', '-')}", f"Survival of {answer['of']}, with 95 % intervals"
    return svg(Chart(name, title, str(answer["of"]), "survival", lines, whiskers, marks, top=1.0))


def curve_ends(answer: Fields) -> list[int]:
    """Return the numbers of the figures at the ends of the drawn curves, the highest first."""
    ends = [points[-1][0] for points in _curves_of(answer)[: len(CURVES)]]
    return sorted(ends, key=lambda index: -answer["figures"][index]["value"])


def _curves_of(answer: Fields) -> list[list[tuple[int, float]]]:
    """Return the numbers and the times of each curve's figures that have a value."""
    groups: dict[str, list[tuple[int, float]]] = {}
    for index, figure in enumerate(answer["figures"]):
        end, _, group = figure["name"].removeprefix(SURVIVAL).partition(", ")
        if figure["name"].startswith(SURVIVAL) and figure["value"] is not None:
            groups.setdefault(group, []).append((index, float(end)))
    return list(groups.values())
