"""Members that cheat in an encrypted sum, alone and together: they are named, and nobody else pays or is left out.

The campaign: `python -m pytest tests/privacy/secagg/test_cheats.py -m campaign`.
"""

import json
import math
import random
import runpy
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.secagg import complaint, messages
from fedveil.privacy.secagg.attempt import Work
from fedveil.privacy.secagg.complaint import ORDER, PROOF_BYTES, disclose, on_curve, open_proof, prove
from fedveil.privacy.secagg.deal import (
    COMMITMENT_BYTES,
    SOUNDNESS_BITS,
    Claim,
    challenge_of,
    check_share,
    deal,
    digest_of,
    label_of,
)
from fedveil.privacy.secagg.encrypted_shares import cut
from fedveil.privacy.secagg.evidence import convictions, evidence_from
from fedveil.privacy.secagg.graph import colluders, smallest_shape
from fedveil.privacy.secagg.messages import read, write
from fedveil.privacy.secagg.refusal import Fault, Reason, Refused
from fedveil.privacy.secagg.reveals import Reveals
from fedveil.privacy.secagg.server import Abandoned, OpenedSum
from fedveil.privacy.secagg.shamir import PRIME, codeword, combine, new_secret, parity, polynomial, values
from fedveil.privacy.secagg.suite import SUITES, key_from_seed, new_key, public_of
from fedveil.privacy.secagg.transcript import Profile, Purpose

FAULTS = Path(__file__).parents[2] / "faults"
COHORT = runpy.run_path(str(FAULTS / "secagg_cohort.py"))
CHEATS = runpy.run_path(str(FAULTS / "secagg_cheats.py"))
Cohort, total, NOW, MODEL = COHORT["Cohort"], COHORT["total"], COHORT["NOW"], COHORT["MODEL"]
STAGES, STAGE_OF = COHORT["STAGES"], COHORT["STAGE_OF"]
Cheat, WAYS, HYBRID_WAYS = CHEATS["Cheat"], CHEATS["WAYS"], CHEATS["HYBRID_WAYS"]
until_checks, accusation = CHEATS["until_checks"], CHEATS["accusation"]
DIMENSION = 20
COLLUSION = 0.1  # of the cohort, as by default
CAMPAIGN_RUNS = 2000
SAMPLE_RUNS = 40
# A mask key that is not its seed's makes its owner's own vector another one, which everybody may choose; in a sum that
# it leaves it must do no harm.
SILENT_FROM = dict.fromkeys(
    (
        "another mask seed, then silence",
        "another mask key",
        "mask key of the twist",
        "another KEM key",
        "another escrow",
    ),
    "mask",
)


def cohort_of(size, suite=1, lost=0):
    """A cohort of the smallest graph that stands the assumed collusion and some who are lost, all of them silent."""
    bad = colluders(size, COLLUSION)
    shape = smallest_shape(size, (bad + lost) / size, COLLUSION, Profile.MALICIOUS)
    return Cohort(size, shape.threshold, shape.neighbours, minimum=bad + 2, suite=suite, collusion=COLLUSION)


def corrupt(cohort, ways, seed=0):
    """Let the first nodes that the seed picks cheat in these ways, together; return them."""
    hands = random.Random(seed)
    friends = hands.sample(list(cohort.nodes), len(ways))
    for node, way in zip(friends, ways, strict=True):
        honest = cohort.nodes[node]
        cheat = Cheat(node, honest.key, honest.policy, honest.roster)
        cheat.way, cheat.hands, cheat.friends = way, random.Random(hands.random()), frozenset(friends)
        cohort.nodes[node] = cheat
    return friends


def require_evidence(cohort):
    """Whoever is blamed is convicted by the evidence, with public keys alone, and no honest node ever is."""
    found = cohort.last.evidence
    if not cohort.blamed:
        assert found is None
        return
    told = convictions(evidence_from(json.loads(json.dumps(found.to_json()))), cohort.roster, COLLUSION)
    assert cohort.blamed.items() <= told, (cohort.blamed, told)
    assert not {node for node, _ in told} & {
        n for n, each in cohort.nodes.items() if not isinstance(each, Cheat)
    }


