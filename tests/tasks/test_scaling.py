"""`task.scaling`: numbers scaled by the mean and deviation of an answer, and kept in the schema wherever it goes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.tasks import load_task
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

SCHEMA = """
label: ill
columns:
  age: {low: 0, high: 200, missing: 60}
  pain: {categories: [weak, strong]}
  pressure: {low: 0, high: 400}
  ill: {categories: ["no", "yes"]}
"""
AGES, PRESSURES = (40.0, 60.0, 900.0, np.nan), (100.0, np.nan, 140.0, 120.0)
SAID = {"age": (50.0, 10.0), "pressure": (120.0, 20.0)}


@pytest.fixture
def clinics(tmp_path: Path) -> Path:
    rows = [f"{a:g},weak,{p:g},no".replace("nan", "") for a, p in zip(AGES, PRESSURES, strict=True)]
    (tmp_path / "clinics").mkdir()
    (tmp_path / "clinics" / "a.csv").write_text("age,pain,pressure,ill\n" + "\n".join(rows) + "\n")
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    return tmp_path


def answer(**changed: Any) -> dict[str, Any]:
    """Return the record of a question about both numbers; `changed` are keys of the one about age."""
    asked = [
        {"kind": "variance", "of": "Age", "low": 0, "high": 200, **changed},
        {"kind": "variance", "of": "pressure", "low": 0, "high": 400},
    ]
    answers = [
        {"figures": [{"name": name, "value": value, "low": value, "high": value} for name, value in pairs]}
        for pairs in (zip(("mean", "standard deviation"), SAID[each], strict=True) for each in SAID)
    ]
    return {"question": {"ask": asked}, "answers": answers}


def scaled(clinics: Path, record: object = None, **options: Any) -> Any:
    (clinics / "answer.json").write_text(json.dumps(answer() if record is None else record))
    given = {"schema": str(clinics / "schema.yaml"), "scaling": str(clinics / "answer.json")} | options
    return load(str(clinics / "clinics"), **given)


def test_numbers_are_cut_to_the_bounds_and_scaled_by_the_answer(clinics: Path) -> None:
    inputs = scaled(clinics).client_data(0).inputs.numpy()
    ages = np.nan_to_num(np.clip(AGES, 0, 200), nan=60.0)  # the schema's word for a missing one
    pressures = np.nan_to_num(PRESSURES, nan=120.0)  # the mean
    assert np.allclose(inputs[:, 0], (ages - 50) / 10)
    assert np.allclose(inputs[:, 3], (pressures - 120) / 20)
    assert inputs[:, 1:3].tolist() == [[1, 0]] * 4


def test_schema_carries_the_scaling_to_holders_of_no_answer(clinics: Path) -> None:
    task = scaled(clinics)
    (content,) = task.beside_the_model().values()
    (clinics / "kept.yaml").write_bytes(content)
    assert read_schema(clinics / "kept.yaml") == task.schema
    again = load(str(clinics / "clinics"), schema=str(clinics / "kept.yaml"))
    assert torch.equal(again.client_data(0).inputs, task.client_data(0).inputs)
    assert torch.equal(again.encode(clinics / "clinics" / "a.csv"), task.client_data(0).inputs)
    gam = load(str(clinics / "clinics"), schema=str(clinics / "kept.yaml"), model="gam")
    assert all(each.standard is None for each in gam.schema.columns)  # its bins are of the bounds


def test_a_run_with_a_real_answer_has_inputs_of_mean_0_and_variance_1(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    (tmp_path / "clinics").mkdir()
    for number in range(60):
        values = generator.normal((50.0, 120.0), (10.0, 20.0), (30, 2))
        rows = [f"{a:.3f},weak,{p:.3f},{'yes' if a > 50 else 'no'}" for a, p in values]
        (tmp_path / "clinics" / f"{number:02}.csv").write_text(
            "age,pain,pressure,ill\n" + "\n".join(rows) + "\n"
        )
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    task = {
        "name": "csv",
        "folder": str(tmp_path / "clinics"),
        "schema": str(tmp_path / "schema.yaml"),
        "simulated": True,
    }
    asked: dict[str, Any] = {
        "name": "scaling",
        "purpose": "scaling",
        "records": 30,
        "ask": answer()["question"]["ask"],
    }
    asked["ask"] = [{**each, "of": each["of"].lower(), "name": each["of"]} for each in asked["ask"]]
    enough = fv.ClientCentral(target_epsilon=60.0)
    fv.ask(asked, task, epsilon=50.0, privacy=enough, folder=tmp_path / "questions")
    options = {**task, "scaling": str(tmp_path / "questions" / "scaling.json")}
    name = options.pop("name")
    made: Any = load_task(str(name), options)
    inputs = torch.cat([made.client_data(client).inputs for client in range(60)])[:, [0, 3]]
    # The answer of 60 clients is noisy.
    assert inputs.mean(0).abs().max() < 0.3 and (inputs.std(0) - 1).abs().max() < 0.3
    run = fv.simulate({"name": "csv", **options}, num_rounds=1, cohort="all", quiet=True)
    assert run.status == "completed"
    assert (run.folder / "schema.yaml").read_bytes() == made.beside_the_model()["schema.yaml"]


def saying(mean: float, deviation: float) -> dict[str, Any]:
    record = answer()
    for figure, value in zip(record["answers"][0]["figures"], (mean, deviation), strict=True):
        figure |= {"value": value, "low": value, "high": value}
    return record


def without_a_figure(record: dict[str, Any]) -> dict[str, Any]:
    record["answers"][0]["figures"][1] |= {"value": None, "low": None, "high": None}
    return record


def in_reverse(record: dict[str, Any]) -> dict[str, Any]:
    record["answers"][0]["figures"][1] |= {"low": 12.0, "high": 8.0}
    return record


@pytest.mark.parametrize(
    ("record", "options", "said"),
    [
        (answer(of="height"), {}, "task.scaling: age=.*is a number without a variance there"),
        (answer(kind="mean"), {}, "task.scaling: age=.*is a number without a variance there"),
        (answer(high=100), {}, "was asked within 0 and 100, and the schema declares 0 and 200"),
        (in_reverse(answer()), {}, "12 to 8.*is a reversed interval"),
        (without_a_figure(answer()), {}, "task.scaling: age=.*is not estimated there"),
        (saying(-1, 10), {}, "the mean lies between 0 and 200"),
        (saying(50, 201), {}, "the deviation is above 0 and at most their distance"),
        ({**answer(), "answers": []}, {}, "without a variance"),
        ({"weights": 3}, {}, "is not an answer of fedveil ask; give its JSON"),
        (
            {"question": {"ask": [{}]}, "answers": [{"figures": [{"value": "x"}]}]},
            {},
            "is not an answer of fedveil",
        ),
        (answer(), {"model": "gam"}, "a gam uses their bins"),
        (answer(), {"scaling": "nowhere.json"}, "nowhere.json"),
        (answer(), {"scaling": "ask"}, "task.scaling='ask': is no file; did you mean 'asked'?"),
    ],
)
def test_an_answer_that_scales_nothing_is_refused(
    clinics: Path, record: object, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        scaled(clinics, record, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("missing: 60", "mean: 50, deviation: 10", "remove one of them"),
        ("missing: 60", "mean: 50", "give mean and deviation together"),
        ("missing: 60", "mean: 50, deviation: 9, edges: [3]", "of a number without edges"),
        ("missing: 60", "mean: 201, deviation: 10", "the mean lies between 0 and 200"),
        ("missing: 60", "mean: 50, deviation: 0", "the deviation is above 0"),
        ("missing: 60", "mean: 50, deviation: nan", "give a finite number"),
        ('"yes"]', '"yes"], mean: 1', "mean belongs to a number"),
        ("label: ill", "label: age", "without a variance|is scaled by its bounds"),
    ],
)
def test_a_mistake_in_the_schemas_own_scaling_is_refused(
    clinics: Path, before: str, after: str, said: str
) -> None:
    assert before in SCHEMA
    changed = SCHEMA.replace(before, after)
    if before.startswith("label"):
        changed = changed.replace("missing: 60", "mean: 50, deviation: 10")
    (clinics / "schema.yaml").write_text(changed)
    with pytest.raises(Refusal, match=said):
        scaled(clinics)
