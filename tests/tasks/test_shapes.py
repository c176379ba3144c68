"""Additive models over bins, groups of examples, and the shapes that are such a model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.export.export import Order, export
from fedveil.tasks.arrays import agreement_of
from fedveil.tasks.exported import read_export
from fedveil.tasks.protocol import GroupedTask
from fedveil.tasks.shapes import shapes
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

COLUMNS = {
    "age": {"low": 0, "high": 80, "edges": [20, 40, 60]},
    "hours": {"low": 0, "high": 8},
    "kind": {"categories": ["p", "q"]},
    "y": {"categories": ["no", "yes"]},
}
GROUPS = {"sex": {"categories": {"woman": ["f"], "man": ["m"]}}}


def made(folder: Path, rows: int = 300, seed: int = 0) -> Path:
    """Tables of three clients whose label is high in the middle of age, which no line can say."""
    draw = np.random.default_rng(seed)
    (folder / "tables").mkdir(exist_ok=True)
    for name in "abc":
        age, hours = draw.uniform(0, 80, rows), draw.uniform(0, 8, rows)
        kind, sex = draw.choice(["p", "q"], rows), draw.choice(["f", "m", ""], rows)
        y = np.where((age > 20) & (age < 60), "yes", "no")
        lines = [
            f"{a:.1f},{h:.2f},{k},{s},{t}" for a, h, k, s, t in zip(age, hours, kind, sex, y, strict=True)
        ]
        (folder / "tables" / f"{name}.csv").write_text("\n".join(["age,hours,kind,sex,y", *lines, ""]))
    (folder / "schema.yaml").write_text(
        yaml.safe_dump({"label": "y", "columns": COLUMNS, "groups": GROUPS}, sort_keys=False)
    )
    return folder


def additive_task(folder: Path) -> dict[str, object]:
    """Additive model of the tables that `made` has made."""
    where = {"folder": str(folder / "tables"), "schema": str(folder / "schema.yaml")}
    return {"name": "csv", **where, "simulated": True, "model": "gam", "bins": 4}


def test_each_number_is_the_bin_that_it_lies_in(tmp_path: Path) -> None:
    made(tmp_path, 3)
    (tmp_path / "new.csv").write_text("age,hours,kind\n19.9,0,p\n20,8,q\n99,,\n")
    task = load(schema=str(tmp_path / "schema.yaml"), model="gam", bins=2, smoothing=0)
    assert task.schema.width == 4 + 2 + 2
    wanted = [[1, 0, 0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0]]
    assert task.encode(tmp_path / "new.csv").tolist() == wanted
    kept = tmp_path / "kept.yaml"
    kept.write_text(task.schema.text())
    again = load(schema=str(kept), model="gam", bins=7)
    assert again.schema == task.schema and agreement_of(again) == agreement_of(task)
    assert load(schema=str(tmp_path / "schema.yaml")).schema.width == 4 + 1 + 2


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ({"low": 0, "high": 8, "edges": [3, 2]}, "edges must ascend, between 0 and 8"),
        ({"low": 0, "high": 8, "edges": [2, 2]}, "edges must ascend"),
        ({"low": 0, "high": 8, "edges": [0]}, "edges must ascend"),
        ({"low": 0, "high": 8, "edges": []}, "edges must be a list of numbers"),
        ({"low": 0, "high": 8, "edges": ["x"]}, "edges must be a number"),
        ({"categories": ["p", "q"], "edges": [1]}, "edges belongs to a number"),
    ],
)
def test_edges_that_make_no_bins_are_refused(column: object, said: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"label": "y", "columns": {"hours": column, "y": COLUMNS["y"]}})
    )
    with pytest.raises(Refusal, match=said):
        read_schema(tmp_path / "s.yaml")


def test_a_label_has_no_bins_and_groups_have_words_of_their_own(tmp_path: Path) -> None:
    for changed, said in (
        ({"label": "age"}, "belong to inputs, and this is the label"),
        ({"groups": {"kind": COLUMNS["kind"]}}, "is in columns too"),
        ({"groups": {"weight": {"low": 0, "high": 1}}}, "must have categories"),
        ({"groups": ["sex"]}, "groups must be a mapping"),
    ):
        (tmp_path / "s.yaml").write_text(yaml.safe_dump({"label": "y", "columns": COLUMNS, **changed}))
        with pytest.raises(Refusal, match=said):
            read_schema(tmp_path / "s.yaml")


def test_a_task_says_the_groups_of_its_clients_examples(tmp_path: Path) -> None:
    made(tmp_path, 40)
    how = {"schema": str(tmp_path / "schema.yaml"), "simulated": True, "groups": ["Sex", "kind"]}
    task = load(str(tmp_path / "tables"), **how)
    assert isinstance(task, GroupedTask)
    assert task.group_words == {"sex": ("woman", "man"), "kind": ("p", "q")}
    lines = [each.split(",") for each in (tmp_path / "tables" / "b.csv").read_text().splitlines()[1:]]
    known = {
        (round(float(age) / 40 - 1, 4), code)
        for age, _, _, sex, _ in lines
        for code in [{"f": 0, "m": 1, "": -1}[sex]]
    }
    data, groups = task.client_data(1), task.groups(1)
    ages = load(str(tmp_path / "tables"), simulated=True, label="y", groups=[]).client_data(1)
    assert len(groups["sex"]) == len(data) == len(ages) and set(groups["sex"].tolist()) == {-1, 0, 1}
    assert torch.equal(groups["kind"], data.inputs[:, 5:7].argmax(1))
    bins = data.inputs[:, :4].argmax(1).tolist()
    assert all(
        any(int((age + 1) * 40 // 20) == bin_ and code == group for age, code in known)
        for bin_, group in zip(bins, groups["sex"].tolist(), strict=True)
    )
    dealt = load(str(tmp_path / "tables"), **how, partition="iid", num_clients=5)
    assert sum(len(dealt.groups(client)["sex"]) for client in range(5)) == sum(
        len(task.client_data(c)) for c in range(3)
    )
    for name, said in (("age", "holds numbers"), ("colour", "is not a column")):
        with pytest.raises(Refusal, match=said):
            load(str(tmp_path / "tables"), **{**how, "groups": [name]})


def test_an_additive_model_is_its_shapes(tmp_path: Path) -> None:
    task = additive_task(made(tmp_path))
    run = fv.simulate(
        task, privacy="none", num_rounds=30, local_epochs=3, folder=tmp_path / "run", quiet=True
    )
    assert run.metrics["accuracy"] > 0.97  # where a line is right for half of the rows
    folder, _ = export(tmp_path / "run", Order("int8", out=tmp_path / "small"))
    told = json.loads((folder / "shapes.json").read_text())
    assert told["scores"] == ["yes"] and told["shapes"][0]["column"] == "age"
    by_name = {each["column"]: each for each in told["shapes"]}
    assert by_name["age"]["edges"] == [0, 20, 40, 60, 80] and by_name["kind"]["words"] == ["p", "q"]
    assert all(abs(sum(each["values"][0])) < 1e-6 for each in told["shapes"])
    (tmp_path / "new.csv").write_text("age,hours,kind\n30,1,p\n70,3,\n")
    chosen = [("age", 1), ("hours", 0), ("kind", 0)], [("age", 3), ("hours", 1), ("kind", None)]
    for place, bins in enumerate(chosen):
        values = [
            by_name[name]["values"][0][at] if at is not None else by_name[name]["missing"][0]
            for name, at in bins
        ]
        odds = told["intercept"][0] + sum(values)
        said = run.predict(tmp_path / "new.csv")
        assert said["y"][place] == ("yes" if odds > 0 else "no")
        assert said["probability"][place] == pytest.approx(1 / (1 + np.exp(-abs(odds))), abs=1e-5)
    exported = read_export(folder)
    assert exported is not None and exported.predict(tmp_path / "new.csv")["y"].tolist() == ["yes", "no"]


def test_a_line_is_no_shape(tmp_path: Path) -> None:
    made(tmp_path, 3)
    with pytest.raises(Refusal, match=r"hours.*have no bins; train with task.model=gam"):
        shapes(read_schema(tmp_path / "schema.yaml"), np.zeros((2, 7)), np.zeros(2))


def test_an_additive_model_trains_at_record_level(tmp_path: Path) -> None:
    task = additive_task(made(tmp_path))
    run = fv.simulate(
        task,
        privacy={"name": "record", "target_epsilon": 3.0, "target_delta": 1e-3},
        num_rounds=10,
        quiet=True,
    )
    assert run.epsilon <= 3 and run.metrics["accuracy"] > 0.8