def play(cohort, ways, seed=0, silent=None, lost=None):
    """Run an attempt with cheats, and hold it against what an honest node is promised; return outcome and cheats.

    Args:
      cohort: before the attempt.
      ways: of the cheats.
      seed: picks them.
      silent: nodes that fall silent, by the stage.
      lost: stage from which one honest node is lost, by accident.
    """
    cheats = corrupt(cohort, ways, seed)
    silent = {stage: list(nodes) for stage, nodes in (silent or {}).items()}
    gone = random.Random(seed).choice([node for node in cohort.nodes if node not in cheats])
    if lost is not None:
        silent.setdefault(lost, []).append(gone)
    for node, way in zip(cheats, ways, strict=True):
        if way in SILENT_FROM:
            silent.setdefault(SILENT_FROM[way], []).append(node)
    vectors = cohort.vectors(DIMENSION, seed)
    honest = set(cohort.nodes) - set(cheats)
    stays = honest - {gone} if lost in STAGES[: STAGES.index("confirm")] else honest
    outcome = cohort.run(vectors, silent)
    require_evidence(cohort)
    # What two can still do: one deals another mask seed and vanishes, and the other is in the sum and does not reveal the
    # mask of the two. Nobody else knows it: the round is lost, and the first is named.
    mute = {node for stage in ("confirm", "reveal") for node in silent.get(stage, ())}
    mute |= {node for node, way in zip(cheats, ways, strict=True) if way in ("nonsense", "no mask keys")}
    mute |= {
        node
        for node, way in zip(cheats, ways, strict=True)
        if "wrong mask keys" in way and cohort.suite in (2, 3)
    }
    if isinstance(outcome, Abandoned) and mute and SILENT_FROM.keys() & set(ways):
        assert {Fault.WRONG_SEED, Fault.WRONG_SECRET} & set(cohort.blamed.values())
        assert not honest & cohort.blamed.keys()
        return outcome, cheats
    assert isinstance(outcome, OpenedSum), (ways, outcome, cohort.refusals, cohort.dropped)
    # A mask between two cheats about which they disagree is the vector of one of them, which it may choose anyway.
    if not any("wrong mask keys" in way for way in ways) or not SILENT_FROM.keys() & set(ways):
        assert np.array_equal(outcome.total, total(vectors, outcome.survivors, 32))
    assert stays <= set(outcome.survivors)
    assert not honest & cohort.blamed.keys() and not honest & cohort.refusals.keys()
    assert all(cohort.charged[node] == 1 for node in stays)
    return outcome, cheats


NAMED = {
    "degree too high": Fault.BAD_DEAL,
    "degree hidden": Fault.BAD_DEAL,
    "another mask seed, then silence": Fault.WRONG_SEED,
    "another mask key": Fault.WRONG_SEED,
    "mask key of the twist": Fault.WRONG_SEED,
    "wrong shares": Fault.BAD_DEAL,
    "a wrong share to some": Fault.BAD_DEAL,
    "wrong shares of the mask": Fault.BAD_DEAL,
    "shares too large": Fault.BAD_DEAL,
    "garbage seals": Fault.BAD_DEAL,
    "garbage to one": Fault.BAD_DEAL,
    "garbage commitments": Fault.BAD_DEAL,
    "garbage proof": Fault.BAD_DEAL,
    "false complaint of all": Fault.FALSE_COMPLAINT,
    "false complaint with a proof": Fault.FALSE_COMPLAINT,
    "false complaint with another's proof": Fault.FALSE_COMPLAINT,
    "false complaint, then wrong mask keys": Fault.FALSE_COMPLAINT,
    "wrong reveal": Fault.WRONG_SHARE,
    "wrong reveal of one": Fault.WRONG_SHARE,
    "reveal off by the prime": Fault.WRONG_SHARE,
    "another seed committed": Fault.WRONG_COMMITMENT,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [5, 20])
def test_one_cheat_costs_nobody_else_anything(size, way):
    cohort = cohort_of(size)
    outcome, (cheat,) = play(cohort, [way])
    assert cohort.blamed.get(cheat) == NAMED.get(way)
    if cohort.blamed.get(cheat) in (Fault.BAD_DEAL, Fault.FALSE_COMPLAINT):
        assert cheat not in outcome.survivors and cheat not in cohort.charged


@pytest.mark.parametrize(
    "way",
    ["degree too high", "degree hidden", "garbage proof", "wrong reveal of one", "another seed committed"],
)
def test_one_cheat_on_a_ring_is_named_and_nobody_else(way):
    """There each dealer has other holders, and each share that is revealed is looked at."""
    cohort = Cohort(24, 8, 12, minimum=4)
    _, (cheat,) = play(cohort, [way])
    assert cohort.blamed == {cheat: NAMED[way]}


