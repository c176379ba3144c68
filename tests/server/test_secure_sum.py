"""Secure aggregation over a grid: exact sums, retries that cost nothing, and rounds that release nothing."""

import itertools
import os
import runpy
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedveil.base.refusal import Refusal
from fedveil.client import secure_update
from fedveil.client.private_update import SUM_PART
from fedveil.messages.secure_wire import USUAL, messages_of, read_position
from fedveil.messages.wire import WEIGHT, Exchange, memory_arrays
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Unit
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.mechanisms.distributed import decode_sum
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.plan import Plan
from fedveil.privacy.secagg.messages import read_any
from fedveil.privacy.secagg.refusal import Reason
from fedveil.privacy.secagg.roster import Member, Roster
from fedveil.privacy.secagg.server import Due, ServerAttempt
from fedveil.privacy.secagg.transcript import Profile
from fedveil.server import secure_sum
from fedveil.server.accounts import Unprotected
from fedveil.server.checkpoint import State
from fedveil.server.masked_sums import UNTRUE, MaskedSums
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.server.round_terms import Mean, Round, Sum, SumPrivacy
from fedveil.server.rounds import Loop, run_rounds
from fedveil.server.run_status import Status
from fedveil.server.secure_sum import ATTEMPTS, Opened, SecureSums
from fedveil.strategies import identity
from fedveil.strategies.cohorts import All
from fedveil.strategies.identity import FIRST_NODE
from fedveil.strategies.registry import make_strategy

MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "masked_clients.py"))
ASKED, CLIENTS, Clients, LAYOUT = MADE["ASKED"], MADE["CLIENTS"], MADE["Clients"], MADE["LAYOUT"]
gone, masking, rounds_of, summed, update_of, wanted = (
    MADE[name] for name in ("gone", "masking", "rounds_of", "summed", "update_of", "wanted")
)


def mean_of(opened: Opened) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    assert opened.total is not None and opened.spec is not None
    return decode_sum(opened.total, LAYOUT, opened.spec, opened.survivors, opened.survivors, bytes(32))


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """Unix seconds in which the keys of clients end, by client, to be filled."""
    made, ends = identity._member, dict[int, int]()

    def member(secret: bytes, node: int, doubly: bool) -> Member:
        one = made(secret, node, doubly)
        return replace(one, not_after=ends.get(node - FIRST_NODE, one.not_after))

    monkeypatch.setattr(identity, "_member", member)
    identity.simulated_identity.cache_clear()
    identity.simulated_roster.cache_clear()
    yield ends
    identity.simulated_identity.cache_clear()
    identity.simulated_roster.cache_clear()


def test_member_with_an_ended_key_is_left_out_and_stops_nobody(ending: dict[int, int]) -> None:
    grid, ending[3] = Clients(), 1
    for opened in rounds_of(grid, wanted(), 2):
        assert (opened.survivors, opened.dropped, opened.attempts) == (CLIENTS - 1, {"expired": 1}, 1)
        assert FIRST_NODE + 3 not in opened.nodes
    assert 3 not in grid.trained


