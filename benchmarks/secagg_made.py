"""Server's side of secure aggregation for more clients than one machine can play: theirs is made, its is real.

A made client has real keys, signatures and tags, and what it sends costs the server what a real reply does; it leaves
out what the server never sees. The shares it seals are zeros, which nobody opens; its polynomials are constant, so that
a share it reveals is the seed; the keys of masks that it reveals are zeros, since its seed gives them. It adds none
of the masks that cancel between two living clients.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np

from ..privacy.secagg.attempt import NodeAttempt, masked, tag_reply
from ..privacy.secagg.bindings import (
    deal_body,
    mask_sign,
    pair_mask_info,
    private_mask_key,
    reveal_body,
)
from ..privacy.secagg.client import Participant
from ..privacy.secagg.deal import (
    challenge_of,
    digest_of,
    label_of,
    mask_commitment,
    private_commitment,
    seed_commitment,
)
from ..privacy.secagg.messages import (
    SEALED_BYTES,
    SHARE_BYTES,
    Checked,
    Confirmation,
    Revealed,
    SealedShares,
    write,
)
from ..privacy.secagg.server import OpenedSum, ServerAttempt
from ..privacy.secagg.shamir import PRIME
from ..privacy.secagg.suite import KEY_BYTES, SIGNATURE_BYTES, agree, key_from_seed, public_of, sign
from .secagg_case import Case, Clock
from .tables import Row

STAGES = ("adverts", "shares", "checks", "vectors", "confirmations", "opening")
_MODEL = bytes(32)
_MEBI = float(1 << 20)


class _Memory:
    """What is left of memory taken while this is entered, and the most there was at once, in traced bytes."""

    def __init__(self) -> None:
        self.most = self._held = self._before = 0

    def __enter__(self) -> None:
        self._before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()

    def __exit__(self, *_: object) -> None:
        now, peak = tracemalloc.get_traced_memory()
        self.most = max(self.most, self._held + peak - self._before)
        self._held += now - self._before


def server_times(case: Case, attempt: ServerAttempt, nodes: Sequence[Participant]) -> Row:
    """Return the server's CPU milliseconds in each exchange of one round, and in all.

    Args:
      case: the clients, and who vanishes.
      attempt: the server's side of the round.
      nodes: the made clients.
    """
    clocks = {stage: Clock() for stage in STAGES}
    _play(case, attempt, nodes, clocks)
    took = {stage: clock.milliseconds for stage, clock in clocks.items()}
    return {name: round(ms) for name, ms in {**took, "all": sum(took.values())}.items()}


def server_memory(case: Case, attempt: ServerAttempt, nodes: Sequence[Participant]) -> float:
    """Return the most that the server takes at once in one round, its messages included, in MiB.

    Args:
      case: the clients, and who vanishes.
      attempt: the server's side of the round.
      nodes: the made clients.
    """
    memory = _Memory()
    tracemalloc.start()
    _play(case, attempt, nodes, dict.fromkeys(STAGES, memory))
    tracemalloc.stop()
    return round(memory.most / _MEBI, 1)


def _play(
    case: Case,
    attempt: ServerAttempt,
    nodes: Sequence[Participant],
    watches: Mapping[str, AbstractContextManager[object]],
) -> None:
    alive = set(case.survivors())
    made = _Made(attempt, nodes, alive)
    replies = (made.advert, made.shares, made.check, made.vector, made.confirmation, made.revealed)
    result: object = attempt.proposal()
    for reply_of, (stage, watch) in zip(replies, watches.items(), strict=True):
        for node in sorted(attempt.waiting if stage in STAGES[:3] else attempt.waiting & alive):
            reply = reply_of(nodes[node])
            with watch:
                attempt.take(node, reply)
        with watch:
            result = attempt.advance(_MODEL)
    assert isinstance(result, OpenedSum), result
    if len(result.survivors) != len(alive) or (result.total != len(alive)).any():
        raise AssertionError("the sum is not the survivors'")


@dataclass(frozen=True)
class _Made:
    """What clients reply, each of whom sends a vector of ones, out of what the server knows."""

    attempt: ServerAttempt
    nodes: Sequence[Participant]
    alive: set[int]

    def advert(self, node: Participant) -> bytes:
        server = self.attempt
        return node._advertise(server._terms, server._candidates, public_of(server._key))

    def shares(self, node: Participant) -> bytes:
        agreed = self.attempt._agreed
        held, peers = _held(node), agreed.neighbours(node.node)
        label, blinding = label_of(agreed.cohort, node.node), bytes(SHARE_BYTES)
        pairs = [
            private_commitment(label, agreed.points[peer], held.own_seed, blinding)
            + mask_commitment(label, agreed.points[peer], held.mask_seed)
            for peer in peers
        ]
        commitments, sealed = b"".join(pairs), bytes(SEALED_BYTES * len(peers))
        challenge = challenge_of(agreed.cohort, node.node, digest_of(commitments))
        value = challenge * int.from_bytes(held.own_seed, "big") % PRIME
        proof = value.to_bytes(SHARE_BYTES, "big") * len(peers)
        seed = seed_commitment(label, held.own_seed)
        unsigned = SealedShares(agreed.cohort, sealed, commitments, proof, seed, bytes(SIGNATURE_BYTES))
        signature = sign(node.key, agreed.cohort, deal_body(node.node, unsigned))
        return tag_reply(held, write(replace(unsigned, signature=signature)))

    def check(self, node: Participant) -> bytes:
        return tag_reply(_held(node), write(Checked(self.attempt._agreed.cohort, ())))

    def vector(self, node: Participant) -> bytes:
        held, agreed, context = _held(node), self.attempt._agreed, self.attempt._round
        secret, info = key_from_seed(held.mask_seed), pair_mask_info(context)
        masks = [(private_mask_key(held.own_seed, context), 1)]
        for peer in agreed.neighbours(node.node):
            if peer not in self.alive:
                key = agree(secret, agreed.by_node[peer].mask_key, info)
                masks.append((key, mask_sign(node.node, peer)))
        return masked(held, np.ones_like(self.attempt._total), masks, context)

    def confirmation(self, node: Participant) -> bytes:
        server = self.attempt
        said = Confirmation(node.node, _MODEL, server._round, server._view, b"")
        signature = sign(node.key, server.context, said.body)
        return tag_reply(_held(node), write(replace(said, signature=signature)))

    def revealed(self, node: Participant) -> bytes:
        seeds = [
            _held(self.nodes[peer]).own_seed if peer in self.alive else _held(self.nodes[peer]).mask_seed
            for peer in self.attempt._agreed.neighbours(node.node)
        ]
        dead = sum(peer not in self.alive for peer in self.attempt._agreed.neighbours(node.node))
        keys = bytes(KEY_BYTES * dead)
        said = Revealed(self.attempt._view, b"".join(seeds), keys, b"")
        body = reveal_body(node.node, said, self.attempt._acceptance(node.node))
        signature = sign(node.key, self.attempt.context, body)
        return tag_reply(_held(node), write(replace(said, signature=signature)))


def _held(node: Participant) -> NodeAttempt:
    (held,) = node.attempts.values()
    return held
