"""A server, a network or a member that cheats: the node refuses by name, or is dropped; there is never a wrong sum."""

import copy
import re
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.secagg import bindings, client, messages
from fedveil.privacy.secagg.attempt import Work, quorum
from fedveil.privacy.secagg.bindings import (
    Agreement,
    complaint_body,
    deal_hash,
)
from fedveil.privacy.secagg.client import Participant
from fedveil.privacy.secagg.complaint import PROOF_BYTES
from fedveil.privacy.secagg.deal import challenge_of, label_of
from fedveil.privacy.secagg.dealings import Dealings
from fedveil.privacy.secagg.double_signature import sign_by
from fedveil.privacy.secagg.masks import add_masks
from fedveil.privacy.secagg.messages import read, write
from fedveil.privacy.secagg.refusal import Reason, Refused
from fedveil.privacy.secagg.roster import Member, Roster
from fedveil.privacy.secagg.server import Abandoned, OpenedSum
from fedveil.privacy.secagg.shamir import combine
from fedveil.privacy.secagg.suite import SUITES, new_key, public_of, sign
from fedveil.privacy.secagg.transcript import Profile
from fedveil.privacy.secagg.unmask import Opening

COHORT = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "secagg_cohort.py"))
Cohort, total, MODEL, NOW = COHORT["Cohort"], COHORT["total"], COHORT["MODEL"], COHORT["NOW"]
STAGES, STAGE_OF = COHORT["STAGES"], COHORT["STAGE_OF"]
DIMENSION = 6
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=64)
    | st.text()
)
JSON = st.tuples(st.integers(0, 15), *[LEAVES | st.lists(LEAVES, max_size=3)] * 3).map(list)
OTHER_MODEL = b"o" * 32


def play(cohort, until, model=MODEL, round_number=0):
    """Carry an attempt honestly; return it with the messages of the stage `until`, not yet delivered."""
    vectors = cohort.vectors(DIMENSION)
    attempt = cohort.attempt(DIMENSION, round_number)
    result = attempt.proposal()
    for stage in STAGES[: STAGES.index(until)]:
        cohort.exchange(attempt, stage, result, vectors)
        result = attempt.advance(model)
    return attempt, result


def refusal(cohort, node, message, model=MODEL, now=NOW):
    """Return why a node refuses a message, by name."""
    with pytest.raises(Refused) as caught:
        cohort.nodes[node].handle(
            message, now, Work(model, lambda terms: (np.zeros(DIMENSION, np.uint32), ()))
        )
    return caught.value.reason


def edited(message, kind, **changed):
    return write(replace(read(message, kind), **changed))


# What a server may do to one node.


@pytest.mark.parametrize("signer", ["nobody", "the server", "a member that colludes"])
def test_a_swapped_key_is_refused(signer):
    cohort = Cohort(5, 3)
    attempt, out = play(cohort, "share")
    victim, swapped, colluder = list(cohort.nodes)[:3]
    key = {"a member that colludes": cohort.nodes[colluder].key}.get(signer, Ed25519PrivateKey.generate())
    adverts = list(read(out[victim], messages.CohortAdverts).adverts)
    false = replace(adverts[1], mask_key=public_of(new_key()), share_key=public_of(new_key()))
    assert adverts[1].node == swapped
    if signer != "nobody":
        false = replace(false, signature=sign(key, attempt.context, false.body))
    adverts[1] = false
    message = edited(out[victim], messages.CohortAdverts, adverts=tuple(adverts))
    assert refusal(cohort, victim, message) is Reason.BAD_SIGNATURE


def test_an_advert_of_an_earlier_attempt_is_refused():
    cohort = Cohort(5, 3)
    _, earlier = play(cohort, "share")
    _, out = play(cohort, "share", round_number=1)
    victim = next(iter(cohort.nodes))
    old, new = (list(read(sent[victim], messages.CohortAdverts).adverts) for sent in (earlier, out))
    message = edited(out[victim], messages.CohortAdverts, adverts=(*new[:1], old[1], *new[2:]))
    assert refusal(cohort, victim, message) is Reason.BAD_SIGNATURE


def test_ones_own_key_swapped_is_refused():
    cohort = Cohort(5, 3)
    _, out = play(cohort, "share")
    victim = next(iter(cohort.nodes))
    adverts = read(out[victim], messages.CohortAdverts).adverts
    message = edited(out[victim], messages.CohortAdverts, adverts=adverts[1:])
    assert refusal(cohort, victim, message) is Reason.WRONG_COHORT


def split(cohort):
    """A server that tells half of the cohort of one survivor set, and half of another, and asks all to confirm."""
    attempt, out = play(cohort, "confirm")
    ids = list(cohort.nodes)
    half = len(ids) // 2
    said = read(out[ids[0]], messages.Survivors)
    views = {node: (ids[0] if place < half else ids[-1]) for place, node in enumerate(ids)}
    replies = {}
    for node, dead in views.items():
        if node != dead:
            alive = tuple(other for other in said.alive if other != dead)
            replies[node] = cohort.nodes[node].handle(write(replace(said, alive=alive, dead=(dead,))), NOW)
    read_replies = [read(reply[:-28], messages.Confirmation) for reply in replies.values()]
    groups = [[c for c in read_replies if views[c.node] == dead] for dead in (ids[0], ids[-1])]
    return attempt, ids, groups


