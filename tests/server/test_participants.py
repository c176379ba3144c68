"""Who is drawn for a round and who is asked: canaries change nothing for the real clients."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.audit.canary_updates import add_canaries, canary_updates
from fedveil.client.private_update import private_update
from fedveil.messages.client_settings import CanaryClients
from fedveil.messages.wire import memory_arrays, view
from fedveil.privacy import Adjacency, Budget, Ledger, Plan, Unit
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.server.round_terms import ALL_ANSWERS, SumPrivacy
from fedveil.simulations.in_process import InProcessGrid
from fedveil.strategies.cohorts import All, Cohort, Fixed, MinSeparation, OverSelected, Poisson, canary_cohort
from fedveil.strategies.registry import make_strategy

REAL = list(range(2, 42))


class Reached:
    """A grid that reaches these nodes."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> Sequence[int]:
        return self.nodes


def participants(cohort: Cohort, canaries: int, here: bool) -> Participants:
    nodes: Any = Reached(REAL if here else [*REAL, *range(42, 42 + canaries)])
    answering = (lambda *_: None) if here else None
    return Participants(nodes, cohort, len(REAL), canaries=canaries, add_canaries=answering)


def draws(cohort: Cohort, canaries: int, here: bool = True) -> tuple[Participants, list[list[int]]]:
    made = participants(cohort, canaries, here)
    return made, [made.draw(Randomness(3).stream("cohort", number)) for number in range(200)]


@pytest.mark.parametrize("here", [True, False], ids=["in this process", "on the grid"])
@pytest.mark.parametrize(
    "cohort", [Poisson(0.3), Fixed(8), All(), OverSelected(Fixed(12), Fixed(8))], ids=lambda each: each.name
)
def test_real_clients_are_drawn_as_without_canaries(cohort: Cohort, here: bool) -> None:
    _, plain = draws(cohort, 0)
    made, drawn = draws(cohort, 80, here)
    assert [made.real(each) for each in drawn] == plain
    dummies = [made.dummies(each) for each in drawn]
    assert all(each == sorted(set(each)) and set(each) <= set(range(80)) for each in dummies)
    rates = [np.mean([len(each) / of for each in cohorts]) for cohorts, of in ((plain, 40), (dummies, 80))]
    assert rates[1] == pytest.approx(rates[0], abs=0.02)
    assert made.expected == cohort.expected_size(40)
    asked = [made.over_grid(each) for each in drawn]
    assert asked == (plain if here else drawn)


def test_canaries_keep_their_identity_when_clients_come_and_go() -> None:
    made = participants(Fixed(8), 80, here=True)
    before = made.draw(Randomness(1).stream("cohort", 1))
    made.renew([*REAL, 10**9], ALL_ANSWERS)
    made.renew(REAL[:16], ALL_ANSWERS)
    after = made.draw(Randomness(1).stream("cohort", 1))
    assert len(made.dummies(before)) == 16 and len(made.dummies(after)) == 40  # one of five, then one of two
    assert set(made.real(after)) <= set(REAL[:16]) and made.first_nodes(3) == REAL[:3]


def test_canaries_stay_though_clients_changed_before_the_first_draw() -> None:
    made = participants(Fixed(8), 80, here=True)
    made.renew(REAL[:20], ALL_ANSWERS)
    assert (
        len(made.dummies(made.draw(Randomness(1).stream("cohort", 1)))) == 32
    )  # two of five, as of the clients


def still_app() -> ClientApp:
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        arrays, metrics = message.content.array_records["arrays"], MetricRecord({"num-examples": 1})
        return Message(RecordDict({"a": arrays, "m": metrics}), reply_to=message)

    return app


def test_answering_canaries_are_weighed_and_not_in_the_model(tmp_path: Path) -> None:
    told = CanaryClients(5, 30, "07" * 32, 200, 10.0, False, {})
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), 1.0, 10, 0.1)
    start, strategy = memory_arrays({"w": np.full(200, 0.3, np.float32)}), make_strategy("fedavg", {})
    models, weighed = list[Any](), list[Any]()
    for count in (0, 30):
        budget = Budget(Unit.CLIENT, 1e9, 1e-5)
        with Ledger.open(tmp_path / f"{count}", budget, owner="test", simulated=True) as ledger:
            clients: Any = InProcessGrid(still_app(), 5, {})
            everybody = Participants(
                clients, All(), 5, canaries=count, add_canaries=partial(add_canaries, told) if count else None
            )
            grid = PrivateGrid(
                everybody, privacy=SumPrivacy(plan, ledger), randomness=Randomness(4), run="run"
            )
            messages = strategy.configure_train(1, start, ConfigRecord(), grid)
            arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
            assert arrays is not None and grid.released is not None
            assert (grid.rounds.newest[0].invited, grid.rounds.newest[0].replies) == (5, 5)
            models.append(view(arrays["w"]))
            weighed.append(np.concatenate(grid.released.layers))
    assert np.array_equal(*models)
    sent = canary_updates(told, range(5, 35), 200).sum(axis=0) / told.norm
    assert weighed[1] - weighed[0] == pytest.approx(sent, abs=1e-3)


def test_a_rule_with_a_size_is_scaled_and_always_draws_one() -> None:
    assert (
        canary_cohort(Fixed(10), 100, 30)
        == Fixed(3)
        == canary_cohort(OverSelected(Fixed(10), Fixed(5)), 100, 30)
    )
    assert canary_cohort(Fixed(1), 100, 30) == Fixed(1)
    assert canary_cohort(OverSelected(Fixed(10), Fixed(5)), 8, 30) == Fixed(30)
    assert canary_cohort(MinSeparation(10, 4, 2), 100, 50) == MinSeparation(5, 4, 2)
    assert canary_cohort(OverSelected(Poisson(0.5), Poisson(0.2)), 100, 30) == Poisson(0.5)
