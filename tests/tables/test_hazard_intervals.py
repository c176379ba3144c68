"""Intervals of survival curves: their law, their covariance against Fisher's information, their coverage, and a run's."""

import csv
from pathlib import Path

import numpy as np
import pytest
from shared.runs import run_quietly

from fedveil.__main__ import run as fedveil
from fedveil.benchmarks.intervals import Case, coverage_of_times, hazards_of, rows_of
from fedveil.tables import hazard_intervals
from fedveil.tables.descent import Descent, Design, ModelEstimate, estimate
from fedveil.tables.hazard_intervals import curves, law_of_times, public_rows
from fedveil.tables.outcomes import expit
from fedveil.tables.run_steps import NoInterval
from fedveil.tables.survival import SurvivalTimes
from fedveil.tasks.table_schema import read_schema

LABEL = "{kind: survival, time: cost, event: ill, bins: 3}"


def label_of(folder: Path) -> SurvivalTimes:
    (folder / "schema.yaml").write_text(
        f"label: {LABEL}\ncolumns:\n  age: {{low: 0, high: 1}}\n  cost: {{low: 0, high: 30}}\n"
        "  ill: {categories: [no, yes]}\n"
    )
    label = read_schema(folder / "schema.yaml").outcome
    assert isinstance(label, SurvivalTimes)
    return label


def test_the_law_has_the_censoring_of_the_public_rows(tmp_path: Path) -> None:
    # Middles are 5, 15 and 25. At risk: 6, then 4 (one event and one censoring are over), then 2.
    times, events = [3, 10, 12, 16, 20, 30], [0, 1, 0, 0, 1, 0]
    law = law_of_times(label_of(tmp_path), np.array([times, events], float).T)
    assert law.censored == pytest.approx([1 / 6, 1 / 4, 1 / 2])
    assert law.offsets == pytest.approx(np.full(3, np.log(2 ** (1 / 3) - 1)))


@pytest.mark.parametrize(("bins", "rows"), [(3, 1000), (10, 952), (40, 61), (44, 51)], ids=str)
def test_many_bins_take_fewer_public_rows(bins: int, rows: int) -> None:
    inputs = np.arange(1000.0)[:, None]
    some = public_rows(inputs, bins)
    assert some.shape == (rows, 1) and (some[0], some[-1]) == (0, 999)
    assert np.diff(some[:, 0]).max() - np.diff(some[:, 0]).min() <= 1


@pytest.mark.parametrize(("bins", "rows"), [(45, 48), (365, 0)], ids=str)
def test_bins_for_too_few_public_rows_have_no_intervals(bins: int, rows: int) -> None:
    sentence = f"of {bins} bins only {rows} public rows are used, and 50 are the fewest; use fewer bins"
    with pytest.raises(NoInterval, match=sentence):
        public_rows(np.ones((1000, 1)), bins)


def test_median_of_a_flat_curve_is_infinite(tmp_path: Path) -> None:
    medians = label_of(tmp_path).medians(np.array([[0.9, 0.9, 0.9], [0.75, 0.25, 0.0]]))
    assert medians.tolist() == [np.inf, 15.0]


def test_without_noise_the_covariance_is_of_fishers_information() -> None:
    stream = np.random.default_rng(2)
    case = Case(0, columns=2, intervals=3, strength=0.5)
    inputs, (law, truth) = rows_of(60, 2, stream), hazards_of(case)
    steps = Descent(0.6, 0.9, 700, 1, clip=np.inf, noise=0.0, share=1.0, records=500)
    result = estimate(Design(steps, inputs, law), truth, np.inf)
    layout = law.layout(inputs)
    scores = layout.scores(truth)
    at_risk = law.errors(scores, scores).chances @ law.lived
    weights = at_risk * expit(scores) * (1 - expit(scores))
    rows = np.concatenate([np.hstack([inputs[:, :-1], np.tile(unit, (60, 1))]) for unit in np.eye(3)])
    information = rows.T @ (rows * weights.T.ravel()[:, None]) * 500 / 60
    assert np.allclose(result.coefficients, truth, atol=1e-4)
    assert np.allclose(result.covariance, np.linalg.inv(information), rtol=1e-3, atol=1e-6)


