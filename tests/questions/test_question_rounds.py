"""Questions that hide records: each record's part is bounded, the noise is its own, and each ledger of records is charged."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from flwr.app import Message, RecordDict
from shared import questions
from shared.questions import figure
from shared.runs import reservations

from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.deployment.device.device_ledger import questions_of
from fedveil.deployment.questions import ask_clients
from fedveil.messages.flower_adapter import claim_identity, name_message
from fedveil.messages.training_order import ORDER_KEY, ModeName, RecordTerms
from fedveil.messages.wire import OWNERS_POLICY, instruct
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.ledger.ledger import verify
from fedveil.privacy.ledger.store import ledgers_in
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec
from fedveil.privacy.statistics.inquiry import Inquiry, read_inquiry
from fedveil.questions.answers import noised_counts
from fedveil.questions.question_plan import Spend
from fedveil.questions.simulated import ask_here
from fedveil.questions.wire import question_content
from fedveil.run.build import RunObjects, build

HERE = Path(__file__).parents[1]
STATISTICS = runpy.run_path(str(HERE / "privacy/statistics/test_inquiry.py"))
MADE, SERVED = (runpy.run_path(str(HERE / "faults" / name)) for name in ("devices.py", "served.py"))
CLIENTS, ROWS, MODES = 8, 10, ("record", "record_distributed")
AGES = {"of": "age", "low": 0, "high": 100}


class Ages(questions.Ages):
    num_clients = CLIENTS


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def clients(made: Path) -> Path:
    claim_identity(1)
    return made / "clients"


def inquiry(name: str = "ages", *more: dict[str, Any], **keys: Any) -> Inquiry:
    ask = [{"kind": "mean", "name": "age", **AGES}, *more]
    return read_inquiry({"name": name, "unit": "record", "records": 2 * ROWS, "ask": ask, **keys})


def federation(mode: str, *overrides: str, task: object | None = None) -> Any:
    common = ["task=custom", "task.target=object:Ages", "allow_modules=[object]", "cohort=all"]
    given = ["privacy.target_delta=0.0005", "privacy.target_epsilon=100000", "privacy.allow_large_delta=true"]
    settings = settings_from_overrides([*common, f"privacy={mode}", *given, *overrides])
    return build(settings, objects=RunObjects(task=task or Ages()))


def test_parts_of_a_record_have_its_norm_at_most_in_any_question() -> None:
    ask = STATISTICS["ASK"]
    asked = read_inquiry({"name": "q", "unit": "record", "records": 40, "ask": ask})
    for number in range(20):
        one = {name: values[:1] for name, values in STATISTICS["table"](number).items()}
        parts = asked.contribution_of_records(one, 0.7)
        assert {name: part.shape for name, part in parts.items()} == asked.layout
        assert np.linalg.norm(np.concatenate([part.ravel() for part in parts.values()])) <= 0.7 * (1 + 1e-12)


def test_rows_add_up_so_that_one_more_moves_a_vector_by_its_own_part() -> None:
    asked = read_inquiry({"name": "q", "unit": "record", "records": 40, "ask": STATISTICS["ASK"]})
    table = STATISTICS["table"](1)
    whole = asked.contribution_of_records(table, 1.0)
    for name, total in whole.items():
        rows = ({column: values[[row]] for column, values in table.items()} for row in range(40))
        added = sum(asked.contribution_of_records(row, 1.0)[name] for row in rows)
        np.testing.assert_allclose(added, total, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_without_noise_worth_naming_answers_are_numpys(tmp_path: Path, mode: str) -> None:
    values = np.concatenate([Ages().columns(client)["age"] for client in range(CLIENTS)])
    histogram = {"kind": "histogram", "name": "h", "of": "age", "edges": [30, 50, 70]}
    record = ask_here(federation(mode), inquiry("q", histogram), Spend(noise_multiplier=0.02), tmp_path)
    assert figure(record, "mean")["value"] == pytest.approx(values.mean(), abs=0.5)
    inside = ((values >= 30) & (values < 50)).sum() + (values < 30).sum()
    assert figure(record, "30 to 50")["value"] == pytest.approx(inside, abs=3)
    clipped = record["answers"][1]["clipped"]
    truth = ((values < 30) | (values > 70)).mean()
    assert clipped["low"] - 0.01 <= truth <= clipped["high"] + 0.01 and record["unit"] == "record"
    assert record["adversaries"] == ["server", "clients", "model"]


@pytest.mark.parametrize("mode", MODES)
def test_epsilon_is_dp_accountings_of_one_gaussian(tmp_path: Path, mode: str) -> None:
    record = ask_here(federation(mode), inquiry(), Spend(noise_multiplier=2.0), tmp_path)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-4).compose(GaussianDpEvent(2.0))
    assert record["epsilon"] == pytest.approx(accountant.get_epsilon(0.0005), rel=1e-3)
    paths = (
        [tmp_path / "records" / "ledger"]
        if mode == "record_distributed"
        else ledgers_in(tmp_path / "client_ledgers")
    )
    entries = [each for path in paths for each in reservations(path)]
    assert len(entries) == (1 if mode == "record_distributed" else CLIENTS)
    for entry in entries:
        assert entry["kind"] == "question" and entry["segments"] == {
            "age": "statistics",
            "age: clipped": "statistics",
        }
    assert all(verify(path).ok for path in paths)
    again = ask_here(federation(mode), inquiry(), Spend(noise_multiplier=2.0), tmp_path)
    assert again == {**record, "from_record": True}
    assert sum(len(reservations(path)) for path in paths) == len(entries)


@pytest.mark.parametrize("mode", MODES)
def test_intervals_are_as_wide_as_planned_and_hold(tmp_path: Path, mode: str) -> None:
    held = []
    parts = federation(mode)
    for number in range(12):
        asked, spend = inquiry(f"q{number}"), Spend(noise_multiplier=1.0)
        rows = figure(ask_here(parts, asked, spend, tmp_path), "rows")
        held.append(rows["low"] <= CLIENTS * ROWS <= rows["high"])
        each = np.sqrt(CLIENTS) if mode == "record" else 1.0
        width = 2 * 1.96 * np.sqrt(2) / np.sqrt(0.98) * each
        assert rows["high"] - rows["low"] == pytest.approx(width, rel=0.01)
    assert np.mean(held) >= 0.75  # of 12: fewer with a probability below 1 in 300


@pytest.mark.parametrize("mode", MODES)
def test_too_coarse_records_are_refused_with_a_sufficient_epsilon(tmp_path: Path, mode: str) -> None:
    histogram = {"kind": "histogram", "name": "h", "of": "age", "edges": [30, 50, 70], "resolution": 5}
    with pytest.raises(Refusal, match=r"resolution=5.0: h is planned to .*epsilon [\d.]+ would suffice"):
        ask_here(federation(mode), inquiry("q", histogram), Spend(noise_multiplier=9.0), tmp_path)


def test_noise_of_a_clients_own_is_as_large_as_was_charged() -> None:
    asked, table, noise = inquiry(), Ages().columns(1), 3.0
    parts = asked.contribution_of_records(table, 1.0)
    drawn = []
    for number in range(400):
        answer = noised_counts(asked, table, noise, Randomness(number).stream("question noise"))
        drawn.append(np.concatenate([(answer[name] - parts[name]).ravel() for name in parts]))
    deviation = np.std(drawn, 0)
    assert np.all(np.abs(deviation / noise - 1) < 0.1) and np.std(drawn) == pytest.approx(noise, rel=0.05)
    assert abs(np.mean(drawn)) < 0.2


def test_nobody_tells_whether_a_record_was_there_better_than_claimed() -> None:
    """The largest advantage of a threshold on a Gaussian of this noise is 2 Phi(1 / (2 z)) - 1."""
    asked, noise, draws = inquiry(records=1), 1.0, 3000
    without, one = {"age": np.zeros(0)}, {"age": np.array([100.0])}
    part = asked.contribution_of_records(one, 1.0)
    along = np.concatenate([each.ravel() for each in part.values()])
    assert np.linalg.norm(along) == pytest.approx(1.0)
    scores = []
    for there, table in enumerate((without, one)):
        stream = [Randomness(n).stream("question noise", there) for n in range(draws)]
        answers = [noised_counts(asked, table, noise, each) for each in stream]
        scores.append(np.array([np.concatenate([a[n].ravel() for n in part]) @ along for a in answers]))
    thresholds = np.linspace(-2, 3, 101)
    false, found = (np.array([np.mean(s > t) for t in thresholds]) for s in scores)
    assert np.max(found - false) <= 0.3829 + 3 * np.sqrt(0.5 / draws)
    assert np.max(found - false) >= 0.3829 - 0.06  # and no noise was spent in vain


def test_encrypted_sums_hide_records_by_shares_of_noise(tmp_path: Path) -> None:
    parts = federation("record_distributed", "secagg=masked", "secagg.dropout=0.2", "secagg.collusion=0")
    record = ask_here(parts, inquiry(), Spend(noise_multiplier=1.0), tmp_path)
    rows = figure(record, "rows")
    assert rows["low"] <= CLIENTS * ROWS <= rows["high"] and rows["high"] - rows["low"] < 10
    assert len(reservations(tmp_path / "records" / "ledger")) == 1


@pytest.mark.parametrize(
    ("mode", "overrides", "change", "field"),
    [
        ("client_central", (), {}, "unit"),
        ("record", (), {"unit": "client"}, "unit"),
        ("record", ("privacy.per_person=1",), {}, "privacy.per_person"),
        ("record", ("cohort=poisson", "cohort.rate=0.5"), {}, "cohort"),
        ("record", ("secagg=masked",), {}, "secagg"),
        ("none", (), {}, "privacy"),
    ],
)
def test_question_not_hiding_a_record_is_refused_by_name(
    tmp_path: Path, mode: str, overrides: tuple[str, ...], change: dict[str, Any], field: str
) -> None:
    common = ["task=digits", "task.num_clients=40", "cohort=all", f"privacy={mode}", *overrides]
    with pytest.raises(Refusal) as refused:
        ask_here(build(settings_from_overrides(common)), inquiry(**change), Spend(epsilon=0.5), tmp_path)
    assert refused.value.field == field and not list(tmp_path.iterdir())


def test_one_folder_keeps_answers_of_both_units(tmp_path: Path) -> None:
    for unit, mode in (("client", "client_central"), ("record", "record_distributed"), ("record", "record")):
        asked = inquiry(f"{unit}-{mode}", unit=unit)
        assert ask_here(federation(mode), asked, Spend(noise_multiplier=1.0), tmp_path)["unit"] == unit


def test_question_of_an_unknown_unit_is_refused() -> None:
    for unit in ("person", "row"):
        with pytest.raises(Refusal) as refused:
            inquiry(unit=unit)
        assert refused.value.field == "unit"


def test_a_ledger_of_records_that_is_spent_lets_its_client_sit_out(tmp_path: Path) -> None:
    parts = federation("record", "privacy.target_epsilon=0.6")
    first = ask_here(parts, inquiry("one"), Spend(epsilon=0.5), tmp_path)
    second = ask_here(parts, inquiry("two"), Spend(epsilon=0.5), tmp_path)
    assert first["released"] and first["epsilon_after"] is None
    assert abs(figure(second, "rows")["value"]) < 1e-6  # nobody answered


# --- devices ----------------------------------------------------------------------------------------------------


LABELS = {"kind": "histogram", "name": "classes", "of": "label", "categories": ["0", "1", "2"]}
BUDGET = RecordTerms(8.0, 1e-5, 0.5, Adjacency.ZERO_OUT)


def of_labels(**keys: Any) -> Inquiry:
    told = {"name": "labels", "unit": "record", "records": 40, "why": "How many are ill?", "ask": [LABELS]}
    return read_inquiry({**told, **keys})


def message(
    asked: Inquiry, spec: SumSpec | None = None, noise: float | None = 3.0, budget: RecordTerms = BUDGET
) -> Message:
    order = replace(MADE["CENTRAL"], run=asked.name, privacy=ModeName.RECORD, client=None, record=budget)
    content = question_content(asked, {ORDER_KEY: order.to_json()}, noise)
    spec = spec or SumSpec(None, (Segment("num-examples", 1.0),))
    sent = Message(instruct(content, spec, asked.name, 1), 2, "train")
    name_message(sent, f"m {asked.name}")
    return sent


def test_a_device_charges_its_records_and_adds_the_noise_itself(clients: Path) -> None:
    device, asked = MADE["device_of"](clients / "c0", purposes=("statistics",)), of_labels()
    assert MADE["code_of"](device, message(asked)) == 0
    (entry,) = reservations(device.ledger.records)
    assert entry["kind"] == "question" and not device.ledger.path.exists()
    (told,) = questions_of(device.ledger.records)
    assert told.reason == "How many are ill?" and told.epsilon > 0


@pytest.mark.parametrize(
    ("asked", "changes"),
    [
        (of_labels(purpose="marketing"), {}),
        (of_labels(), {"noise": None}),
        (of_labels(), {"spec": SumSpec(1.0, of_labels().segments)}),
        (of_labels(), {"spec": of_labels().spec_of_records(1.0)}),
        (replace(of_labels(), name="other"), {}),
        (of_labels(), {"budget": replace(BUDGET, per_person=1)}),  # of whom more rows may be counted
    ],
)
def test_device_refuses_questions_beyond_the_allowance(
    clients: Path, asked: Inquiry, changes: dict[str, Any]
) -> None:
    sent = message(asked, **changes)
    device = MADE["device_of"](clients / "c0", purposes=("statistics",))
    assert MADE["code_of"](device, sent) == OWNERS_POLICY
    assert not device.ledger.records.exists() and not device.ledger.path.exists()


def test_a_device_adds_no_less_noise_than_its_owner_demands(clients: Path) -> None:
    """In the clear nothing else hides the records of one client."""
    for least, code in ((3.1, OWNERS_POLICY), (3.0, 0)):
        allowed = {"purposes": ("statistics",), "minimum_noise_multiplier": least}
        device = MADE["device_of"](clients / "c0", **allowed)
        assert MADE["code_of"](device, message(of_labels())) == code
        assert device.ledger.records.exists() == (code == 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_servers_folder_asks_its_clients_about_records(tmp_path: Path, mode: str) -> None:
    hearts = SERVED["make_federation"](tmp_path)
    grid = SERVED["Devices"](hearts / "clients")
    given = ("task=digits", f"privacy={mode}", "privacy.target_epsilon=10", "cohort=all", "link.wait=5")
    more = ("privacy.allow_large_delta=true",)
    if mode == "record_distributed":
        more = (*more, "privacy.records=1500", "privacy.most_records=400")
    asked = of_labels(records=400)
    record = ask_clients(
        hearts / "server", asked, Spend(noise_multiplier=1.0), (*given, *more), reach=SERVED["reaching"](grid)
    )
    assert record["released"] and record["rng"] == "system"
    assert (record["message_bytes"] is None) == (mode == "record_distributed")
    assert record["bytes"]["source"] == "counted by the link"
    truth = sum(
        np.bincount(device.task.columns(RecordDict(), asked)["label"], minlength=10)[0]
        for device in grid.devices.values()
    )
    zeros = figure(record, "0")
    assert abs(zeros["value"] - truth) < 3 * (zeros["high"] - zeros["low"])
    for device in grid.devices.values():
        (told,) = questions_of(device.ledger.records)
        assert told.name == "labels"