@pytest.mark.parametrize("dead", [0, 8, -1])
@pytest.mark.parametrize("suite", sorted(SUITES))
def test_wrong_mask_key_of_a_dead_node_is_detected_and_avoided(suite, dead):
    """Of lower and of higher nodes: with ML-KEM the lower one of a pair makes its secret."""
    cohort = cohort_of(20, suite)
    (liar,) = corrupt(cohort, ["wrong mask keys"])
    vectors, dead = cohort.vectors(DIMENSION), [node for node in cohort.nodes if node != liar][dead]
    outcome = cohort.run(vectors, {"mask": [dead]})
    assert np.array_equal(outcome.total, total(vectors, outcome.survivors, 32))
    assert cohort.blamed == {liar: Fault.WRONG_MASK} and len(outcome.survivors) == 19


@pytest.mark.parametrize("suite", [2, 3])
def test_a_false_claim_about_a_mask_that_no_seed_gives_opens_no_sum(suite):
    """The dealer's seed is of another key, so that only its neighbours' claims could take its masks off."""
    cohort = cohort_of(20, suite)
    outcome, (dealer, liar) = play(cohort, ["another mask seed, then silence", "wrong mask keys"])
    assert isinstance(outcome, Abandoned)
    assert cohort.blamed == {dealer: Fault.WRONG_SEED, liar: Fault.WRONG_MASK}


def test_shares_of_two_mask_seeds_convict_their_dealer():
    """Right shares to those who come first, and others to the rest, each as its commitment says."""
    cohort = cohort_of(20)
    node = list(cohort.nodes)[-1]
    old = cohort.nodes[node]
    cheat = cohort.nodes[node] = Cheat(node, old.key, old.policy, old.roster)
    cheat.way, cheat.hands, cheat.friends = "shares of two mask seeds", random.Random(0), frozenset({node})
    vectors = cohort.vectors(DIMENSION)
    outcome = cohort.run(vectors, {"mask": [node]})
    assert np.array_equal(outcome.total, total(vectors, outcome.survivors, 32))
    assert cohort.blamed == {node: Fault.WRONG_SEED}
    require_evidence(cohort)


def test_two_revealers_of_wrong_shares_cost_nothing():
    """Windows went around one of them; commitments say which share is wrong, whatever their number."""
    cohort = cohort_of(20)
    _, cheats = play(cohort, ["wrong reveal", "wrong reveal of one"])
    assert cohort.blamed == dict.fromkeys(cheats, Fault.WRONG_SHARE)


def test_wrong_shares_do_not_count_as_answers_that_are_enough():
    """Where the link waits for some number of answers only, it goes on waiting for right ones."""
    cohort = cohort_of(20)
    cheats = corrupt(cohort, ["wrong reveal", "wrong reveal of one"])
    vectors = cohort.vectors(DIMENSION)
    attempt = cohort.attempt(DIMENSION)
    result = attempt.proposal()
    while STAGE_OF[attempt.due] != "reveal":
        cohort.exchange(attempt, STAGE_OF[attempt.due], result, vectors)
        result = attempt.advance(MODEL)
    first = [*cheats, *[node for node in cohort.nodes if node not in cheats][:15]]
    cohort.exchange(attempt, "reveal", {node: result[node] for node in first}, vectors)
    assert not attempt.has(17) and attempt.has(15) and set(cheats) <= attempt.waiting
    assert attempt.blamed == dict.fromkeys(cheats, Fault.WRONG_SHARE)
    again = cohort.traffic[-17][3]
    with pytest.raises(Refused, match="bad_share"):
        attempt.take(cheats[0], again)
    opened = attempt.advance()
    assert np.array_equal(opened.total, total(vectors, opened.survivors, 32))


@pytest.mark.parametrize("suite", [1, 2])
def test_a_reveal_that_its_node_did_not_sign_is_none(suite):
    """Whoever reveals wrong shares under another signature would escape a name, and could reveal again."""
    cohort = cohort_of(20, suite)
    (cheat,) = corrupt(cohort, ["wrong reveal"])
    node = cohort.nodes[cheat]
    reveal = node._reveal
    node._reveal = lambda attempt: (
        setattr(attempt, "acceptance", bytes(len(attempt.acceptance))) or reveal(attempt)
    )
    vectors = cohort.vectors(DIMENSION)
    outcome = cohort.run(vectors)
    assert cohort.dropped == {cheat: Reason.BAD_SIGNATURE} and not cohort.blamed
    assert (
        np.array_equal(outcome.total, total(vectors, outcome.survivors, 32)) and len(outcome.survivors) == 20
    )


