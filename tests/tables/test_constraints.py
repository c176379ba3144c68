"""Directions and bounds of shapes: the closest shape that has them, in the released model of a run and on its page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from sklearn.isotonic import IsotonicRegression

from fedveil.__main__ import run as fedveil
from fedveil.base.refusal import Refusal
from fedveil.tables.constraints import constrained
from fedveil.tasks.held_back import held_back, held_back_of
from fedveil.tasks.shapes import shapes
from fedveil.tasks.table_schema import Schema, read_schema
from fedveil.tasks.tables import load

CLASSES = "y: {categories: [no, yes]}"
NUMBER = "y: {low: 0, high: 100}"


def schema_of(folder: Path, age: str, label: str = CLASSES, ward: str = "") -> Schema:
    text = f"label: y\ncolumns:\n  age: {{low: 0, high: 10, {age}}}\n"
    path = folder / "schema.yaml"
    path.write_text(f"{text}  ward: {{categories: [a, b, c]{ward}}}\n  {label}\n")
    return read_schema(path)


def model_of(schema: Schema, seed: int = 0) -> dict[str, NDArray[Any]]:
    draw, outputs = np.random.default_rng(seed), len(schema.target.categories) or 1
    weight = draw.normal(size=(outputs, schema.width)).astype(np.float32)
    return {"weight": weight, "bias": draw.normal(size=outputs).astype(np.float32)}


def by_column(schema: Schema, model: dict[str, NDArray[Any]]) -> dict[str, dict[str, Any]]:
    picture = shapes(schema, model["weight"], model["bias"], lines=True)
    return {each["column"]: each for each in picture["shapes"]} | {"": picture}


@pytest.mark.parametrize("label", [CLASSES, NUMBER])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_bins_become_their_isotonic_regression(direction: str, label: str, tmp_path: Path) -> None:
    schema = schema_of(tmp_path, f"edges: [2, 4, 6, 8], monotone: {direction}", label)
    for seed in range(20):
        before = model_of(schema, seed)
        model = constrained(schema, before)
        raw, new = by_column(schema, before), by_column(schema, model)
        fitted = IsotonicRegression(increasing=direction == "up").fit_transform(
            np.arange(5), raw["age"]["values"][0]
        )
        values = np.array(new["age"]["values"][0])
        assert values == pytest.approx(fitted, abs=1e-4)
        steps = np.diff(values) * (1 if direction == "up" else -1)
        assert steps.min() >= 0  # exactly
        assert new["ward"] == raw["ward"] or np.allclose(
            new["ward"]["values"], raw["ward"]["values"], atol=1e-5
        )
        assert new[""]["intercept"] == pytest.approx(raw[""]["intercept"], abs=1e-4)


def test_direction_of_a_line_is_a_sign(tmp_path: Path) -> None:
    schema = schema_of(tmp_path, "monotone: up")
    for slope, expected in ((0.5, 1.0), (-0.5, 0.0)):
        model = {**model_of(schema), "weight": np.zeros((2, schema.width), np.float32)}
        model["weight"][:, 0] = [-slope, slope]
        new = constrained(schema, model)["weight"]
        assert new[1, 0] - new[0, 0] == pytest.approx(expected)


@pytest.mark.parametrize(
    "age", ["bound: 0.5", "edges: [3, 6], bound: 0.5", "edges: [3, 6], bound: 0.5, missing: category"]
)
@pytest.mark.parametrize("label", [CLASSES, NUMBER, "y: {categories: [p, q, r]}"])
def test_bound_limits_what_a_column_adds(age: str, label: str, tmp_path: Path) -> None:
    schema = schema_of(tmp_path, age, label, ", bound: 0.25")
    for seed in range(20):
        before = model_of(schema, seed)
        new = by_column(schema, constrained(schema, before))
        for name, bound in (("age", 0.5), ("ward", 0.25)):
            values = np.array(new[name]["values"])
            assert np.abs(values).max() <= bound * (1 + 1e-5) + 1e-5
            assert np.abs(values.mean(1)).max() < 1e-5
            assert np.abs(new[name].get("missing", [0.0])).max() <= bound * (1 + 1e-5) + 1e-5
            assert new[name]["constraint"] == f"within {bound:g}"
        assert new[""]["intercept"] == pytest.approx(by_column(schema, before)[""]["intercept"], abs=1e-4)


def test_shape_within_its_constraints_stays(tmp_path: Path) -> None:
    schema = schema_of(tmp_path, "edges: [2, 4, 6, 8], monotone: up, bound: 3", ward=", bound: 5")
    weight = np.zeros((2, schema.width), np.float32)
    weight[1] = [-1, -0.5, 0, 0.5, 1, 2, -1, 0]
    model = {"weight": weight, "bias": np.array([0.25, -0.5], np.float32)}
    before, after = by_column(schema, model), by_column(schema, constrained(schema, model))
    assert after["age"]["values"] == pytest.approx(np.array(before["age"]["values"]), abs=1e-6)
    assert after[""]["intercept"] == pytest.approx(before[""]["intercept"], abs=1e-6)


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("age: {low: 0, high: 1, monotone: rising}", "monotone must be up or down"),
        ("age: {low: 0, high: 1, bound: 0}", "bound must be above 0"),
        ("age: {categories: [a, b], monotone: up}", "monotone belongs to a number"),
        ("age: {low: 0, high: 1}\n  z: {low: 0, high: 1, bound: 1}", "belong to inputs"),
    ],
)
def test_wrong_constraint_is_refused(definition: str, message: str, tmp_path: Path) -> None:
    label = "z" if "z:" in definition else "y"
    (tmp_path / "schema.yaml").write_text(f"label: {label}\ncolumns:\n  {definition}\n  {CLASSES}\n")
    with pytest.raises(Refusal, match=message):
        read_schema(tmp_path / "schema.yaml")


def test_model_or_label_without_a_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age,ward,y\n1,a,no\n2,b,yes\n")
    schema_of(tmp_path, "monotone: up")
    with pytest.raises(Refusal, match=r"mlp.*has no shape of a column"):
        load(str(tmp_path), model="mlp")
    schema_of(tmp_path, "monotone: up", "y: {categories: [no, yes, maybe]}")
    with pytest.raises(Refusal, match="has 3 classes"):
        load(str(tmp_path))


KEYS = (
    "task=csv",
    "task.folder=tables",
    "task.simulated=true",
    "task.model=gam",
    "num_rounds=3",
    "seed=1",
)


def two_wards(folder: Path, bound: float = 1.5) -> Schema:
    """Tables in which the risk falls with age and then rises; return their schema, by which it only rises."""
    (folder / "tables").mkdir()
    schema = schema_of(folder / "tables", f"edges: [1, 2, 3, 4, 5, 6, 7, 8, 9], monotone: up, bound: {bound}")
    draw = np.random.default_rng(1)
    for name in "ab":
        ages = draw.uniform(0, 10, 80)
        ill = draw.random(80) < np.where(ages < 3, 0.6, np.where(ages < 6, 0.3, 0.9))
        rows = [
            f"{age:.2f},{draw.choice(list('abc'))},{'yes' if y else 'no'}"
            for age, y in zip(ages, ill, strict=True)
        ]
        (folder / "tables" / f"{name}.csv").write_text("\n".join(["age,ward,y", *rows, ""]))
    return schema


def test_figures_with_intervals_are_of_the_shapes_that_are_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two_wards(tmp_path)
    assert fedveil(["simulate", *KEYS, "privacy=none", "num_rounds=40", "hydra.run.dir=run"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    figures = {each["name"]: each["value"] for each in result["held_out"]["figures"]}
    assert figures["auc"] == pytest.approx(result["metrics"]["auc"], abs=1e-6)
    attributions = {each["column"]: each["mean"] for each in result["held_out"]["attributions"]}
    assert attributions.keys() == {"age", "ward"} and attributions["age"] > attributions["ward"] > 0
    raw = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert raw["auc"] != pytest.approx(result["metrics"]["auc"], abs=1e-6)


def test_clients_evaluate_the_shapes_that_are_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two_wards(tmp_path, bound=0.1)
    keys = (
        *KEYS,
        "num_rounds=6",
        "learning_rate=4",
        "privacy=record_distributed",
        "privacy.target_epsilon=3000",
    )
    asked = ("evaluate.clients=final", "evaluate.noise_multiplier=0.05")
    assert fedveil(["simulate", *keys, *asked, "hydra.run.dir=run"]) == 0
    (record,) = json.loads((tmp_path / "run" / "result.json").read_text())["evaluations"]
    told = {each["name"]: each["figures"][0]["value"] for each in record["answers"]}
    parts = held_back(load("tables", model="gam", simulated=True), 0.2, alone=True)
    rows = [held_back_of(parts, client) for client in range(2)]
    inputs, targets = (np.concatenate([getattr(each, n) for each in rows]) for n in ("inputs", "targets"))

    def loss(model: dict[str, NDArray[Any]]) -> float:
        scores = (inputs @ (model["weight"][1] - model["weight"][0]) + np.diff(model["bias"])) * (
            1 - 2 * targets
        )
        return float(np.logaddexp(0, scores).mean())

    released = load_file(tmp_path / "run" / "model.safetensors")
    raw = {name.removeprefix("model/"): value for name, value in checkpoint(tmp_path).items()}
    assert abs(loss(released) - loss(raw)) > 0.05
    assert told["loss"] == pytest.approx(loss(released), abs=0.02)


@pytest.mark.parametrize("name", ["after", "ditto"])
def test_own_models_have_the_shapes_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    schema = two_wards(tmp_path)
    keys = (*KEYS, "privacy=none", f"personal={name}", "personal.steps=60")
    assert fedveil(["simulate", *keys, "hydra.run.dir=run"]) == 0
    chosen = json.loads((tmp_path / "run" / "result.json").read_text())["personal"]
    for client in range(2):
        arrays = load_file(tmp_path / "run" / "personal" / f"client-{client:03d}.safetensors")
        values = np.array(by_column(schema, arrays)["age"]["values"][0])
        assert (np.diff(values) >= -1e-6).all() and np.abs(values).max() <= 1.5 + 1e-6, chosen


def test_layers_that_stay_are_refused_with_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    two_wards(tmp_path)
    keys = (*KEYS, "privacy=none", "personal=layers", "personal.layers=[bias]")
    assert fedveil(["simulate", *keys, "hydra.run.dir=run"]) == 2
    assert "the task's monotone and bound shape a whole model" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_run_leaves_a_monotone_model_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    schema = two_wards(tmp_path)
    keys = (*KEYS, "privacy=record_distributed", "privacy.sample_rate=0.5")
    assert fedveil(["plan", *keys]) == 0
    assert "Released model: age up, within 1.5, at no epsilon." in capsys.readouterr().out
    assert fedveil(["simulate", *keys, "hydra.run.dir=run"]) == 0
    shape = by_column(schema, load_file(tmp_path / "run" / "model.safetensors"))["age"]
    values = np.array(shape["values"][0])
    assert (np.diff(values) >= 0).all() and np.abs(values).max() <= 1.5 + 1e-6 and np.ptp(values) > 0
    raw = by_column(
        schema, {name.removeprefix("model/"): value for name, value in checkpoint(tmp_path).items()}
    )
    assert (np.diff(raw["age"]["values"][0]) < 0).any()  # training goes on from here
    assert fedveil(["verify", "run"]) == 0 and fedveil(["report", "run"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["metrics"]["loss"] != last["loss"]  # of the model that the run leaves
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    picture = next(each for each in report["shapes"]["shapes"] if each["column"] == "age")
    assert picture["constraint"] == "up, within 1.5"
    assert "The schema requires" in (tmp_path / "run" / "report.html").read_text()


def checkpoint(folder: Path) -> dict[str, NDArray[Any]]:
    path = max((folder / "run").glob("checkpoint*.safetensors"))
    return {name: value for name, value in load_file(path).items() if name.startswith("model/")}
