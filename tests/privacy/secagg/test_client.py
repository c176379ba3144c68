"""Secure aggregation from end to end: the sum to the bit, what a node keeps, and how few exchanges a round takes."""

import gc
import runpy
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.secagg.attempt import NodeAttempt, Work
from fedveil.privacy.secagg.client import OVER, Participant, read_state, write_state
from fedveil.privacy.secagg.messages import Proposal, Revealed, Survivors, read, write
from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.server import Abandoned, OpenedSum, together
from fedveil.privacy.secagg.suite import SUITES, unseal
from fedveil.privacy.secagg.transcript import Profile, Purpose, frame

COHORT = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "secagg_cohort.py"))
Cohort, total, MODEL, NOW = COHORT["Cohort"], COHORT["total"], COHORT["MODEL"], COHORT["NOW"]
NODE_KEY = b"k" * 32


@st.composite
def cohorts(draw):
    """A cohort on a complete graph or a ring, of either profile, width and suite."""
    size = draw(st.integers(3, 9))
    complete = draw(st.booleans()) or size < 6
    neighbours = size - 1 if complete else draw(st.sampled_from(range(4, size, 2)))
    profile = draw(st.sampled_from(Profile))
    least = neighbours // 2 + 1 if profile is Profile.MALICIOUS else 1
    threshold = draw(st.integers(least, neighbours))
    bits, suite = draw(st.sampled_from((16, 32))), draw(st.sampled_from((1, 2, 3, 4)))
    return Cohort(size, threshold, neighbours, bits, profile, suite=suite)


def agrees(cohort, vectors, outcome):
    return np.array_equal(outcome.total, total(vectors, outcome.survivors, cohort.bits))


@settings(max_examples=25)
@given(cohorts(), st.integers(1, 200), st.integers(0, 2**32))
def test_the_sum_is_that_of_whole_numbers(cohort, dimension, seed):
    vectors = cohort.vectors(dimension, seed)
    outcome = cohort.run(vectors)
    assert isinstance(outcome, OpenedSum) and outcome.survivors == tuple(cohort.nodes)
    assert agrees(cohort, vectors, outcome)
    assert not cohort.refusals and not cohort.dropped


@pytest.mark.parametrize("bits", [16, 32])
def test_masks_longer_than_a_chunk_cancel(bits):
    cohort = Cohort(4, 2 + 1, bits=bits)
    vectors = cohort.vectors(2**18 // (bits // 8) + 5)
    assert agrees(cohort, vectors, cohort.run(vectors))


def test_messages_of_a_node_look_nothing_like_its_vector():
    cohort = Cohort(4, 3)
    vectors = {node: np.zeros(4000, np.uint32) for node in cohort.nodes}
    cohort.run(vectors)
    sent = [reply for stage, _, _, reply in cohort.traffic if stage == "mask"]
    for reply in sent:
        ones = np.unpackbits(np.frombuffer(reply[:16000], np.uint8)).mean()
        assert abs(ones - 0.5) < 6 * 0.5 / 128_000**0.5
    assert len(set(sent)) == len(sent)


def test_a_node_may_be_another_process_at_every_message():
    """All that it needs between two messages is the sealed state, and its own key opens it alone."""
    cohort = Cohort(5, 3)
    vectors, states = cohort.vectors(20), {}

    def restart(stage, node, message):
        old = cohort.nodes[node]
        fresh = Participant(node, old.key, old.policy, old.roster)
        if node in states:
            read_state(fresh, states[node], NODE_KEY)
        cohort.nodes[node] = fresh
        return message

    def keep(stage, node, reply):
        states[node] = write_state(cohort.nodes[node], NODE_KEY)
        return reply

    outcome = cohort.run(vectors, {"mask": list(cohort.nodes)[:1]}, message_wire=restart, reply_wire=keep)
    assert agrees(cohort, vectors, outcome) and len(outcome.survivors) == 4
    node, other = list(cohort.nodes)[:2]
    for wrong, key in ((states[node], b"x" * 32), (states[other], NODE_KEY), (states[node][:-1], NODE_KEY)):
        with pytest.raises(Refused, match="bad_share"):
            read_state(cohort.nodes[node], wrong, key)


def secrets_of(attempt):
    names = ("mask_seed", "own_seed", "share_seed", "reply_key")
    many = [
        joined[at : at + 32]
        for joined in (attempt.held, attempt.pair_keys, attempt.mask_secrets, attempt.mask_keys)
        for at in range(0, len(joined), 32)
    ]
    opening = {seed for _, seed in attempt.openings}
    return {*(getattr(attempt, name) for name in names), *many, *opening} - {b""}


@pytest.mark.parametrize("suite", [1, 2])
def test_nothing_secret_is_left_after_the_shares_are_revealed(suite):
    cohort = Cohort(5, 3, suite=suite, openings=((4, b"o" * 32), (6, b"c" * 32)))
    vectors, secrets, before, attempts = cohort.vectors(20), {}, {}, {}

    def watch(stage, node, message):
        for attempt in cohort.nodes[node].attempts.values():
            secrets.setdefault(node, set()).update(secrets_of(attempt))
            attempts[node] = attempt
            before[node] = opened(cohort.nodes[node])
        return message

    def opened(node):
        return unseal(SUITES[1], NODE_KEY, write_state(node, NODE_KEY), frame(Purpose.STATE, node.node))

    assert isinstance(cohort.run(vectors, message_wire=watch), OpenedSum)
    for number, node in cohort.nodes.items():
        # Four of its own, and for each neighbour a key, two shares and a mask key, or in suite 2 what that is derived from.
        assert len(secrets[number]) == 4 + 4 * 4 + 2
        assert sum(secret in before[number] for secret in secrets[number]) >= 4  # the check can fail
        after = opened(node)
        assert not any(secret in after for secret in secrets[number])
        assert not secrets_of(attempts[number])
        assert not any(isinstance(kept, NodeAttempt) for kept in gc.get_referrers(*node.attempts.values()))
        assert msgpack.unpackb(after)[1:] == [[[11, 0, OVER]], []]


@pytest.mark.parametrize("end", ["forget", "refusal", "failure"])
def test_nothing_secret_is_left_of_an_attempt_that_ended_early(end):
    cohort = Cohort(4, 3)
    vectors, attempt = cohort.vectors(3), cohort.attempt(3)
    cohort.exchange(attempt, "advertise", attempt.proposal(), vectors)
    node = next(iter(cohort.nodes.values()))
    (kept,) = node.attempts.values()
    messages = attempt.advance()
    if end == "forget":
        node.forget()
    elif end == "refusal":
        with pytest.raises(Refused):
            node.handle(messages[node.node], NOW + 100)  # everybody has expired
    else:
        cohort.exchange(attempt, "share", messages, vectors)
        cohort.exchange(attempt, "check", attempt.advance(), vectors)

        def fails(terms):
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError):
            node.handle(attempt.advance(MODEL)[node.node], NOW, Work(MODEL, fails))
    assert not node.attempts and not secrets_of(kept) if end != "failure" else not node.attempts