def test_key_ending_as_a_sum_begins_is_counted_with_ended_ones(
    ending: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = 2**33
    clock = itertools.chain([soon], itertools.repeat(soon + 1))
    monkeypatch.setattr(secure_sum, "time", SimpleNamespace(time=lambda: next(clock)))
    ending |= {3: 1, 4: soon}
    opened = summed(Clients(), wanted())
    assert (opened.survivors, opened.dropped) == (CLIENTS - 2, {"expired": 2})


@pytest.mark.parametrize("profile", list(Profile))
def test_the_sum_is_the_weighted_mean_of_everybody(profile: Profile) -> None:
    grid = Clients(asked=replace(ASKED, profile=str(profile)))
    opened = summed(grid, wanted(), profile=profile)
    assert (opened.survivors, opened.dropped, opened.attempts) == (CLIENTS, {}, 1)
    mean, scalars = mean_of(opened)
    weights = np.arange(1, CLIENTS + 1)
    for name in LAYOUT:
        expected = np.average([update_of(c)[name] for c in range(CLIENTS)], axis=0, weights=weights)
        assert mean[name] == pytest.approx(expected, abs=2e-4)
    assert scalars["loss"] == pytest.approx(1.0, abs=1e-4)
    assert set(grid.trained.values()) == {1}
    exchanges = {read_position(asked.content).exchange for asked, _ in grid.seen}
    assert len(exchanges) == (6 if profile is Profile.MALICIOUS else 5)


@pytest.mark.parametrize("since", USUAL)
def test_a_client_lost_at_any_exchange_is_left_out_or_already_in(since: Exchange) -> None:
    opened = summed(Clients(gone(since, 2)), wanted())
    left = [c for c in range(CLIENTS) if c != 2 or since > Exchange.INBOX]
    assert opened.survivors == len(left) and opened.attempts == 1
    mean, _ = mean_of(opened)
    expected = np.average([update_of(c)["w"] for c in left], axis=0, weights=np.array(left) + 1)
    assert mean["w"] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("since", [Exchange.PROPOSAL, Exchange.COHORT, Exchange.PARCELS, Exchange.INBOX])
def test_too_few_release_nothing_and_open_nothing(since: Exchange) -> None:
    grid = Clients(gone(since, 1, 2, 3))
    opened = summed(grid, wanted(noise=3.0))
    assert opened.total is None and opened.attempts == ATTEMPTS
    assert sum(opened.dropped.values()) == CLIENTS and opened.dropped["failed"] == 3
    assert {read_position(asked.content).exchange for asked, _ in grid.seen} <= {
        Exchange.PROPOSAL,
        Exchange.COHORT,
        Exchange.PARCELS,
        Exchange.INBOX,
    }


def test_a_retry_has_fresh_keys_and_succeeds_once_enough_are_back() -> None:
    grid = Clients(gone(Exchange.INBOX, 1, 2, 3, attempts=1))
    opened = summed(grid, wanted())
    assert (opened.survivors, opened.attempts) == (CLIENTS, 2)
    sent = [tuple(messages_of(asked.content) or []) for asked, _ in grid.seen]
    proposals = {sent[i] for i, (m, _) in enumerate(grid.seen) if not read_position(m.content).exchange}
    assert len(proposals) == 2


def test_no_second_attempt_follows_a_request_for_shares() -> None:
    grid = Clients(gone(Exchange.CONFIRMED, 1, 2, 3, 4))
    opened = summed(grid, wanted(noise=3.0))
    assert opened.total is None and opened.attempts == 1
    assert opened.dropped


def test_noise_is_the_survivors_and_is_no_less_than_planned() -> None:
    opened = summed(Clients(gone(Exchange.INBOX, 6)), wanted(noise=3.0))
    assert opened.spec is not None and opened.survivors == 7
    attendance = opened.spec.attendance
    assert attendance.least >= 6 and attendance.colluders == 1
    assert opened.spec.min_noise(1) >= 3.0
    mean, _ = mean_of(opened)
    assert np.std(mean["w"]) > 1.0  # alone the updates' mean deviates by 0.4


def test_nothing_of_a_client_travels_in_the_clear() -> None:
    grid = Clients()
    assert summed(grid, wanted()).survivors == CLIENTS
    for _, reply in grid.seen:
        assert list(reply.content.keys()) == ["fedveil.secagg"]
        assert list(reply.content["fedveil.secagg"].keys()) == ["messages"]
    vectors = [r for m, r in grid.seen if read_position(m.content).exchange is Exchange.INBOX]
    words = [np.frombuffer((messages_of(r.content) or [b""])[0][: 4 * 21], "<u4") for r in vectors]
    # Masked words are uniform: their top bits are not all those of a small number.
    assert min(np.unique(each >> 24).size for each in words) > 8


def test_a_reply_of_noise_or_of_nothing_is_dropped_by_name() -> None:
    def nonsense(message: Message, client: int) -> Message | None:
        if client not in (0, 5) or read_position(message.content).exchange is not Exchange.INBOX:
            return None
        sent = [b"\x07" * 200] if client else []
        return Message(RecordDict({"fedveil.secagg": ConfigRecord({"messages": sent})}), reply_to=message)

    opened = summed(Clients(nonsense), wanted())
    assert opened.survivors == 6
    assert set(opened.dropped) == {str(Reason.MALFORMED)}


def test_an_array_in_place_of_masked_bytes_is_dropped() -> None:
    def plain(message: Message, client: int) -> Message | None:
        if client != 3 or read_position(message.content).exchange is not Exchange.INBOX:
            return None
        return Message(RecordDict({"v": ArrayRecord([np.ones(21, np.int32)])}), reply_to=message)

    assert summed(Clients(plain), wanted()).survivors == 7


@pytest.mark.parametrize(("clients", "collusion"), [(1, 0.0), (3, 0.9)])
def test_a_cohort_that_hides_nobody_is_refused(clients: int, collusion: float) -> None:
    with pytest.raises(Refusal):
        masking(collusion=collusion).shape(clients)
    nodes = list(range(FIRST_NODE, FIRST_NODE + clients))
    opened = SecureSums(Clients(), masking(collusion=collusion)).sum(nodes, wanted(), None)
    assert opened.total is None and opened.dropped == {"too_few": clients}


@pytest.mark.parametrize("clients", [4, 8, 10, 20, 60, 100, 128])
def test_the_fewest_survivors_can_confirm_and_open(clients: int) -> None:
    settings = masking(dropout=0.4, collusion=0.1)
    attendance = settings.attendance(clients)
    assert attendance.least - 1 >= settings.shape(clients).threshold
    assert 2 * attendance.least > clients + attendance.colluders
    assert attendance.least - attendance.colluders >= 2


# --- the next round's keys and shares beside this round's messages


def exchanges_of(opened: list[Opened]) -> list[int]:
    return [each.exchanges for each in opened]


@pytest.mark.parametrize(("profile", "first_takes"), [(Profile.MALICIOUS, 6), (Profile.SEMI_HONEST, 5)])
def test_a_steady_round_takes_no_exchange_for_keys_and_shares(profile: Profile, first_takes: int) -> None:
    grid = Clients(asked=replace(ASKED, profile=str(profile)))
    rounds = rounds_of(grid, wanted(), 4, profile=profile)
    assert exchanges_of(rounds) == [first_takes, 3, 3, 3]
    first, *others = [mean_of(each) for each in rounds]
    assert [each.survivors for each in rounds] == [CLIENTS] * 4
    for mean, _ in others:
        assert mean["w"] == pytest.approx(first[0]["w"], abs=2e-4)
    assert set(grid.trained.values()) == {4}


def test_a_newcomer_gets_its_keys_and_shares_in_the_round_before() -> None:
    nodes = range(FIRST_NODE, FIRST_NODE + CLIENTS)
    cohorts = [[node for node in nodes if node - FIRST_NODE not in absent] for absent in ((7,), (0,), (3,))]
    grid = Clients()
    rounds = rounds_of(grid, wanted(), 3, cohorts)
    assert exchanges_of(rounds) == [6, 3, 3] and [each.survivors for each in rounds] == [7, 7, 7]
    for opened, absent in zip(rounds, (7, 0, 3), strict=True):
        left = [client for client in range(CLIENTS) if client != absent]
        expected = np.average([update_of(c)["w"] for c in left], axis=0, weights=np.array(left) + 1)
        assert mean_of(opened)[0]["w"] == pytest.approx(expected, abs=2e-4)
    assert grid.trained == {client: 3 - (client in (0, 3, 7)) for client in range(CLIENTS)}


def test_lost_client_costs_the_next_round_three_exchanges() -> None:
    def since_the_model(message: Message, client: int) -> Message | None:
        place = read_position(message.content)
        lost = client == 2 and place.round == 3 and place.exchange >= Exchange.INBOX
        return Message(Error(1, "gone"), reply_to=message) if lost else None

    rounds = rounds_of(Clients(since_the_model), wanted(), 3)
    assert [each.survivors for each in rounds] == [7, 8, 8]
    assert exchanges_of(rounds) == [6, 6, 3] and [each.attempts for each in rounds] == [1, 2, 1]


def test_keys_of_a_round_that_comes_to_nothing_serve_the_next_one() -> None:
    def before_the_shares(message: Message, client: int) -> Message | None:
        place = read_position(message.content)
        lost = client in (1, 2, 3, 4) and place.round == 3 and place.exchange >= Exchange.SURVIVORS
        return Message(Error(1, "gone"), reply_to=message) if lost else None

    first, second = rounds_of(Clients(before_the_shares), wanted(), 2)
    assert first.total is None and first.attempts == 1
    assert second.survivors == CLIENTS


def test_a_retry_goes_on_though_the_next_rounds_keys_are_out() -> None:
    grid = Clients(gone(Exchange.INBOX, 1, 2, 3, attempts=1))
    first, second = rounds_of(grid, wanted(), 2)
    assert (first.survivors, first.attempts) == (CLIENTS, 2)
    assert second.survivors == CLIENTS


def test_vectors_are_requested_in_their_own_round_alone() -> None:
    grid = Clients()
    rounds_of(grid, wanted(), 3)
    for message, _ in grid.seen:
        place, sent = read_position(message.content), messages_of(message.content) or []
        kinds = [type(read_any(each)).__name__ for each in sent]
        assert ("Inbox" in kinds) == (place.exchange is Exchange.INBOX) == ("arrays" in message.content)
        ahead = {
            Exchange.INBOX: "Proposal",
            Exchange.SURVIVORS: "CohortAdverts",
            Exchange.CONFIRMED: "NeighbourShares",
        }
        assert kinds[1:] == [ahead[place.exchange]] if place.exchange in ahead else not kinds[1:]


def test_terms_that_changed_leave_the_prepared_attempt_aside() -> None:
    sums, nodes = SecureSums(Clients(), masking()), list(range(FIRST_NODE, FIRST_NODE + CLIENTS))
    sums.sum(nodes, wanted(), None, nodes)
    other = replace(wanted(), row=4, spec=replace(wanted().spec, clipping_norm=90.0))
    opened = sums.sum(nodes, other, None, nodes)
    assert (opened.survivors, opened.exchanges, opened.attempts) == (CLIENTS, 6, 2)


def test_preparation_under_another_roster_is_abandoned() -> None:
    grid, first = Clients(), masking()
    sums, nodes = SecureSums(grid, first), list(range(FIRST_NODE, FIRST_NODE + CLIENTS))
    assert sums.sum(nodes, wanted(), None, nodes).survivors == CLIENTS
    newer = replace(first, roster=Roster(first.roster.version + 1, first.roster.members))
    sums.masking = newer
    opened = sums.sum(nodes, replace(wanted(), row=4), None, nodes)
    assert opened.total is None and opened.dropped == {"declined: unknown_member": CLIENTS}
    sums.masking = first
    assert sums.sum(nodes, replace(wanted(), row=5), None).survivors == CLIENTS


# --- clients in processes of their own, killed


@pytest.mark.parametrize("stage", USUAL)
def test_client_process_killed_at_any_stage_is_left_out_or_already_in(
    stage: Exchange, tmp_path: Path
) -> None:
    """SIGKILL in the middle of an exchange; the process that takes its place knows nothing of the attempt."""
    note = tmp_path / "killed"

    def die(message: Message, client: int) -> Message | None:
        if client == 2 and read_position(message.content).exchange is stage and not note.exists():
            note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    grid = Clients(die, workers=CLIENTS)
    try:
        first, second = rounds_of(grid, wanted(noise=3.0), 2)
    finally:
        grid.close()
    assert int(note.read_text()) not in (os.getpid(), 0)
    kept = CLIENTS - (stage <= Exchange.INBOX)
    assert (first.survivors, first.attempts) == (kept, 1)
    assert first.dropped == ({} if kept == CLIENTS else {"failed": 1})
    assert first.spec is not None and first.spec.noise_multiplier(kept - 1, kept) >= 3.0
    assert second.survivors == CLIENTS


@pytest.mark.parametrize("due", ["take", "messages_of"])
def test_an_error_that_nobody_thought_of_costs_one_reply(
    due: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad, true_take = FIRST_NODE + 2, ServerAttempt.take

    def take(attempt: ServerAttempt, node: int, reply: bytes) -> None:
        if due == "take" and node == bad and attempt.due is Due.VECTORS:
            raise AttributeError("nobody thought of this")
        true_take(attempt, node, reply)

    def read(content: RecordDict) -> list[bytes] | None:
        said = messages_of(content)
        if due == "messages_of" and said and len(said[0]) > 1000 and not raised:
            raised.append(True)
            raise RecursionError("nor of this")
        return said

    raised: list[bool] = []
    monkeypatch.setattr(ServerAttempt, "take", take)
    monkeypatch.setattr(secure_sum, "messages_of", read)
    opened = summed(Clients(), wanted())
    assert (opened.survivors, opened.dropped, opened.attempts) == (CLIENTS - 1, {"unreadable": 1}, 1)
    assert "processing a reply of node" in caplog.text


# --- sums that cannot be true


def random_words(words: np.ndarray) -> np.ndarray:
    return np.random.default_rng(5).integers(0, np.iinfo(words.dtype).max + 1, words.size, dtype=words.dtype)


def no_examples(words: np.ndarray) -> np.ndarray:
    """Return a vector of a false count, which takes everybody's examples out of the sum."""
    return np.array([0] * (words.size - 1) + [-(2**27)]).astype(words.dtype)


def spoilt(monkeypatch: pytest.MonkeyPatch, lie: Callable[[np.ndarray], np.ndarray] = random_words) -> None:
    """Let one client in every round send another vector under its masks."""
    calls, honest = itertools.count(), secure_update.encode_share

    def encode(*asked, **options):
        words, clipped = honest(*asked, **options)
        words = lie(words) if next(calls) % CLIENTS == 2 else words
        return words, clipped

    monkeypatch.setattr(secure_update, "encode_share", encode)


def sums_of_records(message: Message, client: int) -> Message:
    summed = RecordDict({SUM_PART: memory_arrays(update_of(client)), "m": MetricRecord({WEIGHT: 1})})
    return Message(summed, reply_to=message)


def masked_sum(asked: Sum) -> tuple[Round, Mean | None]:
    """Return what a round did: of records with noise of their own, of whole clients, or of records in the sum."""
    grid = Clients(training=sums_of_records if asked.spec.unit_norm else None)
    participants = Participants(grid, All(), CLIENTS)
    sums = MaskedSums(participants, Unprotected(()), masking(), Randomness(1))
    nodes = list(range(FIRST_NODE, FIRST_NODE + CLIENTS))
    return sums.sum(nodes, asked, None, lambda: nodes)


RECORDS = replace(wanted(noise=3.0), spec=SumSpec(10.0, unit_norm=1.0))
LEVELS = pytest.mark.parametrize(
    "asked", [wanted(), wanted(noise=1.0), RECORDS], ids=["masked", "clients", "records"]
)


@LEVELS
def test_a_sum_of_random_words_is_not_released(
    asked: Sum, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spoilt(monkeypatch)
    done, mean = masked_sum(asked)
    assert mean is None and done.abandoned and done.untrue
    assert (done.replies, done.dropped) == (0, {UNTRUE: CLIENTS})
    assert done.cause.startswith(UNTRUE) and "clipping norms" in done.cause and done.cause in caplog.text


def test_a_sum_with_a_false_count_of_examples_is_not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, no_examples)
    done, mean = masked_sum(wanted())
    assert mean is None and done.untrue and "longer than any update" in done.cause


@LEVELS
def test_a_true_sum_is_released(asked: Sum) -> None:
    done, mean = masked_sum(asked)
    assert mean is not None and not done.untrue and done.replies == CLIENTS


def test_a_sum_that_cannot_be_true_stays_charged_and_leaves_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoilt(monkeypatch)
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), 10.0, 10, 1.0)
    with Ledger.open(tmp_path / "l", Budget(Unit.CLIENT, 1e9, 1e-5), owner="test", simulated=True) as ledger:
        grid = PrivateGrid(
            Participants(Clients(), All(), CLIENTS),
            privacy=SumPrivacy(plan, ledger),
            randomness=Randomness(4),
            masking=masking(),
        )
        strategy = make_strategy("fedavg", {})
        start = {name: np.full(shape, 0.5, np.float32) for name, shape in LAYOUT.items()}
        ending = run_rounds(
            grid,
            Loop(
                [strategy], 2, lambda arrays, number: {}, lambda state, done, metrics: None, lambda state: {}
            ),
            State(0, start, {}),
        )
        assert [done.untrue for done in grid.rounds.newest] == [True, True]
        assert all(np.array_equal(ending.state.arrays[name], start[name]) for name in LAYOUT)
        assert [event.count for event in ledger.events(Adversary.MODEL)] == [2]
        assert (ending.status, ending.reason) == (Status.FAILED, f"no sum was valid ({UNTRUE})")
