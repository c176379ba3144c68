"""`task=csv`: its keys, held_out-out rows, persons, models and metrics."""

from pathlib import Path

import numpy as np
import pytest
import torch
from shared.tables import NORTH, SCHEMA, refusal_of

from fedveil.base.refusal import Refusal
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load, row_hashes


def test_a_class_that_a_client_lacks_is_still_a_class(hospitals: Path) -> None:
    (hospitals / "south.csv").write_text("age,sex,diagnosis\n20,f,healthy\n")
    task = load(str(hospitals))
    assert task.model().state_dict()["weight"].shape == (2, 3)


# --- the schema ---------------------------------------------------------------------------------------------------


def test_real_tables_need_a_declared_schema_and_are_never_measured(hospitals: Path) -> None:
    (hospitals / "schema.yaml").unlink()
    message = refusal_of(hospitals, label="diagnosis")
    assert f"fedveil new draft --from csv {hospitals} writes a first draft" in message
    assert "task.simulated=true" in message


# --- the task -----------------------------------------------------------------------------------------------------


def test_a_number_is_predicted_in_its_own_unit(hospitals: Path) -> None:
    (hospitals / "north.csv").write_text("age,sex,diagnosis\n20,f,healthy\n80,,healthy\n")
    task = load(str(hospitals), "age")
    examples = task.client_data(0)
    assert examples.targets.dtype == torch.float32 and examples.targets.tolist() == [-1, 0.5]
    (hospitals / "north.csv").write_text(NORTH)
    assert "column 'age', row 4=None: is the label and missing" in refusal_of(hospitals, label="age")
    assert task.metrics(torch.zeros(2, 1), examples.targets)["mean_absolute_error"] == 30.0
    assert task.decode(torch.tensor([[-1.0], [0.0], [7.0]]))["age"].tolist() == [20, 60, 100]


def test_held_out_rows_go_by_their_content_and_not_by_their_place(tmp_path: Path) -> None:
    stream = np.random.default_rng(1)
    lines = [f"{x:.4f},{'ab'[int(x > 0)]}" for x in stream.permutation(np.arange(-1000, 1000) / 1000)]
    texts = ["\n".join(["x,y", *order]) for order in (lines, lines[::-1])]
    tasks = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.csv").write_text(text)
        tasks.append(load(str(tmp_path / f"{number}.csv"), "y", simulated=True))
    held_out = [sorted(task.held_out().inputs[:, 0].tolist()) for task in tasks]
    assert held_out[0] == held_out[1] and 340 < len(held_out[0]) < 460
    trained = tasks[0].client_data(0)
    assert set(held_out[0]).isdisjoint(trained.inputs[:, 0].tolist())
    hashes = row_hashes(trained) / 2.0**64
    assert abs(hashes.mean() - 0.6) < 0.02 and hashes.min() > 0.2


def test_public_table_measures_the_model(hospitals: Path) -> None:
    (hospitals / "public.csv").write_text(NORTH)
    task = load(str(hospitals), held_out_file=str(hospitals / "public.csv"))
    assert task.num_clients == 1 and len(task.held_out()) == 3


def test_rows_of_simulated_tables_are_dealt_anew_and_real_ones_never(hospitals: Path) -> None:
    task = load(
        str(hospitals),
        simulated=True,
        partition="iid",
        num_clients=3,
        held_out_file=str(hospitals / "north.csv"),
    )
    assert task.num_clients == 3
    assert "real rows stay with their owners" in refusal_of(hospitals, partition="iid", num_clients=3)
    assert "gives 1, one per file or folder; leave it out" in refusal_of(hospitals, num_clients=3)


def test_a_multilayer_model_is_the_same_at_every_call(hospitals: Path) -> None:
    task = load(str(hospitals), model="mlp", hidden=[5, 4])
    torch.manual_seed(1)
    first = task.model().state_dict()
    torch.manual_seed(2)
    second = task.model().state_dict()
    assert [tuple(each.shape) for each in first.values()] == [(5, 3), (5,), (4, 5), (4,), (2, 4), (2,)]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_largest_class_weight_is_one_and_weighs_after_the_mean(hospitals: Path) -> None:
    (hospitals / "schema.yaml").write_text(
        SCHEMA.replace("Very Ill]", "Very Ill, dead], weights: {very ill: 8, healthy: 2}")
    )
    task = load(str(hospitals))
    assert task.schema.target.weights == (0.25, 1, 0.125)
    outputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    each = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
    expected = (torch.tensor([0.25, 1, 0.125, 1, 0.25]) * each).mean()
    assert torch.allclose(task.loss(outputs, targets), expected)
    assert torch.allclose(task.losses(outputs[None], targets[None]), expected[None])
    again = hospitals / "again.yaml"
    again.write_text(task.schema.text())
    assert read_schema(again) == task.schema


# --- whose a row is


def visits_of(folder, header="age,ill,patient", rows=("40,yes,7", "41,no,7.0", "60,yes,x", "61,no,X")):
    folder.mkdir(exist_ok=True)
    (folder / "one.csv").write_text("\n".join([header, *rows]) + "\n")
    schema = "label: ill\ncolumns:\n  age: {low: 0, high: 100}\n  ill: {categories: [no, yes]}\n"
    (folder / "schema.yaml").write_text(schema)
    return str(folder)


