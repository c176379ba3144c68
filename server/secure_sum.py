"""Secure aggregation over any Flower grid: exchanges until the cohort's sum is open, or the attempt is given up.

A round may take several attempts, each with fresh keys. Nodes are asked for what opens a sum in at most one of them,
so that one reservation pays for the round: an attempt given up before that has told the server nothing, one given up
after it may have been opened, and is not repeated.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..privacy.mechanisms.distributed import Words
from ..privacy.mechanisms.private_sum import SumSpec
from ..privacy.mechanisms.sizing import Attendance, ShareSpec, size_shares
from ..privacy.refusal import Refusal
from ..privacy.secagg.graph import colluders, parameters
from ..privacy.secagg.refusal import Reason, Refused
from ..privacy.secagg.roster import Roster
from ..privacy.secagg.server import Abandoned, Outcome, Outgoing, ServerAttempt
from ..privacy.secagg.transcript import PROTOCOL_VERSION, Profile, Terms
from ..strategies.secure_wire import Exchange, Place, ask, messages_of, model_hash, task_hash
from ..strategies.wire import DROP_REASONS, WEIGHT

COUNTED_SHARE = 0.02  # of the squared norm of a sum without privacy, for what weighs it
ATTEMPTS = 3  # at one round; each asks all of the cohort again


@dataclass(frozen=True)
class Masking:
    """How sums are encrypted; all of it is public.

    Attributes:
      roster: of the federation's nodes, by the numbers that the grid knows them by.
      dropout: share of a cohort that may fail to answer before a sum is given up.
      collusion: share of a cohort that may work for the server: its noise does not count.
      profile: what the server is trusted with.
      bits: of a coordinate; None takes 16 where that is fine enough.
      clipping_norm: L2 norm that a vector keeps where no privacy asks for one: the range of what fits.
      most_examples: of one client, where examples weigh; who has more counts as if it had these.
      suite: of primitives.
    """

    roster: Roster
    dropout: float
    collusion: float
    profile: Profile = Profile.MALICIOUS
    bits: int | None = None
    clipping_norm: float = 100.0
    most_examples: float = 1000.0
    suite: int = 1

    def attendance(self, clients: int) -> Attendance:
        """Return who must answer of a cohort of so many, for a sum that is open to be private.

        Raises:
          Refusal: no cohort of so many stands this collusion.
        """
        return _attendance(clients, self.dropout, self.collusion, self.profile)

    def shape(self, clients: int) -> tuple[int, int]:
        """Return with how many others each of so many clients shares masks, and how many of them open a secret."""
        return _shape(self.attendance(clients), self.collusion, self.profile)


@lru_cache(maxsize=256)
def _attendance(clients: int, dropout: float, collusion: float, profile: Profile) -> Attendance:
    if clients < 2:
        raise Refusal("cohort", clients, "a sum hides its clients behind each other: ask for more")
    bad = colluders(clients, collusion)
    # As many as must sign one set of survivors, as `Participant.quorum` says, where the server may lie about it.
    signers = (clients + bad) // 2 + 1 if profile is Profile.MALICIOUS else 0
    least = min(clients, max(math.ceil(clients * (1 - dropout) - 1e-9), bad + 2, signers))
    if bad + 2 > clients:
        raise Refusal(
            "secagg.collusion", collusion, f"leaves no two of {clients} clients to hide behind each other"
        )
    # A small cohort cannot stand all of the dropout: then more must answer.
    above = clients
    _shape(Attendance(clients, above, bad), collusion, profile)
    while least < above:
        middle = (least + above) // 2
        try:
            _shape(Attendance(clients, middle, bad), collusion, profile)
            above = middle
        except Refusal:
            least = middle + 1
    return Attendance(clients, above, bad)


def _shape(attendance: Attendance, collusion: float, profile: Profile) -> tuple[int, int]:
    dropout = 1 - attendance.least / attendance.most
    return parameters(attendance.most, dropout, collusion, profile)


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


@dataclass
class Opened:
    """How a round of secure aggregation ended: with a sum, or with nothing, and then why.

    Attributes:
      total: of the survivors' vectors, modulo 2^bits; None if nothing was opened.
      spec: what the vectors are; None if no attempt could begin.
      survivors: how many were added.
      dropped: for what reasons the others were not.
      model: what everybody started from, as a hash.
    """

    total: Words | None = None
    spec: ShareSpec | None = None
    survivors: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    model: bytes = b""
    attempts: int = 0


def masked_spec(spec: SumSpec, masking: Masking) -> SumSpec:
    """Return a sum's spec as secure aggregation needs it: with a norm, as the range that fits, and a share for counts."""
    if spec.clipping_norm is not None:
        return spec
    scalars = tuple(
        replace(each, bound=masking.most_examples) if each.name == WEIGHT else each for each in spec.scalars
    )
    return SumSpec(masking.clipping_norm, scalars, COUNTED_SHARE)