def test_a_split_view_is_refused():
    cohort = Cohort(9, 5)
    attempt, ids, (first, second) = split(cohort)
    both = tuple(sorted([*first, *second], key=lambda c: c.node))
    node, other = first[0].node, first[1].node
    alone = write(messages.Confirmed(attempt.context, tuple(first)))
    assert refusal(cohort, node, alone) is Reason.TOO_FEW
    mixed = write(messages.Confirmed(attempt.context, both))
    assert refusal(cohort, other, mixed) in {Reason.SPLIT_VIEW, Reason.UNKNOWN_MEMBER}
    without = tuple(c for c in both if c.node not in (ids[0], ids[-1]))
    message = write(messages.Confirmed(attempt.context, without))
    assert refusal(cohort, second[0].node, message) is Reason.SPLIT_VIEW


def spoiled(agreed, node, message, dealers):
    """Return a node's parcels, of which those of some dealers do not open."""
    said = read(message, messages.NeighbourShares)
    sealed = bytearray(said.sealed)
    for place, peer in enumerate(agreed.neighbours(node, set(said.sharers))):
        sealed[place * messages.SEALED_BYTES] ^= peer in dealers
    return write(replace(said, sealed=bytes(sealed)))


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_mask_is_omitted_only_for_a_real_complaint(suite):
    """A server that spoils parcels from one part to another, and has it leave out the masks between the two.

    The masks within the first part cancel, and six holders open all private seeds: its sum would be open.
    """
    cohort = Cohort(12, 6, suite=suite)
    attempt, out = play(cohort, "check")
    nodes = tuple(cohort.nodes)
    first, others = nodes[:7], nodes[7:]
    for node in first:
        cohort.nodes[node].handle(spoiled(attempt._agreed, node, out[node], others), NOW)
    nobody = bytes(SUITES[suite].signature_bytes)
    reason = Reason.BAD_SHARE if SUITES[suite].hybrid else Reason.WRONG_COHORT
    for node in first:
        void = tuple(messages.Void(node, dealer, nobody) for dealer in others)
        inbox = messages.Inbox(attempt.context, MODEL, nodes, void)
        assert refusal(cohort, node, write(inbox)) is reason


@pytest.mark.parametrize("suite", [1, 2])
def test_a_complaint_of_a_deal_needs_its_holders_signature(suite):
    cohort = Cohort(5, 3, suite=suite)
    attempt, out = play(cohort, "mask")
    dealer, holder, other, *_ = cohort.nodes
    deal = deal_hash(dealer, attempt._deals[dealer])
    body = complaint_body(holder, dealer, deal, bytes(PROOF_BYTES))
    for signer, refused in ((holder, False), (other, True)):
        said = sign_by(SUITES[suite], cohort.nodes[signer].key, attempt._agreed.cohort, body)
        inbox = edited(out[dealer], messages.Inbox, void=(messages.Void(holder, dealer, said),))
        node = copy.deepcopy(cohort.nodes[dealer].attempts)
        if suite == 1:
            assert refusal(cohort, dealer, inbox) is Reason.WRONG_COHORT
        elif refused:
            assert refusal(cohort, dealer, inbox) is Reason.BAD_SIGNATURE
        else:
            cohort.answer("mask", dealer, inbox, cohort.vectors(DIMENSION))
            assert not cohort.refusals
        cohort.nodes[dealer].attempts = node


def opened_by_split_views(cohort, honest, targets):
    """Return the sum of the targets and the colluders, if split views opened it, and why nodes refused.

    Every honest node is told of three dead, and never the same three; each of the six others is dead to four.
    """
    vectors = cohort.vectors(DIMENSION)
    attempt, out = play(cohort, "mask")
    cohort.exchange(attempt, "mask", out, vectors)
    frames = {node: reply for stage, node, _, reply in cohort.traffic if stage == "mask"}
    others = [node for node in honest if node not in targets]
    dead_to = {node: [others[(place + step) % 6] for step in (1, 2, 3)] for place, node in enumerate(others)}
    dead_to |= {targets[0]: others[:3], targets[1]: others[3:]}
    held = {node: next(iter(cohort.nodes[node].attempts.values())) for node in cohort.nodes}
    agreed, everybody = held[honest[0]].agreed, tuple(cohort.nodes)
    shares, keys = {node: {} for node in everybody}, {node: {} for node in everybody}
    for node in set(everybody) - set(honest):  # colluders hand over both kinds
        for place, peer in enumerate(agreed.neighbours(node)):
            at = 64 * place + 32 * (peer in others)
            shares[peer][node] = held[node].held[at : at + 32]
    for node in honest:
        dead = tuple(sorted(dead_to[node]))
        alive = tuple(peer for peer in everybody if peer not in dead)
        reply = cohort.answer(
            "confirm", node, write(messages.Survivors(attempt.context, alive, dead)), vectors
        )
        if cohort.profile is Profile.MALICIOUS:
            proof = messages.Confirmed(attempt.context, (read(reply[:-28], messages.Confirmation),))
            reply = cohort.answer("reveal", node, write(proof), vectors)
        if len(reply) > messages.DECLINED_BYTES:
            revealed = read(reply[:-28], messages.Revealed).shares
            for place, peer in enumerate(agreed.neighbours(node)):
                if (peer in others) == (peer in dead):
                    shares[peer][node] = revealed[32 * place : 32 * place + 32]
    living = [node for node in everybody if node not in others]
    bare = sum(np.frombuffer(frames[node][: 4 * DIMENSION], np.uint32) for node in living)
    context = agreed.round(everybody, MODEL)
    seeds = {
        node: combine({agreed.points[holder]: share for holder, share in held.items()}, cohort.threshold)
        for node, held in shares.items()
        if len(held) >= cohort.threshold
    }
    opening = Opening(Dealings(agreed, {}), context, living, others, seeds, keys, {})
    add_masks(bare, list(opening.remaining_masks()), agreed.suite)
    return np.array_equal(bare, total(vectors, living, 32))


