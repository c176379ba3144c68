"""Tests of tables/grades.py: proportional odds, its figures, and a run."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.tables.grades import Grades
from fedveil.tasks.shapes import read_shapes
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load

LABEL = "{kind: ordinal, column: pain}"
WORDS = ["none", "mild", "strong", "worst"]
SCHEMA = """label: LABEL
columns:
  age: {low: -1, high: 1}
  dose: {low: -1, high: 1}
  pain: {categories: [none, mild, strong, worst]}
"""


def write(
    folder: Path, schema: str = SCHEMA.replace("LABEL", LABEL)
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Write two clinics with 300 patients each; return the inputs and the grades of all."""
    draw = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    inputs = draw.uniform(-1, 1, (600, 2)).round(4)
    grades = np.searchsorted([-1, 0.5, 2], inputs @ [2, -1] + draw.logistic(size=600))
    for name, rows in (("north", range(300)), ("south", range(300, 600))):
        lines = [f"{inputs[row, 0]},{inputs[row, 1]},{WORDS[grades[row]]}" for row in rows]
        (folder / f"{name}.csv").write_text("\n".join(["age,dose,pain", *lines]) + "\n")
    (folder / "schema.yaml").write_text(schema)
    return inputs, grades


def label_of(folder: Path) -> Grades:
    outcome = read_schema(folder / "schema.yaml").outcome
    assert isinstance(outcome, Grades)
    return outcome


def shares(parameters: NDArray[np.float64], inputs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability of each grade by proportional odds, with the first cut and the logarithms of further steps."""
    cuts = np.cumsum([parameters[2], *np.exp(parameters[3:])])
    below = expit(cuts - (inputs @ parameters[:2])[:, None])
    return np.diff(below, prepend=0, append=1, axis=1)


def test_fit_without_privacy_is_the_most_likely_one(tmp_path: Path) -> None:
    """`OrderedModel(grades, inputs, distr="logit")` of statsmodels 0.15.0 has these slopes too."""
    inputs, grades = write(tmp_path / "clinics")
    (tmp_path / "public.csv").write_text((tmp_path / "clinics" / "north.csv").read_text())
    own = [
        f"task.folder={tmp_path / 'clinics'}",
        f"task.held_out_file={tmp_path / 'public.csv'}",
        "num_rounds=100",
    ]
    own += ["task.simulated=true", "task.model=linear", "privacy=none", "audit=off", "seed=1"]
    own += [f"hydra.run.dir={tmp_path / 'run'}"]
    assert run(["simulate", "task=csv", *own]) == 0
    fit = minimize(lambda each: -np.log(shares(each, inputs)[np.arange(600), grades]).mean(), np.zeros(5)).x
    assert fit[:2] == pytest.approx([1.98038, -0.93378], abs=1e-3)
    shapes = read_shapes(tmp_path / "run" / "schema.yaml", tmp_path / "run" / "model.safetensors")
    assert shapes is not None and shapes["scores"] == ["above none"]
    slopes = {each["column"]: np.ptp(each["values"][0]) / 2 for each in shapes["shapes"]}
    assert [slopes["age"], slopes["dose"]] == pytest.approx(np.abs(fit[:2]), abs=0.05)
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    best = shares(fit, inputs[:300]).argmax(1)
    assert metrics["accuracy"] == pytest.approx((best == grades[:300]).mean(), abs=0.02)
    assert metrics["mean_absolute_steps"] == pytest.approx(np.abs(best - grades[:300]).mean(), abs=0.03)
    (tmp_path / "new.csv").write_text("age,dose\n1,-1\n-1,1\n")
    assert (
        run(["predict", str(tmp_path / "run"), str(tmp_path / "new.csv"), "--out", str(tmp_path / "p.csv")])
        == 0
    )
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    wanted = shares(fit, np.array([[1.0, -1], [-1, 1]]))
    assert [row["pain"] for row in rows] == [WORDS[each] for each in wanted.argmax(1)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(wanted.max(1), abs=0.03)


def test_loss_is_that_of_proportional_odds(tmp_path: Path) -> None:
    inputs, grades = write(tmp_path)
    parameters = np.array([1.5, -0.5, -0.8, 0.3, -0.4])
    outputs = torch.tensor(
        np.column_stack([inputs @ parameters[:2] - parameters[2], np.full((600, 2), parameters[3:])])
    )
    wanted = -np.log(shares(parameters, inputs)[np.arange(600), grades])
    label, targets = label_of(tmp_path), torch.from_numpy(grades.astype(np.float32))
    assert float(label.loss(outputs, targets, ())) == pytest.approx(wanted.mean(), abs=1e-9)
    stacked = label.losses(outputs.view(3, 200, 3), targets.view(3, 200), ())
    assert stacked.numpy() == pytest.approx(wanted.reshape(3, 200).mean(1), abs=1e-9)
    weights = np.array([0.5, 1, 0.25, 1])
    weighted = float(label.loss(outputs, targets, tuple(weights)))
    assert weighted == pytest.approx((weights[grades] * wanted).mean(), abs=1e-9)


def test_all_grades_are_alike_before_training(tmp_path: Path) -> None:
    write(tmp_path)
    task = load(str(tmp_path), simulated=True)
    outputs = task.model()(task.client_data(0).inputs).detach()
    assert float(task.loss(outputs, task.client_data(0).targets)) == pytest.approx(np.log(4), abs=1e-5)


def test_cut_points_stay_ordered_whatever_is_trained(tmp_path: Path) -> None:
    write(tmp_path)
    outputs = np.random.default_rng(0).normal(0, 30, (50, 3)).astype(np.float32)
    label = label_of(tmp_path)
    assert torch.isfinite(label.loss(torch.from_numpy(outputs), torch.zeros(50), ()))
    assert (label.predictions(outputs)["probability"] > 0.25 - 1e-9).all()


def test_concordance_counts_pairs_of_different_grades(tmp_path: Path) -> None:
    write(tmp_path)
    outputs = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0.5, 0, 0], [0.5, 0, 0]])
    metrics = label_of(tmp_path).metrics(outputs, torch.tensor([0.0, 1, 2, 2]))
    assert metrics["concordance"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("column", ["age", "sex"])
def test_a_column_without_three_categories_is_refused(column: str, tmp_path: Path) -> None:
    write(tmp_path, SCHEMA.replace("LABEL", LABEL.replace("pain", column)) + "  sex: {categories: [f, m]}\n")
    with pytest.raises(Refusal, match=rf"label.column='{column}': must have at least three categories"):
        label_of(tmp_path)


@pytest.mark.parametrize(("mode", "model"), [("record", "gam"), ("record_distributed", "mlp")])
def test_private_modes_train_grades(mode: str, model: str, tmp_path: Path) -> None:
    weights = ", weights: {worst: 3}}"
    write(tmp_path / "clinics", SCHEMA.replace("LABEL", LABEL).replace("worst]}", f"worst]{weights}"))
    own = [
        f"task.folder={tmp_path / 'clinics'}",
        "task.simulated=true",
        f"task.model={model}",
        "num_rounds=3",
    ]
    own += [f"privacy={mode}", "audit=off", f"hydra.run.dir={tmp_path / 'run'}", "seed=1"]
    assert run(["simulate", "task=csv", *own, *(["batch_size=50"] if mode == "record" else [])]) == 0
    assert "concordance" in json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
