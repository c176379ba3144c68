"""Inputs of bins and of pairs: bounded rows, smooth neighbours, and interactions that two shapes cannot say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedveil.base.refusal import Refusal
from fedveil.tasks.attribution import explained
from fedveil.tasks.shapes import shapes
from fedveil.tasks.table_basis import PAIR_BINS, Pair, basis, contrast, effective
from fedveil.tasks.table_schema import Column, categorical, read_schema
from fedveil.tasks.tables import load

COLUMNS = {
    "age": {"low": 0, "high": 80},
    "kind": {"categories": ["p", "q", "r"]},
    "y": {"categories": ["no", "yes"]},
}


def schema_file(folder: Path, **keys: Any) -> Path:
    content = {"label": "y", "columns": COLUMNS, "pairs": [["Age", "kind"]], **keys}
    (folder / "schema.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "schema.yaml"


@pytest.mark.parametrize(("count", "length"), [(2, 0.1), (16, 0.5), (16, 4.0), (256, 0.3), (16, 0.0)])
def test_no_row_of_inputs_is_longer_than_one(count: int, length: float) -> None:
    for rows in (basis(count, length), contrast(count)):
        assert np.linalg.norm(rows, axis=1).max() == pytest.approx(1, abs=1e-6)


def test_similarity_falls_with_distance_and_sums_to_zero() -> None:
    similar = basis(16, 0.5) @ basis(16, 0.5).T
    assert np.all(np.diff(similar[0, :8]) < 0)
    assert np.abs(similar.sum(1)).max() < 1e-5
    apart = (np.arange(16) - np.arange(16)[:, None]) / 8
    kernel = np.exp(-(apart**2) / (2 * 0.5**2))
    centre = np.eye(16) - 1 / 16
    wanted = centre @ kernel @ centre
    assert np.allclose(similar, wanted / wanted.diagonal().max(), atol=1e-5)


def test_smooth_bins_have_fewer_directions_than_separate_ones() -> None:
    assert effective(basis(16, 0.0)) == 16
    assert effective(basis(16, 0.5)) == pytest.approx(2.17, abs=0.01)


def test_a_pair_groups_neighbouring_bins_and_keeps_words() -> None:
    age = Column("age", 0, 80, edges=tuple(range(5, 80, 5)))
    pair = Pair(age, categorical("kind", "pqr"))
    assert pair.counts == (PAIR_BINS, 3) and pair.width == 24 and pair.name == "age x kind"
    assert pair.levels(age) == [0, *range(10, 80, 10), 80]
    codes = pair.codes(np.array([0, 1, 2, -1, 15]), np.array([0, 2, 1, 0, -1]))
    assert codes.tolist() == [0, 2, 4, -1, -1]
    rows = pair.rows.reshape(8, 3, 24)
    assert np.abs(rows.sum(0)).max() < 1e-5 and np.abs(rows.sum(1)).max() < 1e-5


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_pairs_of_another_model_are_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"task.model='.*age x kind .* set task.model=gam"):
        load(schema=str(schema_file(tmp_path)), model=model)


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ("age", "must be a list of pairs"),
        ([["age"]], "a pair has two names"),
        ([["age", "y"]], "y.: is no input of the model"),
        ([["age", "Age"]], "is one column"),
        ([["age", "kind"], ["kind", "age"]], "kind x age.: occurs twice"),
    ],
)
def test_pairs_that_are_no_pairs_are_refused(pairs: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=sentence):
        read_schema(schema_file(tmp_path, pairs=pairs))


def test_a_run_adds_pairs_to_those_of_the_schema(tmp_path: Path) -> None:
    columns = {**COLUMNS, "dose": {"low": 0, "high": 1}}
    task = load(schema=str(schema_file(tmp_path, columns=columns)), model="gam", pairs=[["dose", "AGE"]])
    assert task.schema.pair_names == (("age", "kind"), ("dose", "age"))
    with pytest.raises(Refusal, match=r"task\.pairs='kind x age': occurs twice"):
        load(schema=str(schema_file(tmp_path)), model="gam", pairs=[["age", "kind"], ["kind", "age"]])


def test_a_pair_of_the_schema_may_be_in_the_runs_key(tmp_path: Path) -> None:
    # As in the key that `fedveil ask pairs` prints.
    columns = {**COLUMNS, "dose": {"low": 0, "high": 1}}
    pairs = [["kind", "age"], ["dose", "age"]]
    task = load(schema=str(schema_file(tmp_path, columns=columns)), model="gam", pairs=pairs)
    assert task.schema.pair_names == (("age", "kind"), ("dose", "age"))
    assert load(schema=str(schema_file(tmp_path)), model="gam", pairs=pairs[:1]).schema.pair_names == (
        ("age", "kind"),
    )


def test_a_stored_schema_keeps_its_pairs_and_smoothing(tmp_path: Path) -> None:
    task = load(schema=str(schema_file(tmp_path)), model="gam", smoothing=0.3)
    (tmp_path / "stored.yaml").write_text(task.schema.text())
    assert load(schema=str(tmp_path / "stored.yaml"), model="gam", smoothing=2).schema == task.schema
    assert task.schema.width == 16 + 3 + 8 * 3 and task.squared_length == 1 + 2 + 1


def test_a_missing_value_adds_nothing_to_a_pair(tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("age,kind\n20,p\n,p\n20,\n")
    inputs = load(schema=str(schema_file(tmp_path)), model="gam").encode(tmp_path / "new.csv")
    assert inputs[0, 19:].abs().sum() > 0 and not inputs[1:, 19:].any() and not inputs[1, :16].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_a_score_is_the_intercept_and_the_shapes_of_its_row(smoothing: float, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("age,kind\n3,p\n79,r\n41,q\n,q\n41,\n")
    task = load(schema=str(schema_file(tmp_path)), model="gam", smoothing=smoothing)
    draw = np.random.default_rng(0)
    weight, bias = draw.normal(size=(2, task.schema.width)).astype(np.float32), np.array([0.5, 1.5])
    inputs = task.encode(tmp_path / "new.csv").numpy()
    scores = (inputs @ (weight[1] - weight[0])) + bias[1] - bias[0]
    content = shapes(task.schema, weight, bias)
    by_name = {each["column"]: each for each in content["shapes"]}
    age, kind, pair = (by_name[name] for name in ("age", "kind", "age x kind"))
    assert [level["column"] for level in pair["levels"]] == ["age", "kind"]
    for score, at, word in zip(scores, [0, 15, 8, None, 8], [0, 2, 1, 1, None], strict=True):
        total = content["intercept"][0]
        total += age["missing"][0] if at is None else age["values"][0][at]
        total += kind["missing"][0] if word is None else kind["values"][0][word]
        if at is not None and word is not None:
            total += pair["values"][0][at // 2][word]
        assert total == pytest.approx(score, abs=1e-4)


def test_an_explanation_names_what_a_pair_adds(tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("age,kind\n3,p\n79,r\n")
    task = load(schema=str(schema_file(tmp_path)), model="gam")
    model = task.model()
    torch.nn.init.normal_(model.get_parameter("weight"), generator=torch.Generator().manual_seed(0))
    columns = explained(model, task.encode(tmp_path / "new.csv"), task.schema, classifies=True)
    assert list(columns) == ["score", "at_baseline", "age", "kind", "age x kind"]
    total = columns["at_baseline"] + columns["age"] + columns["kind"] + columns["age x kind"]
    assert np.allclose(total, columns["score"], atol=1e-6) and np.abs(columns["age x kind"]).min() > 1e-4
