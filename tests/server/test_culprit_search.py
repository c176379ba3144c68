"""Search for who spoils encrypted sums: found in log n rounds, nobody honest is, and each part is a sum of its own."""

import math
import runpy
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.client import secure_update
from fedveil.messages.secure_wire import answer, messages_of
from fedveil.messages.wire import WEIGHT
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Unit
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.plan import Plan
from fedveil.privacy.secagg.client import declined
from fedveil.privacy.secagg.messages import Proposal, read_any
from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.server import masked_sums
from fedveil.server.accounts import Unprotected
from fedveil.server.checkpoint import State
from fedveil.server.culprit_search import CALM, SPLIT_AFTER, Search, WeighedSum
from fedveil.server.masked_sums import LOST_IN_NOISE, UNTRUE, MaskedSums
from fedveil.server.participants import Participants
from fedveil.server.private_grid import PrivateGrid
from fedveil.server.round_terms import Mean, Round, SumPrivacy, join_means
from fedveil.server.rounds import Loop, run_rounds
from fedveil.strategies.cohorts import All
from fedveil.strategies.identity import FIRST_NODE
from fedveil.strategies.registry import make_strategy

MADE = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "masked_clients.py"))
ASKED, Clients, LAYOUT = MADE["ASKED"], MADE["Clients"], MADE["LAYOUT"]
masking, update_of, wanted = (MADE[name] for name in ("masking", "update_of", "wanted"))

LEAST = 3  # members of a part


# --- the search alone


