"""A real server and real devices, one of which has an owner who decides: the question and the run wait, and go on."""

import json
import re
import runpy
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedveil.deployment.device.owner_desk import read_desk
from fedveil.deployment.device.owner_roles import set_passphrase
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


BROWSER = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "browser.py"))
OFFICERS = "staple of the officer"


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Any]:
    """A federation of three devices, of which one serves its owner's page and has an officer."""
    port = SERVED["free_port"]()
    hearts = SERVED["make_federation"](tmp_path, port, names=("boston", "hungary", "cleveland"))
    folder = hearts / "clients" / OWNER
    (folder / "policy.toml").write_text(DEMANDS + (folder / "policy.toml").read_text())
    set_passphrase(folder / "state", "officer", OFFICERS)
    made = SERVED["Served"](hearts, SERVED["starter_in"]({}))
    with SERVED["living"](made):
        for name in ("hungary", "cleveland"):
            made.client(name)
        made.clients[OWNER] = made.start("client", "start", folder, "--page")
        yield made


@pytest.mark.campaign
@pytest.mark.skipif(BROWSER["CHROMIUM"] is None, reason="Chromium is not installed")
def test_officer_refuses_a_question_in_a_browser(three: Any, tmp_path: Path) -> None:
    client, server = three.clients[OWNER], three.hearts / "server"
    address = re.compile(r"page: (http://127\.0\.0\.1:\d+/)$", re.MULTILINE)
    until(lambda: address.search(client.said), lambda: client.said)
    why = "Which wards have more than ten patients?"
    loose = ("privacy=client_central", "task=digits", "accept_vacuous=true", *LOOSE)
    count = ("ask", "count", "--name", "wards", "--why", why, "--records", "400", "--noise-multiplier", "2")
    question = three.start(*count, "--server", server, "--json", *loose)
    until(
        lambda: read_desk(three.hearts / "clients" / OWNER).waiting or not question.alive,
        lambda: question.said,
    )
    assert question.alive, question.said
    with BROWSER["browsing"](tmp_path / "profile") as browser:
        browser.open(address.search(client.said)[1])
        browser.tab_to("Role")
        browser.press("ArrowDown")
        browser.tab_to("Passphrase")
        browser.type(OFFICERS)
        browser.press("Enter", loads=True)
        assert why in browser.text and "connected to" in browser.text
        browser.tab_to("Decide on question wards")
        browser.press("Enter", loads=True)
        assert why in browser.text and "at least 0" in browser.text
        browser.tab_to("Approve these terms")
        browser.press("ArrowDown")
        browser.tab_to("Reason, which goes on your ledger")
        browser.type("wards name patients")
        browser.press("Enter", loads=True)
        assert "wards name patients" in browser.text
    assert question.wait() == 0, question.said
    record = json.loads(question.said.strip().splitlines()[-1])
    assert record["released"]  # of the two others
    (ledger,) = (three.hearts / "clients" / OWNER / "state" / "ledgers").glob("client-*.ledger")
    kinds = [each.kind for each in read_entries(ledger)]
    assert "owner's decision" in kinds and "reserve" not in kinds
    assert client.kill(signal.SIGTERM) == 0
    with pytest.raises(ConnectionRefusedError):
        port = int(address.search(client.said)[1].rpartition(":")[2].strip("/"))
        socket.create_connection(("127.0.0.1", port), timeout=1)
