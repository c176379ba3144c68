"""Caps of whoever owns the data: they lower what a ledger may spend, end it on a day, and nothing else moves them."""

import json
import os
import stat
from datetime import UTC, date, datetime, timedelta

import pytest
from dp_accounting import GaussianDpEvent

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.epsilon import within
from fedveil.privacy.budget import Adversary, Budget, Release, Unit
from fedveil.privacy.ledger import caps
from fedveil.privacy.ledger.caps import ALL, FILE, Cap, CapEnded, capped, read_caps, set_cap
from fedveil.privacy.ledger.ledger import BudgetExhausted, Ledger, read_entries, verify

WIDE = Budget(Unit.CLIENT, 8.0, 1e-4)
EVENT = GaussianDpEvent(10.0)
DATA = "0123456789abcdef" * 4


def day(later: int = 0) -> date:
    return datetime.now(UTC).date() + timedelta(days=later)


def ledger_of(folder):
    return folder / f"population-{DATA[:32]}.ledger"


def opened(folder, budget=WIDE):
    return Ledger.open(ledger_of(folder), budget, owner=DATA, simulated=False, durable=False)


def release(number):
    return Release(Unit.CLIENT, "run", number, "update", {Adversary.MODEL: EVENT}, "system")


def spend(ledger, first=0):
    """Reserves until the ledger refuses; returns how often it did not."""
    for number in range(first, 10_000):
        try:
            ledger.reserve(release(number))
        except BudgetExhausted:
            return number - first
    raise AssertionError("it never refused")


def affordable(budget):
    return next(n for n in range(1, 1000) if not within({EVENT: n + 1}, budget))


@pytest.mark.parametrize("data", [ALL, DATA, DATA[:32]])
def test_cap_lowers_the_budget_of_a_run(tmp_path, data):
    set_cap(tmp_path, Cap(data, 1.0, 1e-5))
    with opened(tmp_path) as ledger:
        assert ledger.budget == Budget(Unit.CLIENT, 1.0, 1e-5)
        assert spend(ledger) == affordable(ledger.budget)
    granted = json.loads(read_entries(ledger_of(tmp_path))[1].payload)["budget"]
    assert granted == {"target_epsilon": 1.0, "target_delta": 1e-5}
    assert verify(ledger_of(tmp_path)).ok


def test_the_smaller_of_each_number_counts_and_a_cap_never_adds(tmp_path):
    set_cap(tmp_path, Cap(ALL, 20.0, 1e-5))
    set_cap(tmp_path, Cap(DATA, 3.0, 0.5))
    assert capped(ledger_of(tmp_path), WIDE) == Budget(Unit.CLIENT, 3.0, 1e-5)
    assert capped(ledger_of(tmp_path), Budget(Unit.CLIENT, 1.0, 1e-7)) == Budget(Unit.CLIENT, 1.0, 1e-7)
    assert capped(tmp_path / "population-ff.ledger", WIDE) == Budget(Unit.CLIENT, 8.0, 1e-5)


def test_lowered_cap_holds_from_the_next_release_on(tmp_path):
    with opened(tmp_path) as ledger:
        ledger.reserve(release(0))
        set_cap(tmp_path, Cap(ALL, 0.01, 1e-5))
        with pytest.raises(BudgetExhausted, match=r"of 0\.01 at delta"):
            ledger.reserve(release(1))
        ledger.reserve(release(0))  # was paid for
        set_cap(tmp_path, Cap(ALL, 1.0, 1e-5))
        assert spend(ledger, 1) + 1 == affordable(Budget(Unit.CLIENT, 1.0, 1e-5))
    assert verify(ledger_of(tmp_path)).ok


def test_an_ended_cap_refuses_until_its_owner_sets_another(tmp_path):
    set_cap(tmp_path, Cap(DATA, 5.0, 1e-5, day(-1)))
    set_cap(tmp_path, Cap(ALL, 5.0, 1e-5))
    with opened(tmp_path) as ledger:
        with pytest.raises(CapEnded, match="no release after that day"):
            _ = ledger.budget
        with pytest.raises(BudgetExhausted, match="no release after that day"):
            ledger.reserve(release(0))
        assert ledger.head.seq == 1
        set_cap(tmp_path, Cap(DATA, 5.0, 1e-5, day()))
        ledger.reserve(release(0))


def test_decisions_stand_in_order_in_a_private_file(tmp_path):
    folder = tmp_path / "new"
    for size in (3.0, 1.0, 2.0):
        set_cap(folder, Cap(ALL, size, 1e-5, date(2999, 1, 2)))
    found = read_caps(folder)
    assert [(cap.target_epsilon, cap.until) for cap in found] == [
        (size, date(2999, 1, 2)) for size in (3.0, 1.0, 2.0)
    ]
    assert all(cap.decided.startswith(str(day().year)) for cap in found)
    assert stat.S_IMODE((folder / FILE).stat().st_mode) == 0o600
    assert not list(folder.glob(".*"))


def test_a_decision_is_on_disk_before_it_stands(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    set_cap(tmp_path, Cap(ALL, 1.0, 1e-5))
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_caps_as_they_were(tmp_path, monkeypatch, name):
    set_cap(tmp_path, Cap(ALL, 1.0, 1e-5))
    before = read_caps(tmp_path)

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, name, fails)
    with pytest.raises(Refusal, match="stay as they were"):
        set_cap(tmp_path, Cap(ALL, 9.0, 1e-5))
    monkeypatch.undo()
    assert read_caps(tmp_path) == before
    set_cap(tmp_path, Cap(ALL, 9.0, 1e-5))


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"version": 2, "caps": []}', '{"version": 1, "caps": [{"data": "all"}]}', "\xff\xfe"],
)
def test_caps_that_cannot_be_read_let_nothing_leave(tmp_path, text):
    (tmp_path / FILE).write_bytes(text.encode("latin-1"))
    with opened(tmp_path) as ledger:
        with pytest.raises(Refusal, match="caps") as caught:
            ledger.reserve(release(0))
        assert not isinstance(caught.value, BudgetExhausted)
        assert ledger.head.seq == 1
    with pytest.raises(Refusal, match="caps"):
        set_cap(tmp_path, Cap(ALL, 1.0, 1e-5))


def test_a_linked_file_of_caps_is_refused(tmp_path):
    (tmp_path / FILE).symlink_to("elsewhere")
    with pytest.raises(Refusal, match="not a regular file"):
        capped(ledger_of(tmp_path), WIDE)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ((ALL, 0.0, 1e-5), "target_epsilon"),
        ((ALL, float("inf"), 1e-5), "target_epsilon"),
        ((ALL, 1.0, 1.0), "target_delta"),
        (("population", 1.0, 1e-5), "data"),
        ((DATA[:31], 1.0, 1e-5), "data"),
        ((DATA + "0", 1.0, 1e-5), "data"),
    ],
)
def test_a_cap_out_of_range_is_refused(fields, field):
    with pytest.raises(Refusal) as caught:
        Cap(*fields)
    assert caught.value.field == field


def test_two_owners_at_once_lose_no_decision(tmp_path, monkeypatch):
    monkeypatch.setattr(caps, "WAIT_SECONDS", 60.0)
    children = []
    for child in range(4):
        process = os.fork()
        if not process:
            code = 1
            try:
                for number in range(5):
                    set_cap(tmp_path, Cap(ALL, 1.0 + child + number / 10, 1e-5))
                code = 0
            finally:
                os._exit(code)
        children.append(process)
    assert [os.waitpid(process, 0)[1] for process in children] == [0] * 4
    assert len({cap.target_epsilon for cap in read_caps(tmp_path)}) == 20
