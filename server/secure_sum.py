"""Driver of secure aggregation over any Flower grid: exchanges until the cohort's sum is opened, or abandoned.

A round may take several attempts, each with fresh keys. Nodes are asked for the shares that open a sum in at most one
of them, so that one reservation covers the round: an attempt abandoned before that has revealed nothing to the server,
one abandoned later may have been opened, and is not retried. Nor is an attempt that too many refused permanently: a
retry would charge the others.

The next round's keys and shares are sent with this round's messages. They reveal nothing about data, so they may
precede its reservation; its vectors are requested only in its own round. A steady round takes three exchanges; the
first round, or one whose preparation lost too many nodes, takes three more, or two if the profile is semi-honest, which
has no confirmations. A dispute over shares takes one more.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..base.refusal import Refusal
from ..messages.secure_wire import Position, ask, failure_of, messages_of, model_hash, task_hash, with_roster
from ..messages.wire import DROP_REASONS, LASTING, NO_REPLY, NOT_NEEDED, POLICY_REASONS, UNREADABLE, Exchange
from ..privacy.mechanisms.distributed import Words, take_back
from ..privacy.mechanisms.sizing import ShareSpec, size_shares
from ..privacy.secagg.encrypted_shares import cut
from ..privacy.secagg.evidence import AttemptEvidence
from ..privacy.secagg.refusal import Fault, Reason, Refused
from ..privacy.secagg.server import Abandoned, Due, OpenedSum, Outgoing, ServerAttempt, together
from ..privacy.secagg.shamir import SECRET_BYTES
from ..privacy.secagg.transcript import PROTOCOL_VERSION, AttemptTerms, Profile, run_number
from .masking import Masking
from .round_terms import Sum

logger = logging.getLogger("fedveil.server")

ATTEMPTS = 3  # at one round; each asks all of the cohort again
SPARED = 4  # of the nodes that a sum can spare, one in this many may be lost before its round begins


@dataclass(frozen=True)
class Opened:
    """Result of a round of secure aggregation: a sum, or the reason why there is none.

    Attributes:
      total: sum of the survivors' vectors, modulo 2^bits; None if nothing was opened.
      spec: of the vectors; None if no attempt could begin.
      survivors: number of added vectors.
      dropped: counts of the others, by reason.
      model: hash of the clients' initial model.
      attempts: the number of the last one, from 1; an unused prepared attempt counts.
      exchanges: from the round's first message to its end.
      nodes: the survivors.
      blamed: by node, its provable violation of the protocol, in any attempt at the round.
      evidence: of these violations, for each attempt with one.
      cause: why nothing was opened, if the nodes may have been charged; empty otherwise.
      unopened: number of survivors whose noise layers all remain in the sum.
      further: by survivor, the parameter of its own noise, as it claims; only survivors that added some.
    """

    total: Words | None = None
    spec: ShareSpec | None = None
    survivors: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    model: bytes = b""
    attempts: int = 0
    exchanges: int = 0
    nodes: tuple[int, ...] = ()
    blamed: dict[int, Fault] = field(default_factory=dict[int, Fault])
    evidence: tuple[AttemptEvidence, ...] = ()
    cause: str = ""
    unopened: int = 0
    further: dict[int, int] = field(default_factory=dict[int, int])


class SecureSums:
    """Rounds of one run, in order; the preparation of the next one is kept between two calls."""

    def __init__(
        self,
        grid: Grid,
        masking: Masking,
        arrive: Callable[[int, Sequence[int]], None] = lambda row, nodes: None,
    ) -> None:
        """Prepare rounds on a grid; `masking` may be replaced: a new roster discards what was prepared under the old.

        Args:
          grid: reaches the nodes.
          masking: of the sums.
          arrive: called with the row of a sum and its nodes before they are asked for the shares that open it.
        """
        self._grid, self.masking, self._arrive, self._enough = grid, masking, arrive, None
        self._next: Attempt | None = None  # at the next row, under preparation
        self._ahead: int | None = None  # row whose keys were exchanged in advance
        self._exchanges = 0  # of the round so far, as are the next two
        self._blamed: dict[int, Fault] = {}
        self._evidence: dict[bytes, AttemptEvidence] = {}  # by the attempt's context

    def sum(
        self,
        nodes: Sequence[int],
        request: Sum,
        timeout: float | None,
        upcoming: Sequence[int] = (),
        enough: int | None = None,
    ) -> Opened:
        """Return the sum of the nodes' vectors; an invalid reply is dropped and counted.

        Args:
          nodes: the round's cohort.
          request: the sum to compute.
          timeout: seconds for the replies of one exchange.
          upcoming: the cohort of the next row, if known: its keys are sent with this round's messages.
          enough: number of answers that ends an exchange, but never fewer than a sum needs; None waits for all.
        """
        model, valid = model_hash(request.content), self._valid(nodes)
        self._exchanges, self._blamed, self._evidence, self._enough = 0, {}, {}, enough
        outcome = Opened(dropped={str(Reason.TOO_FEW): len(valid)}, model=model)
        for attempt in self._attempts(valid, request, model, timeout):
            self._finish(attempt, self._valid(upcoming), model, timeout)
            outcome = attempt.outcome(model, self._exchanges)
            if outcome.total is not None or attempt.opening_requested or attempt.in_vain:
                break
        expired = Counter({str(Reason.EXPIRED): len(nodes) - len(valid)})
        dropped = dict(Counter(outcome.dropped) + expired)
        evidence = tuple(self._evidence.values())
        return replace(outcome, blamed=self._blamed, evidence=evidence, dropped=dropped)

    def _record_faults(self, attempt: Attempt) -> None:
        """Keep the faults that an attempt has proved, and its evidence."""
        self._blamed |= attempt.server.blamed
        if (evidence := attempt.server.evidence) is not None:
            self._evidence[evidence.adverts.context] = evidence

    def _valid(self, nodes: Sequence[int]) -> list[int]:
        """Return the nodes with a valid key: no node joins an attempt with a member whose key has expired."""
        expired = self.masking.roster.ended(int(time.time()))
        return [node for node in nodes if node not in expired]

    def _attempts(
        self, nodes: Sequence[int], request: Sum, model: bytes, timeout: float | None
    ) -> Iterator[Attempt]:
        """Yield attempts that are ready to request vectors: the prepared one, if it fits, then fresh ones.

        Arguments as of `sum`, and the hash of the clients' initial model.
        """
        prepared, self._next = self._next, None
        first_number = 1 if request.row == self._ahead else 0  # nodes join each attempt number once
        if prepared is not None and prepared.prepares(nodes, request, self.masking):
            prepared.request = request
            self._prepare(prepared, model, timeout)
            if prepared.outgoing and SPARED * prepared.missing <= prepared.spare:
                yield prepared
        for number in range(first_number, ATTEMPTS):
            try:
                attempt = Attempt(tuple(nodes), request, self.masking, number)
            except Refusal:  # no graph, or no lattice, for this few
                return
            self._prepare(attempt, model, timeout)
            yield attempt

    def _prepare(self, attempt: Attempt, model: bytes, timeout: float | None) -> None:
        """Exchange keys and shares until vectors can be requested, or the attempt is over; arguments as of `_attempts`."""
        while attempt.outgoing and attempt.step < Exchange.INBOX:
            if not attempt.is_sent:
                self._exchange(timeout, attempt)
            attempt.advance(model)
        self._record_faults(attempt)

    def _finish(self, attempt: Attempt, upcoming: Sequence[int], model: bytes, timeout: float | None) -> None:
        """Request vectors and open the sum, together with the first exchanges of the next row's attempt.

        Arguments as of `_attempts`.
        """
        while attempt.outgoing:
            next_attempts: list[Attempt] = []
            if attempt.step is Exchange.INBOX and self._next is None:
                next_attempts = self._start_next(upcoming, attempt.request)
                self._next = next_attempts[0] if next_attempts else None
            elif attempt.step >= Exchange.SURVIVORS and self._next is not None and self._next.precedes_checks:
                self._next.advance()
                next_attempts = [self._next] if self._next.outgoing else []
            if attempt.server.due is Due.REVEALED:
                self._arrive(attempt.request.row, attempt.server.alive)
            self._exchange(timeout, attempt, *next_attempts)
            attempt.advance(model)
        self._record_faults(attempt)

    def _start_next(self, nodes: Sequence[int], request: Sum) -> list[Attempt]:
        """Return a first attempt at the row after `request`; none if these nodes are too few."""
        following = replace(request, row=request.row + 1, content=RecordDict())
        try:
            attempt = Attempt(tuple(nodes), following, self.masking, 0)
        except Refusal:
            return []
        self._ahead = following.row
        return [attempt]

    def _exchange(self, timeout: float | None, *attempts: Attempt) -> None:
        """Send each node the messages of these attempts in one instruction, and pass its replies to them."""
        self._exchanges += 1
        for attempt in attempts:
            attempt.send()
        by_node = together(*(attempt.outgoing for attempt in attempts))
        messages = (
            _message(node, parts, next(each for each in attempts if node in each.outgoing))
            for node, parts in by_node.items()
        )
        for reply in self._grid.send_and_receive(messages, timeout=timeout):
            node = reply.metadata.src_node_id
            recipients = [attempt for attempt in attempts if node in attempt.outgoing]
            for attempt, (answer, reason) in zip(recipients, _replies(reply, len(recipients)), strict=True):
                attempt.hear(node, answer, reason)
            if self._enough is not None and all(each.has_enough(self._enough) for each in attempts):
                for each in attempts:
                    each.wait_no_more(NOT_NEEDED)
                break


def _message(node: int, parts: Sequence[bytes], attempt: Attempt) -> Message:
    """Return an instruction with a protocol message of each attempt, and the model where the first requests a vector."""
    request = attempt.request
    model = dict(request.content.items()) if attempt.step is Exchange.INBOX else {}
    records = ask(parts, attempt.spec, attempt.position)
    if attempt.step is Exchange.PROPOSAL:  # a node must know the roster of the terms before it reads them
        records = with_roster(records, attempt.signed_roster)
    content = RecordDict({**model, **records})
    return Message(content, node, request.message_type, group_id=str(request.row))


def _replies(reply: Message, count: int) -> list[tuple[bytes, str]]:
    """Return a node's answers to `count` protocol messages: the bytes, or empty bytes and the reason."""
    if reply.has_error():
        return [(b"", DROP_REASONS.get(reply.error.code, "failed"))] * count
    try:
        answers = [*(messages_of(reply.content) or []), *[b""] * count][:count]  # missing ones are empty
        code = failure_of(reply.content)
    except Exception:
        logger.exception("processing a reply of node %s failed", reply.metadata.src_node_id)
        return [(b"", DROP_REASONS[UNREADABLE])] * count
    reason = "" if code is None else DROP_REASONS.get(code, "failed")
    return [(each, "" if each else reason) for each in answers]


