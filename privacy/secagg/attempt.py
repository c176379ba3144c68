"""Attempt in one node's memory: the encoding of its replies, and the signatures that it checks.

In a cohort of hundreds a node checks neither all adverts nor all confirmations. Only its neighbours hold a key or a
share of a node, so they check its advert before they share anything; the others need it only to be a member of the sum.
A quorum signs the hash of all adverts with the survivors, and a signer has checked its neighbours' adverts: fewer than
2t - k of a node's k neighbours collude (`graph.opens_nothing`), so a survivor with that many signing neighbours is
authentic. The advert of any other survivor is checked directly, before a share is revealed. A forged advert can change
the graph only as a colluder's can.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from .bindings import Agreement, agreement, survivors_digest
from .graph import colluders
from .masks import Vector, add_masks
from .messages import FURTHER_BYTES, Advert, Confirmation
from .refusal import Reason, Refused
from .roster import Roster
from .suite import seal, suite_of
from .transcript import AttemptTerms


class Stage(IntEnum):
    """Last step that a node has done in an attempt."""

    ADVERTISED = 0
    SHARED = 1
    CHECKED = 2
    MASKED = 3
    CONFIRMED = 4


# Pairs of a number of survivors and a secret seed of 32 bytes: the noise of this seed may be removed from the node's
# vector if at least that many clients survive.
Openings = tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Work:
    """Computation of a node for a round.

    Attributes:
      model_hash: of the model that this node received, 32 bytes, computed by the node itself.
      vector: called once, in the step that masks. It returns words of the terms' width, shape (d,), which masks then
        overwrite, and `Openings`: seeds of noise in these words that the node reveals with its shares.
      further: returns the parameter of the node's own noise in that vector, in whole grid units, 0 for none; a public
        number, which the server gets under the vector's seal.
    """

    model_hash: bytes
    vector: Callable[[AttemptTerms], tuple[Vector, Openings]]
    further: Callable[[AttemptTerms], int] = lambda _: 0


@dataclass
class NodeAttempt:
    """Memory of a node for one attempt, between messages; seeds, keys, secrets, `held` and `openings` are secret.

    Attributes:
      terms: those that the node accepted.
      candidates: nodes that were asked, ascending.
      context: in which adverts and replies count, 32 bytes.
      mask_seed: of the node's key for masks, 32 bytes.
      own_seed: of its private mask, 32 bytes.
      share_seed: of its key for shares, 32 bytes.
      reply_key: shared with the server, 32 bytes.
      adverts: at first its own alone; once it shares, all of the cohort's, by ascending node.
      stage: the last step done.
      held: of each neighbour among the sharers, ascending, the two shares that it dealt to this node, 64 bytes; zeros
        for an accused one.
      sharers: nodes that shared, ascending; once the vector is masked, those of them that stay in the cohort.
      acceptance: `encrypted_shares.acceptance` of each of these neighbours, 32 bytes; zeros for an accused one.
      accused: neighbours without a valid share at this node.
      complained: those of them about whose signed deal this node has signed a complaint.
      void: pairs of holder and dealer that add no mask together, as the inbox names them.
      dealt: `deal_hash` of this node's own deal, by which a complaint names it.
      model_hash: of the round's model, 32 bytes.
      alive: survivors, ascending.
      openings: see `Openings`.
      pair_keys: keys of 32 bytes under which shares travel, by ascending neighbour.
      mask_secrets: of a hybrid suite, 32 bytes by ascending neighbour: first for the higher ones, whose secrets this
        node made; once the shares are checked, for all that shared.
      mask_keys: of the masks with the neighbours among the sharers, 32 bytes each, by ascending neighbour; of a hybrid
        suite the secrets that they are derived from. Zeros where the two have no mask.
    """

    terms: AttemptTerms
    candidates: tuple[int, ...]
    context: bytes
    mask_seed: bytes
    own_seed: bytes
    share_seed: bytes
    reply_key: bytes
    adverts: tuple[Advert, ...]
    stage: Stage = Stage.ADVERTISED
    held: bytes = b""
    sharers: tuple[int, ...] = ()
    accused: tuple[int, ...] = ()
    model_hash: bytes = b""
    alive: tuple[int, ...] = ()
    openings: Openings = ()
    pair_keys: bytes = b""
    mask_secrets: bytes = b""
    mask_keys: bytes = b""
    acceptance: bytes = b""
    dealt: bytes = b""
    complained: tuple[int, ...] = ()
    void: tuple[tuple[int, int], ...] = ()

    @cached_property
    def agreed(self) -> Agreement:
        """Cohort as its adverts fix it; only once they are known."""
        return agreement(self.terms, self.context, self.candidates, self.adverts)

    @cached_property
    def view(self) -> tuple[bytes, bytes]:
        """Context of the round and digest of its survivors; only once they are known."""
        alive = set(self.alive)
        context = self.agreed.round(self.sharers, self.model_hash, self.void)
        return context, survivors_digest(
            context, self.alive, tuple(n for n in self.sharers if n not in alive)
        )

    def bare(self, node: int) -> frozenset[int]:
        """Return the nodes with which a node adds no mask: one of the two has complained of the other."""
        return frozenset(other for pair in self.void if node in pair for other in pair if other != node)

    def erase(self) -> None:
        """Erase every secret.

        Python cannot overwrite bytes; freed memory may keep them for a while.
        """
        self.mask_seed = self.own_seed = self.share_seed = self.reply_key = self.held = b""
        self.pair_keys, self.mask_secrets, self.mask_keys, self.openings = b"", b"", b"", ()


def tag_reply(attempt: NodeAttempt, body: bytes) -> bytes:
    """Return a reply and its tag, under the key that this node and this server share for the attempt."""
    return body + seal(suite_of(attempt.terms.suite), attempt.reply_key, b"", body)


def masked(
    attempt: NodeAttempt, vector: Vector, masks: Sequence[tuple[bytes, int]], context: bytes, further: int = 0
) -> bytes:
    """Mask the vector in place; return its bytes, then the context and `further` under a seal that covers them all.

    Args:
      attempt: whose reply key seals.
      vector: words of the terms' width, (d,); overwritten.
      masks: key of 32 bytes and sign of each.
      context: of the round, 32 bytes.
      further: parameter of the node's own noise in the vector, 0 for none; see `Work`.

    Raises:
      ValueError: the vector is not what `Work` promises.
    """
    width = attempt.terms.bits // 8
    if vector.dtype.itemsize != width or vector.dtype.kind != "u" or vector.ndim != 1:
        raise ValueError(f"the vector is not one row of unsigned {attempt.terms.bits}-bit words")
    words = np.require(vector, f"<u{width}", ["C", "W"])
    suite = suite_of(attempt.terms.suite)
    add_masks(words, masks, suite)
    body = words.data.cast("B")
    trailer = context + further.to_bytes(FURTHER_BYTES, "big")
    return b"".join((body, seal(suite, attempt.reply_key, trailer, body)))


def check_adverts(roster: Roster, attempt: NodeAttempt, adverts: Iterable[Advert], now: int) -> None:
    """Check that members of the roster, none expired, signed these adverts in this attempt.

    Args:
      roster: of the attempt's terms.
      attempt: in which they were signed.
      adverts: those to check.
      now: Unix seconds, against which members expire.

    Raises:
      Refused: BAD_SIGNATURE, UNKNOWN_MEMBER or EXPIRED.
    """
    suite = suite_of(attempt.terms.suite)
    for advert in adverts:
        member = roster.member(advert.node, now)
        member.check(suite, attempt.context, advert.body, advert.signature)


def quorum(terms: AttemptTerms, collusion: float) -> int:
    """Return how many of the cohort must sign one survivor set, so that no second set can get as many.

    Two sets would need twice as many signatures; colluders sign both, honest nodes one.

    Args:
      terms: of the attempt.
      collusion: share of the other clients that may work for the server, in [0, 1).
    """
    size = terms.cohort_size
    return max(terms.threshold, (size + colluders(size, collusion)) // 2 + 1)


def signers(
    roster: Roster, attempt: NodeAttempt, confirmations: Iterable[Confirmation], needed: int, now: int
) -> set[int]:
    """Return the first `needed` survivors that signed this node's view of the round.

    An honest node signs one view. So with `needed` from `quorum` no other view has as many signers: the caller may
    reveal shares. Arguments as of `check_adverts`, with the confirmations of the cohort.

    Raises:
      Refused: one signed a different view, or they are too few.
    """
    nodes: set[int] = set()
    for confirmation in confirmations:
        _check_view(attempt, confirmation)
        member, suite = roster.member(confirmation.node, now), suite_of(attempt.terms.suite)
        member.check(suite, attempt.context, confirmation.body, confirmation.signature)
        nodes.add(confirmation.node)
        if len(nodes) == needed:
            return nodes
    raise Refused(Reason.TOO_FEW, f"{len(nodes)} confirmations of the {needed} needed")


def _check_view(attempt: NodeAttempt, reply: Confirmation) -> None:
    """Refuse a confirmation of another view than this node's."""
    round_context, view = attempt.view
    if reply.node not in attempt.alive:
        raise Refused(Reason.UNKNOWN_MEMBER, "a confirmation of a node that is not alive")
    if reply.model_hash != attempt.model_hash:
        raise Refused(Reason.WRONG_MODEL, "a node confirmed the round with another model")
    if reply.round_context != round_context:
        raise Refused(Reason.WRONG_COHORT, "a node confirmed a round of another cohort")
    if reply.survivors != view:
        raise Refused(Reason.SPLIT_VIEW, "a node confirmed other survivors")


def unchecked_adverts(node: int, attempt: NodeAttempt, signed: set[int]) -> list[Advert]:
    """Return the adverts of survivors that neither this node nor an honest neighbour in `signed` has checked.

    Before it reveals a share the caller checks these itself. Arguments as of `check_adverts`; `signed` of `signers`.
    """
    agreed, terms = attempt.agreed, attempt.terms
    max_colluders = 2 * terms.threshold - terms.neighbours - 1  # among a node's neighbours; see the module
    checked = {node, *agreed.neighbours(node), *signed}
    return [
        agreed.by_node[other]
        for other in attempt.alive
        if other not in checked and len(signed.intersection(agreed.neighbours(other))) <= max_colluders
    ]
