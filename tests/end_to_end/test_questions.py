"""Questions over both links and on Ray, asked by the command and answered by processes of their own."""

import json
import re
import runpy
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedveil.configs.settings import settings_from_overrides
from fedveil.deployment.device.device_ledger import questions_of
from fedveil.privacy.ledger.ledger import verify
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.questions.question_plan import Spend
from fedveil.questions.simulated import ask_here
from fedveil.run.build import build
from fedveil.run.released import model_of
from fedveil.tasks import load_task
from fedveil.tasks.model_columns import columns_with

SERVED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))
LOOSE = ("privacy.allow_large_delta=true", "privacy.target_epsilon=10", "link.wait=60")
ROWS = sum(len(load_task("digits", {}).client_data(client)) for client in range(5))
MODES = ("client_central", "client_distributed")
BELIEVED_SECONDS = 35.0  # two heartbeats of Flower's, for which a SuperLink takes a dead device to be there
NOISE = 400  # rows, in a standard deviation


def ask(world: Any, name: str, *more: str) -> Any:
    question = ("ask", "count", "--name", name, "--records", str(NOISE), "--noise-multiplier", "1", "--json")
    return world.start(*question, "--server", world.hearts / "server", "task=digits", *LOOSE, *more)


def ask_file(world: Any, question: dict[str, Any], *more: str) -> Any:
    path = world.hearts / f"{question['name']}.yaml"
    path.write_text(json.dumps(question))
    return world.start(
        "ask", path, "--json", "--server", world.hearts / "server", "task=digits", *LOOSE, *more
    )


@pytest.fixture(scope="module", params=["grpc", pytest.param("flower", marks=pytest.mark.campaign)])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp(request.param)
    with SERVED["serving"](SERVED["Served"], folder, request.param) as made:
        made.link = request.param
        yield made


def test_clients_of_a_real_federation_answer_and_are_charged_once(world: Any) -> None:
    for mode in MODES:
        asked = ask(world, mode, f"privacy={mode}")
        assert asked.wait() == 0, asked.said
        record = json.loads(asked.said.strip().splitlines()[-1])
        (rows,) = record["answers"][0]["figures"]
        # The noise is the system's own: the interval of 95 % and five standard deviations miss once in 10^11.
        assert record["released"] and rows["low"] - 5 * NOISE <= ROWS <= rows["high"] + 5 * NOISE
        central = mode == "client_central"  # what its server counts is for its operator
        lines = (world.hearts / "server" / "questions" / "operator.jsonl").read_text().splitlines()
        carried = json.loads(lines[-1])["bytes"] if central else record["bytes"]
        assert len(lines) == 1 and (record["bytes"] is None) == central
        assert carried["source"] == "counted by the link"
        for way in ("down", "up"):
            assert carried[way]["questions"] and sum(carried[way].values()) > 5 * 200
    ledgers = sorted((world.hearts / "clients").glob("*/state/ledgers/client-*.ledger"))
    assert len(ledgers) == 5
    for ledger in ledgers:
        assert [each.name for each in questions_of(ledger)] == list(MODES) and verify(ledger).ok


def test_second_of_two_operators_asking_at_once_is_not_charged(world: Any) -> None:
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


def test_devices_describe_a_released_model_on_their_rows(world: Any) -> None:
    run = world.start(
        "server", world.hearts / "server", "task=digits", "run=first", "num_rounds=1", "privacy=client_central",
        "privacy.noise_multiplier=1", "privacy.target_epsilon=null", "accept_vacuous=true", *LOOSE[::2],
    )  # fmt: skip
    assert run.wait() == 0, run.said
    about = {
        "name": "said", "why": "How often is the model right?", "records": 400, "noise_multiplier": 1.0,
        "model": str(world.hearts / "server" / "runs" / "first"),
        "ask": [{"kind": "histogram", "of": "predicted", "categories": [str(digit) for digit in range(10)]}],
    }  # fmt: skip
    task = load_task("digits", {})
    model = model_of(world.hearts / "server" / "runs" / "first", task)
    columns = [columns_with(task, client, model, attributed=False) for client in range(5)]
    said = np.concatenate([each["predicted"] for each in columns])
    for mode in MODES:
        asked = ask_file(
            world, {**about, "name": f"said-{mode}"}, f"privacy={mode}", "privacy.target_epsilon=20"
        )
        assert asked.wait() == 0, asked.said
        record = json.loads(asked.said.strip().splitlines()[-1])
        for figure, truth in zip(
            record["answers"][0]["figures"], np.bincount(said, minlength=10), strict=True
        ):
            assert abs(figure["value"] - truth) < 3.5 * (figure["high"] - figure["low"]) / 2
    ledgers = sorted((world.hearts / "clients").glob("*/state/ledgers/client-*.ledger"))
    before = [[each.name for each in questions_of(ledger)] for ledger in ledgers]
    assert len(ledgers) == 5 and all(each[-2:] == [f"said-{mode}" for mode in MODES] for each in before)
    other = world.hearts / "server" / "runs" / "other"
    shutil.copytree(world.hearts / "server" / "runs" / "first", other)
    save_file({"weight": np.zeros((2, 2), np.float32)}, other / "model.safetensors")
    asked_for = ("privacy=client_central", "privacy.target_epsilon=20")
    refused = ask_file(world, {**about, "name": "other", "model": str(other)}, *asked_for)
    assert refused.wait() == 2 and "another task" in refused.said, refused.said
    assert before == [[each.name for each in questions_of(ledger)] for ledger in ledgers]


def test_operator_reads_the_missing_clients_and_the_deadline(world: Any) -> None:
    world.clients["boston"].kill()
    if world.link == "flower":
        time.sleep(BELIEVED_SECONDS)
    asked = ask(world, "away", "privacy=client_central", "privacy.target_epsilon=20", "link.enough=0.8")
    assert asked.wait() == 0, asked.said  # four of five are enough
    assert re.search(
        r"of 5 clients are not connected yet \(.*boston\): .* 300 s \(link.deadline\)", asked.said
    )
    assert re.search(r"waiting up to 60 s \(link.wait\) for \d clients", asked.said)


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