# --- one attempt ------------------------------------------------------------------------------------------------


_STEPS = {  # exchange in which the server waits for these replies
    Due.ADVERTS: Exchange.PROPOSAL,
    Due.SHARES: Exchange.COHORT,
    Due.CHECKS: Exchange.PARCELS,
    Due.COMPLAINTS: Exchange.DISPUTED,
    Due.VECTORS: Exchange.INBOX,
    Due.CONFIRMATIONS: Exchange.SURVIVORS,
    Due.REVEALED: Exchange.CONFIRMED,
}


class Attempt:
    """One attempt to sum one vector of every node in a cohort; no message of a node can end it for the others.

    Attributes:
      nodes: the cohort.
      request: the sum to compute.
      number: of the attempt at this sum, from 0.
      spec: of the vectors.
      server: the state of the protocol.
      step: of the exchange of `outgoing`.
      outgoing: the next messages, by node; empty once the attempt is over.
      is_sent: whether these have been sent.
      signed_roster: sent with the proposal.
      opening_requested: whether the sum may be open, because nodes were asked for the shares that open it.

    Raises:
      Refusal: no graph, or no grid, for so few.
    """

    def __init__(self, nodes: tuple[int, ...], request: Sum, masking: Masking, number: int) -> None:
        self.nodes, self.request, self.number = nodes, request, number
        self.spec = share_spec(request, masking, len(nodes))
        self._semi_honest = masking.profile is Profile.SEMI_HONEST
        self.signed_roster, self._roster = masking.signed_roster, masking.roster.hash
        terms = _terms(request, self.spec, masking, number)
        self.server = ServerAttempt(
            terms, masking.roster, nodes, self.spec.size, int(time.time()), self.spec.attendance.colluders
        )
        self.step = Exchange.PROPOSAL
        self.outgoing: Outgoing = self.server.proposal()
        self.is_sent = self.opening_requested = self._vectors_requested = False
        self._ended: OpenedSum | Abandoned | None = None  # how the protocol ended, once it has
        self._reasons: dict[int, str] = {}  # by node, why it is out of the sum

    def prepares(self, nodes: Sequence[int], request: Sum, masking: Masking) -> bool:
        """Return whether this attempt, begun a row ahead, is at this sum, of these nodes, under this roster."""
        same = self.nodes == tuple(nodes) and self._roster == masking.roster.hash
        return same and self.request.has_terms_of(request)

    @property
    def precedes_checks(self) -> bool:
        """Whether the next exchange precedes the one in which nodes check the shares dealt to them."""
        return bool(self.outgoing) and self.step < Exchange.PARCELS

    @property
    def position(self) -> Position:
        """Position of the next exchange in the run."""
        return Position(self.request.run, self.request.row, self.number, self.step)

    @property
    def missing(self) -> int:
        """Number of nodes of the cohort that are no longer asked."""
        return len(self.nodes) - len(self.outgoing)

    @property
    def spare(self) -> int:
        """Number of nodes of the cohort that may be missing at the end."""
        return self.spec.attendance.most - self.spec.attendance.least

    @property
    def in_vain(self) -> bool:
        """Whether the next attempt would fail as well: more nodes than can be spared refuse for good."""
        return sum(reason in LASTING | POLICY_REASONS for reason in self._reasons.values()) > self.spare

    def has_enough(self, enough: int) -> bool:
        """Return whether `enough` nodes answered validly, and at least as many as a sum needs."""
        return self.server.has(min(len(self.outgoing), max(enough, self.spec.attendance.least)))

    def send(self) -> None:
        """Mark the messages as sent."""
        self.is_sent = True
        self.opening_requested |= self.server.due is Due.REVEALED
        self._vectors_requested |= self.step is Exchange.INBOX

    def hear(self, node: int, reply: bytes, reason: str = "") -> None:
        """Process a node's reply; an invalid one is dropped and counted.

        Args:
          node: the sender.
          reply: unverified; ignored if there is a reason.
          reason: why the node sent no reply; empty if it sent one.
        """
        if not reason:
            try:
                self.server.take(node, reply)
            except Refused as refused:
                reason = str(refused.reason)
            except Exception:  # an unexpected error costs this reply and not the whole round
                logger.exception("processing a reply of node %s failed", node)
                reason = DROP_REASONS[UNREADABLE]
        if node in self.server.declined:
            reason = f"declined: {self.server.declined[node]}"
        if reason:
            self._reasons[node] = reason

    def wait_no_more(self, reason: str) -> None:
        """Record the reason for the missing answers."""
        for node in self.server.waiting:
            self._reasons.setdefault(node, reason)

    def advance(self, model: bytes = b"") -> None:
        """Close the exchange; `model` is the hash of the round's initial model, if the inboxes are due."""
        self.wait_no_more(NO_REPLY)
        result = self.server.advance(model)
        if isinstance(result, dict):
            self.outgoing = result
        else:
            self.outgoing, self._ended = {}, result
        self._reasons |= {node: str(fault) for node, fault in self.server.blamed.items()}
        if self.outgoing:
            self.step = _STEPS[self.server.due]
            if self._semi_honest and self.step is Exchange.CONFIRMED:  # without the exchange of confirmations
                self.step = Exchange.SURVIVORS
        self.is_sent = False

    def outcome(self, model: bytes, exchanges: int) -> Opened:
        """Return the outcome of the attempt; first take back the excess noise of an opened sum, in place.

        Args:
          model: hash of the clients' initial model.
          exchanges: of the round so far.
        """
        ended = self._ended
        survivors = ended.survivors if isinstance(ended, OpenedSum) else ()
        reason = str(ended.reason) if isinstance(ended, Abandoned) else NO_REPLY
        lost = set(self.nodes).difference(survivors)
        outcome = Opened(
            spec=self.spec,
            survivors=len(survivors),
            dropped=dict(Counter(self._reasons.get(node, reason) for node in self.nodes if node in lost)),
            model=model,
            attempts=self.number + 1,
            exchanges=exchanges,
            nodes=survivors,
        )
        if isinstance(ended, Abandoned) and self._vectors_requested:
            return replace(outcome, cause=self._cause(ended.reason))
        if not isinstance(ended, OpenedSum):
            return outcome
        seeds = (cut(each, SECRET_BYTES) for each in ended.seeds.values())  # of excess noise, by survivor
        removed = take_back(ended.total, len(survivors), self.spec, seeds)
        further = {node: ended.further[node] for node in survivors if ended.further[node]}
        return replace(outcome, total=ended.total, unopened=len(survivors) - removed, further=further)

    def _cause(self, reason: Reason) -> str:
        """Return why nothing was opened after vectors were requested, and whether a member is named for it."""
        if self.server.blamed:
            return f"{reason}: too few are left without the named members"
        if NO_REPLY not in self._reasons.values():
            return f"{reason}: too few answered to the end, and each of the others sent its reason"
        return f"{reason}: too few answered to the end, and no member can be named: the cause of a missing answer is unknown"