def sum_securely(
    grid: Grid, nodes: Sequence[int], wanted: Sum, masking: Masking, timeout: float | None
) -> Opened:
    """Return the sum of the nodes' vectors. Whatever a node sends, it is dropped and counted, and the round goes on."""
    model = model_hash(wanted.content)
    ended = Opened(dropped={str(Reason.TOO_FEW): len(nodes)}, model=model)
    for number in range(ATTEMPTS):
        try:
            attempt = _Attempt(grid, tuple(nodes), wanted, masking, number, timeout)
        except Refusal:  # no graph, or no grid, for so few
            return ended
        ended = attempt.run(model)
        if ended.total is not None or attempt.asked_to_open:
            return ended
    return ended


class _Attempt:
    """One attempt of a round."""

    def __init__(
        self,
        grid: Grid,
        nodes: tuple[int, ...],
        wanted: Sum,
        masking: Masking,
        number: int,
        timeout: float | None,
    ) -> None:
        self._grid, self._nodes, self._wanted = grid, nodes, wanted
        self._number, self._timeout = number, timeout
        attendance = masking.attendance(len(nodes))
        self._spec = size_shares(
            wanted.spec, wanted.coordinates, attendance, wanted.noise_multiplier, masking.bits
        )
        if not wanted.noise_multiplier:
            self._spec = replace(self._spec, weighted=True)
        self._semi_honest = masking.profile is Profile.SEMI_HONEST
        self._server = ServerAttempt(
            _terms(wanted, self._spec, masking, number),
            masking.roster,
            nodes,
            self._spec.size,
            int(time.time()),
        )
        self._reasons: dict[int, str] = {}
        self.asked_to_open = False

    def run(self, model: bytes) -> Opened:
        result: Outgoing | Outcome | Abandoned = self._server.proposal()
        for step in Exchange:
            if not isinstance(result, dict):
                break
            self._exchange(step, result)
            result = self._server.advance(model)
        survivors = result.survivors if isinstance(result, Outcome) else ()
        reason = str(result.reason) if isinstance(result, Abandoned) else "no reply"
        dropped = Counter(
            self._reasons.get(node, reason) for node in self._nodes if node not in set(survivors)
        )
        total = result.total if isinstance(result, Outcome) else None
        return Opened(total, self._spec, len(survivors), dict(dropped), model, self._number + 1)

    def _exchange(self, step: Exchange, messages: Mapping[int, bytes]) -> None:
        opens = Exchange.SURVIVORS if self._semi_honest else Exchange.CONFIRMED
        self.asked_to_open |= step is opens
        asked = self._addressed(step, messages)
        for reply in self._grid.send_and_receive(asked, timeout=self._timeout):
            self._take(reply)
        for node in self._server.waiting:
            self._reasons.setdefault(node, "no reply")

    def _addressed(self, step: Exchange, messages: Mapping[int, bytes]) -> Iterator[Message]:
        wanted = self._wanted
        place = Place(wanted.run, wanted.row, self._number, step)
        records = dict(wanted.content.items()) if step is Exchange.INBOX else {}
        for node, message in messages.items():
            content = RecordDict({**records, **ask([message], self._spec, place)})
            yield Message(content, node, wanted.message_type, group_id=str(wanted.row))

    def _take(self, reply: Message) -> None:
        node = reply.metadata.src_node_id
        if reply.has_error():
            self._reasons[node] = DROP_REASONS.get(reply.error.code, "failed")
            return
        for each in messages_of(reply.content) or [b""]:
            try:
                self._server.take(node, each)
            except Refused as refused:
                self._reasons[node] = str(refused.reason)
        if node in self._server.declined:
            self._reasons[node] = f"declined: {self._server.declined[node]}"


def _terms(wanted: Sum, spec: ShareSpec, masking: Masking, attempt: int) -> Terms:
    attendance = spec.attendance
    clipping_norm = spec.sum.clipping_norm
    assert clipping_norm is not None
    neighbours, threshold = masking.shape(attendance.most)
    return Terms(
        PROTOCOL_VERSION,
        masking.suite,
        run=int.from_bytes(hashlib.sha256(wanted.run.encode()).digest()[:8], "big"),
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
