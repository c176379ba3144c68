"""One budget of a device's records: what the device releases as a client is charged to them too."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting.dp_event import GaussianDpEvent

from fedveil.base.refusal import Refusal
from fedveil.client.private_update import NotTrained
from fedveil.deployment.device.device_ledger import DeviceLedger, epsilon_of, spent_on
from fedveil.deployment.device.order_policy import Cost
from fedveil.messages.wire import BUDGET_SPENT, NOT_READY
from fedveil.privacy.accounting.events import Gaussian
from fedveil.privacy.accounting.gaussian import gaussian_epsilon, gaussian_mu
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.caps import Cap
from fedveil.privacy.ledger.client_sums import SUFFIX
from fedveil.privacy.ledger.ledger import Ledger, read_entries, verify
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.run.audit_trail import audit_trail, by_run

DELTA, TARGET, SUMS = 1e-5, 8.0, 13
# With this noise thirteen record-level sums spend the whole of an owner's 8.
NOISE = math.sqrt(SUMS) / gaussian_mu(TARGET, DELTA) * (1 + 1e-6)
RECORDS = Budget(Unit.RECORD, TARGET, DELTA)


@pytest.fixture
def own(tmp_path: Path) -> DeviceLedger:
    return DeviceLedger(tmp_path, "a" * 64, Cap("all", TARGET, DELTA))


def released(
    own: DeviceLedger, number: int, budget: Budget | None, run: str = "spring", **more: object
) -> int:
    """Release one vector, as a client or of records; return the code of the refusal, 0 if it left."""
    cost = replace(Cost(Gaussian(NOISE), tuple(Adversary), budget), **more)
    try:
        with own.charged(run, number, 0, cost):
            return 0
    except NotTrained as said:
        return said.code


def lost(records: int, clients: int) -> float:
    """Return what a record has lost by so many sums of records and of clients."""
    return gaussian_epsilon(math.sqrt(records + 4 * clients) / NOISE, DELTA)


def spent(own: DeviceLedger) -> float:
    found, _ = spent_on(own.folder)[own.records.stem]
    return 0.0 if found is None else found[0]


def counts(own: DeviceLedger, order: Iterator[Budget | None]) -> tuple[int, int]:
    left = [(budget, released(own, number, budget)) for number, budget in enumerate(order, 1)]
    assert {code for _, code in left} == {0, BUDGET_SPENT}
    of_records = sum(code == 0 and budget is not None for budget, code in left)
    return of_records, sum(code == 0 for _, code in left) - of_records


@pytest.mark.parametrize(
    "order",
    [[RECORDS] * SUMS + [None] * SUMS, [None] * SUMS + [RECORDS] * SUMS, [None, RECORDS] * SUMS],
    ids=["records first", "clients first", "by turns"],
)
def test_twenty_six_sums_of_two_units_end_at_the_owners_budget(own: DeviceLedger, order: list) -> None:
    records, clients = counts(own, iter(order))
    assert 0 < records + clients < len(order)
    assert spent(own) == pytest.approx(lost(records, clients)) and spent(own) <= TARGET
    assert lost(records + 1, clients) > TARGET
    assert lost(SUMS, SUMS) > 20 and lost(SUMS, 0) == pytest.approx(TARGET, rel=1e-4)
    if own.records.exists():
        assert verify(own.records).ok and epsilon_of(own.records)[0] == pytest.approx(spent(own))


def test_sum_of_clients_is_charged_as_its_exchanged_vector(
    own: DeviceLedger,
) -> None:
    assert released(own, 1, RECORDS) == 0
    assert released(own, 2, None, adversaries=(Adversary.CLIENTS, Adversary.MODEL)) == 0
    entry = [e for e in read_entries(own.records) if e.kind == "reserve"][-1]
    payload = json.loads(entry.payload)
    assert payload["events"] == {
        who: {"kind": "Gaussian", "noise_multiplier": NOISE / 2} for who in ("clients", "model")
    }
    assert json.loads(entry.key) == ["spring", 2, f"private_sum 0{SUFFIX}"] and payload["source"] == "client"
    assert [e.kind for e in read_entries(own.records)][-1] == "commit"


def test_record_ledger_under_replace_one_reads_the_distance_itself(own: DeviceLedger) -> None:
    replaced = replace(RECORDS, adjacency=Adjacency.REPLACE_ONE)
    assert released(own, 1, None) == 0
    assert released(own, 1, replaced) == 0
    assert '"noise_multiplier":' + repr(NOISE) in read_entries(own.records)[1].payload
    assert spent(own) == pytest.approx(gaussian_epsilon(2 * math.sqrt(2) / NOISE, DELTA))


def test_question_before_the_first_training_leaves_the_unit_open(own: DeviceLedger) -> None:
    assert released(own, 1, None) == 0
    assert not own.records.exists() and spent(own) == pytest.approx(lost(0, 1))
    person = replace(RECORDS, unit=Unit.PERSON)
    assert released(own, 1, person) == 0
    assert json.loads(read_entries(own.records)[0].payload)["unit"] == "person"
    assert spent(own) == pytest.approx(lost(1, 1))


def test_sum_of_charged_releases_costs_records_nothing_more(own: DeviceLedger) -> None:
    assert released(own, 1, RECORDS) == 0
    assert released(own, 1, None, is_of_records=True) == 0
    assert spent(own) == pytest.approx(lost(1, 0)) and len(read_entries(own.path)) == 3
    own.charge_records(RECORDS)
    assert spent(own) == pytest.approx(lost(1, 0))


def test_charges_of_an_older_release_move_at_first_use(own: DeviceLedger) -> None:
    """Until now a device charged each unit on a ledger of its own."""
    for path, unit in ((own.path, Unit.CLIENT), (own.records, Unit.RECORD)):
        budget = Budget(unit, TARGET, DELTA)
        with Ledger.open(path, budget, owner=own.device, simulated=False) as ledger:
            for number in (1, 2):
                key = ("winter", number, "private_sum 0")
                ledger.reserve(
                    Release(unit, *key, dict.fromkeys(Adversary, GaussianDpEvent(NOISE)), "system")
                )
                if number == 1:
                    ledger.commit(key)
    assert spent(own) == pytest.approx(lost(2, 2))
    assert epsilon_of(own.records)[0] == pytest.approx(lost(2, 0))
    assert released(own, 1, RECORDS) == 0
    assert epsilon_of(own.records)[0] == pytest.approx(lost(3, 2)) and verify(own.records).ok
    assert released(own, 2, None) == BUDGET_SPENT or spent(own) <= TARGET
    before = len(read_entries(own.records))
    own.charge_records(RECORDS)  # once
    assert len(read_entries(own.records)) == before


def test_the_same_attempt_is_charged_once_on_both_ledgers(own: DeviceLedger) -> None:
    assert released(own, 1, RECORDS) == 0
    assert released(own, 2, None) == 0
    with pytest.raises(Refusal, match="was charged before"):
        released(own, 2, None)
    assert spent(own) == pytest.approx(lost(1, 1))


def test_neither_ledger_pays_without_a_vector(own: DeviceLedger) -> None:
    assert released(own, 1, RECORDS) == 0
    with pytest.raises(ValueError), own.charged("spring", 2, 0, Cost(Gaussian(NOISE), tuple(Adversary))):
        raise ValueError("row 17")
    assert spent(own) == pytest.approx(lost(1, 0)) and epsilon_of(own.path) == (0.0, DELTA)


def test_a_refusal_of_the_clients_ledger_gives_the_records_back(own: DeviceLedger) -> None:
    with pytest.raises(ValueError), own.charged("spring", 2, 0, Cost(Gaussian(NOISE), tuple(Adversary))):
        raise ValueError("before there was a ledger of records")
    assert released(own, 1, RECORDS) == 0
    with pytest.raises(Refusal, match="was charged before"):
        released(own, 2, None)
    assert [e.kind for e in read_entries(own.records)][-2:] == ["reserve", "void"]
    assert spent(own) == pytest.approx(lost(1, 0))


def test_a_clients_ledger_that_cannot_be_read_holds_everything_back(own: DeviceLedger) -> None:
    assert released(own, 1, RECORDS) == 0
    own.path.mkdir()
    assert [released(own, 2, each) for each in (None, RECORDS)] == [NOT_READY, NOT_READY]
    own.path.rmdir()
    assert released(own, 2, None) == 0 and spent(own) == pytest.approx(lost(1, 1))


@pytest.mark.parametrize("trained", [False, True], ids=["no ledger of records", "a ledger of records"])
def test_questions_part_of_the_budget_holds_for_records(own: DeviceLedger, trained: bool) -> None:
    asked = replace(own.cap, questions=1.2 * lost(0, 1), purposes=("statistics",))
    own = replace(own, cap=asked)
    if trained:
        assert released(own, 1, RECORDS) == 0
    codes = []
    for name in ("one", "two"):
        ask = [{"kind": "histogram", "name": "classes", "of": "label", "categories": ["0", "1"]}]
        question = read_inquiry({"name": name, "purpose": "statistics", "why": "", "records": 40, "ask": ask})
        codes.append(released(own, 1, None, name, inquiry=question))
    assert codes == [0, BUDGET_SPENT]
    assert spent(own) == pytest.approx(lost(int(trained), 1))


def test_each_change_of_the_roster_is_on_the_ledger(own: DeviceLedger) -> None:
    for number, version in ((1, 1), (2, 1), (3, 2)):
        roster = {"version": version, "hash": f"{version:064x}"}
        at_round = replace(own, origin={"who": "server of hearts", "roster": roster})
        assert released(at_round, number, None) == 0
    trail = [row for row in audit_trail(read_entries(own.path)) if row.act == "training"]
    assert [row.origin["roster"]["version"] for row in trail] == [1, 1, 2]
    assert ["origin" in row.payload for row in trail] == [True, False, True]
    ((heading, _),) = by_run(trail)
    assert heading == (
        "run spring, started by server of hearts, roster 1 (000000000000), then roster 2 (000000000000)"
    )