def test_confirmed_survivor_set_prevents_two_openings():
    """A server that splits views opens the sum of two honest nodes of ten, of a threshold that two colluders cannot
    reach twice, unless survivors are confirmed."""
    for profile in Profile:
        cohort = Cohort(10, 6, profile=profile, minimum=4, collusion=0.2)
        honest = list(cohort.nodes)[:8]
        if profile is Profile.SEMI_HONEST:
            assert opened_by_split_views(cohort, honest, honest[:2])
        else:
            with pytest.raises(Refused, match="too_few"):
                opened_by_split_views(cohort, honest, honest[:2])
            assert cohort.refusals == dict.fromkeys(honest, Reason.TOO_FEW)


def test_only_survivors_count_for_the_quorum():
    """A member that colludes, outside of the sum, signs whatever it is asked to."""
    cohort = Cohort(5, 3)
    *_, outside = cohort.nodes
    attempt = cohort.attempt(DIMENSION)
    result, vectors = attempt.proposal(), cohort.vectors(DIMENSION)
    for stage in STAGES[:-1]:
        cohort.exchange(attempt, stage, result, vectors, [outside] if stage in ("mask", "confirm") else ())
        result = attempt.advance(MODEL)
    witness, proof = next((node, read(message, messages.Confirmed)) for node, message in result.items())
    unsigned = replace(proof.confirmations[0], node=outside)
    signature = sign(cohort.nodes[outside].key, attempt.context, unsigned.body)
    signed = replace(unsigned, signature=signature)
    message = write(replace(proof, confirmations=(*proof.confirmations[:2], signed)))
    assert refusal(cohort, witness, message) is Reason.UNKNOWN_MEMBER


class Puppet(Participant):
    """A node that works for the server: it takes everybody's word."""

    def _share(self, *args):
        return self._blindly(super()._share, *args)

    def _open(self, *args):
        return self._blindly(super()._open, *args)

    def _blindly(self, act, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client, "check_adverts", lambda *_: None)
            return act(*args)


@pytest.mark.parametrize("confirming", [0, 1])
def test_invented_survivor_is_refused(confirming):
    """On a ring only neighbours check a node's keys before they share: here all four neighbours are the server's."""
    cohort = Cohort(24, 3, 4)
    vectors, (forged, *_) = cohort.vectors(DIMENSION), cohort.nodes
    made_up = cohort.nodes[forged]
    cohort.nodes[forged] = Puppet(forged, Ed25519PrivateKey.generate(), made_up.policy, cohort.roster)
    attempt = cohort.attempt(DIMENSION)
    attempt._roster = SimpleNamespace(
        member=lambda *_: SimpleNamespace(check=lambda *_: None)
    )  # it looks at nothing
    result = attempt.proposal()
    for stage in STAGES:
        silent = []
        if stage == "share":
            puppets = attempt._agreed.neighbours(forged)
            for node in puppets:
                old = cohort.nodes[node]
                cohort.nodes[node] = Puppet(node, old.key, old.policy, old.roster)
                cohort.nodes[node].attempts = old.attempts
        if stage == "confirm":  # fewer than 2t - k = 2 of the neighbours that sign are the server's
            silent = [forged, *puppets[confirming:]]
        cohort.exchange(attempt, stage, result, vectors, silent)
        result = attempt.advance(MODEL)
    honest = set(cohort.nodes) - {forged, *puppets}
    assert cohort.refusals == dict.fromkeys(honest, Reason.BAD_SIGNATURE)
    assert result == Abandoned(Reason.TOO_FEW)


def test_a_node_checks_its_neighbours_a_quorum_and_nobody_twice(monkeypatch):
    cohort = Cohort(24, 3, 4)
    vectors, (victim, *_) = cohort.vectors(DIMENSION), cohort.nodes
    checked = []
    monkeypatch.setattr(Member, "check", lambda member, *_: checked.append(member.public))

    def note(stage, node, message):
        checked.clear()
        return message

    def count(stage, node, reply):
        counts.setdefault(node, []).append(len(checked))
        return reply

    counts = {}
    assert isinstance(cohort.run(vectors, message_wire=note, reply_wire=count), OpenedSum)
    assert all(each[:5] == [0, 4, 0, 0, 0] and 13 <= each[5] < 24 for each in counts.values())
    # How many adverts nobody else has checked follows from the random graph.
    assert sum(each[5] for each in counts.values()) < (24 - 4) * len(counts)
    assert len(counts[victim]) == 6