def test_a_curves_interval_is_greenwoods_where_no_column_matters() -> None:
    count, hazards = 400.0, np.array([0.1, 0.2, 0.3])
    at_risk = count * np.concatenate([[1.0], np.cumprod(1 - hazards)[:-1]])
    variances = 1 / (at_risk * hazards * (1 - hazards))
    offsets = np.log(hazards / (1 - hazards))
    covariance = np.diag(np.concatenate([[0.0], variances]))
    fit = ModelEstimate(np.concatenate([[0.0], offsets]), covariance, np.eye(2), 0.0, 1.0)
    value, low, high = (band[0] for band in curves(fit, np.array([[0.3, 1.0]]), 3, 1.96))
    assert value == pytest.approx(np.cumprod(1 - hazards))
    greenwood = np.sqrt(np.cumsum(hazards / (at_risk * (1 - hazards))))
    wide = 1.96 * greenwood / -np.log(value)
    assert low == pytest.approx(value ** np.exp(wide)) and high == pytest.approx(value ** np.exp(-wide))


def test_intervals_of_curves_cover_the_true_survival() -> None:
    # 6 federations with fixed seeds: a guard; `python -m fedveil.benchmarks.intervals 300 times` measures.
    shares = coverage_of_times(
        Case(0, records=400, public=50, columns=2, epsilon=3.0, intervals=3), 6, seed=7
    )
    assert shares.failures == 0
    assert shares.coefficients >= 0.8 and shares.predictions >= 0.85


def test_a_run_gives_curves_with_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hazard_intervals, "MOST_NUMBERS", 80 * 3 * 7)  # 80 of the 100 public rows
    draw = np.random.default_rng(0)
    (tmp_path / "sites").mkdir()
    for name, count in (("sites/a.csv", 250), ("sites/b.csv", 250), ("public.csv", 100)):
        ages, stops = draw.uniform(0, 1, count), draw.uniform(5, 40, count)
        times = draw.exponential(25 * np.exp(-1.5 * (ages - 0.5)))
        cells = zip(ages, np.minimum(times, stops), times <= stops, strict=True)
        rows = [f"{age:.3f},{cost:.2f},{['no', 'yes'][int(ill)]}" for age, cost, ill in cells]
        (tmp_path / name).write_text("\n".join(["age,cost,ill", *rows, ""]))
    label_of(tmp_path)
    files = {"folder": "sites", "schema": "schema.yaml", "held_out_file": "public.csv"}
    keys = [f"task.{key}={tmp_path / name}" for key, name in files.items()]
    keys += ["task=csv", "task.model=linear", "task.simulated=true", "num_rounds=30", "seed=1"]
    private = ["privacy=record_distributed", "privacy.target_epsilon=20"]
    result = run_quietly([*keys, *private], tmp_path / "run").result
    baseline = result["intervals"]["baseline"]
    assert result["intervals"]["rows"] == 80
    assert [each["time"] for each in baseline] == [10, 20, 30]
    assert all(each["low"] < each["value"] < each["high"] for each in baseline)
    assert baseline[1]["low"] < np.exp(-20 / 25) < baseline[1]["high"]
    assert {each["score"] for each in result["intervals"]["coefficients"]} == {"hazard of ill yes"}
    (tmp_path / "new.csv").write_text("age\n0.2\n0.9\n")
    capsys.readouterr()
    assert fedveil(["predict", str(tmp_path / "run"), str(tmp_path / "new.csv"), "--interval", "0.9"]) == 0
    for row in csv.DictReader(capsys.readouterr().out.splitlines()):
        for column in ("survival_at_20", "median_cost"):
            ends = [float(row[f"{column}_{name}"]) for name in ("low", "estimate", "high")]
            assert ends == sorted(ends) and ends[0] < ends[2]