def share_spec(request: Sum, masking: Masking, clients: int) -> ShareSpec:
    """Return the spec of the vectors in an encrypted sum of this many clients; arguments as of `SecureSums`.

    Raises:
      Refusal: no graph, or no grid, for so few.
    """
    attendance = masking.attendance(clients)
    spec = size_shares(
        request.spec, request.coordinates, attendance, request.noise_multiplier, masking.bits, layered=True
    )
    return spec if request.noise_multiplier else replace(spec, weighted=True)  # by examples


def _terms(request: Sum, spec: ShareSpec, masking: Masking, attempt: int) -> AttemptTerms:
    """Return the terms that the nodes hold against their policies."""
    attendance = spec.attendance
    clipping_norm = spec.sum.clipping_norm
    assert clipping_norm is not None
    shape = masking.shape(attendance.most)
    return AttemptTerms(
        PROTOCOL_VERSION,
        masking.suite,
        run=run_number(request.run),
        round=request.row,
        attempt=attempt,
        roster_version=masking.roster.version,
        roster_hash=masking.roster.hash,
        cohort_size=attendance.most,
        threshold=shape.threshold,
        neighbours=shape.neighbours,
        bits=spec.bits,
        step=spec.sum.step,
        clipping_norm=clipping_norm,
        noise_multiplier=request.noise_multiplier,
        minimum_survivors=attendance.least,
        profile=masking.profile,
        task_hash=task_hash(spec),
    )
