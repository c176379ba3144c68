"""How many answers a round goes by: quorum, enough, over-selection, and when a run is given up."""

import runpy
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.client.private_update import private_update
from fedveil.configs.settings import settings_from_overrides
from fedveil.messages.wire import memory_arrays
from fedveil.populations.deployed import Deployed
from fedveil.privacy import Adjacency, Budget, Ledger, Plan, Unit
from fedveil.privacy.arms import Arm, ArmDeal
from fedveil.privacy.budget import Adversary
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.secagg.roster import Roster
from fedveil.run.build import build
from fedveil.server.accounts import Unprotected
from fedveil.server.checkpoint import State
from fedveil.server.culprit_search import SPLIT_AFTER, Search
from fedveil.server.masked_sums import MaskedSums
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.server.round_terms import Answers, SumPrivacy
from fedveil.server.rounds import Loop, Pace, run_rounds
from fedveil.server.run_status import Status
from fedveil.server.secure_sum import SecureSums
from fedveil.simulations.in_process import FIRST_NODE, InProcessGrid
from fedveil.strategies.cohorts import (
    All,
    Cohort,
    Fixed,
    OverSelected,
    Poisson,
    invited_size,
    likely_participations,
    over_select,
)
from fedveil.strategies.registry import make_strategy

CLIENTS = 10
NOISE = 1.0
DISTRIBUTED = ("privacy=client_distributed", "privacy.allow_large_delta=true")
MASKED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "masked_clients.py"))


def shifting(down: set[int] | None = None) -> ClientApp:
    """Clients that add 1 to every coordinate, but for those that are down."""
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        if int(str(context.node_config["partition-id"])) in (down or ()):
            raise RuntimeError("down")
        moved = {name: array.numpy() + 1 for name, array in message.content.array_records["arrays"].items()}
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"a": memory_arrays(moved), "m": metrics}), reply_to=message)

    return app


class AskedOnly(InProcessGrid):
    """The engine without sums of its own, as a network is; it counts whom it asked."""

    asked: int = 0
    sum_replies = None  # pyright: ignore[reportAssignmentType]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        for reply in super().send_and_receive(messages, timeout=timeout):
            self.asked += 1
            yield reply


@pytest.fixture
def ledger(tmp_path: Path) -> Iterable[Ledger]:
    with Ledger.open(
        tmp_path / "ledger", Budget(Unit.CLIENT, 1e9, 1e-5), owner="test", simulated=True
    ) as opened:
        yield opened


def private(grid: InProcessGrid, cohort: Cohort, ledger: Ledger | None, answers: Answers) -> PrivateGrid:
    privacy = None
    if ledger is not None:
        privacy = SumPrivacy(Plan(Unit.CLIENT, Adjacency.ZERO_OUT, cohort, 1.0, 10, NOISE), ledger)
    participants = Participants(grid, cohort, CLIENTS, answers)
    return PrivateGrid(participants, privacy=privacy, randomness=Randomness(4), run="run")


def rounds(grid: PrivateGrid, number: int, pace: Pace | None = None) -> Any:
    start = State(0, {"w": np.zeros(4, np.float32)}, {})
    loop = Loop(
        [make_strategy("fedavg", {})], number, lambda *_: {}, lambda *_: None, lambda _: {}, pace or Pace()
    )
    return run_rounds(grid, loop, start)


@pytest.mark.parametrize(("down", "abandoned"), [(5, False), (6, True)])
def test_below_the_quorum_nothing_is_released_and_reservations_stay(
    down: int, abandoned: bool, ledger: Ledger
) -> None:
    grid = private(AskedOnly(shifting(set(range(down))), CLIENTS, {}), All(), ledger, Answers(quorum=5))
    ending = rounds(grid, 2)
    assert [done.abandoned for done in grid.rounds.newest] == [abandoned] * 2
    assert bool(np.any(ending.state.arrays["w"])) is not abandoned
    assert [done.replies for done in grid.rounds.newest] == [CLIENTS - down] * 2
    assert grid.rounds.newest[0].dropped == {"failed": down}
    assert ledger.events(Adversary.MODEL) == [SelfComposedDpEvent(GaussianDpEvent(NOISE), 2)]
    expected = "reserved" if abandoned else "committed"
    assert str(ledger.state(("run", 1, "private_sum"))) == expected


def test_rounds_survive_one_failure_and_the_run_ends_after_many() -> None:
    inner = AskedOnly(shifting(set(range(CLIENTS))), CLIENTS, {})
    grid = private(inner, All(), None, Answers(quorum=1))
    ending = rounds(grid, 9, Pace(patience=3))
    assert (ending.status, ending.state.round) == (Status.FAILED, 3)
    assert ending.reason == "3 rounds in a row were abandoned (failed)"
    back = private(AskedOnly(shifting(), CLIENTS, {}), All(), None, Answers(quorum=1))
    assert rounds(back, 9, Pace(patience=3)).status is Status.COMPLETED


def test_an_exchange_ends_when_enough_have_answered() -> None:
    inner = AskedOnly(shifting({0, 1}), CLIENTS, {})
    grid = private(inner, All(), None, Answers(enough=4))
    rounds(grid, 1)
    assert inner.asked == 6
    assert (
        grid.rounds.newest[0].dropped == {"failed": 2, "not needed": 4} and grid.rounds.newest[0].replies == 4
    )


