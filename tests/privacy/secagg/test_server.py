"""Nodes that go silent at any stage: the exact sum of those who sent, or nothing.

The campaign: `python -m pytest tests/privacy/secagg/test_server.py -m campaign`.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedveil.privacy.secagg.messages import FURTHER_BYTES, SEAL_BYTES
from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.server import Abandoned, OpenedSum
from fedveil.privacy.secagg.transcript import HASH_BYTES, Profile

COHORT = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "secagg_cohort.py"))
Cohort, total, MODEL, STAGES = COHORT["Cohort"], COHORT["total"], COHORT["MODEL"], COHORT["STAGES"]
CAMPAIGN_RUNS = 10_000


@st.composite
def accidents(draw):
    """A cohort, a vector for each node, and from which stage on which nodes are silent."""
    size = draw(st.integers(3, 8))
    neighbours = size - 1 if size < 6 or draw(st.booleans()) else 4
    profile = draw(st.sampled_from(Profile))
    least = neighbours // 2 + 1 if profile is Profile.MALICIOUS else 1
    threshold = draw(st.integers(least, neighbours))
    cohort = Cohort(
        size, threshold, neighbours, draw(st.sampled_from((16, 32))), profile, draw(st.integers(2, size))
    )
    fate = st.none() | st.none() | st.sampled_from(cohort.stages())
    silent = {}
    for node in cohort.nodes:
        stage = draw(fate)
        if stage is not None:
            silent.setdefault(stage, []).append(node)
    return cohort, cohort.vectors(draw(st.integers(1, 40)), draw(st.integers(0, 2**32))), silent


def left(cohort, silent):
    """Return who still answers at each stage, by a count of its own."""
    present, answering = set(cohort.nodes), {}
    for stage in cohort.stages():
        present = present - set(silent.get(stage, ()))
        answering[stage] = present
    return answering


def must_succeed(cohort, silent):
    """Whether a cohort on a complete graph has enough nodes at every stage."""
    here = left(cohort, silent)
    alive, t = here["mask"], cohort.threshold
    early = ("advertise", "share", "check", "mask")
    enough = all(len(here[stage]) >= max(cohort.minimum, t + 1) for stage in early)
    if cohort.profile is Profile.MALICIOUS:
        enough = enough and len(here["confirm"]) >= max(t, cohort.size // 2 + 1)
    dead = here["check"] - alive
    shares = [len(here["reveal"] - {node}) for node in alive | dead]
    return enough and min(shares, default=0) >= t


def holds(case):
    cohort, vectors, silent = case
    outcome = cohort.run(vectors, silent)
    if cohort.neighbours == cohort.size - 1:
        assert isinstance(outcome, OpenedSum if must_succeed(cohort, silent) else Abandoned)
    if isinstance(outcome, OpenedSum):
        assert set(outcome.survivors) <= left(cohort, silent)["mask"]
        assert len(outcome.survivors) >= cohort.minimum
        assert np.array_equal(outcome.total, total(vectors, outcome.survivors, cohort.bits))
    else:
        assert outcome == Abandoned(Reason.TOO_FEW)


@settings(max_examples=150)
@given(accidents())
def test_survivors_have_their_exact_sum_or_nothing(case):
    holds(case)


@pytest.mark.campaign
@settings(max_examples=CAMPAIGN_RUNS, suppress_health_check=list(HealthCheck))
@given(accidents())
def test_campaign_of_dropouts(case):
    holds(case)


@pytest.mark.parametrize("stage", STAGES)
def test_one_silent_node_costs_its_vector_at_most(stage):
    cohort = Cohort(7, 4)
    vectors, (gone, *stay) = cohort.vectors(50), cohort.nodes
    outcome = cohort.run(vectors, {stage: [gone]})
    assert outcome.survivors == tuple(stay if STAGES.index(stage) < 4 else cohort.nodes)
    assert np.array_equal(outcome.total, total(vectors, outcome.survivors, 32))


def test_vector_after_the_survivors_were_named_stays_masked():
    """The server opened its pairwise masks by then; the private mask, which only its own seed gives, is left."""
    cohort = Cohort(6, 4)
    vectors, late = {node: np.zeros(8000, np.uint32) for node in cohort.nodes}, {}
    attempt, victim = cohort.attempt(8000), next(iter(cohort.nodes))

    def withhold(stage, node, reply):
        if (stage, node) == ("mask", victim):
            late[node] = reply
            return None
        return reply

    result = attempt.proposal()
    for stage in STAGES:
        cohort.exchange(attempt, stage, result, vectors, reply_wire=withhold)
        result = attempt.advance(MODEL)
        if stage == "mask":
            with pytest.raises(Refused, match="out_of_order"):
                attempt.take(victim, late[victim])
            pairwise = cohort.nodes[victim].attempts[attempt.context].mask_seed
    assert victim not in result.survivors and not result.total.any()
    bare = without_pairwise_masks(cohort, attempt, victim, pairwise, late[victim])
    ones = np.unpackbits(bare.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 6 * 0.5 / (8 * bare.nbytes) ** 0.5
    # The same with the private mask is the vector: the test would see it.
    own = cohort.nodes[victim].attempts[attempt.context].own_seed
    assert not without_pairwise_masks(cohort, attempt, victim, pairwise, late[victim], own).any()


def without_pairwise_masks(cohort, attempt, victim, mask_seed, frame, own_seed=None):
    """Return what the server can compute of a late vector, from all that the survivors revealed."""
    from fedveil.privacy.secagg.bindings import mask_sign, pair_mask_info, private_mask_key
    from fedveil.privacy.secagg.masks import add_masks
    from fedveil.privacy.secagg.suite import SUITES, agree, key_from_seed

    held = cohort.nodes[victim].attempts[attempt.context]
    context = held.agreed.round(held.sharers, MODEL)
    secret, info = key_from_seed(mask_seed), pair_mask_info(context)
    bare = np.frombuffer(frame[: -HASH_BYTES - FURTHER_BYTES - SEAL_BYTES], np.uint32).copy()
    masks = [
        (agree(secret, held.agreed.by_node[peer].mask_key, info), -mask_sign(victim, peer))
        for peer in held.agreed.neighbours(victim)
    ]
    masks += [] if own_seed is None else [(private_mask_key(own_seed, context), -1)]
    add_masks(bare, masks, SUITES[1])
    return bare


def test_node_without_enough_ring_neighbours_is_left_out():
    """Nobody could open its seeds: with it in the sum, the attempt would fail."""
    cohort = Cohort(12, 2, 4, profile=Profile.SEMI_HONEST)
    vectors, victim = cohort.vectors(9), next(iter(cohort.nodes))

    def lose(stage, node, reply):
        if stage != "share":
            return reply
        (attempt,) = cohort.nodes[victim].attempts.values()
        return None if node in attempt.agreed.neighbours(victim)[:3] else reply

    outcome = cohort.run(vectors, reply_wire=lose)
    assert victim not in outcome.survivors and not cohort.refusals
    assert np.array_equal(outcome.total, total(vectors, outcome.survivors, 32))


def test_a_failed_attempt_is_tried_again_with_fresh_keys():
    cohort = Cohort(5, 4)
    vectors, ids = cohort.vectors(9), list(cohort.nodes)
    assert isinstance(cohort.run(vectors, {"reveal": ids[:2]}), Abandoned)
    again = cohort.run(vectors, round_number=1)
    assert np.array_equal(again.total, total(vectors, ids, 32))


def test_an_attempt_with_a_declined_node_waits_for_the_others_alone():
    cohort = Cohort(4, 3)
    vectors, ids = cohort.vectors(3), list(cohort.nodes)
    attempt = cohort.attempt(3)
    cohort.nodes[ids[0]].newest_attempts[11] = {5: 0}
    cohort.exchange(attempt, "advertise", attempt.proposal(), vectors, silent=ids[1:2])
    assert attempt.waiting == {ids[1]} and attempt.declined == {ids[0]: Reason.REPLAY}
