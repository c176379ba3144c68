"""Tests of tables/survival.py: its hazards, its predictions, its refusals, and whole runs."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.export.export import Order, export
from fedveil.tables.survival import SurvivalTimes
from fedveil.tables.survival_metrics import kaplan_meier
from fedveil.tasks.shapes import read_shapes
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load

LABEL = "{kind: survival, time: weeks, event: relapse, bins: 7}"
SCHEMA = """label: LABEL
columns:
  dose: {low: -1, high: 1}
  weeks: {low: 0, high: 35}
  relapse: {categories: [no, yes]}
"""


def write(folder: Path, label: str = LABEL) -> Path:
    """Write three clinics with 150 patients each, whose hazard grows with the dose, and return the folder."""
    draw = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for clinic in ("north", "south", "west"):
        doses = draw.uniform(-1, 1, 150)
        times, stops = draw.exponential(np.exp(2.5 - 2 * doses)), draw.uniform(5, 40, 150)
        rows = zip(doses, np.minimum(times, stops), np.where(times <= stops, "yes", "no"), strict=True)
        lines = [f"{dose:.4f},{weeks:.3f},{relapse}" for dose, weeks, relapse in rows]
        (folder / f"{clinic}.csv").write_text("\n".join(["dose,weeks,relapse", *lines]) + "\n")
    (folder / "schema.yaml").write_text(SCHEMA.replace("LABEL", label))
    return folder


@pytest.fixture
def clinics(tmp_path: Path) -> Path:
    return write(tmp_path / "clinics")


def label_of(folder: Path) -> Any:
    """Return the label of a folder's schema, a `SurvivalTimes`."""
    return read_schema(folder / "schema.yaml").outcome


def test_hazards_without_covariates_are_those_of_kaplan_and_meier(tmp_path: Path) -> None:
    """At the logits of its hazards the loss has no gradient, where each time is the end of an interval."""
    draw = np.random.default_rng(1)
    times, events = draw.integers(1, 6, 300).astype(float), draw.random(300) < 0.5
    write(tmp_path, "{kind: survival, time: weeks, event: relapse, bins: [1, 2, 3, 4, 5]}")
    label = label_of(tmp_path)
    curve = kaplan_meier(times, events, np.arange(1, 7) + 0.5)
    hazards = np.append(1 - curve[:5] / np.append(1, curve[:4]), 0.1)
    logits = torch.tensor(np.log(hazards / (1 - hazards)), requires_grad=True)
    targets = torch.from_numpy(np.stack([times, events], 1))
    loss = label.loss(logits.expand(300, 6), targets, ())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.numpy() == pytest.approx(np.zeros(6), abs=1e-7)
    assert label.predictions(logits.detach().numpy()[None])["survival_at_4"][0] == pytest.approx(curve[3])


def test_losses_of_clients_are_the_losses_of_each(clinics: Path) -> None:
    label = label_of(clinics)
    outputs = torch.randn(3, 20, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.from_numpy(load(str(clinics)).client_data(0).targets.numpy()[:60].reshape(3, 20, 2))
    each = [label.loss(outputs[client], targets[client], ()) for client in range(3)]
    assert torch.allclose(label.losses(outputs, targets, ()), torch.stack(each))


def test_an_event_after_the_last_time_is_censored_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "north.csv").write_text("dose,weeks,relapse\n0,36,yes\n0,35,yes\n0,5,no\n")
    task = load(str(folder))
    assert task.client_data(0).targets.tolist() == [[35, 0], [35, 1], [5, 0]]
    assert task._label_values(task.client_data(0), "relapse").tolist() == ["no", "yes", "no"]  # pyright: ignore


def test_a_censored_row_has_lived_through_an_interval_past_its_middle(clinics: Path) -> None:
    outputs = torch.zeros(4, 7)
    targets = torch.tensor([[7.4, 0.0], [7.6, 0.0], [7.6, 1.0], [0.0, 1.0]])
    terms = label_of(clinics)._terms(outputs, targets) / np.log(2)
    assert terms.tolist() == pytest.approx([1, 2, 2, 1])