def test_revealer_of_wrong_shares_may_not_reveal_again():
    """The committed seed of one that reveals wrong shares is found to be another one whenever reveals are weighed."""
    cohort = cohort_of(20)
    (cheat,) = corrupt(cohort, ["wrong reveal"])
    cohort.nodes[cheat]._resealed = lambda _, said: replace(said, seed=bytes(len(said.seed)))
    vectors, attempt = cohort.vectors(DIMENSION), cohort.attempt(DIMENSION)
    result = attempt.proposal()
    while STAGE_OF[attempt.due] != "reveal":
        cohort.exchange(attempt, STAGE_OF[attempt.due], result, vectors)
        result = attempt.advance(MODEL)
    cohort.exchange(attempt, "reveal", result, vectors)
    again = next(reply for stage, node, _, reply in cohort.traffic if (stage, node) == ("reveal", cheat))
    for _ in range(2):
        assert attempt.has(19) and attempt.blamed == {cheat: Fault.WRONG_SHARE}
        with pytest.raises(Refused, match="bad_share"):
            attempt.take(cheat, again)


@pytest.fixture(scope="module")
def reveals():
    """What all of a cohort of 12 reveal, one of them dead, of seeds that seven shares give."""
    cohort = Cohort(12, 7)
    attempt, vectors = cohort.attempt(DIMENSION), cohort.vectors(DIMENSION)
    dead, *living = cohort.nodes
    result = attempt.proposal()
    while isinstance(result, dict):
        gone = [dead] if STAGE_OF[attempt.due] in ("mask", "confirm", "reveal") else []
        cohort.exchange(attempt, STAGE_OF[attempt.due], result, vectors, gone)
        if STAGE_OF[attempt.due] == "reveal":
            break
        result = attempt.advance(MODEL)
    assert not cohort.refusals
    made = Reveals(attempt._dealings, frozenset(living), attempt._shares, 2)
    return made, dead, living


def changed(made, holders, errors, owner):
    """Reveals of these holders alone, with errors that are added to the shares of one owner, by holder."""
    shares = {holder: dict(made.shares[holder]) for holder in holders}
    for holder, error in errors.items():
        number = (int.from_bytes(shares[holder][owner], "big") + error) % PRIME
        shares[holder][owner] = number.to_bytes(32, "big")
    return replace(made, shares=shares)


@pytest.mark.parametrize("count", [7, 8, 9, 11])
def test_right_shares_give_the_seeds_without_any_member(reveals, count):
    made, dead, living = reveals
    honest, _ = made.opened()
    for holders in (living[:count], living[-count:]):
        seeds, blamed = changed(made, holders, {}, dead).opened()
        enough = set(honest) - (set(holders) if count == 7 else set())  # nobody holds a share of itself
        assert not blamed and seeds == {owner: honest[owner] for owner in enough}


def test_wrong_shares_of_an_unchanged_seed_are_detected(reveals):
    """Two liars add what Lagrange's weights take away: weights that are drawn afterwards do not."""
    made, dead, living = reveals
    points = made.dealings.agreed.points
    for owner in (dead, living[4]):
        own, holders = points[owner], [node for node in living if node != owner]
        first, second = holders[:2]

        def weight(node, holders=holders, own=own):
            others = [points[other] for other in holders if other != node]
            below = pow(math.prod(at - points[node] for at in others), -1, PRIME)
            return math.prod(others) * below % PRIME

        error = pow(weight(second), -1, PRIME) * weight(first) % PRIME
        lied = changed(made, living, {first: 1, second: -error}, owner)
        seeds, blamed = lied.opened()
        assert blamed == dict.fromkeys((first, second), Fault.WRONG_SHARE)
        assert seeds[owner] == made.opened()[0][owner]


@pytest.mark.parametrize("alive", [False, True])
def test_liars_between_few_honest_holders_are_detected(reveals, alive):
    """Of five honest holders and two liars, at a threshold of seven, liars can fit wrong shares to the right seed."""
    made, dead, living = reveals
    points, holders, owner = made.dealings.agreed.points, living[:7], living[7] if alive else dead
    honest = [points[holder] for holder in holders[2:]]

    def error(node):  # of degree 6, zero at zero and at the honest points
        return math.prod(points[node] - at for at in (0, *honest)) % PRIME

    errors = {node: error(node) for node in holders[:2]}
    seeds, blamed = changed(made, [*holders, *[owner] * alive], errors, owner).opened()
    assert blamed == dict.fromkeys(holders[:2], Fault.WRONG_SHARE) and owner not in seeds


@settings(max_examples=30)
@given(st.data())
def test_revealer_of_a_wrong_share_alone_is_named(reveals, data):
    made, dead, living = reveals
    holders = data.draw(st.lists(st.sampled_from(living), min_size=10, unique=True))
    liars = data.draw(st.sets(st.sampled_from(holders), max_size=2))
    owner = data.draw(st.sampled_from([node for node in (dead, *living) if node not in liars]))
    errors = {liar: data.draw(st.integers(1, PRIME - 1)) for liar in liars}
    seeds, blamed = changed(made, sorted(holders), errors, owner).opened()
    assert blamed == dict.fromkeys(liars, Fault.WRONG_SHARE)
    honest, _ = made.opened()
    assert seeds.items() <= honest.items()