def test_encrypted_exchange_ends_with_enough_answers_to_open_the_sum() -> None:
    for enough, survivors in ((1, 6), (7, 7), (None, 8)):
        grid = MASKED["Clients"]()
        nodes = list(range(FIRST_NODE, FIRST_NODE + 8))
        opened = SecureSums(grid, MASKED["masking"]()).sum(nodes, MASKED["wanted"](), None, enough=enough)
        assert (opened.survivors, opened.attempts) == (survivors, 1)
        assert opened.dropped == ({} if survivors == 8 else {"not needed": 8 - survivors})


@pytest.mark.parametrize("arm", [None, ArmDeal(f"{5:032x}", 2).arm(1)], ids=["parts", "arm"])
def test_part_or_arm_waits_for_its_share_of_sufficient_answers(arm: Arm | None) -> None:
    """Else one member that says nothing holds each of its sums up to the deadline."""
    participants = Participants(MASKED["Clients"](clients=16), All(), 16, Answers(enough=12), arm=arm)
    sums = MaskedSums(participants, Unprotected(()), MASKED["masking"](16), Randomness(1))
    sums._participants.search = Search() if arm else Search(untrue=SPLIT_AFTER)
    drawn = participants.draw(Randomness(1).stream("cohort", 1), arm=arm)
    done, _ = sums.sum(drawn, MASKED["wanted"](), None, lambda: ())
    assert (len(drawn), done.replies, done.dropped["not needed"]) == ((8, 6, 2) if arm else (16, 12, 4))


def test_no_round_begins_before_it_may() -> None:
    grid = private(AskedOnly(shifting(), CLIENTS, {}), All(), None, Answers())
    told = iter([None, "only 1 client is connected"])
    ending = rounds(grid, 5, Pace(ready=lambda stop: next(told)))
    assert (ending.status, ending.state.round) == (Status.FAILED, 1)
    assert ending.reason == "only 1 client is connected"


def test_a_wait_that_is_interrupted_ends_the_run_in_order(ledger: Ledger) -> None:
    grid = private(AskedOnly(shifting(), CLIENTS, {}), All(), ledger, Answers())

    def wait(stop: threading.Event) -> str | None:
        stop.set()
        return "nobody came"

    assert rounds(grid, 5, Pace(ready=wait)).status is Status.INTERRUPTED
    assert ledger.events(Adversary.MODEL) == []


# --- over-selection ---------------------------------------------------------------------------------------------


def test_the_invited_are_accounted_and_the_planned_are_divided_by(ledger: Ledger) -> None:
    cohort = over_select(Poisson(0.25), 2.0, CLIENTS)
    assert cohort == OverSelected(Poisson(0.5), Poisson(0.25))
    assert cohort.expected_size(100) == 25
    assert cohort.event(GaussianDpEvent(2.0)) == PoissonSampledDpEvent(0.5, GaussianDpEvent(2.0))
    assert likely_participations(cohort, 100, 50) == likely_participations(Poisson(0.5), 100, 50)
    everybody = OverSelected(All(), Fixed(5))
    grid = private(AskedOnly(shifting(), CLIENTS, {}), everybody, ledger, Answers())
    grid._randomness = Randomness(1)
    assert rounds(grid, 1).state.arrays["w"].mean() > 0.5  # ten halves of ones, divided by five, and noise
    assert grid.rounds.newest[0].invited == CLIENTS
    assert ledger.events(Adversary.MODEL) == [GaussianDpEvent(NOISE)]


@pytest.mark.parametrize("changed", [{"quorum": 0.1}, {"enough": 0.9}])
def test_a_draw_that_answers_give_away_claims_nothing(changed: dict[str, Any]) -> None:
    population = Deployed("run-1", "", Roster(1, ()), b"", Path(), **changed)
    seen = population.visible(Poisson(0.4))
    assert isinstance(seen, Poisson)
    for cohort in (seen, over_select(seen, 2.0, CLIENTS)):
        assert cohort.event(GaussianDpEvent(2.0)) == GaussianDpEvent(2.0)
        assert cohort.expected_size(100) == pytest.approx(40)
    assert Deployed("run-1", "", Roster(1, ()), b"", Path()).visible(Poisson(0.4)) == Poisson(0.4)


def test_no_more_are_invited_than_there_are() -> None:
    assert over_select(Fixed(5), 3.0, CLIENTS) == OverSelected(Fixed(CLIENTS), Fixed(5))
    assert invited_size(over_select(Poisson(0.4), 3.0, CLIENTS), CLIENTS) == CLIENTS


def test_all_are_invited_where_clients_have_left() -> None:
    cohort, left = over_select(Fixed(5), 1.6, CLIENTS), range(6)
    assert cohort.draw(left, Randomness(1).stream("cohort", 1)) == list(left)
    assert invited_size(cohort, 6) == 6 and cohort.expected_size(6) == 5


@pytest.mark.parametrize(
    ("overrides", "invited", "planned"),
    [
        ((), 10, 10),
        (("cohort.over_selection=2",), 20, 10),
        (("cohort.over_selection=2", "cohort=fixed", "cohort.size=8"), 16, 8),
        ((*DISTRIBUTED, "cohort=poisson"), 13, 10),
        ((*DISTRIBUTED, "cohort=poisson", "cohort.over_selection=1"), 10, 10),
        (DISTRIBUTED, 40, 40),
    ],
)
def test_more_are_invited_on_request_or_without_privacy_cost(
    overrides: tuple[str, ...], invited: float, planned: float
) -> None:
    built = build(settings_from_overrides(["task=digits", "task.num_clients=40", *overrides]))
    assert (invited_size(built.cohort, 40), built.cohort.expected_size(40)) == (invited, planned)