@pytest.mark.parametrize(("size", "colluding"), [(4, 0), (5, 0), (9, 0.2), (10, 0.2), (10, 0.35), (100, 0.2)])
def test_two_survivor_sets_never_get_a_quorum_each(size, colluding):
    terms = Cohort(size, size // 2 + 1).terms(threshold=1)
    bad = -(-size * colluding // 1)
    needed = quorum(terms, colluding)
    assert 2 * needed > size + bad >= 2 * (needed - 1)
    assert quorum(replace(terms, threshold=size - 1), colluding) == size - 1


def test_node_both_alive_and_dead_is_refused():
    cohort = Cohort(5, 3)
    _, out = play(cohort, "confirm")
    victim, witness = list(cohort.nodes)[:2]
    message = edited(out[witness], messages.Survivors, dead=(victim,))
    assert refusal(cohort, witness, message) is Reason.ALIVE_AND_DEAD


@pytest.mark.parametrize("profile", Profile)
def test_a_node_opens_one_secret_of_a_neighbour_and_then_nothing(profile):
    cohort = Cohort(5, 3, profile=profile)
    attempt, out = play(cohort, "reveal" if profile is Profile.MALICIOUS else "mask")
    witness, victim, *_ = cohort.nodes
    if profile is Profile.SEMI_HONEST:
        cohort.exchange(attempt, "mask", out, cohort.vectors(DIMENSION))
        out = attempt.advance()
    assert (
        len(read(cohort.nodes[witness].handle(out[witness], NOW)[:-28], messages.Revealed).shares) == 4 * 32
    )
    everybody = tuple(cohort.nodes)
    dead = messages.Survivors(attempt.context, tuple(n for n in everybody if n != victim), (victim,))
    for message in (write(dead), out[witness]):
        assert refusal(cohort, witness, message) is Reason.ERASED


def test_survivors_are_named_once():
    cohort = Cohort(5, 3)
    _, out = play(cohort, "confirm")
    witness, victim, *rest = cohort.nodes
    cohort.nodes[witness].handle(out[witness], NOW)
    message = edited(out[witness], messages.Survivors, alive=(witness, *rest), dead=(victim,))
    assert refusal(cohort, witness, message) is Reason.OUT_OF_ORDER


DOWNGRADES = {
    "threshold": 2,
    "neighbours": 2,
    "cohort_size": 4,
    "protocol_version": 0,
    "suite": 99,
    "bits": 8,
    "clipping_norm": 2.5,
    "noise_multiplier": -0.1,
    "step": 0.0,
    "minimum_survivors": 2,
    "profile": Profile.SEMI_HONEST,
    "roster_version": 2,
}


@pytest.mark.parametrize("field", DOWNGRADES)
def test_weaker_terms_are_refused_by_the_nodes_own_policy(field):
    cohort = Cohort(5, 3, minimum=3)
    _, out = play(cohort, "advertise")
    victim = next(iter(cohort.nodes))
    weaker = cohort.terms(**{field: DOWNGRADES[field]})
    assert refusal(cohort, victim, edited(out[victim], messages.Proposal, terms=weaker)) is Reason.POLICY


def test_another_model_than_announced_is_refused():
    cohort = Cohort(5, 3)
    _, out = play(cohort, "mask")
    victim = next(iter(cohort.nodes))
    assert refusal(cohort, victim, out[victim], model=OTHER_MODEL) is Reason.WRONG_MODEL


def test_a_model_of_its_own_for_one_node_is_refused_by_all():
    """The server announces to its victim the model that it gave it: the masks do not cancel, and the signatures show it."""
    cohort = Cohort(5, 3)
    vectors = cohort.vectors(DIMENSION)
    attempt, out = play(cohort, "mask")
    victim, *_others = cohort.nodes
    replies = {}
    for node, message in out.items():
        model = OTHER_MODEL if node == victim else MODEL
        message = edited(message, messages.Inbox, model_hash=model)
        replies[node] = cohort.nodes[node].handle(
            message, NOW, Work(model, lambda terms, n=node: (vectors[n].copy(), ()))
        )
    with pytest.raises(Refused, match="wrong_cohort"):
        attempt.take(victim, replies[victim])
    survivors = write(messages.Survivors(attempt.context, tuple(cohort.nodes), ()))
    said = [read(cohort.nodes[n].handle(survivors, NOW)[:-28], messages.Confirmation) for n in cohort.nodes]
    proof = write(messages.Confirmed(attempt.context, tuple(said)))
    assert {refusal(cohort, node, proof) for node in cohort.nodes} == {Reason.WRONG_MODEL}


@pytest.mark.parametrize(("round_number", "attempt"), [(4, 1), (4, 0), (2, 7)])
def test_an_attempt_is_joined_once_and_none_of_rounds_long_past(round_number, attempt):
    cohort = Cohort(4, 3)
    victim = next(iter(cohort.nodes))
    cohort.nodes[victim].handle(cohort.attempt(3, 4, attempt=1).proposal()[victim], NOW)
    again = cohort.attempt(3, round_number, attempt=attempt).proposal()[victim]
    assert refusal(cohort, victim, again) is Reason.REPLAY
    cohort.nodes[victim].handle(cohort.attempt(3, 4, attempt=2).proposal()[victim], NOW)
    cohort.nodes[victim].handle(cohort.attempt(3, 0, run=12).proposal()[victim], NOW)


@pytest.mark.parametrize("profile", list(Profile))
def test_a_round_that_a_node_opened_is_over_for_it(profile):
    """A second sum of the same round would be a second release for one charge."""
    cohort = Cohort(4, 3, profile=profile)
    victim, vectors = next(iter(cohort.nodes)), cohort.vectors(3)
    assert isinstance(cohort.run(vectors, round_number=4), OpenedSum)
    again = cohort.attempt(3, 4, attempt=5).proposal()[victim]
    assert refusal(cohort, victim, again) is Reason.REPLAY
    cohort.nodes[victim].handle(cohort.attempt(3, 5).proposal()[victim], NOW)
    assert refusal(cohort, victim, again) is Reason.REPLAY


def test_round_is_tried_again_and_each_attempt_once():
    cohort = Cohort(4, 3)
    victim = next(iter(cohort.nodes))
    for place in ((4, 0), (5, 0), (4, 1), (4, 2)):
        cohort.nodes[victim].handle(cohort.attempt(3, place[0], attempt=place[1]).proposal()[victim], NOW)
    live = [(held.terms.round, held.terms.attempt) for held in cohort.nodes[victim].attempts.values()]
    assert live == [(5, 0), (4, 2)]
    for place in ((4, 2), (4, 1), (5, 0)):
        stale = cohort.attempt(3, place[0], attempt=place[1]).proposal()[victim]
        assert refusal(cohort, victim, stale) is Reason.REPLAY


def test_a_swapped_cohort_is_refused():
    cohort = Cohort(5, 3)
    victim, *others = cohort.nodes
    _, out = play(cohort, "advertise")
    assert refusal(cohort, victim, edited(out[victim], messages.Proposal, candidates=tuple(others))) is (
        Reason.WRONG_COHORT
    )
    fewer = edited(out[victim], messages.Proposal, candidates=tuple(cohort.nodes)[:-1])
    assert refusal(cohort, victim, fewer) is Reason.WRONG_COHORT
    stranger = edited(out[victim], messages.Proposal, candidates=tuple(sorted([*others, victim + 1])))
    assert refusal(cohort, victim, stranger) is Reason.WRONG_COHORT
    _attempt, out = play(cohort, "mask")
    message = edited(out[victim], messages.Inbox, sharers=tuple(others))
    assert refusal(cohort, victim, message) is Reason.WRONG_COHORT
    nodes = tuple(cohort.nodes)
    for number, sets in enumerate(((nodes[:-1], ()), (tuple(others), (victim,))), 1):
        _, out = play(cohort, "confirm", round_number=number)
        message = edited(out[victim], messages.Survivors, alive=sets[0], dead=sets[1])
        assert refusal(cohort, victim, message) is Reason.WRONG_COHORT


def test_another_view_of_the_sharers_shows_in_the_confirmations():
    cohort = Cohort(5, 3)
    vectors = cohort.vectors(DIMENSION)
    attempt, out = play(cohort, "mask")
    victim, gone, *others = cohort.nodes
    fewer = replace(read(out[victim], messages.Inbox), sharers=(victim, *others))
    cohort.exchange(attempt, "mask", {**out, victim: write(fewer)}, vectors)
    assert cohort.dropped == {victim: Reason.WRONG_COHORT}
    survivors = messages.Survivors(attempt.context, (victim, *others), ())
    everybody = replace(survivors, dead=(gone,))
    said = [
        read(cohort.nodes[node].handle(write(sets), NOW)[:-28], messages.Confirmation)
        for node, sets in ((victim, survivors), *((node, everybody) for node in others))
    ]
    proof = write(messages.Confirmed(attempt.context, tuple(said)))
    assert {refusal(cohort, node, proof) for node in (victim, *others)} == {Reason.WRONG_COHORT}


@pytest.mark.parametrize("profile", Profile)
def test_survivors_changed_on_the_way_cost_one_reply(profile):
    """Well-formed and plausible, so that the node goes along: the server sees that it speaks of another set."""
    cohort = Cohort(6, 4, profile=profile)
    vectors, (target, other, *_) = cohort.vectors(DIMENSION), cohort.nodes
    stage = "confirm" if profile is Profile.MALICIOUS else "reveal"

    def change(at, node, message):
        if (at, node) != (stage, target):
            return message
        alive = tuple(kept for kept in read(message, messages.Survivors).alive if kept != other)
        return edited(message, messages.Survivors, alive=alive, dead=(other,))

    outcome = cohort.run(vectors, message_wire=change)
    assert np.array_equal(outcome.total, total(vectors, cohort.nodes, 32))
    assert cohort.dropped == {target: Reason.SPLIT_VIEW} and not cohort.refusals


def test_a_cohort_changed_on_the_way_costs_one_node():
    cohort = Cohort(6, 4)
    vectors, target = cohort.vectors(DIMENSION), next(iter(cohort.nodes))

    def change(at, node, message):
        if (at, node) != ("share", target):
            return message
        return edited(
            message, messages.CohortAdverts, adverts=read(message, messages.CohortAdverts).adverts[:-1]
        )

    outcome = cohort.run(vectors, message_wire=change)
    assert np.array_equal(outcome.total, total(vectors, outcome.survivors, 32))
    assert cohort.dropped == {target: Reason.WRONG_COHORT} and target not in outcome.survivors


def test_a_sybil_is_no_member():
    cohort = Cohort(5, 3)
    victim, *others = cohort.nodes
    _, out = play(cohort, "advertise")
    sybils = tuple(sorted([victim, *others[:-1], others[-1] ^ 1]))
    assert (
        refusal(cohort, victim, edited(out[victim], messages.Proposal, candidates=sybils))
        is Reason.UNKNOWN_MEMBER
    )
    with pytest.raises(Refused, match="out_of_order"):
        cohort.attempt(3).take(others[-1] ^ 1, b"")


@pytest.mark.parametrize("stage", STAGES[1:])
def test_an_attempt_ends_where_its_node_has_another_roster_since(stage):
    """A newer roster may give the numbers of a cohort to others, whose keys would then vouch for it."""
    cohort = Cohort(5, 3)
    _, out = play(cohort, stage)
    victim, node = next((each, cohort.nodes[each]) for each in out)
    node.roster = replace(cohort.roster, version=4)
    assert refusal(cohort, victim, out[victim]) is Reason.UNKNOWN_MEMBER
    assert not node.attempts


# What an owner demands of a cohort's members holds to the end.


def demanding(cohort, least, count):
    """Let the first node's owner demand so many of `count` peers, the last nodes; return the node and the peers."""
    victim, *others = cohort.nodes
    peers = others[-count:]
    names = frozenset(cohort.roster.member(node, NOW).fingerprint for node in peers)
    node = cohort.nodes[victim]
    node.policy = replace(node.policy, peers=names, peers_at_least=least)
    return victim, peers


def without(message, kind, gone):
    """Return a message that names a cohort without some of its nodes."""
    said = read(message, kind)
    if kind is messages.CohortAdverts:
        return write(replace(said, adverts=tuple(each for each in said.adverts if each.node not in gone)))
    if kind is messages.Survivors:
        alive = tuple(node for node in said.alive if node not in gone)
        return write(replace(said, alive=alive, dead=tuple(sorted({*said.dead, *gone}))))
    return write(replace(said, sharers=tuple(node for node in said.sharers if node not in gone)))


def test_a_node_joins_no_cohort_without_enough_of_its_owners_peers():
    for least, reason in ((3, Reason.POLICY), (2, None)):
        cohort = Cohort(7, 4)
        victim, _ = demanding(cohort, least, count=2)
        _, out = play(cohort, "advertise")
        if reason is None:
            assert cohort.nodes[victim].handle(out[victim], NOW)
        else:
            assert refusal(cohort, victim, out[victim]) is reason
            assert not cohort.nodes[victim].newest_attempts


@pytest.mark.parametrize(
    ("stage", "kind"),
    [("share", messages.CohortAdverts), ("mask", messages.Inbox), ("confirm", messages.Survivors)],
)
def test_node_is_not_summed_with_too_few_of_its_owners_peers(stage, kind):
    for least, reason in ((2, Reason.POLICY), (1, None)):
        cohort = Cohort(7, 4)
        victim, peers = demanding(cohort, least, count=2)
        _, out = play(cohort, stage)
        message, node = without(out[victim], kind, peers[:1]), cohort.nodes[victim]
        if reason is None:
            node.handle(message, NOW, Work(MODEL, lambda terms: (np.zeros(DIMENSION, np.uint32), ())))
        else:
            assert refusal(cohort, victim, message) is reason
            assert not node.attempts


def test_node_does_not_deal_among_too_few_dealing_peers():
    cohort = Cohort(7, 4)
    victim, peers = demanding(cohort, 2, count=2)
    vectors = cohort.vectors(DIMENSION)
    assert isinstance(cohort.run(vectors, silent={"share": peers[:1]}), OpenedSum)
    assert cohort.refusals == {victim: Reason.POLICY} and victim not in cohort.charged
    assert len(cohort.charged) == 5


def agreed_of(attempt, adverts):
    return Agreement(attempt.terms, attempt.context, attempt.candidates, adverts)


def test_a_peer_that_the_server_only_names_is_no_peer():
    """In a sparse graph a node checks the keys of its neighbours; the keys of its owner's peers as well."""
    for demanded, reason in ((0, None), (1, Reason.BAD_SIGNATURE)):
        cohort = Cohort(40, 6, neighbours=8)
        attempt, out = play(cohort, "share")
        victim, node = next(iter(cohort.nodes.items()))
        adverts = read(out[victim], messages.CohortAdverts).adverts
        far, forged = next(
            (far, named)
            for far in cohort.nodes
            for named in [tuple(replace(a, signature=bytes(64)) if a.node == far else a for a in adverts)]
            if far not in [victim, *agreed_of(node.attempts[attempt.context], named).neighbours(victim)]
        )
        names = frozenset({cohort.roster.member(far, NOW).fingerprint})
        node.policy = replace(node.policy, peers=names, peers_at_least=demanded)
        message = edited(out[victim], messages.CohortAdverts, adverts=forged)
        if reason is None:
            assert node.handle(message, NOW)
        else:
            assert refusal(cohort, victim, message) is reason


def test_a_roster_of_the_servers_own_is_refused():
    cohort = Cohort(5, 3)
    victim = next(iter(cohort.nodes))
    forged = replace(
        cohort.roster, members=(*cohort.roster.members[:-1], Member(2**64 - 1, "s", bytes(32), NOW))
    )
    message = cohort.attempt(3, roster_hash=forged.hash).proposal()[victim]
    assert refusal(cohort, victim, message) is Reason.UNKNOWN_MEMBER


@pytest.mark.parametrize("stage", ["advertise", "share"])
def test_an_expired_member_is_refused(stage):
    cohort = Cohort(5, 3)
    victim, *_, late = cohort.nodes
    members = [replace(m, not_after=NOW - 1) if m.node == late else m for m in cohort.roster.members]
    _, out = play(cohort, stage)
    if stage == "advertise":
        expired = Roster(3, tuple(members))
        node = cohort.nodes[victim]
        cohort.nodes[victim] = Participant(victim, node.key, node.policy, expired)
        message = edited(out[victim], messages.Proposal, terms=cohort.terms(roster_hash=expired.hash))
        assert refusal(cohort, victim, message) is Reason.EXPIRED
    else:
        assert refusal(cohort, victim, out[victim], now=NOW + 10) is Reason.EXPIRED


@pytest.mark.parametrize("source", ["another holder", "another dealer", "the holder itself"])
def test_shares_for_another_pair_do_not_open(source):
    """One key serves a pair in both directions; who sealed for whom is in what a share opens with."""
    cohort = Cohort(5, 3)
    attempt, out = play(cohort, "check")
    victim, other, *_ = cohort.nodes
    size = messages.SEALED_BYTES
    mine, theirs = (read(out[node], messages.NeighbourShares).sealed for node in (victim, other))
    sealed = {
        "another holder": theirs,
        "another dealer": mine[size : 2 * size] + mine[:size] + mine[2 * size :],
        "the holder itself": theirs[:size] + mine[size:],
    }[source]
    reply = cohort.nodes[victim].handle(edited(out[victim], messages.NeighbourShares, sealed=sealed), NOW)
    accused = read(reply[:-28], messages.Checked).accused
    wrong = {"another holder": 4, "another dealer": 2, "the holder itself": 1}[source]
    assert len(accused) == wrong and accused[0] == other
    (held,) = cohort.nodes[victim].attempts.values()
    assert held.held[: 64 * wrong] == bytes(64 * wrong) and held.context == attempt.context


def test_the_keys_of_two_rounds_have_nothing_in_common():
    one, two = bytes(32), bytes(31) + b"1"
    assert bindings.private_mask_key(b"s" * 32, one) != bindings.private_mask_key(b"s" * 32, two)
    assert bindings.pair_mask_info(one) != bindings.pair_mask_info(two)
    assert bindings.reply_info(one) != bindings.reply_info(two)
    assert label_of(one, 1) != label_of(two, 1)
    assert challenge_of(one, 1, b"s" * 32) != challenge_of(two, 1, b"s" * 32)


def test_a_server_that_loses_adverts_does_not_crowd_a_ring():
    """Neighbours are drawn among all who were asked: who is left has fewer, and no more of those who collude."""
    cohort = Cohort(12, 4, 6)
    vectors, (node, *lost) = cohort.vectors(DIMENSION), cohort.nodes
    attempt = cohort.attempt(DIMENSION)
    cohort.exchange(attempt, "advertise", attempt.proposal(), vectors, lost[:4])
    cohort.exchange(attempt, "share", attempt.advance(), vectors)
    kept = [held.agreed for held in cohort.nodes[node].attempts.values()] or [attempt._agreed]
    assert sum(len(kept[0].neighbours(member)) for member in kept[0].nodes) < 6 * 8


@pytest.mark.parametrize("nodes", [(5, 5), (6, 5)])
def test_nodes_are_listed_in_order_and_once(nodes):
    with pytest.raises(Refused, match="malformed"):
        read(write(messages.Survivors(bytes(32), nodes, ())), messages.Survivors)


@pytest.mark.parametrize("stage", ["share", "mask", "confirm"])
def test_too_few_to_hide_among_is_refused(stage):
    cohort = Cohort(6, 4, minimum=5)
    _, out = play(cohort, stage)
    ids = tuple(cohort.nodes)
    victim, few = ids[0], ids[:4]
    if stage == "share":
        adverts = read(out[victim], messages.CohortAdverts).adverts[:4]
        message = edited(out[victim], messages.CohortAdverts, adverts=adverts)
    elif stage == "mask":
        message = edited(out[victim], messages.Inbox, sharers=few)
    else:
        message = edited(out[victim], messages.Survivors, alive=few, dead=ids[4:])
    assert refusal(cohort, victim, message) is Reason.TOO_FEW


def test_only_the_reason_leaves():
    cohort = Cohort(4, 3)
    victim = next(iter(cohort.nodes))
    message = cohort.attempt(3, clipping_norm=9.0).proposal()[victim]
    reply = cohort.answer("advertise", victim, message, {})
    assert msgpack.unpackb(reply)[1:] == ["policy"]
    assert all(len(write(messages.Declined(reason.value))) <= messages.DECLINED_BYTES for reason in Reason)


# Each field of each message, changed in each way.


def flipped(value):
    """Return another value of the same type."""
    if isinstance(value, bytes):
        return b"\1" if not value else bytes([value[0] ^ 1, *value[1:]])
    if isinstance(value, str):
        return "semi_honest" if value == "malicious" else value + "x"
    return value * 2 if isinstance(value, float) and value else value + 1


def variants(value):
    """Yield a name and a changed copy, for every field of a message and every way to change it."""
    if isinstance(value, list):
        for at, item in enumerate(value):
            yield f"{at} left out", value[:at] + value[at + 1 :]
            yield f"{at} doubled", value[: at + 1] + value[at:]
            if 0 < at < 3 or not isinstance(item, list):
                for name, changed in variants(item):
                    yield f"{at}.{name}", [*value[:at], changed, *value[at + 1 :]]
    else:
        yield "flipped", flipped(value)
        yield "of another type", None
        if isinstance(value, bytes):
            if value:
                yield "cut", value[:-1]
                yield "flipped in the middle", _flip(value, len(value) // 2)
                yield "flipped at the end", _flip(value, len(value) - 1)
            yield "longer", value + b"\0"


def judge(cohort, vectors, outcome, target):
    """A sum is exact, and whoever got or sent what was changed has refused it, or was dropped, by name."""
    if isinstance(outcome, OpenedSum):
        assert np.array_equal(outcome.total, total(vectors, outcome.survivors, cohort.bits))
    else:
        assert isinstance(outcome, Abandoned)
    return cohort.refusals.get(target) or cohort.dropped.get(target)


# More nodes confirm than must: one that is left out is not missed.
HARMLESS = re.compile(r"2\.\d left out")


@pytest.mark.parametrize(("suite", "stage"), [*((1, stage) for stage in STAGES), (2, "share"), (2, "check")])
def test_every_field_of_every_message_to_a_node(suite, stage):
    _, out = play(Cohort(5, 3, suite=suite), stage)
    sample = msgpack.unpackb(next(iter(out.values())))
    for number, (name, _) in enumerate(variants(sample)):
        cohort = Cohort(5, 3, suite=suite)
        vectors, target = cohort.vectors(DIMENSION), list(cohort.nodes)[number % 5]

        def change(at, node, message, target=target, number=number):
            if (at, node) != (stage, target):
                return message
            return msgpack.packb(list(variants(msgpack.unpackb(message)))[number][1])

        outcome = cohort.run(vectors, message_wire=change)
        reason = judge(cohort, vectors, outcome, target)
        harmless = stage == "reveal" and HARMLESS.fullmatch(name)
        # A parcel that was changed is no good, and is had again as its dealer signed it.
        harmless = harmless or (stage == "check" and {"dispute"} < {at for at, *_ in cohort.traffic})
        assert (reason in list(Reason) or harmless) and not cohort.blamed, name


@pytest.mark.parametrize("stage", STAGES)
def test_every_byte_of_every_reply_of_a_node(stage):
    """A reply is signed or tagged whole: where it is changed does not matter, so bytes all over it are."""
    cohort = Cohort(5, 3)
    cohort.run(cohort.vectors(DIMENSION))
    length = min(len(reply) for at, _, _, reply in cohort.traffic if at == stage)
    changes = {f"{at} flipped": lambda reply, at=at: _flip(reply, at) for at in range(0, length, 9)}
    changes |= {
        "cut": lambda reply: reply[:-1],
        "longer": lambda reply: reply + b"\0",
        "first byte gone": lambda reply: reply[1:],
        "nothing": lambda reply: b"",
        "nonsense": lambda reply: b"\x93" * 300,
    }
    for name, change in changes.items():
        cohort = Cohort(5, 3)
        vectors, target = cohort.vectors(DIMENSION), next(iter(cohort.nodes))

        def wire(at, node, reply, change=change, target=target):
            return change(reply) if (at, node) == (stage, target) else reply

        outcome = cohort.run(vectors, reply_wire=wire)
        assert judge(cohort, vectors, outcome, target) in list(Reason), name
        assert isinstance(outcome, OpenedSum)
        assert (target in outcome.survivors) == (STAGES.index(stage) > 3)


def _flip(data, at):
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.parametrize("direction", ["message", "reply"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("source", ["earlier round", "other node", "twice"])
def test_messages_to_other_nodes_are_of_no_use(stage, direction, source):
    cohort = Cohort(5, 3)
    vectors, (target, other, *_) = cohort.vectors(DIMENSION), cohort.nodes
    cohort.run(vectors)
    origin = {"earlier round": target, "other node": other, "twice": target}[source]
    cohort.refusals.clear(), cohort.dropped.clear()
    recorded = {at: (sent, reply) for at, node, sent, reply in cohort.traffic if node == origin}
    attempt = cohort.attempt(DIMENSION, 1)
    result = attempt.proposal()
    while isinstance(result, dict):
        at = STAGE_OF[attempt.due]
        targeted = result.get(target)
        if at == stage and source == "other node":
            recorded[at] = (result[other], cohort.answer(at, other, result.pop(other), vectors))
            cohort.deliver(attempt, other, recorded[at][1])
        if at == stage and direction == "message":
            message = targeted if source == "twice" else recorded[at][0]
            reply = cohort.answer(at, target, message, vectors)
            cohort.deliver(attempt, target, reply)
            if source == "twice":
                again = cohort.answer(at, target, message, vectors)
                assert read(again, messages.Declined)
            del result[target]
        elif at == stage:
            reply = recorded[at][1] if source != "twice" else cohort.answer(at, target, targeted, vectors)
            cohort.deliver(attempt, target, reply)
            if source == "twice":
                cohort.deliver(attempt, target, reply)
                del result[target]
            else:
                cohort.exchange(attempt, at, {target: result.pop(target)}, vectors)
        cohort.exchange(attempt, at, {n: m for n, m in result.items()}, vectors)
        result = attempt.advance(MODEL)
    reason = judge(cohort, vectors, result, target)
    # Some messages are the same for the whole cohort: it does not matter who else got them.
    # A parcel of somebody else's is no good, and is had again as its dealers signed it.
    shared = direction == "message" and source == "other node"
    assert shared or reason in list(Reason)
    assert isinstance(result, OpenedSum) and not attempt.blamed


@settings(max_examples=60)
@given(st.binary(max_size=300) | JSON.map(msgpack.packb), st.sampled_from(STAGES))
def test_nonsense_raises_nothing_but_a_refusal(nonsense, stage):
    cohort = Cohort(3, 2)
    attempt, out = play(cohort, stage)
    node = next(iter(cohort.nodes))
    with pytest.raises(Refused):
        cohort.nodes[node].handle(nonsense, NOW)
    with pytest.raises(Refused):
        attempt.take(node, nonsense)
    cohort.exchange(attempt, stage, out, cohort.vectors(DIMENSION))
    assert not cohort.refusals and not cohort.dropped
