"""Questions over both links and on Ray, asked by the command and answered by processes of their own."""

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedveil.client.device.own_ledger import questions_of
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.ledger.ledger import verify
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.server.run.build import build
from fedveil.server.run.question_plan import Spend
from fedveil.simulations.ask import ask_here
from fedveil.tasks import load_task

SERVED = runpy.run_path(str(Path(__file__).parent / "faults" / "served.py"))
LOOSE = ("privacy.allow_large_delta=true", "privacy.target_epsilon=10", "link.wait=60")
ROWS = sum(len(load_task("digits", {}).client_data(client)) for client in range(5))
MODES = ("client_central", "client_distributed")


def ask(world: Any, name: str, *more: str) -> Any:
    question = ("ask", "count", "--name", name, "--records", "400", "--noise-multiplier", "1", "--json")
    return world.start(*question, "--server", world.hearts / "server", "task=digits", *LOOSE, *more)


@pytest.fixture(scope="module", params=["grpc", pytest.param("flower", marks=pytest.mark.campaign)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp(request.param)
    with SERVED["serving"](SERVED["Served"], folder, request.param) as made:
        yield made


def test_clients_of_a_real_federation_answer_in_both_modes_and_are_charged_once_each(world: Any) -> None:
    for mode in MODES:
        asked = ask(world, mode, f"privacy={mode}")
        assert asked.wait() == 0, asked.said
        record = json.loads(asked.said.strip().splitlines()[-1])
        (rows,) = record["answers"][0]["figures"]
        assert record["released"] and rows["low"] <= ROWS <= rows["high"]
    ledgers = sorted((world.hearts / "clients").glob("*/state/ledgers/client-*.ledger"))
    assert len(ledgers) == 5
    for ledger in ledgers:
        assert [each.name for each in questions_of(ledger)] == list(MODES) and verify(ledger).ok


def test_two_operators_cannot_ask_at_once_and_the_second_is_charged_nothing(world: Any) -> None:
    one, two = ask(world, "first", "privacy=client_central"), ask(world, "second", "privacy=client_central")
    codes = {one.wait(), two.wait()}
    assert codes <= {0, 2} and 0 in codes, one.said + two.said
    refused = [each for each in (one, two) if "in use by process" in each.said]
    asked = {
        each.name
        for path in (world.hearts / "clients").glob("*/state/ledgers/client-*.ledger")
        for each in questions_of(path)
    }
    assert len(asked & {"first", "second"}) == 2 - len(refused)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of processes that Ray leaves
@pytest.mark.campaign
def test_ray_gives_the_answer_of_the_in_process_engine_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    asked = read_inquiry(
        {"name": "q", "records": 30, "ask": [{"kind": "mean", "of": "label", "low": 0, "high": 9}]}
    )
    common = ("task=digits", "task.num_clients=12", "cohort=all", "privacy=client_central")
    found = []
    for engine in ("inprocess", "ray"):
        parts = build(
            settings_from_overrides([*common, "privacy.allow_large_delta=true", f"engine={engine}"])
        )
        found.append(ask_here(parts, asked, Spend(noise_multiplier=2.0), tmp_path / engine))
    assert found[0]["answers"] == found[1]["answers"]