def test_every_attempt_has_keys_of_its_own():
    cohort = Cohort(4, 3)
    vectors = cohort.vectors(3)
    for number in range(3):
        assert agrees(cohort, vectors, cohort.run(vectors, round_number=number))
    sent = [reply for stage, _, _, reply in cohort.traffic if stage == "advertise"]
    keys = [field for advert in sent for field in msgpack.unpackb(advert)[2:5]]
    assert len(set(keys)) == len(keys) == 3 * 4 * 3


def steady_rounds(cohort, rounds, silent):
    """Sum `rounds` times, the next attempt's keys and shares travelling along; return outcomes and exchanges."""
    vectors = cohort.vectors(8)
    now = cohort.attempt(8)
    cohort.exchange(now, "advertise", now.proposal(), vectors)
    cohort.exchange(now, "share", now.advance(), vectors)
    cohort.exchange(now, "check", now.advance(), vectors)
    ended, counts = [], []
    early = 3 if cohort.profile is Profile.MALICIOUS else 2
    for number in range(rounds):
        following = cohort.attempt(8, number + 1)
        current, exchanges = now.advance(MODEL), 0
        while isinstance(current, dict):
            ahead = (
                following.proposal() if exchanges == 0 else following.advance() if exchanges < early else {}
            )
            for node, parts in together(current, ahead).items():
                for part in () if node in silent(number) else parts:
                    attempt = now if part is current.get(node) else following
                    attempt.take(node, cohort.answer("", node, part, vectors))
            current, exchanges = now.advance(), exchanges + 1
        if early == 2:
            cohort.exchange(following, "check", following.advance(), vectors, silent(number))
            exchanges += 1
        ended.append(current)
        counts.append(exchanges)
        now = following
    return vectors, ended, counts


@pytest.mark.parametrize(("profile", "exchanges"), [(Profile.MALICIOUS, 3), (Profile.SEMI_HONEST, 3)])
def test_a_steady_round_takes_few_exchanges(profile, exchanges):
    cohort = Cohort(6, 3, profile=profile)
    ids = list(cohort.nodes)
    # One is away for the whole of round 1: it misses round 2 as well, whose keys it did not send, and comes back.
    vectors, ended, counts = steady_rounds(cohort, 4, lambda number: ids[:1] if number == 1 else [])
    assert counts == [exchanges] * 4
    assert [len(outcome.survivors) for outcome in ended] == [6, 5, 5, 6]
    assert all(agrees(cohort, vectors, outcome) for outcome in ended)


def test_two_attempts_under_way_are_the_most_a_node_holds():
    cohort = Cohort(4, 3)
    node = next(iter(cohort.nodes.values()))
    for number in range(4):
        node.handle(cohort.attempt(3, number).proposal()[node.node], NOW)
    assert [attempt.terms.round for attempt in node.attempts.values()] == [2, 3]


