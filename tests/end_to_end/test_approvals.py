"""A real server and real devices, one of which has an owner who decides: the question and the run wait, and go on."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from fedveil.deployment.device.owner_desk import read_desk
from fedveil.privacy.ledger.ledger import read_entries

SERVED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))
until = SERVED["until"]
LOOSE = ("privacy.target_epsilon=20", "privacy.allow_large_delta=true", "link.wait=120", "link.clients=1.0")
DEMANDS = "approve_questions = true\napprove_runs = true\n"
OWNER = "boston"


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    with SERVED["serving"](SERVED["Served"], tmp_path, request.param) as made:
        folder = made.hearts / "clients" / OWNER
        made.clients[OWNER].kill()
        policy = folder / "policy.toml"
        policy.write_text(DEMANDS + policy.read_text())
        made.client(OWNER)
        yield made


def decided(world: Any, verb: str, kind: str, reason: str) -> None:
    """Wait for a request of a kind, and decide on it as its owner does."""
    folder = world.hearts / "clients" / OWNER
    until(lambda: any(each.kind == kind for each in read_desk(folder).waiting))
    (request,) = [each for each in read_desk(folder).waiting if each.kind == kind]
    decision = world.start("client", verb, folder, request.id, "--reason", reason)
    assert decision.wait() == 0, decision.said


@pytest.mark.campaign
@pytest.mark.parametrize("world", ["grpc", "flower"], indirect=True)
def test_question_and_run_wait_for_an_owner_and_go_on(world: Any) -> None:
    server, folder = world.hearts / "server", world.hearts / "clients" / OWNER
    count = ("count", "--records", "400", "--noise-multiplier", "2", "--server", server, "--json")
    question = world.start(
        "ask", *count, "--name", "rows", *LOOSE, "task=digits", "privacy=client_distributed"
    )
    decided(world, "approve", "question", "vote 17")
    assert question.wait() == 0, question.said
    refused = world.start(
        "ask", *count, "--name", "again", *LOOSE, "task=digits", "privacy=client_distributed"
    )
    decided(world, "refuse", "question", "asked twice")
    assert refused.wait() == 0, refused.said
    run = (
        "task=digits",
        "privacy=client_distributed",
        "num_rounds=2",
        "run=spring",
        "--accept-vacuous",
        *LOOSE,
    )
    training = world.start("server", server, *run)
    decided(world, "approve", "run", "vote 18")
    assert training.wait() == 0, training.said
    result = json.loads((server / "runs" / "spring" / "result.json").read_text())
    assert result["status"] == "completed" and not result["dropped"], result["dropped"]
    (ledger,) = (folder / "state" / "ledgers").glob("client-*.ledger")
    entries = read_entries(ledger)
    acts = [json.loads(each.payload) for each in entries if each.kind == "owner's decision"]
    assert [(act["verdict"], act["reason"]) for act in acts] == [
        ("approved", "vote 17"),
        ("refused", "asked twice"),
        ("approved", "vote 18"),
    ]
    charged = [json.loads(each.key)[0] for each in entries if each.kind == "reserve"]
    assert charged[0] == "rows" and {name.partition("@")[0] for name in charged} == {"rows", "spring"}
