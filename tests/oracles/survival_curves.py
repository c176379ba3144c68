"""Table of `survival_curves.json`: Kaplan-Meier curves and log-rank tests as lifelines 0.30.3 (MIT) has them.

    pip install lifelines==0.30.3
    python tests/oracles/survival_curves.py > tests/oracles/survival_curves.json

The rows are data sets that come with lifelines: `waltons` (163 flies in two groups) and `rossi` (432 released prisoners,
with and without financial aid), as counts by group, time and event. Times are rounded to bins: an event to the end of its
bin, a censored row to the end too or, with half of its weight, to the start. Nothing here is computed by fedveil.
"""

import json
import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = "0.30.3"
# data set, columns of time, event and group, and the edges of the bins
CASES = (
    ("waltons", ("T", "E", "group"), list(range(0, 81, 4))),
    ("rossi", ("week", "arrest", "fin"), [0, 8, 16, 24, 32, 40, 48]),
)


def cases() -> list[dict[str, Any]]:
    datasets = import_module("lifelines.datasets")
    rows_of_cases: list[dict[str, Any]] = []
    for name, columns, edges in CASES:
        rows = getattr(datasets, f"load_{name}")()[list(columns)]
        rows.columns = ["time", "event", "group"]
        counts = rows.groupby(["group", "time", "event"]).size().reset_index(name="rows")
        groups = sorted(map(str, rows["group"].unique()))
        for censoring in ("end", "middle"):
            rows_of_cases.append(
                {
                    "data": name,
                    "edges": edges,
                    "censoring": censoring,
                    "groups": groups,
                    "rows": [[str(g), float(t), int(e), int(n)] for g, t, e, n in counts.to_numpy()],
                    **expected(rows, groups, edges, censoring),
                }
            )
    return rows_of_cases


def binned(rows: Any, edges: list[int], censoring: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return times as numbers of edges, events and weights."""
    time, event = rows["time"].to_numpy(float), rows["event"].to_numpy(int)
    event = np.where(time > edges[-1], 0, event)
    bin_ = np.minimum(np.searchsorted(edges, time, side="right") - 1, len(edges) - 2)
    end = np.where(time > edges[-1], len(edges), bin_ + 1).astype(float)
    if censoring == "end":
        return end, event, np.ones(len(end))
    split = (event == 0) & (time <= edges[-1])
    return (
        np.concatenate([end, end[split] - 1]),
        np.concatenate([event, event[split]]),
        np.concatenate([np.where(split, 0.5, 1.0), np.full(split.sum(), 0.5)]),
    )


def expected(rows: Any, groups: list[str], edges: list[int], censoring: str) -> dict[str, Any]:
    fitter = import_module("lifelines").KaplanMeierFitter
    logrank_test = import_module("lifelines.statistics").logrank_test

    own = [binned(rows[rows["group"].astype(str) == each], edges, censoring) for each in groups]
    curves: list[list[float]] = []
    medians: list[float] = []
    for time, event, weight in own:
        fitted = fitter().fit(time, event, weights=weight)
        curves.append([float(each) for each in fitted.predict(list(range(1, len(edges))))])
        medians.append(float(fitted.median_survival_time_))
    (time, event, weight), (other_time, other_event, other_weight) = own
    test = logrank_test(time, other_time, event, other_event, weights_A=weight, weights_B=other_weight)
    return {
        "curves": curves,
        "median_bins": [each if np.isfinite(each) else None for each in medians],
        "chi_square": float(test.test_statistic),
        "p": float(test.p_value),
    }


if __name__ == "__main__":
    if version("lifelines") != VERSION:
        sys.exit(f"pip install lifelines=={VERSION}")
    warnings.simplefilter("ignore")  # of weights that are no whole numbers
    print(json.dumps({"lifelines": VERSION, "cases": cases()}, separators=(",", ":"), allow_nan=False))
