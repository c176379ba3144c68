"""Masking of a run's sums: the encryption, and the number of clients that an open sum needs to hide each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from ..base.refusal import Refusal
from ..privacy.mechanisms.sizing import Attendance
from ..privacy.mechanisms.sum_spec import WEIGHT, SumSpec
from ..privacy.secagg.graph import Shape, colluders, smallest_shape
from ..privacy.secagg.roster import Roster
from ..privacy.secagg.transcript import Profile

WEIGHT_SHARE = 0.02  # of the squared norm of a sum without privacy, for its weight


@dataclass(frozen=True)
class Masking:
    """Parameters of encrypted sums; all of them are public.

    Attributes:
      roster: of the federation's nodes, by the grid's node numbers.
      dropout: share of a cohort that may drop out before a sum is abandoned.
      collusion: share of a cohort that may collude with the server; the noise of these clients does not count.
      profile: of trust in the server.
      bits: of a coordinate; None takes 16 if that is fine enough.
      clipping_norm: L2 norm of a vector without client-level privacy: the range of the words.
      max_examples: largest weight of one client, if examples weigh.
      suite: of primitives.
      signed_roster: the roster as its authority signed it, for nodes with an older one; empty if none has.
    """

    roster: Roster
    dropout: float
    collusion: float
    profile: Profile = Profile.MALICIOUS
    bits: int | None = None
    clipping_norm: float = 100.0
    max_examples: float = 1000.0
    suite: int = 1
    signed_roster: bytes = b""

    def attendance(self, clients: int) -> Attendance:
        """Return the bounds on survivors and colluders for a cohort of this size.

        Raises:
          Refusal: no cohort of this size tolerates this collusion.
        """
        return _attendance(clients, self.dropout, self.collusion, self.profile)

    def shape(self, clients: int) -> Shape:
        """Return the graph of the pairs that share masks in a cohort of this size; raises as `attendance` does."""
        return _shape(clients, self.attendance(clients).least, self.collusion, self.profile)


@lru_cache(maxsize=256)
def _attendance(clients: int, dropout: float, collusion: float, profile: Profile) -> Attendance:
    """Return the attendance: if no graph tolerates the whole dropout, more survivors, of which bisection finds the least."""
    if clients < 2:
        raise Refusal("cohort", clients, "is too small: a sum hides each client among the others; draw more")
    num_colluders = colluders(clients, collusion)
    if num_colluders + 2 > clients:
        remedy = f"leaves no two of {clients} clients to hide behind each other"
        raise Refusal("secagg.collusion", collusion, remedy)
    # Where the server may lie about the survivors, as many clients as `quorum` requires must sign one set of them.
    signers = (clients + num_colluders) // 2 + 1 if profile is Profile.MALICIOUS else 0
    lower = min(clients, max(math.ceil(clients * (1 - dropout) - 1e-9), num_colluders + 2, signers))
    least = clients
    _shape(clients, least, collusion, profile)
    while lower < least:
        middle = (lower + least) // 2
        try:
            _shape(clients, middle, collusion, profile)
            least = middle
        except Refusal:
            lower = middle + 1
    return Attendance(clients, least, num_colluders)


def _shape(clients: int, survivors: int, collusion: float, profile: Profile) -> Shape:
    """Return the smallest graph of a cohort of which so many survive."""
    return smallest_shape(clients, 1 - survivors / clients, collusion, profile)


def masked_spec(spec: SumSpec, masking: Masking) -> SumSpec:
    """Return a sum's spec for secure aggregation: a sum without a norm gets the masking's, which bounds its range."""
    if spec.private:
        return spec
    segments = tuple(
        replace(each, bound=masking.max_examples) if each.name == WEIGHT else each for each in spec.segments
    )
    return replace(spec, clipping_norm=masking.clipping_norm, segments=segments, metrics_share=WEIGHT_SHARE)