def test_nobody_is_charged_before_shares_are_checked():
    """A model for a node that has not held its shares against their commitments computes nothing."""
    cohort = Cohort(5, 3)
    vectors, victim = cohort.vectors(DIMENSION), next(iter(cohort.nodes))
    attempt = cohort.attempt(DIMENSION)
    cohort.exchange(attempt, "advertise", attempt.proposal(), vectors)
    cohort.exchange(attempt, "share", attempt.advance(), vectors)
    early = write(messages.Inbox(attempt.context, MODEL, tuple(cohort.nodes)))
    with pytest.raises(Refused, match="out_of_order"):
        cohort.nodes[victim].handle(early, NOW, Work(MODEL, lambda terms: pytest.fail("charged")))


def test_secret_is_not_disclosed_for_an_unsigned_deal():
    """A server that spoils seals, to have a holder complain of an honest dealer, learns no secret of the two."""
    cohort = Cohort(5, 3)
    attempt, vectors = cohort.attempt(DIMENSION), cohort.vectors(DIMENSION)
    cohort.exchange(attempt, "advertise", attempt.proposal(), vectors)
    cohort.exchange(attempt, "share", attempt.advance(), vectors)
    victim, dealer, *_ = cohort.nodes
    parcels = read(attempt.advance()[victim], messages.NeighbourShares)
    spoiled = replace(parcels, sealed=bytes(len(parcels.sealed)))
    checked = read(cohort.nodes[victim].handle(write(spoiled), NOW)[:-28], messages.Checked)
    assert dealer in checked.accused
    deal_of = replace(attempt._deals[dealer], sealed=bytes(len(attempt._deals[dealer].sealed)))
    with pytest.raises(Refused, match="bad_signature"):
        cohort.nodes[victim].handle(write(messages.Disputed(attempt.context, (dealer,), (deal_of,))), NOW)