def test_column_outside_the_inputs_names_the_owner_of_a_row(tmp_path):
    folder = visits_of(tmp_path / "visits")
    tables = load(folder, person="patient", held_out_file=folder + "/one.csv")
    (data,) = tables.clients
    assert data.persons == ["7", "7", "x", "x"] and data.inputs.shape == (4, 1)
    assert load(folder, held_out_file=folder + "/one.csv").clients[0].persons is None
    rows = load(folder, person="patient", simulated=True, held_out_share=0.5)
    whole = [*rows.clients[0].persons, *rows.test.persons]
    assert sorted(whole) == ["7", "7", "x", "x"]


def test_no_person_stands_among_trained_and_held_out_rows(tmp_path):
    rows = [
        f"{20 + visit},{'yes' if visit % 2 else 'no'},p{person}" for person in range(40) for visit in range(5)
    ]
    folder = visits_of(tmp_path / "visits", rows=rows)
    (tmp_path / "visits" / "two.csv").write_text("\n".join(["age,ill,patient", *rows[:100][::-1]]) + "\n")
    tables = load(folder, person="patient", simulated=True, held_out_share=0.3)
    trained, held_out = {p for each in tables.clients for p in each.persons}, set(tables.test.persons)
    assert not trained & held_out and len(trained | held_out) == 40 and 4 < len(held_out) < 22
    again = load(folder, person="patient", simulated=True, held_out_share=0.6)
    assert held_out < set(again.test.persons)


@pytest.mark.parametrize(
    ("person", "rows", "message"),
    [
        ("age", ("40,yes,7",), "is a column of the schema"),
        ("ill", ("40,yes,7",), "is a column of the schema"),
        ("patiant", ("40,yes,7",), "is missing; did you mean .patient"),
        ("patient", ("40,yes,7", "41,no,"), "row 3.*identifies the person of the row"),
        ("patient", ("40,yes,7", "41,no,NA"), "row 3.*identifies the person of the row"),
    ],
)
def test_column_without_owners_of_rows_is_refused(tmp_path, person, rows, message):
    folder = visits_of(tmp_path / "visits", rows=rows)
    with pytest.raises(Refusal, match=message):
        load(folder, person=person)


# --- what is measured


def of_classes(tmp_path, words):
    columns = f"  x: {{low: 0, high: 9}}\n  y: {{categories: [{', '.join(words)}]}}\n"
    (tmp_path / "s.yaml").write_text(f"label: y\ncolumns:\n{columns}")
    return load(schema=str(tmp_path / "s.yaml"))


@pytest.mark.parametrize("words", [("no", "yes"), ("low", "middle", "high")])
def test_skewed_classes_are_measured_as_scikit_learn_does(tmp_path, words):
    learn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    targets = rng.choice(len(words), 400, p=[0.9, *[0.1 / (len(words) - 1)] * (len(words) - 1)])
    outputs = (rng.normal(size=(400, len(words))) + 2 * np.eye(len(words))[targets]).round(1)  # with ties
    metrics = of_classes(tmp_path, words).metrics(torch.tensor(outputs), torch.tensor(targets))
    likeliest = outputs.argmax(1)
    assert metrics["accuracy"] == pytest.approx(learn.accuracy_score(targets, likeliest))
    assert metrics["balanced_accuracy"] == pytest.approx(learn.balanced_accuracy_score(targets, likeliest))
    assert ("auc" in metrics) == (len(words) == 2)
    if "auc" in metrics:
        assert metrics["auc"] == pytest.approx(learn.roc_auc_score(targets, outputs[:, 1] - outputs[:, 0]))
        assert metrics["auc"] < 1


def test_prediction_of_the_frequent_class_alone_is_detected(tmp_path):
    outputs, targets = torch.tensor([[1.0, 0.0]] * 20), torch.tensor([0] * 19 + [1])
    metrics = of_classes(tmp_path, ("no", "yes")).metrics(outputs, targets)
    assert metrics == pytest.approx({"accuracy": 0.95, "balanced_accuracy": 0.5, "auc": 0.5})
    alone = of_classes(tmp_path, ("no", "yes")).metrics(outputs[:19], targets[:19])
    assert alone == {"accuracy": 1.0, "balanced_accuracy": 1.0}


def test_numbers_are_measured_as_scikit_learn_does(tmp_path):
    learn = pytest.importorskip("sklearn.metrics")
    (tmp_path / "s.yaml").write_text("label: y\ncolumns:\n  x: {low: 0, high: 9}\n  y: {low: 10, high: 30}\n")
    rng = np.random.default_rng(4)
    targets = rng.uniform(-1, 1, 300)
    outputs = targets + rng.normal(size=300) / 3
    metrics = load(schema=str(tmp_path / "s.yaml")).metrics(
        torch.tensor(outputs)[:, None], torch.tensor(targets)
    )
    numbers, predicted = 20 + 10 * targets, 20 + 10 * outputs
    assert metrics["mean_absolute_error"] == pytest.approx(learn.mean_absolute_error(numbers, predicted))
    assert metrics["r2"] == pytest.approx(learn.r2_score(numbers, predicted))
