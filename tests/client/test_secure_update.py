"""A client in secure aggregation: trains once, sends nothing in the clear, and refuses by name what is not agreed."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

import fedveil
from fedveil.client.app import make_client_app
from fedveil.client.secure_update import STATE, STATE_RECORD, SharedMemory, secure_update
from fedveil.messages.client_settings import ClientSettings
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.secure_wire import read_position
from fedveil.messages.wire import (
    BUDGET_SPENT,
    DROP_REASONS,
    FAILED,
    OWNERS_POLICY,
    SPEC_RECORD,
    Exchange,
    instruct,
)
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.secagg import client, messages, pair_keys
from fedveil.privacy.secagg.client import OVER, read_state
from fedveil.privacy.secagg.refusal import Reason
from fedveil.server.secure_sum import ATTEMPTS
from fedveil.strategies.identity import simulated_identity, simulated_roster

MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "masked_clients.py"))
ASKED, Clients, KEY, content, summed, wanted = (
    MADE[name] for name in ("ASKED", "Clients", "KEY", "content", "summed", "wanted")
)
gone, rounds_of = MADE["gone"], MADE["rounds_of"]
VICTIM = 3


def at(exchange, change):
    """A wire that changes what node 3 is sent in one exchange."""

    def fault(message, client):
        if client == VICTIM and read_position(message.content).exchange is exchange:
            change(message.content)

    return fault


def declined(change, exchange=Exchange.INBOX, noise=0.0):
    grid = Clients(at(exchange, change))
    opened = summed(grid, wanted(noise))
    assert opened.survivors == 7, opened
    (reason,) = opened.dropped
    assert VICTIM not in grid.trained
    return reason


def with_spec(**changed):
    def change(content):
        spec = json.loads(str(content[SPEC_RECORD]["spec"]))
        spec |= {k: v for k, v in changed.items() if k in spec}
        spec["sum"] |= {k: v for k, v in changed.items() if k in spec["sum"]}
        content[SPEC_RECORD]["spec"] = json.dumps(spec, sort_keys=True)

    return change


@pytest.mark.parametrize(
    "changed", [{"sigma": 0}, {"sigma": 17}, {"clipping_norm": 11.0}, {"rotated": False}]
)
def test_spec_without_the_cohorts_agreement_is_refused(changed):
    assert declined(with_spec(**changed), noise=3.0) == f"declined: {Reason.POLICY}"


def test_a_spec_that_is_none_is_refused():
    def change(content):
        content[SPEC_RECORD]["spec"] = "{}"

    assert declined(change) == f"declined: {Reason.POLICY}"


def test_another_model_for_one_client_is_refused_before_training():
    def swap(content):
        changed = {name: array.numpy() + np.float32(1e-6) for name, array in content["arrays"].items()}
        content["arrays"] = MADE["memory_arrays"](changed)

    assert declined(swap) == f"declined: {Reason.WRONG_MODEL}"


def test_another_setting_for_one_client_is_refused_before_training():
    def change(content):
        content["config"]["lr"] = 0.2

    assert declined(change) == f"declined: {Reason.WRONG_MODEL}"


@pytest.mark.parametrize(
    "asked", [{"minimum_noise_multiplier": 3.5}, {"maximum_clipping_norm": 9.0}, {"minimum_cohort": 8}]
)
def test_terms_below_the_owners_floors_are_refused_by_everybody(asked):
    grid = Clients(asked=replace(ASKED, **asked))
    opened = summed(grid, wanted(noise=3.0))
    assert opened.total is None and opened.dropped == {f"declined: {Reason.POLICY}": 8}
    assert grid.trained == {}


def test_a_second_inbox_does_not_train_again():
    kept = {}

    def fault(message, client):
        if client == VICTIM and read_position(message.content).exchange is Exchange.INBOX:
            kept["inbox"] = message.content

    grid = Clients(fault)
    assert summed(grid, wanted()).survivors == 8
    again = next(iter(grid.send_and_receive([Message(kept["inbox"], VICTIM + 2, "train")])))
    assert b"erased" in again.content["fedveil.secagg"]["messages"][0]
    assert grid.trained[VICTIM] == 1


@pytest.mark.parametrize(("code", "reason"), [(BUDGET_SPENT, "budget spent"), (77, "failed")])
def test_a_client_that_did_not_train_says_so_by_code_alone(code, reason):
    def training(message, client):
        return Message(Error(code, "patient 17 is ill"), reply_to=message) if client == VICTIM else None

    grid = Clients(training=training)
    opened = summed(grid, wanted())
    assert (opened.survivors, opened.dropped) == (7, {reason: 1})
    errors = [reply.error.reason for _, reply in grid.seen if reply.has_error()]
    assert errors == ["the client did not train"]


@pytest.mark.parametrize(("code", "attempts"), [(BUDGET_SPENT, 1), (OWNERS_POLICY, 1), (77, ATTEMPTS)])
def test_too_many_final_refusals_cost_the_others_one_training(code, attempts):
    def training(message, client):
        return Message(Error(code, ""), reply_to=message) if client < 3 else None

    grid = Clients(training=training)
    opened = summed(grid, wanted())
    reason = DROP_REASONS.get(code, "failed")
    assert (opened.total, opened.attempts, opened.dropped) == (None, attempts, {reason: 3, "too_few": 5})
    assert set(grid.trained.values()) == {attempts}


@pytest.mark.filterwarnings("ignore")
def test_the_text_of_a_failure_stays_at_the_client():
    def training(message, client):
        if client == VICTIM:
            raise RuntimeError("patient 17 is ill")

    grid = Clients(training=training)
    assert summed(grid, wanted()).dropped == {"failed": 1}
    assert [reply.error.reason for _, reply in grid.seen if reply.has_error()] == ["the client did not train"]


def test_node_forgets_its_secrets_with_the_attempt_but_not_its_use():
    grid = Clients()
    summed(grid, wanted())
    identity = simulated_identity(ASKED, VICTIM)
    node = identity.participant()
    read_state(node, grid._contexts[VICTIM + 2].state[STATE_RECORD][STATE], identity.node_key)
    assert node.attempts == {} and list(node.newest_attempts.values()) == [{3: OVER}]


def test_simulated_nodes_repeat_no_work_of_each_other(monkeypatch):
    sealed = summed(Clients(), wanted())
    calls = []

    def count(module, name):
        function = getattr(module, name)

        def counted(*args, **options):
            calls.append((name, type(args[0])))
            return function(*args, **options)

        monkeypatch.setattr(module, name, counted)

    count(pair_keys, "agree")
    count(client, "seal")
    count(client, "unseal")
    count(messages, "_row")
    messages.read_received.cache_clear()
    grid = Clients(memory=SharedMemory())
    opened = summed(grid, wanted())
    assert (opened.total == sealed.total).all() and opened.survivors == 8
    counts = {name: sum(each == name for each, _ in calls) for name, _ in calls}
    assert counts["agree"] == 8 * 7  # one for each of 28 pairs, for shares and for masks
    assert counts["seal"] == 8 * 7 and "unseal" not in counts  # shares for neighbours, and no state
    # Read once: the proposal, 8 adverts in one message, the inbox, the survivors, and 8 confirmations in one message. Read
    # for each: its parcels by itself, its 5 replies by the server.
    assert counts["_row"] == 1 + (1 + 8) + 1 + 1 + (1 + 8) + 8 * (1 + 5)


def test_a_simulated_node_whose_context_is_lost_has_forgotten():
    memory, context = SharedMemory(), Context(0, 2, {}, RecordDict(), {})
    identity = simulated_identity(ASKED, 0)
    first = memory.restore(identity, context)
    memory.store(first, identity, context)
    assert memory.restore(identity, context) is first
    assert memory.restore(identity, Context(0, 2, {}, RecordDict(), {})) is not first


def test_node_with_tampered_memory_answers_nothing_and_keeps_it():
    grid = Clients()
    summed(grid, wanted())
    state = grid._contexts[VICTIM + 2].state
    sealed = bytearray(state[STATE_RECORD][STATE])
    sealed[20] ^= 1
    state[STATE_RECORD] = ConfigRecord({STATE: bytes(sealed)})
    opened = summed(grid, replace(wanted(), row=4))
    assert opened.survivors == 7 and opened.dropped == {"failed": 1}
    assert state[STATE_RECORD][STATE] == bytes(sealed)


def test_attempt_is_joined_once_and_an_opened_round_not_again():
    grid = Clients(gone(Exchange.INBOX, 1, 2, 3, attempts=1))
    assert summed(grid, wanted()).attempts == 2
    opened = summed(grid, wanted())  # as a server asks that was killed after the sum was open
    assert opened.total is None and opened.dropped == {f"declined: {Reason.REPLAY}": 8}
    assert summed(grid, replace(wanted(), row=4)).survivors == 8


def test_a_server_that_forgot_an_attempt_tries_another():
    stopped = []

    def fault(message, client):
        if not stopped and read_position(message.content).exchange is Exchange.INBOX:
            stopped.append(client)
            raise KeyboardInterrupt

    grid = Clients(fault)
    with pytest.raises(KeyboardInterrupt):
        summed(grid, wanted())
    opened = summed(grid, wanted())
    assert (opened.survivors, opened.attempts) == (8, 2)


def test_client_without_training_gives_its_keys_for_the_next_round():
    failed = []

    def training(message, client):
        if client == VICTIM and not failed:
            failed.append(client)
            return Message(Error(77, "patient 17 is ill"), reply_to=message)

    grid = Clients(training=training)
    first, second = rounds_of(grid, wanted(), 2)
    assert (first.survivors, first.dropped) == (7, {"failed": 1})
    assert (second.survivors, second.exchanges) == (8, 3)
    assert not any(reply.has_error() for _, reply in grid.seen)
    assert not any(b"ill" in repr(reply.content).encode() for _, reply in grid.seen)


def test_identities_are_distinct_and_every_process_makes_the_same():
    keys = {member.public for member in simulated_roster(KEY, 8)[0].members}
    assert len(keys) == 8
    simulated_roster.cache_clear()
    assert {member.public for member in simulated_roster(KEY, 8)[0].members} == keys
    others = {member.public for member in simulated_roster("00" * 32, 8)[0].members}
    assert not keys & others


def test_simulated_identities_exist_in_simulations_alone():
    """A deployed client reads its own from its bundle: no path leads from there to keys that come from one secret."""
    package = Path(fedveil.__file__).parent
    rooms = (
        "client",
        "server",
        "strategies",
        "configs",
        "simulations",
        "privacy",
        "populations",
        "run",
        "audit",
        "deployment",
    )
    makers = {
        path.relative_to(package).as_posix()
        for room in rooms
        for path in (package / room).rglob("*.py")
        if "simulated_identity" in path.read_text() or "simulated_roster" in path.read_text()
    }
    assert makers == {"strategies/identity.py", "client/app.py", "populations/machine.py"}


def test_an_app_that_encrypts_refuses_sums_in_the_clear():
    settings = ClientSettings(
        "digits", LocalTraining(0.1, 1, 10), {"num_clients": 8}, seed=0, encryption=ASKED
    )
    assert ClientSettings.from_json(settings.to_json()) == settings
    app = make_client_app(lambda context: settings.to_json())
    context = Context(1, 5, {"partition-id": VICTIM, "num-partitions": 8}, RecordDict(), {})
    asked = instruct(content(), SumSpec(None), "run", 1)
    reply = app(Message(asked, 5, "train"), context)
    assert reply.has_error() and reply.error.code == FAILED


def test_messages_without_the_protocols_bytes_are_refused():
    def trains(message, context):
        raise AssertionError("must not be called")

    context = Context(1, 5, {"partition-id": VICTIM}, RecordDict(), {})
    for record in ({}, {"messages": "x"}, {"messages": [1, 2]}):
        asked = RecordDict({"fedveil.secagg": ConfigRecord(record)})
        message = Message(asked, 5, "train")
        reply = secure_update(simulated_identity(ASKED, VICTIM), Randomness(0), message, context, trains)
        assert reply.error.code == FAILED
