"""Correlated noise behind the grid: separation is kept, rows are used once, and a crash changes neither."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.base.refusal import Refusal
from fedveil.client.private_update import private_update
from fedveil.messages.wire import memory_arrays, view
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Unit
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.mechanisms.correlated_noise import Correlation
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.plan import Plan
from fedveil.server import noise_key
from fedveil.server.accounts import MECHANISM
from fedveil.server.noise_rows import RowsExhausted
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.server.round_terms import ALL_ANSWERS, SumPrivacy
from fedveil.simulations.in_process import InProcessGrid
from fedveil.strategies.cohorts import Fixed, MinSeparation
from fedveil.strategies.registry import make_strategy

CLIENTS, ROUNDS, SIZE = 12, 8, 3
COHORT = MinSeparation(SIZE, separation=4, max_participations=2)
CORRELATION = Correlation(ROUNDS, 4, 2, bands=4)
ZEROS = {"w": np.zeros(50, np.float32)}
KEY = bytes(range(32))


def still_app() -> ClientApp:
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        del context
        arrays = message.content.array_records["arrays"]
        return Message(RecordDict({"a": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


@pytest.fixture
def open_ledger(tmp_path: Path) -> Callable[[bool], Ledger]:
    def open_(simulated: bool) -> Ledger:
        budget = Budget(Unit.CLIENT, 1e9, 1e-5)
        return Ledger.open(tmp_path / "ledger", budget, owner="test", simulated=simulated)

    return open_


def grid_of(ledger: Ledger, seed: int | None, key: bytes | None = KEY) -> PrivateGrid:
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, COHORT, 1.0, ROUNDS, 1.0, mechanism=CORRELATION)
    privacy = SumPrivacy(plan, ledger, noise_key=key)
    inner = InProcessGrid(still_app(), CLIENTS, {})
    return PrivateGrid(
        Participants(inner, COHORT, CLIENTS), privacy=privacy, randomness=Randomness(seed), run="run"
    )


def noise_of(grid: PrivateGrid, number: int) -> np.ndarray:
    """Return what round `number` released: clients that stand still leave nothing but the noise."""
    strategy = make_strategy("fedavg", {})
    grid.reserve(number)
    messages = strategy.configure_train(number, memory_arrays(ZEROS), ConfigRecord(), grid)
    arrays, _ = strategy.aggregate_train(number, grid.send_and_receive(messages))
    assert arrays is not None
    return view(arrays["w"])


def kept(cohorts: list[list[int]]) -> None:
    counts = Counter(client for cohort in cohorts for client in cohort)
    assert max(counts.values()) <= COHORT.max_participations
    for number, cohort in enumerate(cohorts):
        for earlier in cohorts[max(0, number - COHORT.separation + 1) : number]:
            assert not set(cohort) & set(earlier)


@pytest.mark.parametrize("seed", [None, 4])
def test_whole_run_is_one_release_and_the_ledger_knows_its_clients(
    open_ledger: Any, seed: int | None
) -> None:
    with open_ledger(seed is not None) as ledger:
        grid = grid_of(ledger, seed)
        noise_of(grid, 1)
        after_one, drawn = ledger.epsilon(), [grid.current_cohort]
        for number in range(2, ROUNDS + 1):
            noise_of(grid, number)
            drawn.append(grid.current_cohort)
        assert ledger.cohorts("run", MECHANISM) == drawn
        assert {len(cohort) for cohort in drawn} == {SIZE}
        kept(drawn)
        assert ledger.epsilon() == after_one > 0
        event = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, Fixed(3), 1.0, 1, 1.0).event()
        assert [each for each in ledger.events(Adversary.MODEL) if each == event] == [event]


def test_a_resumed_simulation_repeats_the_row_bit_for_bit(open_ledger: Any) -> None:
    with open_ledger(True) as ledger:
        grid = grid_of(ledger, 4)
        noises = [noise_of(grid, number) for number in range(1, ROUNDS + 1)]
        resumed, head = grid_of(ledger, 4), ledger.head.seq
        resumed.skip_to(5)
        again = [noise_of(resumed, number) for number in range(6, ROUNDS + 1)]
        assert np.array_equal(again, noises[5:])
        assert ledger.head.seq <= head + 1  # a note that was held back, no reservation
    assert not np.array_equal(noises[0], noises[1])


def test_on_real_data_a_row_that_may_have_left_is_not_used_again(open_ledger: Any) -> None:
    with open_ledger(False) as ledger:
        grid = grid_of(ledger, None)
        noises = [noise_of(grid, number) for number in (1, 2, 3)]
        resumed = grid_of(ledger, None)
        resumed.skip_to(2)  # round 3 was released, its checkpoint lost
        backwards = list(reversed(resumed.participants.first_nodes(CLIENTS)))
        resumed.participants.renew(backwards, ALL_ANSWERS)  # clients come back in another order
        later = [noise_of(resumed, number) for number in range(3, ROUNDS)]
        assert len(ledger.cohorts("run", MECHANISM)) == ROUNDS
        kept(ledger.cohorts("run", MECHANISM))
        assert not any(np.array_equal(noises[2], noise) for noise in later)
        with pytest.raises(RowsExhausted, match=r"all 8 rows"):
            resumed.reserve(ROUNDS)
        assert len(ledger.cohorts("run", MECHANISM)) == ROUNDS


def test_a_later_process_takes_back_the_noise_of_an_earlier_one(open_ledger: Any, tmp_path: Path) -> None:
    with open_ledger(False) as ledger:
        grid = grid_of(ledger, None)
        for number in (1, 2):
            noise_of(grid, number)
        resumed = grid_of(ledger, None)
        resumed.skip_to(2)
        third = noise_of(resumed, 3)
    with Ledger.open(tmp_path / "twin", Budget(Unit.CLIENT, 1e9, 1e-5), owner="t", simulated=False) as twin:
        calm = grid_of(twin, None)
        noises = [noise_of(calm, number) for number in (1, 2, 3)]
    assert np.array_equal(third, noises[2])


def test_the_ledger_must_know_every_finished_round(open_ledger: Any) -> None:
    with open_ledger(True) as ledger, pytest.raises(Refusal, match="only 0 rounds"):
        grid_of(ledger, 4).skip_to(1)


def test_a_row_reserved_for_other_clients_is_refused(open_ledger: Any) -> None:
    with open_ledger(True) as ledger:
        grid_of(ledger, 4).reserve(1)
        with pytest.raises(Refusal, match="other clients"):
            grid_of(ledger, 5).reserve(1)


def test_correlated_noise_needs_a_promise_and_a_key(open_ledger: Any) -> None:
    for cohort in (Fixed(3), MinSeparation(3, 3, 2), MinSeparation(3, 4, 3)):
        with pytest.raises(Refusal, match="does not promise"):
            Plan(Unit.CLIENT, Adjacency.ZERO_OUT, cohort, 1.0, ROUNDS, 1.0, mechanism=CORRELATION)
    with open_ledger(False) as ledger:
        with pytest.raises(Refusal, match="noise_key"):
            grid_of(ledger, None, key=None)
        privacy = SumPrivacy(Plan(Unit.CLIENT, Adjacency.ZERO_OUT, COHORT, 1.0, ROUNDS, 1.0), ledger)
        with pytest.raises(Refusal, match="whole run"):
            PrivateGrid(
                Participants(InProcessGrid(still_app(), CLIENTS, {}), COHORT, CLIENTS), privacy=privacy
            )


def test_the_key_is_its_owners_alone_and_gone_when_the_run_is_done(tmp_path: Path) -> None:
    key = noise_key.make(tmp_path)
    path = tmp_path / noise_key.NAME
    assert (len(key), noise_key.read(tmp_path), path.stat().st_mode & 0o777) == (32, key, 0o600)
    assert noise_key.make(tmp_path) != key
    path.chmod(0o640)
    with pytest.raises(Refusal, match="read by other users"):
        noise_key.read(tmp_path)
    path.chmod(0o600)
    path.write_bytes(key[:31])
    with pytest.raises(Refusal, match="not a complete key"):
        noise_key.read(tmp_path)
    noise_key.erase(tmp_path)
    noise_key.erase(tmp_path)
    with pytest.raises(Refusal, match="cannot be continued"):
        noise_key.read(tmp_path)
