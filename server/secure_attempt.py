"""One attempt of secure aggregation as the driver sees it: what it asks next, of whom, and what came back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flwr.app import RecordDict

from ..privacy.mechanisms.distributed import Words, take_back
from ..privacy.mechanisms.sizing import ShareSpec, size_shares
from ..privacy.mechanisms.sum_spec import SumSpec
from ..privacy.secagg.refusal import Refused
from ..privacy.secagg.server import Abandoned, OpenedSum, Outgoing, ServerAttempt
from ..privacy.secagg.shamir import SECRET_BYTES
from ..privacy.secagg.transcript import PROTOCOL_VERSION, AttemptTerms, Profile
from ..strategies.secure_wire import Exchange, Place, run_number, task_hash
from ..strategies.wire import LASTING, NO_REPLY
from .masking import Masking


@dataclass(frozen=True)
class Sum:
    """What is summed: its name on the ledger, what the clients start from, and what their vectors are.

    Attributes:
      run, row: of the release.
      content: the strategy's records.
      message_type: a kind of `train`.
      spec: clipping norm and scalars.
      coordinates: of the update.
      noise_multiplier: of the sum over its sensitivity; 0 without noise.
    """

    run: str
    row: int
    content: RecordDict
    message_type: str
    spec: SumSpec
    coordinates: int
    noise_multiplier: float

    def asks_as(self, other: Sum) -> bool:
        """Whether only what the clients start from may differ: that is no part of an attempt's terms."""
        return replace(self, content=other.content) == other


@dataclass
class Opened:
    """How a round of secure aggregation ended: with a sum, or with nothing, and then why.

    Attributes:
      total: of the survivors' vectors, modulo 2^bits; None if nothing was opened.
      spec: what the vectors are; None if no attempt could begin.
      survivors: how many were added.
      dropped: for what reasons the others were not.
      model: what everybody started from, as a hash.
      attempts: the number of the last one, from 1; one whose keys travelled ahead in vain counts.
      exchanges: from the round's first message to its end.
      nodes: the survivors.
    """

    total: Words | None = None
    spec: ShareSpec | None = None
    survivors: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    model: bytes = b""
    attempts: int = 0
    exchanges: int = 0
    nodes: tuple[int, ...] = ()


