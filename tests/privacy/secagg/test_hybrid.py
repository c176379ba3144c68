"""Suite 2: keys that only X25519 and ML-KEM-768 together give, also when a node is lost and its seed is opened."""

import runpy
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

from fedveil.privacy.secagg import hybrid, messages
from fedveil.privacy.secagg.bindings import pair_mask_info, private_mask_key
from fedveil.privacy.secagg.masks import add_masks
from fedveil.privacy.secagg.messages import FURTHER_BYTES, SEAL_BYTES, read, write
from fedveil.privacy.secagg.refusal import Refused
from fedveil.privacy.secagg.server import OpenedSum
from fedveil.privacy.secagg.suite import KEM_KEY_BYTES, SUITES, agree, derive, key_from_seed
from fedveil.privacy.secagg.transcript import HASH_BYTES, Profile, Purpose

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "secagg_cohort.py"))
Cohort, MODEL, NOW, total = MADE["Cohort"], MADE["MODEL"], MADE["NOW"], MADE["total"]


def hybrid_cohort(size: int = 5, threshold: int = 3, **more: object):
    return Cohort(size, threshold, suite=2, **more)


def test_a_seed_is_the_published_key() -> None:
    """C2SP/CCTV's vector for ML-KEM-768, as in Wycheproof's mlkem_768_test.json."""
    seed = bytes.fromhex(
        "cbfc4405d1b2a3a386c94c25e0f2d5f5ee92cb0388ff4d6aa04223086d51c3fd"
        "24752da14c9fc3b8ae0d9e4a8b1016b8d8fc69e229c03ea2ef08a4ae0cffc37f"
    )
    public = MLKEM768PrivateKey.from_seed_bytes(seed).public_key().public_bytes_raw().hex()
    assert public.startswith("8b9a7354e8c1c17a9898f96caf99bba1c625ae0983c4d26e60c12f59bc25d756")
    assert public.endswith("526e326a6832d3b36efc3102ef")
    assert len(public) == KEM_KEY_BYTES


def test_keys_of_this_version_are_stable() -> None:
    key = hybrid.kem_key(bytes(range(32)))
    assert key.public_key().public_bytes_raw()[:16].hex() == "abc3bca5c5bb97caac6217a07ae1880c"
    assert (
        hybrid.mixed(bytes(32), b"\1" * 32, b"info").hex()
        == "aa91b5ba4bd3874e0f8347c4448fc79a6016f136a89a235f1116a6fc313c205a"
    )


def test_both_secrets_are_needed() -> None:
    one = hybrid.mixed(bytes(32), bytes(32), b"info")
    others = [
        hybrid.mixed(b"\1" + bytes(31), bytes(32), b"info"),
        hybrid.mixed(bytes(32), b"\1" + bytes(31), b"info"),
        hybrid.mixed(bytes(32), bytes(32), b"other"),
    ]
    assert len({one, *others}) == 4


@pytest.mark.parametrize("profile", list(Profile))
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_the_sum_is_exact_whichever_nodes_are_lost(profile: Profile, lost: int) -> None:
    """Lower and higher nodes than the survivors: their masks come back from ciphertexts and from what they sealed."""
    for gone in combinations(range(6), lost):
        cohort = hybrid_cohort(6, 3, profile=profile, minimum=4)
        vectors, nodes = cohort.vectors(20, lost), list(cohort.nodes)
        ended = cohort.run(vectors, {"mask": [nodes[place] for place in gone]})
        assert isinstance(ended, OpenedSum), (gone, ended, cohort.refusals)
        assert len(ended.survivors) == 6 - lost
        assert np.array_equal(ended.total, total(vectors, ended.survivors, 32))


def test_a_ring_and_a_state_between_messages() -> None:
    cohort = hybrid_cohort(12, 6, neighbours=8)
    vectors = cohort.vectors(9)
    ended = cohort.run(vectors, {"mask": [next(iter(cohort.nodes))]})
    assert isinstance(ended, OpenedSum)
    assert np.array_equal(ended.total, total(vectors, ended.survivors, 32))