def forgeries(told, honest, draw):
    """Yield evidence in which one thing is another, a byte or the node that it is about, or is left out."""
    for _ in range(24):
        made = json.loads(json.dumps(told))
        fields = [name for name in made if isinstance(made[name], dict) and made[name]]
        texts = [name for name in made if isinstance(made[name], str) and made[name]]
        name = draw.choice([*fields, *fields, *texts])
        held, key = (made, name) if name not in fields else (made[name], draw.choice(list(made[name])))
        if isinstance(held[key], dict):
            held, key = held[key], draw.choice(list(held[key]))
        if held is not made and (kind := draw.random()) < 0.6:
            moved = held.pop(key)
            if kind < 0.4:
                held[str(draw.choice(honest))] = moved
        elif held[key]:
            at = 2 * draw.randrange(len(held[key]) // 2)
            held[key] = f"{held[key][:at]}{draw.randrange(256):02x}{held[key][at + 2 :]}"
        yield made


@pytest.mark.parametrize("suite", [1, 2])
@pytest.mark.parametrize(
    "way",
    [
        "garbage seals",
        "false complaint with a proof",
        "wrong reveal",
        "wrong mask keys",
        "another mask key",
        "another escrow",
    ],
)
def test_forged_evidence_convicts_no_honest_node(suite, way):
    cohort, draw = cohort_of(12, suite, lost=1), random.Random(0)
    if suite == 1 and way == "another escrow":
        way = "another seed committed"
    _, cheats = play(cohort, [way], lost="mask")
    honest = [node for node in cohort.nodes if node not in cheats]
    if (found := cohort.last.evidence) is None:
        assert suite == 2 and way == "false complaint with a proof"
        return
    read = 0
    for made in forgeries(found.to_json(), honest, draw):
        try:
            told = convictions(evidence_from(made), cohort.roster, COLLUSION)
        except Refused:
            continue
        read += 1
        assert not {node for node, _ in told} & set(honest)
    assert read > 1  # of most a signature does not hold


def test_forged_reveals_and_complaints_need_a_signature():
    """What a server makes up about an honest node: it has everything but the node's signature."""
    for way, fields in {
        "wrong reveal": ("reveals", "acceptance"),
        "false complaint of all": ("complaints",),
    }.items():
        cohort = cohort_of(12)
        _, (cheat,) = play(cohort, [way])
        told, victim = cohort.last.evidence.to_json(), next(node for node in cohort.nodes if node != cheat)
        for name in fields:
            told[name][str(victim)] = told[name].pop(str(cheat))
        with pytest.raises(Refused, match=r"bad_signature|malformed"):
            convictions(evidence_from(told), cohort.roster, COLLUSION)
        with pytest.raises(Refused, match="wrong_cohort"):
            convictions(cohort.last.evidence, replace(cohort.roster, version=4), COLLUSION)


def test_a_complaint_of_no_neighbour_convicts_nobody():
    """On a ring it would be held against what the dealer sealed for another."""
    cohort = Cohort(24, 8, 12, minimum=4)
    attempt, seeds = until_checks(cohort, DIMENSION)
    agreed = attempt._agreed
    victim, holder = next(
        (victim, holder)
        for victim in cohort.nodes
        for holder in cohort.nodes
        if holder != victim and holder not in agreed.neighbours(victim)
    )
    secret = key_from_seed(seeds[holder], Purpose.SHARE_KEY)
    proof = disclose(secret, agreed.by_node[victim].share_key, agreed.cohort)
    keys = {holder: cohort.nodes[holder].key}
    with pytest.raises(Refused, match="malformed"):
        convictions(accusation(attempt, victim, keys, {holder: proof}), cohort.roster, COLLUSION)


def test_complaints_of_strangers_convict_nobody():
    """Of a federation more members may collude than of a cohort: those who do not take part have nothing to say."""
    cohort = Cohort(16, 7, minimum=4, suite=2, collusion=COLLUSION)
    everybody = cohort.nodes
    cohort.nodes, cohort.size = dict(list(everybody.items())[:12]), 12
    attempt, _ = until_checks(cohort, DIMENSION)
    keys = {node: everybody[node].key for node in list(everybody)[12:]}
    assert len(keys) > colluders(12, COLLUSION)
    found = accusation(attempt, next(iter(cohort.nodes)), keys, dict.fromkeys(keys, bytes(PROOF_BYTES)))
    with pytest.raises(Refused, match="malformed"):
        convictions(found, cohort.roster, COLLUSION)


@pytest.mark.parametrize("suite", [1, 4])
def test_version_three_gives_the_same_sum(suite):
    """A device of this release goes on under a server of an earlier one, which reads no signatures of reveals."""
    cohort = cohort_of(5, suite)
    vectors, attempt = cohort.vectors(DIMENSION), cohort.attempt(DIMENSION, protocol_version=3)
    result = attempt.proposal()
    while isinstance(result, dict):
        cohort.exchange(attempt, STAGE_OF[attempt.due], result, vectors)
        result = attempt.advance(MODEL)
    assert np.array_equal(result.total, total(vectors, result.survivors, 32))
    last = [reply for stage, _, _, reply in cohort.traffic if stage == "reveal"]
    assert all(len(msgpack.unpackb(reply[:-28])) == 5 for reply in last)


def behaviours(size, seed, suite=1):
    """Return ways for as many cheats as the cohort stands, and who of them falls silent when."""
    draw = random.Random(seed)
    bad = colluders(size, COLLUSION)
    all_ways = (*WAYS, *HYBRID_WAYS) if suite in (2, 3) else WAYS
    ways = [draw.choice(all_ways) for _ in range(draw.randint(1, bad))]
    quiet = [draw.choice(STAGES) if draw.random() < 0.3 else None for _ in ways]
    return ways, quiet


def holds(size, seed, suite=1, lost=None):
    ways, quiet = behaviours(size, seed, suite)
    cohort = cohort_of(size, suite, lost=lost is not None)
    hands = random.Random(seed)
    silent = {}
    for node, stage in zip(hands.sample(list(cohort.nodes), len(ways)), quiet, strict=True):
        if stage is not None:
            silent.setdefault(stage, []).append(node)
    play(cohort, ways, seed, silent, lost)


def test_round_ends_before_anybody_pays_without_the_cheats():
    cohort = Cohort(5, 3, minimum=5, collusion=COLLUSION)
    (cheat,) = corrupt(cohort, ["garbage seals"])
    assert cohort.run(cohort.vectors(DIMENSION)) == Abandoned(Reason.TOO_FEW)
    assert cohort.blamed == {cheat: Fault.BAD_DEAL} and not cohort.charged


HYBRID_NAMED = {  # nobody else can tell whose secret is the right one: more complaints than may be lies are believed
    "garbage seals": Fault.BAD_DEAL,
    "another ciphertext": Fault.BAD_DEAL,
    "another mask secret committed": Fault.BAD_DEAL,
    "another escrow": Fault.WRONG_SECRET,
    "another KEM key": Fault.WRONG_SEED,
}
HARMLESS = (
    "garbage to one",
    "another ciphertext to one",
    "false complaint with a proof",
    "false complaint of all",
)


@pytest.mark.parametrize("lost", [None, "mask", "reveal"])
@pytest.mark.parametrize("way", [*HYBRID_NAMED, *HARMLESS, "false complaint, then wrong mask keys"])
def test_hybrid_shares_go_around_cheats(way, lost):
    """Two of which one complains of the other add no mask that one of them could be wrong about afterwards."""
    cohort = cohort_of(20, suite=2, lost=lost is not None)
    if not isinstance((played := play(cohort, [way], seed=1, lost=lost))[0], OpenedSum):
        assert lost == "reveal" and way in SILENT_FROM
    outcome, (cheat,) = played
    expected = HYBRID_NAMED.get(way)
    if way.endswith("wrong mask keys") and lost == "mask":
        (dead,) = set(cohort.nodes) - set(outcome.survivors)
        expected = None if dead in cohort.last._complaints[cheat].accused else Fault.WRONG_MASK
    assert cohort.blamed.get(cheat) is expected
    if (
        expected is not Fault.BAD_DEAL and way not in SILENT_FROM
    ):  # who complains of all has a mask with nobody
        assert (cheat in outcome.survivors) is (way != "false complaint of all")


def test_masks_left_out_are_confirmed_by_all():
    """Whoever is told of other masks than the others is in another round, of which nothing is opened."""
    cohort = cohort_of(20, suite=2, lost=1)
    (cheat,) = corrupt(cohort, ["false complaint with a proof"])
    bystander = next(node for node in cohort.nodes if node != cheat)

    def change(stage, node, message):
        if (stage, node) != ("mask", bystander):
            return message
        said = read(message, messages.Inbox)
        assert said.void
        return write(
            replace(said, void=tuple(each for each in said.void if bystander in (each.holder, each.dealer)))
        )

    vectors = cohort.vectors(DIMENSION)
    outcome = cohort.run(vectors, message_wire=change)
    assert cohort.dropped == {bystander: Reason.WRONG_COHORT} and bystander not in outcome.survivors
    assert np.array_equal(outcome.total, total(vectors, outcome.survivors, 32))


def test_a_peer_without_a_mask_hides_nobody():
    """Three of the others have none with it, since it complains of them."""
    cohort = cohort_of(20, suite=2, lost=1)
    (cheat,) = corrupt(cohort, ["false complaint with a proof"])
    peers = frozenset({cohort.roster.member(cheat, NOW).fingerprint})
    for node in cohort.nodes.values():
        if node.node != cheat:
            node.policy = replace(node.policy, peers=peers, peers_at_least=1)
    assert isinstance(cohort.run(cohort.vectors(DIMENSION)), OpenedSum)
    assert list(cohort.refusals.values()) == [Reason.POLICY] * 3
    assert len(cohort.charged) == 17 and not cohort.refusals.keys() & cohort.charged.keys()


@pytest.mark.parametrize("seed", range(SAMPLE_RUNS))
def test_sample_of_random_cheats(seed):
    size, suite = (5, 12, 20)[seed % 3], 1 + seed // 3 % 4
    holds(size, seed, suite, lost=(None, "mask", "reveal")[seed // 12 % 3] if size > 5 else None)


@pytest.mark.campaign
@pytest.mark.parametrize("lost", [None, "mask", "confirm", "reveal"])
@pytest.mark.parametrize("suite", sorted(SUITES))
@pytest.mark.parametrize("size", [5, 12, 20])
def test_campaign_of_random_cheats(size, suite, lost):
    """In a cohort of five nobody can be lost beside a cheat."""
    for seed in range(CAMPAIGN_RUNS // 48):
        holds(size, 10**6 + seed, suite, lost if size > 5 else None)


@pytest.mark.campaign
@pytest.mark.parametrize("lost", [None, "mask"])
@pytest.mark.parametrize("suite", sorted(SUITES))
@pytest.mark.parametrize("size", [50, 140])
def test_campaign_of_random_cheats_in_large_cohorts(size, suite, lost):
    for seed in range(2):
        holds(size, 10**7 + seed, suite, lost)


# What a deal commits to, and what a complaint shows.


def dealt(threshold=4, points=(1, 2, 3, 5, 8, 9)):
    seeds = new_secret(), new_secret()
    made = deal(b"c" * 32, 7, *seeds, threshold, points)
    claim = Claim(label_of(b"c" * 32, 7), challenge_of(b"c" * 32, 7, digest_of(made.commitments)))
    rows = zip(made.shares, cut(made.proof, 32), cut(made.commitments, COMMITMENT_BYTES), strict=True)
    return seeds, points, claim, list(rows)


def judged(claim, point, pair, value, commitments):
    check_share(claim, point, pair, int.from_bytes(value, "big"), commitments)


def test_shares_fit_their_commitments_and_give_the_seeds():
    seeds, points, claim, rows = dealt()
    for point, row in zip(points, rows, strict=True):
        judged(claim, point, *row)
    for place, seed in enumerate(seeds):
        shares = {p: row[0][32 * place :][:32] for p, row in zip(points, rows, strict=True)}
        assert combine(dict(list(shares.items())[-4:]), 4) == seed
    assert 1 << SOUNDNESS_BITS < PRIME and SOUNDNESS_BITS >= 64


@pytest.mark.parametrize("field", [0, 1, 2])
@settings(max_examples=20)
@given(st.integers(0, 5), st.integers(0, 255))
def test_nothing_of_a_share_can_be_changed(field, place, bit):
    _, points, claim, rows = dealt()
    row = list(rows[place])
    changed = bytearray(row[field])
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    row[field] = bytes(changed)
    with pytest.raises(Refused, match="bad_share"):
        judged(claim, points[place], *row)
    for other in (points[place - 1], 100):
        with pytest.raises(Refused, match="bad_share"):
            judged(claim, other, *rows[place])


@settings(max_examples=40)
@given(
    st.sets(
        st.integers(1, 1000) | st.integers(1 << 61, 1 << 63) | st.integers(1, PRIME - 1),
        min_size=4,
        max_size=30,
    ),
    st.data(),
)
def test_parity_of_values_tells_their_degree_without_any_one_point(points, data):
    points = sorted(points)
    threshold = data.draw(st.integers(1, len(points) - 2))
    missing = data.draw(st.sampled_from(points))

    def told(degree):
        (row,) = values([polynomial(new_secret(), degree)], points)
        weights = parity(points, codeword(points, len(points) - threshold - 1))
        rows = zip(points, weights, row, strict=True)
        return sum(w * (p - missing) * v for p, w, v in rows if p != missing) % PRIME == 0

    assert told(threshold) and not told(threshold + 1)
    assert parity(points, codeword(points, 0)) == [0] * len(points)
    seed, dealt = values([row := polynomial(new_secret(), threshold)], points)[0], points[-threshold:]
    shares = {point: share.to_bytes(32, "big") for point, share in zip(points, seed, strict=True)}
    assert combine({point: shares[point] for point in dealt}, threshold) == row[0].to_bytes(32, "big")


def test_complaint_discloses_the_secret_of_its_pair_alone():
    for _ in range(8):
        own, peer = new_key(), new_key()
        keys = public_of(own), public_of(peer)
        secret = own.exchange(X25519PublicKey.from_public_bytes(keys[1]))
        proof = prove(own, keys[1], b"c" * 32)
        assert open_proof(proof, *keys, b"c" * 32) == secret
    wrong = [(proof, *keys, b"d" * 32), (proof, *reversed(keys), b"c" * 32)]
    wrong += [(proof, keys[0], public_of(new_key()), b"c" * 32), (bytes(PROOF_BYTES), *keys, b"c" * 32)]
    for at in (0, 31, 32, 63, 64, 95):
        wrong.append((proof[:at] + bytes([proof[at] ^ 1]) + proof[at + 1 :], *keys, b"c" * 32))
    for arguments in wrong:
        with pytest.raises(Refused, match="bad_signature"):
            open_proof(*arguments)


def test_a_secret_off_by_a_point_of_small_order_is_refused():
    """Its proof can hold for one challenge in eight: the order of the secret's point is checked, too."""
    own, peer = new_key(), new_key()
    keys = public_of(own), public_of(peer)
    small = complaint._with_y(0)  # of order 4
    assert complaint._packed(complaint._times(4, small)) == complaint._packed(complaint._NEUTRAL)
    honest = prove(own, keys[1], b"c" * 32)
    moved = complaint._plus(complaint._unpacked(honest[:32]), small)
    with pytest.raises(Refused, match="bad_signature"):
        open_proof(complaint._packed(moved) + honest[32:], *keys, b"c" * 32)


def test_the_curve_is_that_of_rfc_8032():
    assert complaint._packed(complaint._BASE) == bytes([0x58]) + bytes([0x66]) * 31
    assert complaint._packed(complaint._times(ORDER, complaint._BASE)) == complaint._packed(
        complaint._NEUTRAL
    )
    assert on_curve(public_of(new_key())) and not on_curve((PRIME - 1).to_bytes(32, "little"))
