"""Secure aggregation over any Flower grid: exchanges until the cohort's sum is open, or the attempt is given up.

A round may take several attempts, each with fresh keys. Nodes are asked for what opens a sum in at most one of them,
so that one reservation pays for the round: an attempt given up before that has told the server nothing, one given up
after it may have been opened, and is not repeated. Nor is one that too many refused for good: trying costs the others.

The next round's keys and shares travel beside this round's messages. They tell nothing of any data, so they may precede
its reservation; its vectors are asked for in its own round alone. A steady round takes three exchanges, or two if the
profile is semi-honest; the first round, or one whose preparation lost too many nodes, takes two more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from ..privacy.refusal import Refusal
from ..privacy.secagg.refusal import Reason
from ..privacy.secagg.server import together
from ..strategies.secure_wire import Exchange, ask, failure_of, messages_of, model_hash, with_roster
from ..strategies.wire import DROP_REASONS, NOT_NEEDED
from .masking import Masking
from .secure_attempt import Attempt, Opened, Sum

ATTEMPTS = 3  # at one round; each asks all of the cohort again
SPARED = 4  # of the nodes that a sum can spare, one in so many may be lost before its round begins


class SecureSums:
    """The rounds of one run, in order; what is prepared of the next one is kept between two calls."""

    def __init__(self, grid: Grid, masking: Masking, enough: int | None = None) -> None:
        """Prepare the rounds.

        Args:
          grid: reaches the nodes.
          masking: how sums are encrypted.
          enough: nodes whose answers end an exchange, but never fewer than a sum takes; None waits for all.
        """
        self._grid, self.masking, self._enough = grid, masking, enough
        self._next: Attempt | None = None
        self._exchanges = 0

    def renew(self, masking: Masking, enough: int | None) -> None:
        """Go on with another roster; what was prepared under the last one is given up."""
        self.masking, self._enough = masking, enough

    def sum(
        self, nodes: Sequence[int], wanted: Sum, timeout: float | None, coming: Sequence[int] = ()
    ) -> Opened:
        """Return the sum of the nodes' vectors. Whatever a node sends, it is dropped and counted; the round goes on.

        Args:
          nodes: the round's cohort.
          wanted: what they sum.
          timeout: seconds for the replies of one exchange.
          coming: the cohort of the next row, if it is known: its keys travel beside this round's messages.
        """
        model = model_hash(wanted.content)
        self._exchanges = 0
        ended = Opened(dropped={str(Reason.TOO_FEW): len(nodes)}, model=model)
        for attempt in self._attempts(nodes, wanted, model, timeout):
            self._finish(attempt, coming, model, timeout)
            ended = attempt.opened(model, self._exchanges)
            if ended.total is not None or attempt.asked_to_open or attempt.in_vain:
                break
        return ended

    def _attempts(
        self, nodes: Sequence[int], wanted: Sum, model: bytes, timeout: float | None
    ) -> Iterator[Attempt]:
        """Yield attempts up to where vectors are asked for: the prepared one, if it is for this, then fresh ones."""
        early, self._next = self._next, None
        known = early is not None and early.wanted.row == wanted.row  # nodes join no attempt twice
        if early is not None and early.prepares(nodes, wanted, self.masking):
            early.wanted = wanted
            self._ready(early, model, timeout)
            if early.asking and SPARED * early.missing <= early.spare:
                yield early
        for number in range(int(known), ATTEMPTS):
            try:
                attempt = Attempt(tuple(nodes), wanted, self.masking, number)
            except Refusal:  # no graph, or no grid, for so few
                return
            self._ready(attempt, model, timeout)
            yield attempt

    def _ready(self, attempt: Attempt, model: bytes, timeout: float | None) -> None:
        while attempt.asking and attempt.step < Exchange.INBOX:
            if not attempt.sent:
                self._exchange(timeout, attempt)
            attempt.advance(model)

    def _finish(self, attempt: Attempt, coming: Sequence[int], model: bytes, timeout: float | None) -> None:
        """Bring an attempt to its end, with the first exchanges of the next one beside its own."""
        last = Exchange.SURVIVORS if attempt.semi_honest else Exchange.CONFIRMED
        while attempt.asking:
            beside: list[Attempt] = []
            if attempt.step is Exchange.INBOX and self._next is None:
                beside = self._coming(coming, attempt.wanted)
                self._next = beside[0] if beside else None
            elif attempt.step is last and self._next is not None:
                self._next.advance()
                beside = [self._next]
            self._exchange(timeout, attempt, *beside)
            attempt.advance(model)

    def _coming(self, nodes: Sequence[int], wanted: Sum) -> list[Attempt]:
        following = replace(wanted, row=wanted.row + 1, content=RecordDict())
        try:
            return [Attempt(tuple(nodes), following, self.masking, 0)]
        except Refusal:
            return []

    def _exchange(self, timeout: float | None, *attempts: Attempt) -> None:
        """Send each node what these attempts ask of it, in one message, and hand them its replies."""
        self._exchanges += 1
        for attempt in attempts:
            attempt.send()
        parts = together(*(attempt.asking for attempt in attempts))
        messages = (
            _message(node, said, next(each for each in attempts if node in each.asking))
            for node, said in parts.items()
        )
        for reply in self._grid.send_and_receive(messages, timeout=timeout):
            node = reply.metadata.src_node_id
            asked = [attempt for attempt in attempts if node in attempt.asking]
            for attempt, (said, reason) in zip(asked, _replies(reply, len(asked)), strict=True):
                attempt.hear(node, said, reason)
            if self._enough is not None and all(each.has_enough(self._enough) for each in attempts):
                for each in attempts:
                    each.wait_no_more(NOT_NEEDED)
                break


def _message(node: int, messages: Sequence[bytes], attempt: Attempt) -> Message:
    wanted = attempt.wanted
    records = dict(wanted.content.items()) if attempt.step is Exchange.INBOX else {}
    asked = ask(messages, attempt.spec, attempt.place)
    if attempt.step is Exchange.PROPOSAL:  # before which a node must know the roster of the terms
        asked = with_roster(asked, attempt.signed_roster)
    content = RecordDict({**records, **asked})
    return Message(content, node, wanted.message_type, group_id=str(wanted.row))


def _replies(reply: Message, count: int) -> list[tuple[bytes, str | None]]:
    """Return what a node answers to so many messages: bytes, and the reason if there are none."""
    if reply.has_error():
        return [(b"", DROP_REASONS.get(reply.error.code, "failed"))] * count
    said = [*(messages_of(reply.content) or []), *[b""] * count][:count]
    code = failure_of(reply.content)
    reason = None if code is None else DROP_REASONS.get(code, "failed")
    return [(each, None if each else reason) for each in said]
