"""Flower grid that turns every training round into one private sum.

To the strategy it looks like one client that replied with the cohort's mean, so every strategy that averages works
unchanged. It enforces the order that the guarantee requires: draw the cohort, reserve on the ledger, train, add, noise,
return the mean, commit. It returns nothing that was not reserved.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from ..base.refusal import Refusal
from ..messages import wire
from ..messages.grids import PassingGrid
from ..messages.wire import POLICY_REASONS
from ..privacy.adaptation import Choices
from ..privacy.ledger.ledger import BudgetExhausted
from ..privacy.mechanisms.compression import compressed_layout, sketch_of
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.released_sum import ReleasedSum, RoundCohort
from ..privacy.mechanisms.sum_spec import SumSpec, compressed_spec
from ..strategies.shared_model import Steps, shared
from .accounts import MECHANISM, SumAccount, account_of
from .noise_rows import create_rows
from .open_sum import OpenSums
from .participants import Participants
from .round_terms import DEFAULT_TERMS, Answers, Results, Sum, SumPrivacy, SumTerms, expand_mean

if TYPE_CHECKING:
    from .masked_sums import MaskedSums
    from .masking import Masking

MAX_NODES = 100  # nodes that a strategy sees at most; its own minimum of nodes may be as high
BUDGET_REASON, FORKED_REASON = wire.DROP_REASONS[wire.BUDGET_SPENT], wire.DROP_REASONS[wire.FORKED]
PATIENCE = 30  # requests for the nodes in one round; Flower's strategies poll once a second while they wait


def sums_over(
    participants: Participants, account: SumAccount, masking: Masking | None, randomness: Randomness
) -> OpenSums | MaskedSums:
    """Return the object that computes a run's sums: encrypted with masking, in the clear without.

    Arguments as of `MaskedSums`.
    """
    if masking is None:
        return OpenSums(participants, account)
    from .masked_sums import MaskedSums  # sums in the clear need no protocol

    return MaskedSums(participants, account, masking, randomness)


class PrivateGrid(PassingGrid):
    """Wraps any grid and sums over it privately.

    Args:
      participants: the clients, and the grid that reaches them.
      privacy: None sums without client-level privacy, weighted by examples.
      randomness: source of draws and noise.
      run: the run's name on the ledger, new for every run; a resumed simulation keeps its own. None generates one.
      masking: encrypts the sums; with `privacy`, the clients add its noise. None sums in the clear.
      terms: content and participants of the sums.

    Attributes:
      account: of the sums; its factors of noise and norm hold for later rounds.
      steps: to which the clients' initial arrays are rounded; a round's mean updates the unrounded model.
      current_cohort: nodes of the last reserved round.
      rounds: results of this process's rounds.
      released: the last round's sum for an audit; None if nothing was released.
      exhausted: why the budget allows no further round; None as long as it does.
    """

    def __init__(
        self,
        participants: Participants,
        *,
        privacy: SumPrivacy | None = None,
        randomness: Randomness | None = None,
        run: str | None = None,
        masking: Masking | None = None,
        terms: SumTerms = DEFAULT_TERMS,
    ) -> None:
        super().__init__(participants.grid)
        self._terms = terms
        self.participants = participants
        self._randomness = randomness or Randomness()
        self._run_name = run or uuid.uuid4().hex
        cohort, source = participants.cohort, self._randomness
        self._rows = create_rows(self._run_name, MECHANISM, cohort, privacy, source)
        self.account = account_of(privacy, cohort, terms.segments, self._rows, self._run_name, source.kind)
        self._sums = sums_over(participants, self.account, masking, source)
        self._early: dict[int, list[int]] = {}  # cohort of the next row, by row, once it is drawn
        self._integers: dict[str, Array] = {}  # arrays of the first model that no round averages
        self._requests = 0  # for the nodes, since the last round
        self._reserved = 0  # last reserved round
        self._row = 0  # of that round
        self._finished = 0  # last round whose sum was computed
        self._spent: set[int] = set()  # nodes whose own ledgers refused
        self._declined: set[int] = set()  # nodes whose owners' policies refused
        self.steps: Steps = {}
        self._counts_are_public = privacy is None or masking is not None  # masked sums need no secret draw
        self.current_cohort: list[int] = []
        self.rounds = Results()
        self.released: ReleasedSum | None = None
        self.exhausted: BudgetExhausted | None = None

    # --- the grid interface of Flower's strategies ---------------------------------------------------------------

    def get_node_ids(self) -> Iterable[int]:
        """Return representative nodes: the cohort selects clients, not a strategy's own sampling.

        At most `MAX_NODES`, so that a strategy does not create a message for each client of a large population; a
        strategy that distinguishes clients is still detected.

        Raises:
          Refusal: the strategy calls this repeatedly, as Flower's do while they wait for more nodes than exist.
        """
        self._requests += 1
        if self._requests > PATIENCE:
            limit = min(MAX_NODES, self.participants.clients)
            remedy = f"set it to at most {limit}: the cohort draws the clients"
            raise Refusal("min_available_nodes", "more than a private sum shows", remedy)
        return self.participants.first_nodes(MAX_NODES)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run one private sum over the cohort and return it as one reply, or nothing once the budget is spent.

        Messages that do not train are not sent: no release covers their replies.

        Args:
          messages: of the strategy, equal for all nodes.
          timeout: seconds for the replies of one exchange; None waits for all.
        """
        self._requests, self.released = 0, None
        training = [m for m in messages if m.metadata.message_type.split(".")[0] == "train"]
        if not training or self.exhausted:
            return []
        content = self._with_integers(wire.common_content(training))
        if self._reserved <= self._finished:  # a strategy's own loop does not reserve
            try:
                self.reserve(self._reserved + 1)
            except BudgetExhausted as spent:
                self.exhausted = spent
                return []
        return self._round(self._reserved, content, training[0], timeout)

    def renew(
        self,
        nodes: Sequence[int],
        masking: Masking | None,
        answers: Answers,
        names: Mapping[int, str] | None = None,
    ) -> None:
        """Continue with these clients from the next round; the plan remains, since it does not depend on their number.

        Args:
          nodes: all current clients.
          masking: of the sums from then on, under their roster; None sums in the clear.
          answers: that a round needs.
          names: of the clients by node; None without names.
        """
        self.participants.renew(nodes, answers, names)
        self._early = {}  # clients drawn ahead may have left
        self._sums.renew(masking)

    # --- the round ----------------------------------------------------------------------------------------------

    @property
    def choices(self) -> Choices | None:
        """Choices for the next round; None without client-level privacy."""
        return self.account.choices

    @property
    def all_spent(self) -> bool:
        """Whether every client was asked and its own ledger refused; always False if the draw is secret."""
        return self._counts_are_public and self.participants.all_among(self._spent)

    @property
    def all_declined(self) -> bool:
        """Whether every client was asked and its owner's policy refused.

        With a secret draw this is revealed only if no client ever answered: then no round contains any data.
        """
        is_public = self._counts_are_public or not self.rounds.answered
        return is_public and self.participants.all_among(self._declined)

    @property
    def forked(self) -> bool:
        """Whether most of the last cohort have seen another log of this server, and no round contains any data.

        Fewer, such as owners who have not yet accepted a lost log, or one client that lies, end no run.
        """
        count = sum(result.dropped.get(FORKED_REASON, 0) for result in [*self.rounds.newest][-1:])
        return 2 * count > len(self.current_cohort) and not self.rounds.answered

    def skip_to(self, number: int, choices: Choices | None = None) -> None:
        """Continue after round `number`, which an earlier process finished, with the resulting choices.

        Args:
          number: of the round.
          choices: after it; None without adaptive choices.
        """
        self._reserved = self._finished = number
        if choices:
            self.account.choices = choices
        self._rows.skip_to(number)

    def draw(self, number: int) -> list[int]:
        """Return the cohort of row `number`: one that is drawn or recorded already, otherwise a new one.

        With seeded randomness, every call returns the same cohort.
        """
        earlier = self._rows.cohorts
        if number in self._early:
            return self._early[number]
        # After a resume, the ledger has of a secret draw that it took place, and not whom it drew.
        if number <= len(earlier) and not self.participants.cohort.secret:
            return list(earlier[number - 1])
        stream = self._randomness.stream("cohort", number)
        return self.participants.draw(stream, earlier[: number - 1], self._terms.tuning.arm_of(number))

    def reserve(self, number: int) -> None:
        """Draw the cohort of round `number` and reserve its release, durably, before anything is configured.

        Raises:
          BudgetExhausted: the release does not fit; nothing was written and nothing will be sent.
          Refusal: another run of this name has released the round with noise that cannot be repeated.
        """
        self._row = self._rows.next(number)
        self.current_cohort = self.draw(self._row)
        self.participants.arm = arm = self._terms.tuning.arm_of(self._row)
        self.account.reserve(self._row, self.current_cohort, arm)
        self._rows.take(self.current_cohort)
        self._reserved = number

    def _round(
        self, number: int, content: RecordDict, request: Message, timeout: float | None
    ) -> list[Message]:
        """Compute the reserved round's sum, settle its account, and return its mean as one reply to the strategy.

        Without a release there is no reply, and the reservation stays spent. The arrays in `content` are the unrounded
        model; `request` is one of the strategy's messages.
        """
        arrays = wire.only_arrays(content)
        content = wire.with_canary_records(_shared(content, arrays, self.steps), self._terms.canary_records)
        layout, sent_layout, spec = self._spec(content)
        sum_request = Sum(
            self._run_name,
            self._row,
            content,
            request.metadata.message_type,
            spec,
            sent_layout,
            self.account.noise_of_sum,
            number,
        )
        result, mean = self._sums.sum(self.current_cohort, sum_request, timeout, self._draw_ahead)
        arm = self.participants.arm
        choices = self.account.round_choices
        self.rounds.add(replace(result, choices=choices, arm=arm.number if arm else None))
        if not result.replies and result.dropped.keys() == {BUDGET_REASON}:
            self._spent.update(self.current_cohort)
        # Members decline subsets of a cohort that are too small for their policies; a search then takes larger ones.
        searches = self.rounds.untrue
        if not result.replies and not searches and result.dropped and result.dropped.keys() <= POLICY_REASONS:
            self._declined.update(self.current_cohort)
        self._finished = number
        if mean is None:
            return []
        if spec.compression is not None:
            mean = expand_mean(mean, layout, sketch_of(spec.compression, self._row))
        dummies = self.participants.dummies(self.current_cohort)
        cohort = RoundCohort(len(self.current_cohort) - len(dummies), dummies, self.participants.pool_size)
        reply = wire.mean_reply(arrays, mean.arrays, mean.scalars, request)
        if not mean.part:  # the noise and cohort of a sum in parts differ from the audit's terms
            self.released = self.account.audit_view(number, self._row, mean, cohort)
        self.account.settle(number, self._row, mean)
        return [reply]

    def _with_integers(self, content: RecordDict) -> RecordDict:
        """Return an instruction whose integer arrays, such as counters, are those of the run's first instruction.

        Some strategies of Flower turn them into floats, which would then be part of the update and be clipped.
        """
        arrays = wire.only_arrays(content)
        averaged = wire.layout_of(arrays)
        self._integers = self._integers or {
            name: each for name, each in arrays.items() if name not in averaged
        }
        lost = {name: each for name, each in self._integers.items() if name in averaged}
        return wire.with_arrays(content, ArrayRecord({**arrays, **lost})) if lost else content

    def _spec(self, content: RecordDict) -> tuple[wire.Layout, wire.Layout, SumSpec]:
        """Return the shapes of an update's arrays and of its sent part, and the spec of the sum."""
        layout, expected = wire.layout_of(wire.only_arrays(content)), self.participants.expected
        if self._terms.compress is None:
            return layout, layout, self.account.spec(layout, expected)
        size = sum(int(np.prod(shape)) for name, shape in layout.items() if name != wire.CANARY_RECORDS)
        compression = self._terms.compress.of(size, self._public_seed)
        sent_layout = compressed_layout(layout, compression)
        whole_spec = self.account.spec(sent_layout, expected)
        return layout, sent_layout, compressed_spec(whole_spec, compression, self._terms.compress.cells)

    @property
    def _public_seed(self) -> str:
        """Seed of the run's matrices: from a simulation's seed, or from the run's name at a server."""
        if self._randomness.seeded:
            return self._randomness.stream("compression").bytes(32).hex()
        return hashlib.sha256(self._run_name.encode()).hexdigest()

    def _draw_ahead(self) -> list[int]:
        """Draw the cohort of the next row, whose keys are exchanged in advance, and keep it for `draw`."""
        self._early = {self._row + 1: self.draw(self._row + 1)}
        return self._early[self._row + 1]


def _shared(content: RecordDict, arrays: ArrayRecord, steps: Steps) -> RecordDict:
    """Return an instruction with the model as clients get it: rounded to whole steps; unchanged without steps."""
    if not steps:
        return content
    return wire.with_arrays(content, wire.memory_arrays(shared(wire.views(arrays), steps)))
