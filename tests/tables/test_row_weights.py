"""Weights of rows: the loss, the rows that weigh nothing, every mode, and what cannot weigh."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.functional import cross_entropy

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import Tables, load

PLAIN = (
    "label: y\ncolumns:\n  x: {low: -1, high: 1}\n  y: {categories: [no, yes], weights: {no: 1, yes: 2}}\n"
)
WEIGHT = "weight:\n  visits: {low: 0, high: 10, missing: 5}\n"
MODES = ("none", "client_central", "client_distributed", "record", "record_distributed")


def wards(folder: Path, weight: str = WEIGHT, visits: str = "10", count: int = 2) -> Path:
    """Return a folder of tables, each row of which has these visits."""
    tables, draw = folder / "wards", np.random.default_rng(0)
    tables.mkdir()
    (tables / "schema.yaml").write_text(weight + PLAIN)
    for name in "abcdef"[:count]:
        lines = [f"{x:.3f},{'yes' if x > 0 else 'no'},{visits}" for x in draw.uniform(-1, 1, 60)]
        (tables / f"{name}.csv").write_text("\n".join(["x,y,visits", *lines, ""]))
    return tables


def weighed(folder: Path, table: str) -> Tables:
    (folder / "schema.yaml").write_text(WEIGHT + PLAIN)
    (folder / "a.csv").write_text(table)
    return load(str(folder))


def test_loss_of_a_row_is_weighed_by_its_share_of_the_largest(tmp_path: Path) -> None:
    task = weighed(tmp_path, "x,y,visits\n0,no,10\n1,yes,2.5\n-1,yes,\n0.5,no,99\n0.5,no,0\n")
    data = task.client_data(0)
    classes, outputs = torch.tensor([0, 1, 1, 0, 0]), torch.randn(5, 2, generator=torch.manual_seed(0))
    assert task.labels(data.targets).tolist() == classes.tolist()
    weights = torch.tensor([1, 0.25, 0.5, 1, 0]) * torch.tensor(
        [0.5, 1, 1, 0.5, 0.5]
    )  # of rows, and of classes
    expected = (weights * cross_entropy(outputs, classes, reduction="none")).mean()
    assert task.loss(outputs, data.targets) == pytest.approx(expected.item(), rel=1e-6)
    assert max(task.weights) == 1.0 and data.groups is None
    assert task.schema.width == 1 and task.squared_length == 2
    assert task.metrics(outputs, classes) == task.metrics(outputs, data.targets)  # unweighted


def test_rows_of_weight_zero_teach_nothing(tmp_path: Path) -> None:
    tables = wards(tmp_path)
    for path in tables.glob("*.csv"):
        wrong = "".join(f"{x},{'no' if x > 0 else 'yes'},0\n" for x in np.linspace(-1, 1, 200))
        path.write_text(path.read_text() + wrong)
    (tmp_path / "public.csv").write_text(
        "x,y\n" + "".join(f"{x},{'yes' if x > 0 else 'no'}\n" for x in (-0.9, -0.5, 0.5, 0.9))
    )
    task = {
        "name": "csv",
        "folder": str(tables),
        "simulated": True,
        "held_out_file": str(tmp_path / "public.csv"),
    }
    run = fv.simulate(task, privacy="none", num_rounds=20, folder=tmp_path / "run", quiet=True)
    assert run.metrics["accuracy"] == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_largest_weights_change_no_bit_in_any_mode(mode: str, tmp_path: Path) -> None:
    models = list[dict[str, np.ndarray]]()
    for name, weight in (("plain", ""), ("weighed", WEIGHT)):
        (tmp_path / name).mkdir()
        task = {
            "name": "csv",
            "folder": str(wards(tmp_path / name, weight, count=4)),
            "simulated": True,
        }
        (tmp_path / "public.csv").write_text("x,y\n0.5,yes\n-0.5,no\n")
        task |= {"held_out_file": str(tmp_path / "public.csv")}
        sampled = {"privacy.sample_rate": 0.5} if mode == "record_distributed" else {}
        fv.simulate(
            task, privacy=mode, num_rounds=2, seed=1, folder=tmp_path / name / "run", quiet=True, **sampled
        )
        models.append(load_file(tmp_path / name / "run" / "model.safetensors"))
    assert all(np.array_equal(models[0][key], models[1][key]) for key in models[0])
    assert np.abs(models[0]["weight"]).max() > 0


def test_dealt_rows_keep_their_weights(tmp_path: Path) -> None:
    tables = wards(tmp_path, visits="5")
    task = load(str(tables), simulated=True, partition="dirichlet", num_clients=3)
    codes = np.concatenate([task.client_data(client).targets.numpy() for client in range(3)])
    assert {task.weights[code] for code in codes} == {0.25, 0.5} and set(
        task.held_out().targets.tolist()
    ) == {0, 1}


def test_weight_survives_the_schemas_file(tmp_path: Path) -> None:
    schema = read_schema(wards(tmp_path) / "schema.yaml")
    (tmp_path / "copy.yaml").write_text(schema.text())
    assert read_schema(tmp_path / "copy.yaml") == schema and schema.weight is not None


@pytest.mark.parametrize(
    ("weight", "text", "message"),
    [
        ("weight: visits\n", PLAIN, "give one column with its bounds"),
        ("weight: {x: {low: 0, high: 1}}\n", PLAIN, "is in columns too"),
        ("weight: {w: {low: -1, high: 1}}\n", PLAIN, "low must be 0 or above"),
        ("weight: {w: {categories: [a, b]}}\n", PLAIN, "is a number with low, high and missing"),
        (WEIGHT, "label: y\ncolumns: {x: {low: 0, high: 1}, y: {low: 0, high: 1}}\n", "has no classes"),
        (WEIGHT + "group_weights: {g: {}}\n", PLAIN, "weigh the rows too"),
    ],
)
def test_column_that_cannot_weigh_is_refused(weight: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text(weight + text)
    with pytest.raises(Refusal, match=message):
        read_schema(tmp_path / "schema.yaml")


def test_row_without_a_weight_is_named(tmp_path: Path) -> None:
    tables = wards(tmp_path, WEIGHT.replace(", missing: 5", ""))
    (tables / "a.csv").write_text("x,y,visits\n0,no,1\n0,no,\n")
    with pytest.raises(Refusal, match=r"column 'visits', row 3=None: is missing and weighs its row"):
        load(str(tables))
