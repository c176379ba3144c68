"""Tests of tables/several.py: labels that one model predicts together."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.tables.several import Several
from fedveil.tasks.columns import columns_of
from fedveil.tasks.shapes import read_shapes
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load

LABEL = "{kind: several, columns: [ill, ward]}"
SCHEMA = """label: LABEL
columns:
  age: {low: -1, high: 1}
  ill: {categories: [well, ill], weights: {well: 1, ill: 2}}
  ward: {categories: [a, b, c]}
"""


def write(folder: Path, schema: str = SCHEMA.replace("LABEL", LABEL)) -> Path:
    """Write two clinics with 200 patients each; the older are ill, and in a later ward."""
    draw = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for name in ("north", "south"):
        ages = draw.uniform(-1, 1, 200)
        lines = [f"{age:.4f},{'ill' if age > 0 else 'well'},{'abc'[int((age + 1) * 1.5)]}" for age in ages]
        (folder / f"{name}.csv").write_text("\n".join(["age,ill,ward", *lines]) + "\n")
    (folder / "schema.yaml").write_text(schema)
    return folder


def label_of(folder: Path) -> Several:
    outcome = read_schema(folder / "schema.yaml").outcome
    assert isinstance(outcome, Several)
    return outcome


def test_loss_is_the_mean_of_the_labels_losses(tmp_path: Path) -> None:
    label = label_of(write(tmp_path))
    outputs = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.stack([torch.arange(60).view(3, 20) % 2, torch.arange(60).view(3, 20) % 3], -1)
    of_ill = label.members[0].losses(outputs[..., :2], targets[..., 0], (0.5, 1))
    of_ward = label.members[1].losses(outputs[..., 2:], targets[..., 1], ())
    assert torch.allclose(label.losses(outputs, targets, ()), (of_ill + of_ward) / 2)
    assert torch.allclose(label.loss(outputs[0], targets[0], ()), (of_ill + of_ward)[0] / 2)


def test_a_client_answers_about_each_label(tmp_path: Path) -> None:
    task = load(str(write(tmp_path)), simulated=True, num_clients=2, partition="iid")
    columns = columns_of(task, 0)
    assert set(columns["ill"]) == {"well", "ill"} and set(columns["ward"]) == {"a", "b", "c"}


def test_a_run_predicts_each_label(tmp_path: Path) -> None:
    own = [
        f"task.folder={write(tmp_path / 'clinics')}",
        "task.simulated=true",
        "num_rounds=40",
        "privacy=none",
    ]
    own += ["audit=off", f"hydra.run.dir={tmp_path / 'run'}", "seed=1", "task.model=gam"]
    assert run(["simulate", "task=csv", *own]) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["accuracy_ill"] > 0.85 and metrics["auc_ill"] > 0.95 and metrics["accuracy_ward"] > 0.8
    assert metrics["accuracy"] == pytest.approx((metrics["accuracy_ill"] + metrics["accuracy_ward"]) / 2)
    (tmp_path / "new.csv").write_text("age\n-0.9\n0.9\n")
    assert (
        run(["predict", str(tmp_path / "run"), str(tmp_path / "new.csv"), "--out", str(tmp_path / "p.csv")])
        == 0
    )
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["ill", "probability_ill", "ward", "probability_ward"]
    assert [(row["ill"], row["ward"]) for row in rows] == [("well", "a"), ("ill", "c")]
    shapes = read_shapes(tmp_path / "run" / "schema.yaml", tmp_path / "run" / "model.safetensors")
    assert shapes is not None and shapes["scores"] == ["ill: ill", "ward: a", "ward: b", "ward: c"]


def test_an_explanation_of_several_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="an explanation is of one score"):
        label_of(write(tmp_path)).explained(torch.zeros(1, 5))


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        ("{kind: several, columns: [ill]}", "at least two different columns"),
        ("{kind: several, columns: [ill, age]}", "label.columns='age': must have at least two categories"),
        ("{kind: several, columns: [ill, wards]}", "did you mean 'ward'"),
    ],
)
def test_a_label_with_a_mistake_is_refused(label: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        label_of(write(tmp_path, SCHEMA.replace("LABEL", label)))
    assert fault in str(refused.value)


def test_weights_by_group_are_refused(tmp_path: Path) -> None:
    groups = "groups:\n  sex: {categories: [f, m]}\ngroup_weights:\n  sex: {f: {well: 1, ill: 2}, m: {well: 1, ill: 1}}\n"
    with pytest.raises(Refusal, match="has no classes, which weights by group need"):
        label_of(write(tmp_path, SCHEMA.replace("LABEL", LABEL) + groups))


@pytest.mark.parametrize(("mode", "model"), [("record", "linear"), ("record_distributed", "mlp")])
def test_private_modes_train_several_labels(mode: str, model: str, tmp_path: Path) -> None:
    own = [f"task.folder={write(tmp_path / 'clinics')}", "task.simulated=true", f"task.model={model}"]
    own += ["num_rounds=3", f"privacy={mode}", "audit=off", f"hydra.run.dir={tmp_path / 'run'}", "seed=1"]
    assert run(["simulate", "task=csv", *own, *(["batch_size=50"] if mode == "record" else [])]) == 0
    assert "auc_ill" in json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]


def test_a_direction_of_several_scores_is_refused(tmp_path: Path) -> None:
    schema = SCHEMA.replace("LABEL", LABEL).replace("high: 1}", "high: 1, monotone: up}")
    with pytest.raises(Refusal, match="is of a kind without monotone and bound"):
        load(str(write(tmp_path, schema)), simulated=True)
