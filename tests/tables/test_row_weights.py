"""Weights of rows: the loss, the rows that weigh nothing, every mode, and what cannot weigh."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.linear_model import LinearRegression
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


# Labels without classes: the schema's label, the columns of the label, and a row's cells of it by its input.
KINDS = {
    "number": ("y", "  y: {low: -4, high: 4}\n", "y", lambda x, u: f"{np.clip(2 * x + u - 0.5, -4, 4):.3f}"),
    "count": (
        "{kind: count, column: y, mean: 2}",
        "  y: {low: 0, high: 20}\n",
        "y",
        lambda x, u: f"{min(int(-np.log(u) * np.exp(0.5 + x)), 20)}",
    ),
    "ordinal": (
        "{kind: ordinal, column: y}",
        "  y: {categories: [a, b, c], weights: {a: 1, b: 2, c: 2}}\n",
        "y",
        lambda x, u: "abc"[int(np.clip(1.5 + x + 2 * (u - 0.5), 0, 2.99))],
    ),
    "survival": (
        "{kind: survival, time: t, event: y, bins: 4}",
        "  t: {low: 0, high: 8}\n  y: {categories: ['no', 'yes']}\n",
        "t,y",
        lambda x, u: f"{min(-np.log(u) * 3 * np.exp(x), 8):.2f},{'yes' if u > 0.3 else 'no'}",
    ),
    "several": (
        "{kind: several, columns: [y, z]}",
        "  y: {categories: ['no', 'yes'], weights: {'no': 1, 'yes': 2}}\n  z: {categories: [p, q, r]}\n",
        "y,z",
        lambda x, u: f"{'yes' if u < 0.5 + x / 3 else 'no'},{'pqr'[int(3 * u)]}",
    ),
}


def study(folder: Path, kind: str, weights: list[int], schema_weight: str = WEIGHT) -> Path:
    """Return the folder of one table of a kind of label, in which rows have these numbers of visits."""
    label, columns, header, cells = KINDS[kind]
    folder.mkdir()
    draw = np.random.default_rng(0)
    text = f"{schema_weight}label: {label}\ncolumns:\n  x: {{low: -1, high: 1}}\n{columns}"
    (folder / "schema.yaml").write_text(text)
    rows = [
        (x, cells(x, u))
        for x, u in zip(draw.uniform(-1, 1, len(weights)), draw.random(len(weights)), strict=True)
    ]
    lines = [f"{x:.4f},{cell},{visits}" for (x, cell), visits in zip(rows, weights, strict=True)]
    (folder / "a.csv").write_text("\n".join([f"x,{header},visits", *lines, ""]))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_any_label_is_weighed_row_by_row(kind: str, tmp_path: Path) -> None:
    visits = [10, 4, 0, 7, 1, 10]
    task = load(str(study(tmp_path / "w", kind, visits)))
    plain = load(str(study(tmp_path / "p", kind, visits, "")))
    own, raw = task.client_data(0), plain.client_data(0).targets
    outputs = torch.randn(len(visits), task.model()(own.inputs).shape[1], generator=torch.manual_seed(0))
    alone = torch.stack([plain.loss(outputs[[row]], raw[[row]]) for row in range(len(visits))])
    expected = (alone * torch.tensor(visits) / 10).mean()
    assert task.loss(outputs, own.targets).item() == pytest.approx(expected.item(), rel=1e-5)
    both = task.losses(outputs.expand(2, -1, -1), own.targets.expand(2, *own.targets.shape))
    assert both.tolist() == pytest.approx([expected.item()] * 2, rel=1e-5)
    assert task.metrics(outputs, own.targets) == plain.metrics(outputs, raw) == task.metrics(outputs, raw)
    assert task.loss(outputs, raw).item() == pytest.approx(alone.mean().item(), rel=1e-5)  # of held-out rows
    assert task.held_out().targets.shape[1:] == raw.shape[1:]
    assert torch.equal(task.labels(own.targets), raw) and torch.equal(task.labels(raw), raw)
    assert task.columns(0)["y"].tolist() == plain.columns(0)["y"].tolist() and own.groups is None
    assert task.curvature == plain.curvature and not task.classes


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_weighs_double_is_two_rows(kind: str, tmp_path: Path) -> None:
    task = load(str(study(tmp_path / "w", kind, [10, 5] * 40)))
    plain = load(str(study(tmp_path / "p", kind, [10, 5] * 40, "")))
    twice = np.repeat(np.arange(80), [2, 1] * 40)
    fits = list[list[float]]()
    for own, rows in ((task, np.arange(80)), (plain, twice)):
        data, model = own.client_data(0), own.model()
        descent = torch.optim.LBFGS(model.parameters(), max_iter=200, tolerance_change=1e-10)

        def loss(own=own, data=data, model=model, rows=rows, descent=descent) -> torch.Tensor:
            descent.zero_grad()
            value = own.loss(model(data.inputs[rows]), data.targets[rows])
            value.backward()
            return value

        descent.step(loss)
        fits.append(model(torch.tensor([[-0.5], [0.8]])).flatten().tolist())
    assert fits[0] == pytest.approx(fits[1], abs=0.01)
    if kind == "number":
        data = plain.client_data(0)
        x, y = data.inputs.numpy(), data.targets.numpy()
        oracle = LinearRegression().fit(x, y, sample_weight=[1, 0.5] * 40)
        assert fits[0] == pytest.approx(oracle.predict([[-0.5], [0.8]]), abs=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_largest_weights_leave_a_number_as_it_is_in_any_mode(mode: str, tmp_path: Path) -> None:
    models = list[dict[str, np.ndarray]]()
    for name, weight in (("plain", ""), ("weighed", WEIGHT)):
        folder = study(tmp_path / name, "number", [10] * 120, weight)
        for other in "bcd":
            (folder / f"{other}.csv").write_text((folder / "a.csv").read_text())
        (tmp_path / "public.csv").write_text("x,y\n0.5,1\n-0.5,-1\n")
        task = {
            "name": "csv",
            "folder": str(folder),
            "simulated": True,
            "held_out_file": str(tmp_path / "public.csv"),
        }
        sampled = {"privacy.sample_rate": 0.5} if mode == "record_distributed" else {}
        run = fv.simulate(
            task, privacy=mode, num_rounds=2, seed=1, folder=tmp_path / name / "run", quiet=True, **sampled
        )
        assert set(run.metrics) >= {"r2", "mean_absolute_error"}
        models.append(load_file(tmp_path / name / "run" / "model.safetensors"))
    for key, plain in models[0].items():
        assert np.allclose(plain, models[1][key], atol=1e-4) and np.abs(plain).max() > 0


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
