"""Arms: dealing is a partition, and a ledger charges all arms of a deal what the one costs that released most."""

import json
import runpy
from collections import Counter
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from hypothesis import given
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.privacy.arms import Arm, ArmDeal
from fedveil.privacy.budget import Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.hash_chain import START, Draft, canonical, linked
from fedveil.privacy.ledger.ledger import BudgetExhausted, Ledger, read_entries, verify
from fedveil.privacy.ledger.ledger_state import LedgerState, read_ledger, run_of

RECOMPUTE = runpy.run_path(str(Path(__file__).parents[2] / "evidence" / "binding" / "recompute_ledger.py"))[
    "main"
]
BUDGET = Budget(Unit.CLIENT, target_epsilon=3.0, target_delta=1e-5)
EVENT = PoissonSampledDpEvent(0.25, GaussianDpEvent(2.0))
OTHER = PoissonSampledDpEvent(0.25, GaussianDpEvent(3.0))
DEAL = ArmDeal("5e" * 16, 4)
KEYS = st.binary(min_size=16, max_size=16).map(bytes.hex)
NAMES = st.sets(st.text(min_size=1, max_size=12), max_size=60)


def release(number: int, arm: Arm | None = None, event: PoissonSampledDpEvent = EVENT) -> Release:
    return Release(Unit.CLIENT, "run", number, "private_sum", {Adversary.MODEL: event}, "system", arm=arm)


def ledger_of(path: Path, releases: list[Release], budget: Budget = BUDGET) -> Path:
    with Ledger.open(path, budget, owner="all", simulated=False, durable=False) as ledger:
        for each in releases:
            ledger.reserve_new(each)
            ledger.commit(each.key)
    return path


def in_turn(rounds: int, rest: int) -> list[Release]:
    """Releases of four arms that take turns, and of all clients after them."""
    arms = [release(number + 1, DEAL.arm(number % 4 + 1)) for number in range(4 * rounds)]
    return [*arms, *(release(4 * rounds + number + 1) for number in range(rest))]


# --- dealing ------------------------------------------------------------------------------------------------------


@given(KEYS, st.integers(2, 32), NAMES, NAMES)
def test_deal_is_a_partition_and_newcomers_move_nobody(key: str, arms: int, there: set, joins: set) -> None:
    deal = ArmDeal(key, arms)
    dealt = {name: [n for n in range(1, arms + 1) if deal.arm(n).holds(name)] for name in there}
    assert all(len(numbers) == 1 for numbers in dealt.values())
    again = {name: [ArmDeal(key, arms).arm_of(name)] for name in there | joins}
    assert {name: again[name] for name in there} == dealt


def test_arms_have_a_hashs_sizes_and_another_key_deals_anew() -> None:
    names = [f"clinic-{number}" for number in range(4000)]
    sizes = Counter(map(DEAL.arm_of, names))
    assert all(abs(size - 1000) < 5 * 28 for size in sizes.values())  # five times the binomial deviation
    other = ArmDeal("5f" * 16, 4)
    assert 850 < sum(DEAL.arm_of(name) == other.arm_of(name) for name in names) < 1150


@pytest.mark.parametrize("key, arms", [("5e" * 15, 4), ("XX" * 16, 4), ("5e" * 16, 1), ("5e" * 16, 33)])
def test_invalid_deal_is_refused(key: str, arms: int) -> None:
    with pytest.raises(Refusal):
        ArmDeal(key, arms)


def test_an_arm_reads_as_it_was_written() -> None:
    assert Arm.from_json(json.loads(json.dumps(DEAL.arm(3).to_json()))) == DEAL.arm(3)
    for broken in ({}, {"deal": "5e" * 16, "arms": 4, "arm": 5}, {"deal": "5e" * 16, "arms": True, "arm": 1}):
        with pytest.raises(Refusal):
            Arm.from_json(broken)


# --- the ledger ---------------------------------------------------------------------------------------------------


