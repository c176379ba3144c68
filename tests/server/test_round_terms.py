"""What rounds choose from earlier ones, behind the private sum: the clip that was applied sets the noise."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from shared.runs import reservations

from fedveil.client.private_update import private_update
from fedveil.messages.wire import memory_arrays, view
from fedveil.privacy import Adversary, Budget, BudgetExhausted, Ledger, Plan, Unit
from fedveil.privacy.adaptation import LATEST, SAVING, Adaptation, AdaptiveNoise
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.ledger.ledger import verify
from fedveil.privacy.mechanisms.adaptive_clipping import AdaptiveClipping
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import Segment
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.server.round_terms import NEWEST, Results, Round, SumPrivacy, SumTerms
from fedveil.simulations.in_process import InProcessGrid
from fedveil.strategies.cohorts import All
from fedveil.strategies.registry import make_strategy

CLIENTS, COORDINATES, NOISE = 20, 20_000, 1.0
FAST = AdaptiveClipping(learning_rate=1.0)  # a norm that moves by up to e^0.5 in a round
LOSS = Segment("loss", 5.0)


ROUNDS = st.lists(
    st.builds(
        Round,
        st.just(0),
        st.just(3),
        st.integers(0, 2),
        st.dictionaries(st.sampled_from(["late", "failed"]), st.integers(1, 3)),
        abandoned=st.booleans(),
        untrue=st.booleans(),
    ),
    max_size=2 * NEWEST,
)


@given(ROUNDS)
def test_results_say_what_all_rounds_say(drawn: list[Round]) -> None:
    rounds = [replace(each, number=number) for number, each in enumerate(drawn, 1)]
    results = Results()
    for each in rounds:
        results.add(each)
    assert (results.count, [*results.newest]) == (len(rounds), rounds[-NEWEST:])
    assert results.answered == any(each.replies for each in rounds)
    assert results.untrue == any(each.untrue for each in rounds)
    assert results.reasons == {reason for each in rounds for reason in each.dropped}
    for streak, belongs in (
        (results.abandoned, lambda each: each.abandoned),
        (results.silent, lambda each: not each.replies),
    ):
        last = [*takewhile(belongs, reversed(rounds))]
        assert streak.count == len(last)
        assert streak.reasons == {reason for each in last for reason in each.dropped}
        assert not last or streak.first == last[-1].number


def app_of(length: Callable[[int], float]) -> ClientApp:
    """Clients whose update has this L2 norm in this round, all of it in the first coordinate."""
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        moved = message.content.array_records["arrays"]["w"].numpy()
        moved[0] += length(int(str(message.content.config_records["fedveil.sum"]["round"])))
        metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
        return Message(RecordDict({"a": memory_arrays({"w": moved}), "m": metrics}), reply_to=message)

    return app


@pytest.fixture
def ledger(tmp_path: Path) -> Iterable[Ledger]:
    with Ledger.open(
        tmp_path / "ledger", Budget(Unit.CLIENT, 12.0, 1e-5), owner="t", simulated=True
    ) as opened:
        yield opened


def grid_of(privacy: SumPrivacy, length: Callable[[int], float]) -> PrivateGrid:
    inner = InProcessGrid(app_of(length), CLIENTS, {})
    everybody = Participants(inner, All(), CLIENTS)
    return PrivateGrid(
        everybody, privacy=privacy, terms=SumTerms((LOSS,)), randomness=Randomness(4), run="run"
    )


def released(grid: PrivateGrid, number: int) -> np.ndarray:
    """The sum that round `number` releases, in the units of the updates."""
    strategy, start = make_strategy("fedavg", {}), memory_arrays({"w": np.zeros(COORDINATES, np.float32)})
    messages = strategy.configure_train(number, start, ConfigRecord(), grid)
    arrays, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
    assert arrays is not None
    return view(arrays["w"]) * CLIENTS


def plan_of(clip: float = 1.0, noise: float | None = NOISE) -> Plan:
    return Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), clip, 4, noise)


@pytest.mark.parametrize("length", [0.0, 1e6], ids=["norm falls", "norm rises"])
def test_noise_and_clip_are_those_of_the_round_and_not_of_the_next(ledger: Ledger, length: float) -> None:
    grid = grid_of(SumPrivacy(plan_of(), ledger, 0.02, Adaptation(FAST)), lambda _: length)
    for number in (1, 2, 3):
        noised = released(grid, number)
        choices = grid.rounds.newest[-1].choices
        assert choices is not None
        assert math.isclose(noised[1:].std(), NOISE * choices.clipping_norm, rel_tol=0.03)
        if length:
            share = 0.02 + FAST.bit(NOISE, CLIENTS).share  # type: ignore[operator]
            clipped = CLIENTS * choices.clipping_norm * math.sqrt(1 - share)
            assert abs(noised[0] - clipped) < 5 * NOISE * choices.clipping_norm
    norms = [done.choices.clipping_norm for done in grid.rounds.newest if done.choices]
    fell = [after < before for before, after in pairwise(norms)]
    assert fell == [not length] * 2
    assert len(set(norms)) == 3


def test_a_moving_clip_leaves_the_event_and_the_accountant_alone(ledger: Ledger) -> None:
    plan = plan_of()
    grid = grid_of(SumPrivacy(plan, ledger, 0.02, Adaptation(FAST)), lambda _: 0.3)
    for number in (1, 2, 3):
        released(grid, number)
    assert ledger.filter_order is None
    assert ledger.epsilon() == plan.epsilon(1e-5, 3)


def test_choices_of_an_earlier_process_go_on(ledger: Ledger) -> None:
    privacy = SumPrivacy(plan_of(), ledger, 0.02, Adaptation(FAST))
    whole, first, second = (grid_of(privacy, lambda _: 0.3) for _ in range(3))
    wanted = [released(whole, number) for number in (1, 2, 3)]
    released(first, 1)
    second.skip_to(1, first.choices)
    assert [released(second, number).tobytes() for number in (2, 3)] == [w.tobytes() for w in wanted[1:]]


def test_noise_from_losses_passes_the_filter_to_the_last_round(ledger: Ledger, tmp_path: Path) -> None:
    budget = Budget(Unit.CLIENT, 12.0, 1e-5)
    plan = plan_of(noise=None).calibrate_for_filter(budget)
    noise = AdaptiveNoise(plan, budget, "loss")
    grid = grid_of(SumPrivacy(plan, ledger, 0.02, Adaptation(FAST, noise)), lambda _: 0.3)
    sums = [released(grid, number) for number in (1, 2, 3, 4)]
    multipliers = [done.choices.noise_multiplier for done in grid.rounds.newest if done.choices]
    saving = int(LATEST * 4)
    assert multipliers[:saving] == [SAVING * plan.noise_multiplier] * saving  # type: ignore[operator]
    assert multipliers[-1] < plan.noise_multiplier  # type: ignore[operator]
    for done, noised in zip(grid.rounds.newest, sums, strict=True):
        assert done.choices is not None
        std = done.choices.noise_multiplier * done.choices.clipping_norm
        assert math.isclose(noised[1:].std(), std, rel_tol=0.03)
    assert ledger.filter_order == plan.filter_order
    assert 11.9 < ledger.epsilon() <= 12.0
    with pytest.raises(BudgetExhausted):
        grid.reserve(5)
    reserved = reservations(tmp_path / "ledger")
    assert {entry["filter_order"] for entry in reserved} == {plan.filter_order}
    assert len(ledger.events(Adversary.MODEL)) == 2
    ledger.close()
    assert verify(tmp_path / "ledger").ok
