"""The server's aggregator and filter: what is reserved, added, released and refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from shared.nvflare_jobs import CLIENTS, START, TERMS, Client, result_of, served, stepped, task_of
from shared.runs import reservations

from fedveil.adapters.nvflare.exchange import SPEC, VECTOR
from fedveil.adapters.nvflare.private_aggregator import COUNT
from fedveil.adapters.population_budget import NobodyAnswered
from fedveil.adapters.protect import protect
from fedveil.base.refusal import Refusal
from fedveil.privacy.ledger.caps import Cap, default_folder, set_cap
from fedveil.privacy.ledger.ledger import BudgetExhausted
from fedveil.privacy.mechanisms.sum_spec import MIN_CELLS
from fedveil.simulations.in_process import InProcessGrid
from fedveil.strategies.cohorts import All


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def ledger(home: Path) -> Path:
    (path,) = home.rglob("*.ledger")
    return path


def test_a_round_is_on_the_ledger_before_its_task_leaves(home: Path) -> None:
    with served() as server:
        with pytest.raises(Refusal, match="no release of it is reserved, so no task leaves"):
            server.send(START)
        assert not list(home.rglob("*.ledger"))
        server.aggregator.reset_stats()
        assert [each["rng"] for each in reservations(ledger(home))] == ["system"]
        server.send(START)
        with pytest.raises(Refusal, match="'another model'"):
            server.send({"w": START["b"]})
        with pytest.raises(Refusal, match="task='validate': no release covers its results"):
            server.send(START, "validate")
        server.accept(0, Client().answer(task_of(START), result_of(stepped(0, START))))
        server.aggregator.aggregate_model()
        with pytest.raises(Refusal, match="'not reserved'"):
            server.send(START)
        with pytest.raises(Refusal, match="no release of it is reserved"):
            server.aggregator.aggregate_model()


def good(model: dict[str, Any] = START) -> Shareable:
    return Client().answer(task_of(model), result_of(stepped(0, model)))


def with_vector(vector: Any, terms: Any = (1.0 / MIN_CELLS, float(MIN_CELLS)), **others: Any) -> Shareable:
    data = {VECTOR: vector, **others}
    return DXO(DataKind.WEIGHT_DIFF, data=data, meta={SPEC: list(terms)}).to_shareable()


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (with_vector(np.zeros(7, np.int32)), "another shape"),
        (with_vector(np.zeros(8, np.float32)), "no vector"),
        (with_vector(np.zeros(8, np.int32), others=START["w"]), "no vector"),
        (result_of(stepped(0, START)), "no vector"),
        (with_vector(np.zeros(8, np.int32), (0.5, float(MIN_CELLS))), "another clipping norm"),
    ],
    ids=["a shape", "a dtype", "an array more", "no filter", "a norm"],
)
def test_a_reply_that_does_not_fit_is_not_in_the_sum(reply: Shareable, reason: str) -> None:
    with served() as server:
        server.aggregator.reset_stats()
        server.send(START)
        logged = list[str]()
        server.aggregator.warning = logged.append
        server.accept(0, reply)
        server.accept(1, good())
        server.accept(1, good())
        total = server.aggregator.rounds._round
        assert total is not None and total.answered == {"site-1"} and total.total.replies == 1
        server.aggregator.aggregate_model()
        server.accept(2, good())
    assert [each.partition(" is not used: ")[2].startswith(reason) for each in logged[:1]] == [True]
    assert [each.partition(" is not used: ")[2] for each in logged[1:]] == ["answered before", "late"]


def test_the_server_clips_what_a_client_did_not() -> None:
    with served() as server:
        server.aggregator.reset_stats()
        server.send(START)
        server.accept(0, with_vector(np.full(8, 10 * MIN_CELLS, np.int32)))
        state = server.aggregator.rounds._round
        assert state is not None and state.total.clipped_again == 1
        assert np.linalg.norm(state.total.total) <= MIN_CELLS


def test_the_divisor_is_fixed_whoever_answers() -> None:
    with served(replace(TERMS, target_epsilon=1e5)) as server:
        server.aggregator.reset_stats()
        server.send(START)
        server.accept(0, good())
        new = server.aggregator.aggregate_model().params
    assert new is not None
    np.testing.assert_allclose(new["w"] - START["w"], 0.3 / CLIENTS, atol=0.02)


def test_a_round_without_an_answer_ends_the_job_and_stays_spent(home: Path) -> None:
    with served() as server:
        server.aggregator.reset_stats()
        server.send(START)
        with pytest.raises(NobodyAnswered, match="no client answered in round 1"):
            server.aggregator.aggregate_model()
        assert server.engine.events[-1].startswith("no client answered in round 1")
    assert len(reservations(ledger(home))) == 1


def test_the_clients_do_not_get_the_count_of_replies() -> None:
    with served() as server:
        result = FLModel(params=dict(START), meta={COUNT: 1})
        server.context.set_prop(AppConstants.AGGREGATION_RESULT, result, private=True, sticky=False)
        server.aggregator.handle_event(AppEventType.AFTER_AGGREGATION, server.context)
    assert result.meta == {COUNT: CLIENTS}


def test_a_second_job_has_what_the_first_left(home: Path) -> None:
    terms = replace(TERMS, target_epsilon=8.0)
    with served(terms) as server:
        for _ in range(2):
            server.round(START)
        assert server.aggregator.rounds.ledger.epsilon() == pytest.approx(8.0, rel=1e-3)
        with pytest.raises(BudgetExhausted):
            server.aggregator.reset_stats()
        with pytest.raises(Refusal, match="'not reserved'"):
            server.send(START)
    with served(terms) as server:
        with pytest.raises(Refusal, match=r"target_epsilon=8\.0: already spent"):
            server.aggregator.reset_stats()
        assert server.engine.events[-1].startswith("target_epsilon=8.0: already spent")
        with pytest.raises(Refusal, match="no task leaves"):
            server.send(START)
    assert len(reservations(ledger(home))) == 2


def test_a_flower_app_has_what_a_job_left() -> None:
    terms = replace(TERMS, target_epsilon=8.0)
    with served(terms) as server:
        model = server.round(START)
        server.round(model)
    grid = InProcessGrid(ClientApp(), CLIENTS, {})
    keys = {
        "population": CLIENTS,
        "cohort": All(),
        "clipping_norm": 1.0,
        "num_rounds": 1,
        "accept_vacuous": True,
    }
    with (
        pytest.raises(Refusal, match=r"target_epsilon=8\.0: already spent"),
        protect(grid, data_id=terms.data_id, budget=terms.budget, **keys),  # pyright: ignore[reportArgumentType]
    ):
        pass


def test_more_clients_than_the_population_have_no_round(home: Path) -> None:
    with (
        served(connected=4) as server,
        pytest.raises(Refusal, match="population=3: 4 clients are connected"),
    ):
        server.aggregator.reset_stats()
    assert not reservations(ledger(home))


def test_a_cap_of_the_owner_holds_for_a_job() -> None:
    set_cap(default_folder(), Cap("all", 2.0, 1e-2))
    with served() as server:
        server.round(START)
        server.round(START)
        assert server.aggregator.rounds.ledger.epsilon() <= 2.0
