"""Cohorts by arrival behind the grid: whoever comes first, no client is in two sums too soon, whatever is restarted."""

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import ConfigRecord, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.messages.flower_adapter import claim_identity, name_message, name_sender
from fedveil.messages.grids import AskingGrid
from fedveil.messages.wire import may_be_late, memory_arrays, reply_with, sum_spec_of
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.mechanisms.correlated_noise import Correlation
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.plan import Plan
from fedveil.server.accounts import MECHANISM
from fedveil.server.noise_rows import ARRIVALS
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.server.round_terms import SumPrivacy
from fedveil.strategies.cohorts import First, MinSeparation
from fedveil.strategies.registry import make_strategy

CLIENTS, ROUNDS, SIZE, SEPARATION = 10, 8, 2, 3
COHORT = First(SIZE, SEPARATION, max_participations=3)
EVERYBODY = replace(COHORT, over_selection=5)
ZEROS = {"w": np.zeros(4, np.float32)}
BUDGET = Budget(Unit.CLIENT, 1e9, 1e-5)


class Hurried(AskingGrid):
    """Clients that answer in the order of `speed`, the first numbers first, and none of those that are `lost`."""

    def __init__(self) -> None:
        self._run = claim_identity(1)
        self.speed, self.lost = list(range(CLIENTS)), set[int]()
        self.asked: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        return range(CLIENTS)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        requests = {each.metadata.dst_node_id: each for each in messages}
        self.asked = sorted(requests)
        for node in sorted(requests, key=self.speed.index):
            if node not in self.lost:
                name_message(requests[node], str(node))
                spec = sum_spec_of(requests[node].content)
                vector = np.zeros(4 + spec.segment_size, np.int32)
                yield name_sender(reply_with(vector, spec, requests[node]), node)


def plan_of(cohort: First = COHORT, bands: int = 1) -> Plan:
    mechanism = Correlation(ROUNDS, SEPARATION, 3, bands)
    return Plan(Unit.CLIENT, Adjacency.ZERO_OUT, cohort, 1.0, ROUNDS, 1.0, mechanism=mechanism)


def grid_of(ledger: Ledger, inner: Hurried, cohort: First = COHORT) -> PrivateGrid:
    privacy = SumPrivacy(plan_of(cohort), ledger, noise_key=bytes(32))
    participants = Participants(inner, cohort, CLIENTS)
    return PrivateGrid(participants, privacy=privacy, randomness=Randomness(None), run="run")


def released(grid: PrivateGrid, number: int) -> list[Message]:
    grid.reserve(number)
    strategy = make_strategy("fedavg", {})
    messages = strategy.configure_train(number, memory_arrays(ZEROS), ConfigRecord(), grid)
    return list(grid.send_and_receive(messages))


def arrivals(ledger: Ledger) -> list[list[int]]:
    """Return the cohort of each row, by the notes on the ledger."""
    return [ledger.note_of(("run", row, ARRIVALS)).get("cohort", []) for row in range(1, ROUNDS + 1)]


def kept(cohorts: list[list[int]]) -> None:
    for number, cohort in enumerate(cohorts):
        assert len(set(cohort)) == len(cohort) <= SIZE
        for earlier in cohorts[max(0, number - SEPARATION + 1) : number]:
            assert not set(cohort) & set(earlier)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_client_comes_back_too_soon_in_any_order(data: st.DataObject) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Ledger.open(Path(folder) / "l", BUDGET, owner="t", simulated=False) as ledger,
    ):
        inner, finished = Hurried(), 0
        grid = grid_of(ledger, inner)
        while len(ledger.cohorts("run", MECHANISM)) < ROUNDS:
            inner.speed = data.draw(st.permutations(range(CLIENTS)))
            inner.lost = data.draw(st.sets(st.integers(0, CLIENTS - 1)))
            assert released(grid, finished + 1)
            row = len(ledger.cohorts("run", MECHANISM))
            came = [node for node in inner.speed if node in inner.asked and node not in inner.lost]
            assert arrivals(ledger)[row - 1] == sorted(came[:SIZE])
            if data.draw(st.booleans()):  # the server is killed, perhaps before the checkpoint of this round
                grid = grid_of(ledger, inner)
                finished += data.draw(st.integers(0, 1))
                grid.skip_to(finished)
            else:
                finished += 1
        kept(arrivals(ledger))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger", BUDGET, owner="test", simulated=False) as opened:
        yield opened


