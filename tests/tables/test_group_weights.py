"""Weights of examples by group and class: against plain PyTorch, from an answer's counts, and refused where one is missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import fedveil as fv
from fedveil.audit.membership_attacks import attack_on
from fedveil.base.refusal import Refusal
from fedveil.privacy.statistics.fairness import reweighing
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.tasks.arrays import agreement_of
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

SCHEMA = """
label: ill
columns:
  age: {low: 20, high: 100}
  ill: {categories: ["no", "yes"]}
groups:
  sex: {categories: {woman: [f], man: [m]}}
"""
WEIGHTS = 'sex:\n  M: {"yes": 2, "no": 1}\n  woman: {"no": 0.5, "yes": 4}\n'
TABLE = np.array([[0.125, 1.0], [0.25, 0.5]])  # of the schema's groups and classes, the largest 1
SEXES = ("f", "m", "f", "m", "?")


@pytest.fixture
def clinics(tmp_path: Path) -> Path:
    """Two clinics, and a file of weights beside them."""
    for name, shift in (("a", 0), ("b", 1)):
        rows = [
            f"{20 + 7 * n + shift},{SEXES[(n + shift) % 5]},{'yes' if n % 3 else 'no'}" for n in range(10)
        ]
        (tmp_path / "clinics").mkdir(exist_ok=True)
        (tmp_path / "clinics" / f"{name}.csv").write_text("age,sex,ill\n" + "\n".join(rows) + "\n")
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    (tmp_path / "weights.yaml").write_text(WEIGHTS)
    return tmp_path


def made(clinics: Path, **options: Any) -> Any:
    weights = options.pop("group_weights", str(clinics / "weights.yaml"))
    schema = str(clinics / "schema.yaml")
    return load(
        str(clinics / "clinics"),
        schema=schema,
        simulated=True,
        group_weights=weights,
        groups=["sex"],
        **options,
    )


def weights_of(groups: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(np.vstack([TABLE, TABLE.mean(0)]), dtype=torch.float32)
    return table[groups, labels]  # -1, an unknown group, is the last row


def test_loss_of_a_client_is_plain_pytorchs_with_example_weights(clinics: Path) -> None:
    task, plain = made(clinics), made(clinics, group_weights=None)
    outputs = torch.randn(len(plain.client_data(0)), 2)
    for client in range(2):
        data, own = task.client_data(client), plain.client_data(client)
        outputs = torch.randn(len(own), 2)
        weights = weights_of(own.groups["sex"], own.targets)
        assert -1 in own.groups["sex"] and 0 in own.groups["sex"]
        expected = (weights * cross_entropy(outputs, own.targets, reduction="none")).mean()
        assert torch.allclose(task.loss(outputs, data.targets), expected)
        assert torch.allclose(task.losses(outputs[None], data.targets[None]), expected[None])
        assert task.metrics(outputs, data.targets) == plain.metrics(outputs, own.targets)
        assert torch.equal(data.inputs, own.inputs)
    held = plain.held_out()
    assert torch.equal(task.held_out().targets, held.targets)  # the same rows, measured without weights
    outputs = torch.randn(len(held), 2)
    assert task.loss(outputs, held.targets) == pytest.approx(plain.loss(outputs, held.targets))


def test_a_round_of_training_is_a_step_of_plain_pytorch(clinics: Path) -> None:
    asked = {
        "name": "csv",
        "folder": str(clinics / "clinics"),
        "schema": str(clinics / "schema.yaml"),
        "model": "linear",
        "simulated": True,
    }
    weights = {"group_weights": str(clinics / "weights.yaml")}
    once: dict[str, Any] = {"num_rounds": 1, "local_epochs": 1, "batch_size": 50, "learning_rate": 0.5}
    run = fv.simulate(asked | weights, privacy=fv.NoPrivacy(), cohort="all", quiet=True, **once)
    plain, updates, sizes = made(clinics, group_weights=None), [], []
    for client in range(2):
        own, model = plain.client_data(client), plain.model()
        each = cross_entropy(model(own.inputs), own.targets, reduction="none")
        (weights_of(own.groups["sex"], own.targets) * each).mean().backward()
        updates.append(-0.5 * model.weight.grad)
        sizes.append(len(own))
    expected = sum(size * update for size, update in zip(sizes, updates, strict=True)) / sum(sizes)
    assert torch.allclose(run.model.weight, expected, atol=1e-6)


@pytest.mark.parametrize(
    "privacy", [fv.Record(noise_multiplier=2.0), fv.RecordDistributed(target_epsilon=8.0)]
)
def test_weights_cost_no_epsilon_at_record_level(clinics: Path, privacy: Any) -> None:
    """The independence of examples is measured before such a run, and each gradient is clipped after its weight."""
    asked = {
        "name": "csv",
        "folder": str(clinics / "clinics"),
        "schema": str(clinics / "schema.yaml"),
        "simulated": True,
    }
    weights = {"group_weights": str(clinics / "weights.yaml")}
    shared: dict[str, Any] = {"privacy": privacy, "cohort": "all", "num_rounds": 1, "quiet": True}
    with_weights, without = (fv.simulate(each, **shared) for each in (asked | weights, asked))
    assert with_weights.status == without.status == "completed"
    assert with_weights.epsilon == without.epsilon


def test_the_schema_keeps_the_weights_and_is_agreed_on_with_them(clinics: Path) -> None:
    task = made(clinics)
    (clinics / "again.yaml").write_text(task.schema.text())
    again = read_schema(clinics / "again.yaml")
    assert again == task.schema and again.group_weights is not None
    assert np.allclose(again.group_weights.weights, TABLE)
    of_schema = load(str(clinics / "clinics"), schema=str(clinics / "again.yaml"), simulated=True)
    assert of_schema.grouped == ("sex",)  # although nobody names the groups
    assert torch.equal(of_schema.client_data(0).targets, task.client_data(0).targets)
    assert agreement_of(of_schema) == agreement_of(task) != agreement_of(made(clinics, group_weights=None))


def test_questions_see_the_labels_as_they_are(clinics: Path) -> None:
    dealt = made(clinics, partition="iid", num_clients=2)
    assert set(dealt.columns(0)["ill"]) == {"no", "yes"}
    assert set(dealt.columns(0)["sex"]) <= {"woman", "man", ""}


def test_members_do_not_show_by_their_weights(clinics: Path) -> None:
    """Held-out rows have no weights: an attack that compares losses would tell members by theirs."""
    given = {"folder": str(clinics / "clinics"), "schema": str(clinics / "schema.yaml"), "simulated": True}
    task = {"name": "csv", **given, "group_weights": str(clinics / "weights.yaml")}
    run = fv.simulate(task, privacy=fv.NoPrivacy(), cohort="all", num_rounds=1, quiet=True)
    attacked = attack_on(run.folder, 1)
    assert attacked.records.targets.max() == 1 and attacked.spare.targets.max() <= 1


COUNTS = np.array([[900.0, 100.0], [700.0, 300.0]])


def answer(**changed: Any) -> dict[str, Any]:
    """Return the record of a cross table as `fedveil ask` leaves it, with a standard deviation of 10."""
    asked = {
        "kind": "crosstable",
        "of": "sex",
        "categories": ["woman", "man"],
        "by": "ill",
        "by_categories": ["no", "yes"],
    }
    figures = [
        {"name": "", "value": each, "low": each - 19.6, "high": each + 19.6} for each in COUNTS.ravel()
    ]
    return {"question": {"ask": [asked | changed]}, "answers": [{"figures": figures}]}


def from_answer(clinics: Path, record: object) -> Any:
    (clinics / "answer.json").write_text(json.dumps(record))
    return made(clinics, group_weights=str(clinics / "answer.json")).schema.group_weights


def test_weights_follow_from_the_counts_of_an_answer(clinics: Path) -> None:
    found = from_answer(clinics, answer())
    assert np.allclose(found.weights, reweighing(COUNTS, 10.0))
    other = {"of": "ill", "categories": ["no", "yes"], "by": "sex", "by_categories": ["woman", "man"]}
    turned = from_answer(clinics, answer(**other))
    assert np.allclose(turned.weights, reweighing(COUNTS.T, 10.0))


ODDS = {
    "kind": "fairness", "criterion": "equalised_odds", "of": "sex", "categories": ["woman", "man"], "label": "ill",
    "label_categories": ["no", "yes"], "said": "treated", "said_categories": ["no", "yes"],
}  # fmt: skip


def test_weights_follow_from_the_rows_that_equalised_odds_counts(clinics: Path) -> None:
    (asked,) = read_inquiry({"name": "q", "records": 9, "ask": [ODDS]}).questions
    cells = np.stack([COUNTS / 4, COUNTS * 3 / 4], -1)  # by groups, classes and decisions
    said = [each.plain for each in asked.statistic.answer(cells, 10.0)]
    record = {"question": {"ask": [ODDS]}, "answers": [{"figures": said}]}
    assert np.allclose(from_answer(clinics, record).weights, reweighing(COUNTS, 10.0 * 2**0.5))
    record["answers"] = [{"figures": [each for each in said if not each["name"].startswith("rows")]}]
    with pytest.raises(Refusal, match="of kind fairness with the criterion equalised_odds"):
        from_answer(clinics, record)  # of an older release


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (answer(kind="fairness"), "holds no released counts by a column of groups and ill"),
        ({**answer(), "answers": []}, "holds no released counts"),
        ({"question": 3}, "is not an answer of fedveil ask"),
        (answer(categories=["woman", "other"]), "is not a category of sex"),
        (answer(of="town"), "is not a column"),
    ],
)
def test_an_answer_that_tells_no_weights_is_refused(clinics: Path, record: object, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        from_answer(clinics, record)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('  M: {"yes": 2, "no": 1}\n', "", "=.man.: has no weight; give one for each word of sex"),
        ('"yes": 2, ', "", "weights.yaml: man=.yes.: has no weight; give one for each word of ill"),
        ("  M:", "  boy:", "=.boy.: is not a category of sex"),
        ("  M:", "  F:", "=.woman.: occurs twice"),
        ("sex:", "town:", "is not a column"),
        ('"yes": 2', '"yes": 0', "weights must be above 0"),
        ('"yes": 2', '"yes": much', "a weight must be a number"),
        ('"yes": 2', '"yes": [1]', "give a finite number"),
        (WEIGHTS, "[1, 2]", "give the name of one column of groups"),
    ],
)
def test_weights_that_leave_out_a_group_or_a_class_are_refused(
    clinics: Path, before: str, after: str, said: str
) -> None:
    assert before in WEIGHTS
    (clinics / "weights.yaml").write_text(WEIGHTS.replace(before, after))
    with pytest.raises(Refusal, match=said) as refused:
        made(clinics)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"yes"]}', '"yes"], weights: {"no": 2}}', "has weights too"),
        ("label: ill", "label: age", "has no classes, which weights by group need"),
        ("groups:", f"group_weights: {{{WEIGHTS[:4]} {{m: {{}}}}}}\ngroups:", "has no weight"),
    ],
)
def test_a_schema_that_cannot_have_them_is_refused(clinics: Path, before: str, after: str, said: str) -> None:
    assert before in SCHEMA
    (clinics / "schema.yaml").write_text(SCHEMA.replace(before, after))
    with pytest.raises(Refusal, match=said):
        made(clinics)


def test_weights_of_schema_and_file_are_refused_together(clinics: Path) -> None:
    (clinics / "schema.yaml").write_text(made(clinics).schema.text())
    with pytest.raises(Refusal, match="the schema also has group_weights"):
        made(clinics)