class Attempt:
    """One attempt to sum one vector of every node in a cohort; nothing that a node sends ends it for the others.

    Attributes:
      nodes: the cohort.
      wanted: what is summed.
      spec: what the vectors are.
      step: of the exchange that `asking` belongs to.
      asking: what to send next, by node; empty once the attempt is over.
      sent: whether that is on its way already.
      signed_roster: what goes along with the proposal.
      asked_to_open: whether the sum may be open: nodes were asked for what opens it.

    Raises:
      Refusal: no graph, or no grid, for so few.
    """

    def __init__(self, nodes: tuple[int, ...], wanted: Sum, masking: Masking, number: int) -> None:
        self.nodes, self.wanted, self.number = nodes, wanted, number
        attendance = masking.attendance(len(nodes))
        spec = size_shares(
            wanted.spec, wanted.coordinates, attendance, wanted.noise_multiplier, masking.bits, layered=True
        )
        self.spec = spec if wanted.noise_multiplier else replace(spec, weighted=True)
        self.semi_honest = masking.profile is Profile.SEMI_HONEST
        self.signed_roster, self._roster = masking.signed_roster, masking.roster.hash
        terms = _terms(wanted, self.spec, masking, number)
        self._server = ServerAttempt(terms, masking.roster, nodes, self.spec.size, int(time.time()))
        self.step = Exchange.PROPOSAL
        self.asking: Outgoing = self._server.proposal()
        self.sent = self.asked_to_open = False
        self._ended: OpenedSum | Abandoned | None = None
        self._reasons: dict[int, str] = {}

    def prepares(self, nodes: Sequence[int], wanted: Sum, masking: Masking) -> bool:
        """Whether it is an attempt at this sum: of these nodes, under this roster."""
        same = self.nodes == tuple(nodes) and self._roster == masking.roster.hash
        return same and self.wanted.asks_as(wanted)

    @property
    def place(self) -> Place:
        """Where in the run the next exchange is."""
        return Place(self.wanted.run, self.wanted.row, self.number, self.step)

    @property
    def missing(self) -> int:
        """How many of the cohort are not asked any more."""
        return len(self.nodes) - len(self.asking)

    @property
    def spare(self) -> int:
        """How many of the cohort may be missing in the end."""
        return self.spec.attendance.most - self.spec.attendance.least

    @property
    def in_vain(self) -> bool:
        """Whether the next attempt would end like this one: more than can be spared do not take part, now or then."""
        return sum(reason in LASTING for reason in self._reasons.values()) > self.spare

    def has_enough(self, enough: int) -> bool:
        """Whether so many of the cohort have answered well, and no fewer than a sum takes."""
        return self._server.answered >= min(len(self.asking), max(enough, self.spec.attendance.least))

    def send(self) -> None:
        """Note that what is asked is on its way."""
        self.sent = True
        opens = Exchange.SURVIVORS if self.semi_honest else Exchange.CONFIRMED
        self.asked_to_open |= self.step is opens

    def hear(self, node: int, reply: bytes, reason: str | None = None) -> None:
        """Take a node's reply; whatever it is, it is dropped and counted, or it counts.

        Args:
          node: the sender.
          reply: as it came; ignored if there is a reason.
          reason: why there is none.
        """
        if reason is None:
            try:
                self._server.take(node, reply)
            except Refused as refused:
                reason = str(refused.reason)
        if node in self._server.declined:
            reason = f"declined: {self._server.declined[node]}"
        if reason is not None:
            self._reasons[node] = reason

    def wait_no_more(self, reason: str) -> None:
        """Note why nothing came of those who have not answered."""
        for node in self._server.waiting:
            self._reasons.setdefault(node, reason)

    def advance(self, model: bytes = b"") -> None:
        """Close the exchange; `model` is the hash of what the round starts from, where the inboxes are due."""
        self.wait_no_more(NO_REPLY)
        result = self._server.advance(model)
        self.asking = result if isinstance(result, dict) else {}
        self._ended = None if isinstance(result, dict) else result
        self.step = Exchange(min(self.step + 1, Exchange.CONFIRMED))
        self.sent = False

    def opened(self, model: bytes, exchanges: int) -> Opened:
        """Return how the attempt ended."""
        ended = self._ended
        survivors = ended.survivors if isinstance(ended, OpenedSum) else ()
        reason = str(ended.reason) if isinstance(ended, Abandoned) else NO_REPLY
        dropped = Counter(
            self._reasons.get(node, reason) for node in self.nodes if node not in set(survivors)
        )
        total, number = None, self.number + 1
        if isinstance(ended, OpenedSum):
            total = ended.total
            take_back(total, len(survivors), self.spec, map(_seeds, ended.seeds.values()))
        return Opened(
            total, self.spec, len(survivors), dict(dropped), model, number, exchanges, tuple(survivors)
        )


def _seeds(joined: bytes) -> list[bytes]:
    return [joined[start : start + SECRET_BYTES] for start in range(0, len(joined), SECRET_BYTES)]


def _terms(wanted: Sum, spec: ShareSpec, masking: Masking, attempt: int) -> AttemptTerms:
    attendance = spec.attendance
    clipping_norm = spec.sum.clipping_norm
    assert clipping_norm is not None
    neighbours, threshold = masking.shape(attendance.most)
    return AttemptTerms(
        PROTOCOL_VERSION,
        masking.suite,
        run=run_number(wanted.run),
        round=wanted.row,
        attempt=attempt,
        roster_version=masking.roster.version,
        roster_hash=masking.roster.hash,
        cohort_size=attendance.most,
        threshold=threshold,
        neighbours=neighbours,
        bits=spec.bits,
        step=spec.sum.step,
        clipping_norm=clipping_norm,
        noise_multiplier=wanted.noise_multiplier,
        minimum_survivors=attendance.least,
        profile=masking.profile,
        task_hash=task_hash(spec),
    )