def test_clients_that_were_invited_in_vain_may_come_next(ledger: Ledger) -> None:
    inner = Hurried()
    grid = grid_of(ledger, inner, EVERYBODY)
    released(grid, 1)
    assert inner.asked == list(range(10)) and arrivals(ledger)[0] == [0, 1]
    released(grid, 2)
    assert inner.asked == list(range(2, 10)) and arrivals(ledger)[1] == [2, 3]
    assert [(each.replies, each.dropped) for each in grid.rounds.newest] == [
        (2, {"not needed": 8}),
        (2, {"not needed": 6}),
    ]


def test_a_cohort_is_on_the_ledger_before_its_sum_is_noised(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = grid_of(ledger, Hurried())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grid.account, "noised", killed)
    with pytest.raises(KeyboardInterrupt):
        released(grid, 1)
    (first, *_) = arrivals(ledger)
    assert len(first) == SIZE
    resumed = grid_of(ledger, inner := Hurried(), EVERYBODY)
    resumed.skip_to(0)
    released(resumed, 1)
    assert sorted([*first, *inner.asked]) == list(range(CLIENTS))
    assert len(ledger.cohorts("run", MECHANISM)) == 2


def test_a_client_that_was_not_invited_again_releases_nothing(ledger: Ledger) -> None:
    grid = grid_of(ledger, Hurried())
    released(grid, 1)
    (first, *_) = arrivals(ledger)
    grid.reserve(2)
    with pytest.raises(AssertionError, match="again before their turn"):
        grid.account.arrive(2, first)
    assert arrivals(ledger)[1] == []


def test_a_client_is_once_in_a_sum(ledger: Ledger) -> None:
    grid = grid_of(ledger, Hurried())
    grid.reserve(1)
    with pytest.raises(AssertionError, match="a client is in it once"):
        grid.account.arrive(1, [4, 4])
    assert arrivals(ledger)[0] == []


@pytest.mark.parametrize("bands", [1, 3])
def test_the_run_costs_one_gaussian_on_the_most_sensitive_rounds(ledger: Ledger, bands: int) -> None:
    plan = plan_of(bands=bands)
    rows = np.array([*plan.mechanism.coefficients, *[0] * ROUNDS][:ROUNDS]) / 256  # pyright: ignore
    matrix = np.array([[rows[i - j] if i >= j else 0 for j in range(ROUNDS)] for i in range(ROUNDS)])
    patterns = [
        each
        for count in (1, 2, 3)
        for each in itertools.combinations(range(ROUNDS), count)
        if all(b - a >= SEPARATION for a, b in itertools.pairwise(each))
    ]
    worst = max(np.linalg.norm(matrix[:, pattern].sum(axis=1)) for pattern in patterns)
    assert plan.noise_std == pytest.approx(worst)
    oracle = PLDAccountant().compose(GaussianDpEvent(float(plan.noise_std / worst)))
    grid = grid_of(ledger, Hurried())
    for number in (1, 2, 3):
        released(grid, number)
        assert ledger.epsilon(1e-5) == pytest.approx(oracle.get_epsilon(1e-5), rel=1e-3)


def test_a_replacement_may_arrive_in_other_rounds() -> None:
    mechanism = Correlation(ROUNDS, SEPARATION, 3)
    for cohort, adjacency in ((COHORT, "zero-out"), (MinSeparation(2, 3, 3), "replace-one")):
        Plan(Unit.CLIENT, Adjacency(adjacency), cohort, 1.0, ROUNDS, 1.0, mechanism=mechanism)
    with pytest.raises(Refusal, match="adjacency='replace-one': a client's replacement may arrive"):
        Plan(Unit.CLIENT, Adjacency("replace-one"), COHORT, 1.0, ROUNDS, 1.0, mechanism=mechanism)


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_instruction_says_whether_its_answer_may_be_late(ledger: Ledger, staleness: int) -> None:
    inner, late = Hurried(), list[bool]()
    original = inner.send_and_receive

    def looking(messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        requests = list(messages)
        late.extend(may_be_late(each.content) for each in requests)
        yield from original(requests)

    inner.send_and_receive = looking
    released(grid_of(ledger, inner, First(SIZE, SEPARATION, 3, staleness=staleness)), 1)
    assert set(late) == {bool(staleness)}
