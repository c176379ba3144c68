"""Whose signatures a node checks, and what it knows by them: of a cohort of hundreds, not all of either kind.

Nobody but its neighbours holds a key or a share of a node, so these check its advert before they share anything; the
others need it only to be one of those behind the sum. A quorum signs the hash of all adverts with the survivors, and
who signs has checked its neighbours' adverts: fewer than 2t - k of a node's k neighbours collude (`graph.opens_nothing`),
so a survivor that so many of them signed beside is who it says. Any other is checked by its own advert, before a share
is revealed. A forged advert changes the graph as one of a colluder can, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable

from .attempt import Attempt
from .bindings import advert_body, confirmation_body
from .graph import colluders
from .messages import Advert, Confirmation
from .refusal import Reason, Refused
from .roster import Roster
from .suite import verify
from .transcript import Terms


def check_adverts(roster: Roster, context: bytes, adverts: Iterable[Advert], now: int) -> None:
    """Return if members of the roster signed these adverts in this attempt.

    Raises:
      Refused: BAD_SIGNATURE, UNKNOWN_MEMBER or EXPIRED.
    """
    for advert in adverts:
        public = roster.member(advert.node, now).public
        verify(public, context, advert_body(advert), advert.signature)


def quorum(terms: Terms, collusion: float) -> int:
    """Return how many of the cohort must sign one survivor set, so that no second set can get as many.

    Two sets would need twice as many signatures; colluders sign both, honest nodes one.
    """
    size = terms.cohort_size
    return max(terms.threshold, (size + colluders(size, collusion)) // 2 + 1)


def signers(
    roster: Roster, attempt: Attempt, confirmations: Iterable[Confirmation], needed: int, now: int
) -> set[int]:
    """Return the first `needed` survivors that signed what this node takes the round to be.

    Raises:
      Refused: one did not, or they are too few.
    """
    found: set[int] = set()
    for said in confirmations:
        _same(attempt, said)
        public = roster.member(said.node, now).public
        verify(public, attempt.context, confirmation_body(said), said.signature)
        found.add(said.node)
        if len(found) == needed:
            return found
    raise Refused(Reason.TOO_FEW, f"{len(found)} confirmations of the {needed} needed")


def _same(attempt: Attempt, said: Confirmation) -> None:
    round_context, view = attempt.view
    if said.node not in attempt.alive:
        raise Refused(Reason.UNKNOWN_MEMBER, "a confirmation of a node that is not alive")
    if said.model_hash != attempt.model_hash:
        raise Refused(Reason.WRONG_MODEL, "a node confirmed the round with another model")
    if said.round_context != round_context:
        raise Refused(Reason.WRONG_COHORT, "a node confirmed a round of another cohort")
    if said.survivors != view:
        raise Refused(Reason.SPLIT_VIEW, "a node confirmed other survivors")


def unwitnessed(node: int, attempt: Attempt, signed: set[int]) -> list[Advert]:
    """Return the adverts of survivors that neither `node` nor an honest neighbour of theirs that signed has checked."""
    agreed, terms = attempt.agreed, attempt.terms
    known = {node, *agreed.neighbours(node), *signed}
    enough = 2 * terms.threshold - terms.neighbours
    rest = (other for other in attempt.alive if other not in known)
    return [
        agreed.by_node[other] for other in rest if len(signed.intersection(agreed.neighbours(other))) < enough
    ]
