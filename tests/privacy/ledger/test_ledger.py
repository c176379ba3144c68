"""Ledger: states, budgets, durability, and any order of operations against a model."""

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from shared.ledgers import (
    AFFORDABLE,
    BUDGET,
    COLUMNS,
    EVENT,
    SAMPLED,
    filled,
    kinds,
    opened,
    release,
    reserved,
)

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting import gate
from fedveil.privacy.accounting.epsilon import epsilon, within
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Release, Unit
from fedveil.privacy.ledger import ledger as ledger_module
from fedveil.privacy.ledger.ledger import (
    BudgetExhausted,
    LedgerUnavailable,
    ReleaseState,
    read_entries,
)

# --- states


def test_reserved_and_committed_count_void_does_not(tmp_path):
    with opened(tmp_path / "ledger") as ledger:
        for number in (1, 2, 3):
            ledger.reserve(release(number))
        ledger.commit(release(2).key)
        ledger.void(release(3).key, "the process had sent nothing")
        assert [ledger.state(release(n).key) for n in (1, 2, 3, 4)] == [
            ReleaseState.RESERVED,
            ReleaseState.COMMITTED,
            ReleaseState.VOID,
            None,
        ]
        assert ledger.epsilon() == epsilon([EVENT, EVENT], BUDGET.target_delta)
        assert ledger.epsilon(1e-7) == epsilon([EVENT, EVENT], 1e-7)


def test_rounds_of_one_event_read_its_parts_once(tmp_path, monkeypatch):
    """Each round made a new object of its event, which the gate remembered beside the others."""
    read = []
    monkeypatch.setattr(gate, "leaves", lambda event, leaves=gate.leaves: read.append(event) or leaves(event))
    monkeypatch.setattr(gate, "GATE", gate.Gate())
    monkeypatch.setattr(ledger_module, "GATE", gate.GATE)
    with opened(tmp_path / "ledger", Budget(Unit.CLIENT, 50.0, 1e-5)) as ledger:
        for number in range(1, 21):
            ledger.reserve(release(number, SAMPLED))
    assert len(read) == 1