def test_the_server_holds_one_accumulator_and_no_vectors():
    cohort = Cohort(12, 7)
    dimension = 200_000
    vectors = {node: np.full(dimension, 3, np.uint32) for node in cohort.nodes}
    attempt = cohort.attempt(dimension)
    cohort.exchange(attempt, "advertise", attempt.proposal(), vectors)
    cohort.exchange(attempt, "share", attempt.advance(), vectors)
    cohort.exchange(attempt, "check", attempt.advance(), vectors)
    inboxes = attempt.advance(MODEL)
    replies = {node: cohort.answer("mask", node, message, vectors) for node, message in inboxes.items()}
    tracemalloc.start()
    for node, reply in replies.items():
        attempt.take(node, reply)
    survivors = attempt.advance()
    cohort.exchange(attempt, "confirm", survivors, vectors)
    cohort.exchange(attempt, "reveal", attempt.advance(), vectors)
    outcome = attempt.advance()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(outcome.total, np.full(dimension, 36, np.uint32))
    assert peak < 2 * 4 * dimension


def test_an_upload_is_the_vector_and_235_bytes_a_neighbour():
    cohort = Cohort(20, 11)
    vectors = cohort.vectors(10_000)
    cohort.run(vectors)
    for node in cohort.nodes:
        sent = sum(len(reply) for _, who, _, reply in cohort.traffic if who == node)
        assert sent <= 1.02 * 40_000 + 235 * 19


def test_a_message_reads_as_it_was_written_and_in_no_other_way():
    cohort = Cohort(3, 2)
    (message, *_) = cohort.attempt(3).proposal().values()
    assert write(read(message, Proposal)) == message
    for wrong in (b"", b"\xc1", message + b"\0", message[:-1], msgpack.packb([99]), msgpack.packb({})):
        with pytest.raises(Refused, match="malformed"):
            read(wrong, Proposal)
    with pytest.raises(Refused, match="out_of_order"):
        read(write(Revealed(bytes(32), b"", b"", b"")), Proposal)


def test_a_vector_of_another_width_is_the_callers_mistake():
    cohort = Cohort(3, 2)
    with pytest.raises(ValueError, match="32-bit"):
        cohort.run({node: np.zeros(4, np.uint16) for node in cohort.nodes})


def test_abandoned_attempt_has_a_reason_and_no_sum():
    assert [field.name for field in fields(Abandoned)] == ["reason"]
    cohort = Cohort(5, 3, minimum=5)
    vectors = cohort.vectors(3)
    assert cohort.run(vectors, {"mask": list(cohort.nodes)[:1]}) == Abandoned(Reason.TOO_FEW)


@pytest.mark.parametrize("profile", list(Profile))
@pytest.mark.parametrize(("lost", "opened"), [(0, (6, 5)), (1, (5,)), (2, ())])
def test_seeds_of_noise_open_to_as_many_survivors_as_they_say(profile, lost, opened):
    seeds = {least: bytes([least]) * 32 for least in (6, 5)}
    cohort = Cohort(6, 3, profile=profile, minimum=4, openings=tuple(seeds.items()))
    ended = cohort.run(cohort.vectors(7), {"mask": list(cohort.nodes)[:lost]})
    assert isinstance(ended, OpenedSum) and len(ended.survivors) == 6 - lost
    assert set(ended.seeds) == set(ended.survivors)
    assert set(ended.seeds.values()) == {b"".join(seeds[least] for least in opened)}
    earlier = [reply for stage, _, _, reply in cohort.traffic if stage != "reveal"]
    assert not any(seed in reply for seed in seeds.values() for reply in earlier)
    told = [reply for stage, _, _, reply in cohort.traffic if stage == "reveal"]
    assert not any(seeds[least] in reply for least in set(seeds) - set(opened) for reply in told)


def test_seeds_do_not_open_to_survivors_that_no_quorum_signed():
    """An active server that claims more survivors to one node than to the others gets none of its seeds."""
    cohort = Cohort(6, 3, minimum=4, openings=((6, b"o" * 32),))
    victim, *others = cohort.nodes
    nodes = tuple(cohort.nodes)

    def lie(stage, node, message):
        if stage == "confirm" and node == victim:
            return write(replace(read(message, Survivors), alive=nodes, dead=()))
        return message

    ended = cohort.run(cohort.vectors(7), {"mask": [others[-1]]}, message_wire=lie)
    assert isinstance(ended, OpenedSum) and len(ended.survivors) == 5
    proof = next(message for stage, _, message, _ in cohort.traffic if stage == "reveal")
    with pytest.raises(Refused, match="split_view"):
        cohort.nodes[victim].handle(proof, NOW)
    assert not any(b"o" * 32 in reply for _, _, _, reply in cohort.traffic)