def test_owner_of_every_x25519_secret_has_no_mask() -> None:
    """What a recording holds, and X25519 broken: masks of X25519 alone leave the vector as it was, under masks."""
    cohort = hybrid_cohort(4, 3)
    vectors, victim = cohort.vectors(50_000), next(iter(cohort.nodes))
    held = {}

    def watch(stage, node, message):
        if stage == "mask" and node == victim:
            (held[victim],) = cohort.nodes[victim].attempts.values()
            held["seeds"] = (held[victim].mask_seed, held[victim].own_seed)
            held["secrets"] = held[victim].mask_secrets
        return message

    assert isinstance(cohort.run(vectors, message_wire=watch), OpenedSum)
    frame = next(reply for stage, node, _, reply in cohort.traffic if (stage, node) == ("mask", victim))
    agreed = held[victim].agreed
    context = agreed.round(agreed.nodes, MODEL)
    info, secret = pair_mask_info(context), key_from_seed(held["seeds"][0])
    peers = agreed.neighbours(victim)
    of_x25519 = {peer: agree(secret, agreed.by_node[peer].mask_key, agreed.mask_info) for peer in peers}
    bare_keys = {peer: derive(key, info) for peer, key in of_x25519.items()}

    def bared(keys: dict[int, bytes]) -> np.ndarray:
        words = np.frombuffer(frame[: -HASH_BYTES - FURTHER_BYTES - SEAL_BYTES], np.uint32).copy()
        masks = [(keys[peer], 1 if peer < victim else -1) for peer in peers]
        add_masks(words, [*masks, (private_mask_key(held["seeds"][1], context), -1)], SUITES[2])
        return words

    left = bared(bare_keys)
    assert abs(np.unpackbits((left - vectors[victim]).view(np.uint8)).mean() - 0.5) < 0.01
    parts = [held["secrets"][at : at + 32] for at in range(0, len(held["secrets"]), 32)]
    assert len(parts) == 3  # the victim is the lowest node: it made all of its pairs' secrets
    whole = {peer: derive(part, info) for peer, part in zip(peers, parts, strict=True)}
    assert np.array_equal(bared(whole), vectors[victim])  # the check can fail


def test_the_keys_of_ml_kem_do_not_follow_from_those_of_x25519() -> None:
    """Were they made from the X25519 private keys, whoever breaks those would have them, too."""
    cohort = hybrid_cohort(4, 3)
    node = next(iter(cohort.nodes))
    reply = cohort.nodes[node].handle(cohort.attempt(3).proposal()[node], NOW)
    (held,) = cohort.nodes[node].attempts.values()
    said = read(reply, messages.Advert)
    private = [
        key_from_seed(held.share_seed, Purpose.SHARE_KEY).private_bytes_raw(),
        key_from_seed(held.mask_seed).private_bytes_raw(),
    ]
    assert said.kem_keys == hybrid.public_keys(held.share_seed, held.mask_seed)
    known = b"".join(hybrid.kem_key(key).public_key().public_bytes_raw() for key in private)
    assert not any(known[at : at + 64] in said.kem_keys for at in range(0, len(known), 64))
    assert not any(key in (held.share_seed, held.mask_seed) for key in private)


@pytest.mark.parametrize("at", [0, 1100, -1])
def test_a_block_changed_on_the_way_opens_nothing(at: int) -> None:
    """The seal of the shares vouches for the block beside them, its part for the mask included."""
    cohort = hybrid_cohort()
    nodes = list(cohort.nodes)
    victim = nodes[-1]  # the highest: every block brings it a secret for a mask

    def change(stage, node, message):
        if (stage, node) != ("check", victim):
            return message
        parcels = read(message, messages.NeighbourShares)
        kem = bytearray(parcels.kem)
        kem[at] ^= 1
        return write(replace(parcels, kem=bytes(kem)))

    vectors = cohort.vectors(9)
    ended = cohort.run(vectors, message_wire=change)
    assert [stage for stage, *_ in cohort.traffic].count(
        "dispute"
    ) == 1  # in which it got the block that was signed
    assert not cohort.refusals and not cohort.blamed
    assert isinstance(ended, OpenedSum) and np.array_equal(ended.total, total(vectors, nodes, 32))


@pytest.mark.parametrize("suite", [1, 2])
def test_keys_of_another_suite_are_dropped_and_refused(suite: int) -> None:
    cohort = Cohort(5, 3, suite=suite)
    attempt, victim = cohort.attempt(3), next(iter(cohort.nodes))
    out = attempt.proposal()
    for node, message in out.items():
        reply = cohort.nodes[node].handle(message, NOW)
        if node == victim:
            advert = read(reply, messages.Advert)
            changed = write(replace(advert, kem_keys=b"" if suite == 2 else bytes(KEM_KEY_BYTES)))
            with pytest.raises(Refused, match="malformed"):
                attempt.take(node, changed)
        attempt.take(node, reply)
    assert isinstance(attempt.advance(), dict)


def test_blocks_of_another_length_are_dropped() -> None:
    with pytest.raises(Refused, match="malformed"):
        hybrid.blocks(bytes(hybrid.CIPHERTEXT_BYTES), [(1, 2)])
    assert len(hybrid.blocks(bytes(hybrid.CIPHERTEXT_BYTES), [(2, 1)])) == 1