def test_states_survive_reopening(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.commit(reserved(ledger, release(1)))
        ledger.void(reserved(ledger, release(2)), "nothing was sent")
        ledger.reserve(release(3))
        before = (ledger.head, ledger.epsilon())
    with opened(path) as ledger:
        assert (ledger.head, ledger.epsilon()) == before
        states = [ledger.state(release(number).key) for number in (1, 2, 3)]
    assert states == [ReleaseState.COMMITTED, ReleaseState.VOID, ReleaseState.RESERVED]
    assert kinds(path) == ["open", "reserve", "commit", "reserve", "void", "reserve"]


def test_reserving_again_costs_nothing(tmp_path):
    with opened(tmp_path / "ledger") as ledger:
        first = ledger.reserve(release(1))
        head = ledger.head
        assert ledger.reserve(release(1)) == first
        ledger.commit(release(1).key)
        assert ledger.reserve(release(1)) == first
        assert ledger.head.seq == head.seq + 1
        assert ledger.epsilon() == epsilon([EVENT], BUDGET.target_delta)


@pytest.mark.parametrize(
    "other",
    [
        release(1, GaussianDpEvent(20.0)),
        release(1, sees=(Adversary.MODEL, Adversary.CLIENTS)),
        release(1, sees=(Adversary.SERVER,)),
    ],
)
def test_the_same_key_with_other_events_is_refused(tmp_path, other):
    with opened(tmp_path / "ledger") as ledger:
        ledger.reserve(release(1))
        head = ledger.head
        with pytest.raises(Refusal, match="other events"):
            ledger.reserve(other)
        assert ledger.head == head


def test_commit_and_void_are_idempotent_and_exclude_each_other(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        left, stayed = reserved(ledger, release(1)), reserved(ledger, release(2))
        for _ in range(2):
            ledger.commit(left)
            ledger.void(stayed, "nothing was sent")
        with pytest.raises(Refusal, match="was committed"):
            ledger.void(left, "no")
        with pytest.raises(Refusal, match="was voided"):
            ledger.commit(stayed)
        with pytest.raises(Refusal, match="was voided"):
            ledger.reserve(release(2))
        with pytest.raises(Refusal, match="never reserved"):
            ledger.commit(release(9).key)
        with pytest.raises(Refusal, match="never reserved"):
            ledger.void(release(9).key, "no")
        with pytest.raises(Refusal, match="proof"):
            ledger.void(release(1).key, " ")
    assert kinds(path) == ["open", "reserve", "reserve", "commit", "void"]


def test_a_held_back_commit_travels_with_the_next_reservation(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.commit(reserved(ledger, release(1)), durable=False)
        assert ledger.state(release(1).key) is ReleaseState.COMMITTED
        assert kinds(path) == ["open", "reserve"]
        with pytest.raises(Refusal, match="was committed"):
            ledger.void(release(1).key, "no")
        ledger.commit(reserved(ledger, release(2)), durable=False)
        assert kinds(path) == ["open", "reserve", "commit", "reserve"]
    assert kinds(path) == ["open", "reserve", "commit", "reserve", "commit"]


# --- the budget


@pytest.mark.parametrize("event", [EVENT, SAMPLED], ids=["plain", "sampled"])
def test_the_budget_is_spent_to_the_last_round_and_not_beyond(tmp_path, event):
    path = tmp_path / "ledger"
    affordable = next(n for n in range(1, 100) if not within({event: n + 1}, BUDGET))
    with opened(path) as ledger:
        for number in range(affordable):
            ledger.reserve(release(number, event))
        head = ledger.head
        with pytest.raises(BudgetExhausted, match="budget is spent") as caught:
            ledger.reserve(release(affordable, event))
        assert caught.value.budget == BUDGET
        assert caught.value.adversary is Adversary.MODEL
        assert ledger.epsilon() <= BUDGET.target_epsilon < caught.value.would_be
        assert ledger.head == head
        assert ledger.state(release(affordable, event).key) is None
        ledger.void(release(0, event).key, "nothing was sent")
        ledger.reserve(release(affordable, event))
    assert len(read_entries(path)) == affordable + 3


def test_too_large_release_writes_nothing_of_the_transaction(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.commit(reserved(ledger, release(1)), durable=False)
        with pytest.raises(BudgetExhausted) as caught:
            ledger.reserve(release(2, NonPrivateDpEvent()))
        assert caught.value.would_be == float("inf")
        assert kinds(path) == ["open", "reserve"]
    assert kinds(path) == ["open", "reserve", "commit"]


def test_every_adversary_is_checked_and_the_worst_is_reported(tmp_path):
    costly = PoissonSampledDpEvent(1.0, GaussianDpEvent(2.0))
    both = Release(
        Unit.CLIENT, "run", 1, "update", {Adversary.MODEL: EVENT, Adversary.SERVER: costly}, "system"
    )
    with opened(tmp_path / "tight") as ledger:
        with pytest.raises(BudgetExhausted) as caught:
            ledger.reserve(both)
        assert caught.value.adversary is Adversary.SERVER
        assert ledger.epsilon() == 0.0
    with opened(tmp_path / "wide", Budget(Unit.CLIENT, 5.0, 1e-5)) as ledger:
        ledger.reserve(both)
        ledger.reserve(release(2))
        assert ledger.epsilon() == epsilon(ledger.events(Adversary.SERVER), 1e-5) == epsilon([costly], 1e-5)
        assert epsilon(ledger.events(Adversary.MODEL), 1e-5) == epsilon([EVENT, EVENT], 1e-5)
        assert ledger.events(Adversary.CLIENTS) == []


def test_releases_that_do_not_belong_are_refused(tmp_path):
    with opened(tmp_path / "real") as ledger:
        with pytest.raises(Refusal, match="counts by client"):
            ledger.reserve(release(unit=Unit.RECORD))
        with pytest.raises(Refusal, match="noise on real data"):
            ledger.reserve(release(rng="seeded"))
        assert ledger.head.seq == 1
    with opened(tmp_path / "simulated", simulated=True) as ledger:
        ledger.reserve(release(rng="seeded"))
    assert '"rng":"seeded"' in read_entries(tmp_path / "simulated")[1].payload


# --- durability


def test_a_reservation_is_in_the_file_before_reserve_returns(tmp_path):
    path = tmp_path / "ledger"
    with opened(path, durable=True) as ledger:
        entry = ledger.reserve(release(1))
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as other:
            row = other.execute(f"SELECT {COLUMNS} FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        assert row == (entry.seq, entry.kind, entry.key, entry.payload, entry.prev_hash, entry.hash)
        assert not ledger._chain._db.in_transaction


def test_a_full_disk_refuses_and_closes(tmp_path):
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.reserve(release(1))
        pages = ledger._chain._db.execute("PRAGMA page_count").fetchone()[0]
        ledger._chain._db.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(LedgerUnavailable, match="nothing may leave"):
            ledger.reserve(release(2, mechanism="m" * 100_000))
        with pytest.raises(Refusal, match="closed"):
            ledger.reserve(release(3))
    with opened(path) as ledger:
        assert ledger.epsilon() == epsilon([EVENT], BUDGET.target_delta)


def test_a_closed_ledger_refuses(tmp_path):
    ledger = opened(tmp_path / "ledger")
    ledger.close()
    ledger.close()
    for use in (
        lambda: ledger.reserve(release(1)),
        lambda: ledger.commit(release(1).key),
        lambda: ledger.void(release(1).key, "nothing was sent"),
    ):
        with pytest.raises(Refusal, match="closed"):
            use()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": Budget(Unit.RECORD, 1.0, 1e-5)}, "unit 'client', not 'record'"),
        ({"budget": Budget(Unit.CLIENT, 1.0, 1e-5, Adjacency.REPLACE_ONE)}, "adjacency 'zero-out'"),
        ({"owner": "others"}, "owner 'population', not 'others'"),
        ({"simulated": True}, "simulated False, not True"),
    ],
)
def test_another_identity_is_refused(tmp_path, change, message):
    filled(tmp_path / "ledger")
    with pytest.raises(Refusal, match=message):
        opened(tmp_path / "ledger", **change)


def test_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fedveil.privacy.ledger.ledger.VERSION", 2)
    filled(tmp_path / "ledger")
    monkeypatch.undo()
    with pytest.raises(Refusal, match="version 2, not 1"):
        opened(tmp_path / "ledger")


def test_a_larger_budget_continues_the_same_ledger(tmp_path):
    filled(tmp_path / "ledger", AFFORDABLE)
    with opened(tmp_path / "ledger", Budget(Unit.CLIENT, 2.0, 1e-5)) as ledger:
        ledger.reserve(release(AFFORDABLE))
    with opened(tmp_path / "ledger") as ledger, pytest.raises(BudgetExhausted):
        ledger.reserve(release(AFFORDABLE + 1))


# --- any order of operations, against a model

ROUNDS = st.integers(0, AFFORDABLE + 2)


class AnyOrder(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "ledger"
        self.ledger = opened(self.path)
        self.model: dict[int, ReleaseState] = {}
        self.held_back: set[int] = set()

    def spent(self):
        return sum(state is not ReleaseState.VOID for state in self.model.values())

    @rule(number=ROUNDS)
    def reserve(self, number):
        state = self.model.get(number)
        if state is ReleaseState.VOID:
            with pytest.raises(Refusal):
                self.ledger.reserve(release(number))
        elif state is None and self.spent() == AFFORDABLE:
            with pytest.raises(BudgetExhausted):
                self.ledger.reserve(release(number))
        else:
            self.ledger.reserve(release(number))
            self.model.setdefault(number, ReleaseState.RESERVED)
            self.held_back.clear()

    @rule(number=ROUNDS, durable=st.booleans())
    def commit(self, number, durable):
        if self.model.get(number) in (None, ReleaseState.VOID):
            with pytest.raises(Refusal):
                self.ledger.commit(release(number).key, durable)
            return
        self.ledger.commit(release(number).key, durable)
        if self.model[number] is ReleaseState.RESERVED:
            self.held_back.add(number)
        self.model[number] = ReleaseState.COMMITTED
        if durable:
            self.held_back.clear()

    @rule(number=ROUNDS)
    def void(self, number):
        if self.model.get(number) in (None, ReleaseState.COMMITTED):
            with pytest.raises(Refusal):
                self.ledger.void(release(number).key, "nothing was sent")
            return
        self.ledger.void(release(number).key, "nothing was sent")
        self.held_back.clear()
        self.model[number] = ReleaseState.VOID

    @rule()
    def reopen(self):
        head = self.ledger.head
        self.ledger.close()
        self.ledger = opened(self.path, expect=head)
        self.held_back.clear()

    @rule()
    def crash(self):
        """What a killed process leaves is what its files hold now."""
        head, left = self.ledger.head, self.path.with_name(self.path.name + "'")
        for suffix in ("", "-wal"):
            shutil.copy(f"{self.path}{suffix}", f"{left}{suffix}")
        self.ledger.close()
        self.path = left
        self.ledger = opened(self.path, expect=head)
        self.model.update(dict.fromkeys(self.held_back, ReleaseState.RESERVED))
        self.held_back.clear()

    @invariant()
    def agrees(self):
        states = {number: self.ledger.state(release(number).key) for number in range(AFFORDABLE + 3)}
        assert {number: state for number, state in states.items() if state} == self.model
        assert self.ledger.epsilon() == epsilon({EVENT: self.spent()}, BUDGET.target_delta)
        assert self.ledger.epsilon() <= BUDGET.target_epsilon

    def teardown(self):
        if hasattr(self, "ledger"):
            self.ledger.close()
            shutil.rmtree(self.folder)


def in_any_order(examples, steps):
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(max_examples=examples, stateful_step_count=steps),
    )


def test_any_order_of_operations_agrees_with_the_model():
    in_any_order(30, 30)


@pytest.mark.campaign
def test_ten_thousand_orders_of_operations_agree_with_the_model():
    in_any_order(10_000, 20)