def test_four_arms_cost_like_one_run(tmp_path: Path) -> None:
    whole = ledger_of(tmp_path / "whole.ledger", [release(number) for number in range(1, 11)])
    arms = ledger_of(tmp_path / "arms.ledger", in_turn(4, 6))
    one, four = verify(whole), verify(arms)
    assert one.ok and four.ok and one.epsilon is not None and four.epsilon is not None
    assert four.epsilon == pytest.approx(one.epsilon, abs=1e-9)
    assert RECOMPUTE(str(arms))["model"]["epsilon"] == pytest.approx(
        RECOMPUTE(str(whole))["model"]["epsilon"], abs=1e-9
    )
    told = [json.loads(entry.payload).get("arm") for entry in read_entries(arms) if entry.kind == "reserve"]
    assert told[:4] == [DEAL.arm(number).to_json() for number in range(1, 5)] and told[16:] == [None] * 6


def test_the_arm_that_released_most_is_charged_and_deals_add_up(tmp_path: Path) -> None:
    again = ArmDeal("77" * 16, 4)
    releases = [
        *(release(number, DEAL.arm(1)) for number in range(1, 4)),
        *(release(number, DEAL.arm(2)) for number in range(4, 6)),
        release(6, DEAL.arm(2), OTHER),
        release(7, again.arm(1)),
    ]
    path = ledger_of(tmp_path / "a.ledger", releases)
    counts = sorted(read_ledger(path).spent[Adversary.MODEL].values())
    assert counts == [1, 4]  # three of arm 1, one of the other deal; the other event of arm 2
    assert (
        sorted(
            event.count if hasattr(event, "count") else 1
            for event in read_ledger(path).events(Adversary.MODEL)
        )
        == counts
    )
    only = read_ledger(path).events(Adversary.MODEL, lambda each: run_of(each.entry) == "run")
    assert sorted(getattr(event, "count", 1) for event in only) == counts
    found = verify(path)
    assert found.epsilon == pytest.approx(RECOMPUTE(str(path))["model"]["epsilon"], rel=1e-3)


def test_void_release_lowers_the_charge_of_its_arm(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "a.ledger", BUDGET, owner="all", simulated=False, durable=False) as ledger:
        first, second = release(1, DEAL.arm(1)), release(2, DEAL.arm(1))
        ledger.reserve_new(first)
        ledger.reserve_new(second)
        two = ledger.epsilon()
        ledger.void(second.key, "nothing was sent")
        assert 0 < ledger.epsilon() < two
        ledger.void(first.key, "nothing was sent")
        assert ledger.epsilon() == 0


def test_releases_of_one_arm_are_free_for_the_others_and_no_more(tmp_path: Path) -> None:
    two = verify(ledger_of(tmp_path / "one", in_turn(0, 2))).epsilon or 0
    tight = Budget(Unit.CLIENT, 1.01 * two, 1e-5)
    with Ledger.open(tmp_path / "a.ledger", tight, owner="all", simulated=False, durable=False) as ledger:
        for number in range(1, 9):
            ledger.reserve_new(release(number, DEAL.arm((number - 1) % 4 + 1)))
        with pytest.raises(BudgetExhausted):
            ledger.reserve_new(release(9, DEAL.arm(1)))
        with pytest.raises(BudgetExhausted):
            ledger.reserve_new(release(9))
        with pytest.raises(Refusal, match="another arm"):
            ledger.reserve(release(1, DEAL.arm(2)))


def test_a_deal_with_another_number_of_arms_makes_no_sense() -> None:
    identity = {"version": 1, "unit": "client", "adjacency": "zero-out", "owner": "all", "simulated": False}
    book, head = LedgerState(), START
    for number, arms in enumerate((0, 4, 3)):
        event = {"kind": "Gaussian", "noise_multiplier": 2.0}
        arm = {"deal": "5e" * 16, "arms": arms, "arm": 1}
        said = {
            "events": {"model": event},
            "budget": {"target_epsilon": 3.0, "target_delta": 1e-5},
            "arm": arm,
        }
        draft = Draft("reserve", canonical(["run", number, "x"]), canonical(said))
        entry = linked(draft if arms else Draft("open", "", canonical(identity)), head)
        head = entry.head
        if arms == 3:
            with pytest.raises(Refusal, match="a deal of 3 arms that has 4"):
                book.take(entry, "here")
        else:
            book.take(entry, "here")