def searched(
    clients: int, culprits: Collection[int], key: int, rounds: int, spoils: Callable[[int, int, int], bool]
) -> tuple[Search, list[list[list[int]]]]:
    """Return what so many rounds led to, and their parts, where culprits spoil what `spoils(culprit, row, parts)` says."""
    search, seen, draw = Search(), [], np.random.default_rng(key)
    cohort = [node * 7 for node in range(clients)]
    for row in range(1, rounds + 1):
        parts, why = search.parts(cohort, range(LEAST, clients), draw)
        assert sorted(node for part in parts for node in part) == cohort and not why
        assert all(len(part) >= LEAST for part in parts)
        seen.append(parts)
        untrue = [
            any(node // 7 in culprits and spoils(node // 7, row, len(parts)) for node in part)
            for part in parts
        ]
        sums = [
            WeighedSum(tuple(part), 9.0, 1.0, "too long" * bad)
            for part, bad in zip(parts, untrue, strict=True)
        ]
        search = search.next_state(row, sums, len(parts) > 1)
    return search, seen


@given(clients=st.sampled_from([8, 20, 50, 100]), culprit=st.integers(0, 99), key=st.integers(0, 2**32))
@settings(max_examples=60)
def test_constant_spoiler_is_alone_after_log_n_rounds(clients: int, culprit: int, key: int) -> None:
    culprit %= clients
    rounds = SPLIT_AFTER + math.ceil(math.log2(clients))
    search, seen = searched(clients, {culprit}, key, rounds, lambda *_: True)
    assert search.suspected.keys() == {culprit * 7}
    assert all(len(parts) == 1 for parts in seen[:SPLIT_AFTER]) and all(
        len(parts) > 1 for parts in seen[SPLIT_AFTER:]
    )
    # From then on it spoils the smallest part alone.
    _, seen = searched(clients, {culprit}, key, rounds + 3, lambda *_: True)
    for parts in seen[rounds:]:
        assert [len(part) for part in parts] == [LEAST, clients - LEAST] and culprit * 7 in parts[0]


@given(
    culprits=st.sets(st.integers(0, 19), min_size=2, max_size=3),
    key=st.integers(0, 2**32),
    every=st.integers(1, 3),
)
@settings(max_examples=60)
def test_several_occasional_spoilers_are_all_detected(culprits: set[int], key: int, every: int) -> None:
    search, _ = searched(20, culprits, key, SPLIT_AFTER + 40 * every, lambda _, row, __: row % every == 0)
    assert search.suspected.keys() == {node * 7 for node in culprits}


@given(clients=st.sampled_from([8, 20, 100]), key=st.integers(0, 2**32), every=st.integers(2, CALM))
@settings(max_examples=60)
def test_one_occasional_spoiler_is_detected_and_no_other(clients: int, key: int, every: int) -> None:
    last = every * (SPLIT_AFTER + 2 * math.ceil(math.log2(clients)) + 10)
    for rounds in (last // 2, last):
        search, seen = searched(clients, {4}, key, rounds, lambda _, row, __: row % every == 0)
        assert search.suspected.keys() <= {28}
    assert search.suspected.keys() == {28} and [28 in part for part in seen[-1]].count(True) == 1
    assert min(map(len, seen[-1])) == LEAST


@pytest.mark.parametrize("rounds", [10, 100, 1000])
def test_one_that_spoils_whole_cohorts_alone_spoils_few(rounds: int) -> None:
    search, seen = searched(20, {4}, 3, rounds, lambda _, __, parts: parts == 1)
    assert [len(parts) for parts in seen].count(1) <= SPLIT_AFTER + math.log2(
        rounds / CALM
    ) and not search.suspected


def test_nobody_is_suspected_without_untrue_sums() -> None:
    search, seen = searched(8, {1}, 3, 10, lambda _, row, __: row <= SPLIT_AFTER)
    assert not search.suspected and search.calm == 0
    assert [len(parts) for parts in seen] == [1] * SPLIT_AFTER + [2] * CALM + [1] * (10 - SPLIT_AFTER - CALM)


def test_suspicion_ends_with_whole_cohorts_and_may_return() -> None:
    named = SPLIT_AFTER + 3
    for calm, suspected in ((0, {35}), (CALM - 1, {35}), (CALM, set()), (CALM + 1, {35})):
        search, _ = searched(8, {5}, 1, named + calm, lambda _, row, __: not named < row <= named + CALM)
        assert search.suspected.keys() == suspected


def test_a_suspicion_ends_with_a_true_sum_where_others_spoil_another() -> None:
    search = Search(3, ((1, frozenset({1, 2})),), suspected={1: "why"})
    sums = [WeighedSum((1, 2), 1.0, 1.0), WeighedSum((3, 4), 9.0, 1.0, "too long")]
    assert search.next_state(4, sums, in_parts=True).suspected.keys() == set()
    assert search.next_state(4, sums[:1], in_parts=True).suspected.keys() == {1}


def test_all_lone_members_of_untrue_sums_are_suspected_at_once() -> None:
    search = Search(untrue=SPLIT_AFTER, cleared=frozenset({2, 3, 5, 6}))
    sums = [WeighedSum((1, 2, 3), 9.0, 1.0, "too long"), WeighedSum((4, 5, 6), 9.0, 1.0, "too long")]
    assert search.next_state(3, [*sums, WeighedSum((7, 8), 1.0, 1.0)], in_parts=True).suspected.keys() == {
        1,
        4,
    }


def test_sums_with_possible_spoilers_among_leavers_do_not_count() -> None:
    search = Search(3, ((1, frozenset({1, 2})), (2, frozenset({2, 3}))), suspected={1: "why", 3: "why"})
    assert search.for_members(frozenset({2, 3})) == replace(
        search, untrue_sums=search.untrue_sums[1:], suspected={3: "why"}
    )


@pytest.mark.parametrize(("declined", "limit"), [(0, "collusion"), (4, "members decline sums of 4")])
def test_a_search_that_the_minimum_forbids_says_so(declined: int, limit: str) -> None:
    search = Search(untrue=SPLIT_AFTER, untrue_sums=((1, frozenset(range(8))),), declined=declined)
    parts, why = search.parts(range(8), range(5, 8), np.random.default_rng(1))
    assert parts == [list(range(8))] and "halves of 8 members are too small" in why and limit in why


# --- with real nodes


def spoilt_by(monkeypatch: pytest.MonkeyPatch, *nodes: int) -> None:
    """Let these nodes send random words under their masks, whenever they are asked."""
    asked, true, honest = [0], secure_update.TrainingJob._vector, secure_update.encode_share

    def vector(job, terms, node):
        asked[0] = job.identity.node
        return true(job, terms, node)

    def encode(*given, **options):
        words, clipped = honest(*given, **options)
        if asked[0] in nodes:
            words = np.random.default_rng(5).integers(0, 2**31, words.size).astype(words.dtype)
        return words, clipped

    monkeypatch.setattr(secure_update.TrainingJob, "_vector", vector)
    monkeypatch.setattr(secure_update, "encode_share", encode)


def sums_of(clients: int, grid: object = None, **changed: object) -> MaskedSums:
    participants = Participants(grid or Clients(clients=clients), All(), clients)
    return MaskedSums(participants, Unprotected(()), masking(clients, **changed), Randomness(1))


def rounds_of(
    sums: MaskedSums, clients: int, count: int, noise: float = 0.0
) -> list[tuple[Round, Mean | None]]:
    nodes = list(range(FIRST_NODE, FIRST_NODE + clients))
    asked = [replace(wanted(noise), row=row, number=row) for row in range(1, count + 1)]
    return [sums.sum(nodes, each, None, lambda: nodes) for each in asked]


@pytest.mark.parametrize(("clients", "noise"), [(8, 0.0), (8, 1.0), (20, 0.0)])
def test_spoiling_node_is_suspected_and_the_others_go_on(
    clients: int, noise: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    culprit = clients - 3
    spoilt_by(monkeypatch, FIRST_NODE + culprit)
    found = SPLIT_AFTER + math.ceil(math.log2(clients))
    told = rounds_of(sums_of(clients), clients, found + 1, noise)
    suspected = [done.suspected for done, _ in told if done.suspected]
    assert [list(each) for each in suspected] == [[f"simulated client {culprit}"]]
    assert "simulated client " in caplog.text and "is suspected" in caplog.text
    for done, mean in told[:SPLIT_AFTER]:
        assert done.abandoned and mean is None and done.dropped == {UNTRUE: clients}
    for done, mean in told[SPLIT_AFTER:]:
        assert done.untrue and not done.abandoned and mean is not None and mean.part
        assert done.replies + done.dropped[UNTRUE] == clients and UNTRUE in done.cause
        assert [each["untrue"] for each in done.weighed].count(True) == 1
        spoilt = next(each["members"] for each in done.weighed if each["untrue"])
        assert f"simulated client {culprit}" in spoilt
        if not noise:
            here = [c for c in range(clients) if f"simulated client {c}" not in spoilt]
            weights = np.minimum(np.array(here) + 1, 20)
            expected = np.average([update_of(c)["w"] for c in here], axis=0, weights=weights)
            assert mean.arrays["w"] == pytest.approx(expected, abs=2e-3)


def test_a_part_that_its_members_decline_ends_the_search_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt_by(monkeypatch, FIRST_NODE)
    sums = sums_of(8, Clients(asked=replace(ASKED, minimum_cohort=5)))
    told = rounds_of(sums, 8, SPLIT_AFTER + 2)
    declined, whole = told[-2][0], told[-1][0]
    assert declined.abandoned and declined.dropped == {"declined: policy": 8}
    assert whole.dropped == {UNTRUE: 8} and "members decline sums of 4" in whole.cause


def test_one_member_that_declines_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def declining(message: Message, client: int) -> Message | None:
        said = read_any((messages_of(message.content) or [b""])[0])
        small = isinstance(said, Proposal) and said.terms.cohort_size < 8
        if client != 5 or not small:
            return None
        return Message(answer([declined(Refused(Reason.POLICY, ""))]), reply_to=message)

    spoilt_by(monkeypatch, FIRST_NODE + 5)
    sums = sums_of(
        8, Clients(declining, asked=replace(ASKED, dropout=0.0)), dropout=0.0
    )  # none can be spared
    told = rounds_of(sums, 8, SPLIT_AFTER + 2)
    assert sums._participants.search.declined == 0
    assert all(mean is not None for _, mean in told[SPLIT_AFTER:])


def test_sum_lost_in_its_owners_noise_draws_no_suspicion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masked_sums, "is_too_noisy", lambda *_: True)
    for done, mean in rounds_of(sums_of(8), 8, SPLIT_AFTER + 1):
        assert mean is None and done.abandoned and not done.untrue and not done.weighed
        assert done.dropped == {LOST_IN_NOISE: 8} and done.cause.startswith(
            f"{LOST_IN_NOISE}: the sum of 8 members is lost"
        )


def test_a_round_in_parts_is_charged_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each part has the noise that one release was charged for, and each client is in one part."""
    spoilt_by(monkeypatch, FIRST_NODE + 2)
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, All(), 10.0, 10, 1.0)
    with Ledger.open(tmp_path / "l", Budget(Unit.CLIENT, 1e9, 1e-5), owner="test", simulated=True) as ledger:
        grid = PrivateGrid(
            Participants(Clients(), All(), 8),
            privacy=SumPrivacy(plan, ledger),
            randomness=Randomness(4),
            masking=masking(),
        )
        start = {name: np.full(shape, 0.5, np.float32) for name, shape in LAYOUT.items()}
        loop = Loop([make_strategy("fedavg", {})], 4, lambda *_: {}, lambda *_: None, lambda _: {})
        run_rounds(grid, loop, State(0, start, {}))
        assert [done.untrue for done in grid.rounds.newest] == [True] * 4
        assert [done.abandoned for done in grid.rounds.newest] == [True, True, False, False]
        assert [event.count for event in ledger.events(Adversary.MODEL)] == [4]
        assert set(grid.participants.grid.trained.values()) == {4}


def test_the_mean_of_parts_is_the_mean_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = sums_of(8)
    sums._participants.search = Search(
        untrue=SPLIT_AFTER, untrue_sums=((1, frozenset(range(FIRST_NODE, FIRST_NODE + 8))),)
    )
    ((done, mean),) = rounds_of(sums, 8, 1)
    ((_, whole),) = rounds_of(sums_of(8), 8, 1)
    assert mean is not None and whole is not None and len(done.weighed) == 2 and done.replies == 8
    for name in LAYOUT:
        assert mean.arrays[name] == pytest.approx(whole.arrays[name], abs=2e-3)
    assert mean.scalars == pytest.approx(whole.scalars, abs=2e-3)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.5, 9)), min_size=1, max_size=4))
def test_parts_weigh_by_their_divisors(parts: list[tuple[int, float]]) -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=len(parts))
    means = [
        Mean({"w": np.array([v])}, {"loss": v, WEIGHT: v}, {}, weight, {}, clients, weight)
        for (clients, weight), v in zip(parts, values, strict=True)
    ]
    mean = join_means(means)
    assert mean.arrays["w"][0] == pytest.approx(np.average(values, weights=[w for _, w in parts]))
    assert mean.scalars[WEIGHT] == pytest.approx(np.average(values, weights=[n for n, _ in parts]))