def test_the_median_is_where_the_curve_is_a_half(clinics: Path) -> None:
    hazards = np.array([[0.25, 1 / 3, *[0.1] * 5], [0.01] * 7])
    found = label_of(clinics).predictions(np.log(hazards / (1 - hazards)))
    assert found["median_weeks"].tolist() == pytest.approx([10, np.inf])
    assert found["survival_at_5"].tolist() == pytest.approx([0.75, 0.99])


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("{kind: cox, time: weeks, event: relapse}", "its partial likelihood compares records"),
        ("{kind: surviving}", "label='surviving': kind must be one of"),
        ("{kind: survival, time: week, event: relapse}", "did you mean 'weeks'"),
        ("{kind: survival, time: relapse, event: relapse}", "label.time='relapse': must hold numbers"),
        ("{kind: survival, time: weeks, event: dose}", "label.event='dose': must have two categories"),
        ("{kind: survival, time: weeks, event: relapse, bins: 0}", "label.bins='0': must be a whole number"),
        ("{kind: survival, time: weeks, event: relapse, bins: [9, 5]}", "label.bins=[9.0, 5.0]: must ascend"),
        ("{kind: survival, time: weeks, event: relapse, steps: 3}", "label.steps='3'"),
    ],
)
def test_a_label_with_a_mistake_is_refused(label: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        label_of(write(tmp_path, label))
    assert said in str(refused.value)


def test_weights_of_an_event_and_another_label_are_refused(clinics: Path) -> None:
    with pytest.raises(Refusal, match="declares a label of kind survival"):
        load(str(clinics), "dose")
    file = clinics / "schema.yaml"
    file.write_text(file.read_text().replace("[no, yes]", "[no, yes], weights: {yes: 2}"))
    with pytest.raises(Refusal, match="have no meaning for this kind of label"):
        load(str(clinics))


def test_a_schema_of_survival_is_its_own_text(clinics: Path) -> None:
    for label in (LABEL, LABEL.replace("7", "[5, 10.5]")):
        (clinics / "schema.yaml").write_text(SCHEMA.replace("LABEL", label))
        schema = read_schema(clinics / "schema.yaml")
        (clinics / "schema.yaml").write_text(schema.text())
        assert read_schema(clinics / "schema.yaml") == schema
    assert isinstance(schema.outcome, SurvivalTimes) and schema.outcome.ends == (5, 10.5, 35)
    assert [column.name for column in schema.inputs] == ["dose"]


# --- whole runs ---------------------------------------------------------------------------------------------------

WHOLE = ["cohort=all", "privacy.allow_large_delta=true"]
RUNS = [
    ("none", "linear", []),
    ("record", "mlp", ["batch_size=50"]),
    ("record_distributed", "gam", []),
    ("client_central", "linear", WHOLE),
    ("client_distributed", "linear", WHOLE),
]


@pytest.mark.parametrize(("mode", "model", "more"), RUNS)
def test_every_mode_trains(mode: str, model: str, more: list[str], clinics: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    own = [f"task.folder={clinics}", "task.simulated=true", f"task.model={model}", "num_rounds=3", "seed=1"]
    own += [f"privacy={mode}", "audit=off", f"hydra.run.dir={folder}", *more]
    assert run(["simulate", "task=csv", *own]) == 0
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    assert 0 <= metrics["concordance"] <= 1 and 0 < metrics["integrated_brier"] < 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run without privacy, beside the tables of its clinics."""
    folder = tmp_path_factory.mktemp("survival")
    write(folder / "clinics")
    own = [f"task.folder={folder / 'clinics'}", "task.simulated=true", "num_rounds=60", "seed=1", "audit=off"]
    own.append("task.model=linear")
    assert run(["simulate", "task=csv", *own, "privacy=none", f"hydra.run.dir={folder / 'run'}"]) == 0
    return folder


def predicted(model: Path, data: Path, out: Path, *more: str) -> list[dict[str, str]]:
    """Return the rows that the command predicts."""
    assert run(["predict", str(model), str(data), "--out", str(out), *more]) == 0
    with out.open() as file:
        return list(csv.DictReader(file))


def test_a_run_finds_who_relapses_first(trained: Path) -> None:
    metrics = json.loads((trained / "run" / "result.json").read_text())["metrics"]
    assert metrics["concordance"] > 0.7 and metrics["integrated_brier"] < 0.17


def test_predictions_are_curves_that_fall(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("dose\n-1\n1\n")
    rows = predicted(
        trained / "run", tmp_path / "new.csv", tmp_path / "out.csv", "--explain", "integrated_gradients"
    )
    curves = np.array([[float(row[f"survival_at_{end}"]) for end in range(5, 36, 5)] for row in rows])
    assert (np.diff(curves, axis=1) < 0).all() and (curves[0] > curves[1]).all()
    assert float(rows[0]["median_weeks"]) > float(rows[1]["median_weeks"]) and "dose" in rows[0]


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
def test_an_export_predicts_the_same_curves(form: str, trained: Path, tmp_path: Path) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
    (tmp_path / "new.csv").write_text("dose\n-1\n0.5\n")
    _, card = export(trained / "run", Order(form, out=tmp_path / "export"))
    assert card["label"]["kind"] == "survival" and not card["classifies"]
    exported = predicted(tmp_path / "export", tmp_path / "new.csv", tmp_path / "b.csv")
    assert exported == predicted(trained / "run", tmp_path / "new.csv", tmp_path / "a.csv")


def test_shapes_of_a_linear_model_are_log_odds_of_the_hazard(trained: Path) -> None:
    shapes = read_shapes(trained / "run" / "schema.yaml", trained / "run" / "model.safetensors")
    assert shapes is not None and shapes["scores"] == ["hazard of relapse yes"]
    low, high = shapes["shapes"][0]["values"][0]
    assert 2 < high - low < 6


def test_described_curves_are_those_of_predictions(trained: Path, tmp_path: Path) -> None:
    shapes = read_shapes(trained / "run" / "schema.yaml", trained / "run" / "model.safetensors")
    assert shapes is not None
    (tmp_path / "new.csv").write_text("dose\n-1\n0\n1\n")
    rows = predicted(trained / "run", tmp_path / "new.csv", tmp_path / "a.csv")
    low, middle, high = ([1.0, *map(float, [*row.values()][1:])] for row in rows)
    (column,) = shapes["survival"]["columns"]
    assert [each["of"] for each in column["curves"]] == ["-1", "1"]
    drawn = (column["curves"][0]["survival"], shapes["survival"]["baseline"], column["curves"][1]["survival"])
    for curve, row in zip(drawn, (low, middle, high), strict=True):
        assert curve == pytest.approx(row, abs=1e-5)
    assert shapes["survival"]["times"][0] == 0 and len(shapes["survival"]["times"]) == len(middle)


def test_rows_of_one_person_are_bounded(clinics: Path, tmp_path: Path) -> None:
    folder = tmp_path / "persons"
    shutil.copytree(clinics, folder)
    for path in folder.glob("*.csv"):
        header, *rows = path.read_text().splitlines()
        lines = [f"{row},p{number // 2}" for number, row in enumerate(rows)]
        path.write_text("\n".join([f"{header},patient", *lines]))
    own = [f"task.folder={folder}", "task.simulated=true", "task.person=patient", "privacy.per_person=2"]
    own += ["num_rounds=2", "seed=1", "privacy=record", "batch_size=50", "audit=off"]
    assert run(["simulate", "task=csv", *own, f"hydra.run.dir={tmp_path / 'run'}"]) == 0


@pytest.mark.parametrize("model", ["linear", "gam"])
def test_a_direction_holds_for_the_hazard(model: str, clinics: Path, tmp_path: Path) -> None:
    file, folder = clinics / "schema.yaml", tmp_path / "run"
    file.write_text(file.read_text().replace("high: 1}", "high: 1, monotone: down}"))
    own = [f"task.folder={clinics}", "task.simulated=true", f"task.model={model}"]
    own += ["num_rounds=10", "seed=1", "privacy=none", "audit=off", f"hydra.run.dir={folder}"]
    assert run(["simulate", "task=csv", *own]) == 0
    shapes = read_shapes(folder / "schema.yaml", folder / "model.safetensors")
    values = np.array(shapes["shapes"][0]["values"])  # pyright: ignore
    assert (np.diff(values.ravel()) <= 1e-6).all() and np.ptp(values) < 1e-6  # the data say up
