"""A Flower grid that turns every training round into one private sum.

To the strategy it looks like one client that replied with the cohort's mean, so every strategy that averages works
unchanged. Around that it keeps the order that the guarantee rests on: draw the cohort, reserve on the ledger,
train, add, noise, hand over, commit. Nothing is handed over that was not reserved.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import Message, RecordDict
from flwr.supercore.run import Run

from ..privacy.adaptation import Choices
from ..privacy.audit.watching import Released
from ..privacy.budget import Release, Unit
from ..privacy.ledger.ledger import BudgetExhausted
from ..privacy.mechanisms.distributed import decode_sum, sum_event
from ..privacy.mechanisms.private_sum import CohortSum, add_noise, decode
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sum_spec import Scalar, SumSpec, cells_for
from ..privacy.plan import Plan
from ..privacy.refusal import Refusal
from ..strategies.grids import AskingGrid
from ..strategies.secure_wire import rotation_seed
from ..strategies.wire import (
    WEIGHT,
    Layout,
    common_content,
    instruct,
    layout_of,
    mean_reply,
    only_arrays,
    size_of,
)
from .masking import Masking, masked_spec
from .noise_rows import rows_of
from .participants import Participants
from .released import released_sum
from .round_terms import Answers, ClientPrivacy, Round
from .secure_attempt import Opened, Sum
from .secure_sum import SecureSums

MECHANISM = "private_sum"
SHOWN_NODES = 100  # what a strategy sees of a population; its own minimum of nodes may be as high
PATIENCE = 30  # questions for the nodes in one round; Flower's strategies ask once a second while they wait
MAX_EXAMPLES = 1e9  # a client that claims more examples than this is dropped


class PrivateGrid(AskingGrid):
    """Wraps any grid; see the module's text.

    Args:
      participants: who takes part, and the grid that reaches them.
      privacy: None sums without client-level privacy, weighted by examples.
      scalars: metrics that may travel in the sum, with their bounds.
      randomness: where draws and noise come from.
      run: the run's name on the ledger, new for every run; a resumed simulation keeps its own. None makes one up.
      masking: encrypts the sums; with `privacy`, the clients add its noise. None sums in the clear.
    """

    def __init__(
        self,
        participants: Participants,
        *,
        privacy: ClientPrivacy | None = None,
        scalars: tuple[Scalar, ...] = (),
        randomness: Randomness | None = None,
        run: str | None = None,
        masking: Masking | None = None,
    ) -> None:
        cohort = participants.cohort
        if privacy is not None and privacy.plan.sampling != cohort:
            raise Refusal(
                "cohort", cohort.name, "the plan was calibrated for another draw; calibrate it for this one"
            )
        if privacy is not None and privacy.plan.noise_multiplier is None:
            raise Refusal("noise_multiplier", None, "calibrate the plan before it is used")
        self.participants = participants
        self._privacy = privacy
        self._scalars = scalars if privacy is None or privacy.metrics_share > 0 else ()
        self._randomness = randomness or Randomness()
        self._run_name = run or uuid.uuid4().hex
        enough = participants.answers.enough
        self._sums = None if masking is None else SecureSums(participants.grid, masking, enough)
        self._rows = rows_of((self._run_name, MECHANISM), cohort, privacy, self._randomness)
        self._early: dict[int, list[int]] = {}
        self._asked = 0
        self._reserved = 0
        self._row = 0
        self._finished = 0
        self.choices = privacy.adaptation.first(privacy.plan) if privacy is not None else None
        self.drawn: list[int] = []
        self.rounds: list[Round] = []
        self.released: Released | None = None
        self.more_noise = 1.0
        self.exhausted: BudgetExhausted | None = None

    # --- what Flower's strategies ask of a grid ---------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        """Pass the run on to the wrapped grid."""
        self.participants.grid.set_run(run)

    @property
    def run(self) -> Run:
        """The wrapped grid's run."""
        return self.participants.grid.run

    def get_node_ids(self) -> Iterable[int]:
        """Return nodes that stand for all: the cohort decides who is asked, not a strategy's own sampling.

        At most `SHOWN_NODES`, so that a strategy does not make a message for each client of a large population;
        one that tells clients apart still gives itself away.

        Raises:
          Refusal: the strategy asks again and again, as Flower's do while they wait for more nodes than there are.
        """
        self._asked += 1
        if self._asked > PATIENCE:
            most = min(SHOWN_NODES, self.participants.clients)
            remedy = f"set it to at most {most}: the cohort decides who takes part"
            raise Refusal("min_available_nodes", "more than a private sum shows", remedy)
        return self.participants.some(SHOWN_NODES)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run one private sum over the cohort and return it as one reply, or nothing once the budget is spent.

        Messages that do not train are not sent: what they would bring back is in no release.
        """
        self._asked, self.released = 0, None
        training = [m for m in messages if m.metadata.message_type.split(".")[0] == "train"]
        if not training or self.exhausted is not None:
            return []
        content = common_content(training)
        number = self._reserved if self._reserved > self._finished else self._reserve_next()
        if number is None:
            return []
        if self._sums is not None:
            return self._secure_sum(number, content, training[0], self._sums, timeout)
        return self._private_sum(number, content, training[0], timeout)

    def renew(self, nodes: Sequence[int], masking: Masking | None, answers: Answers) -> None:
        """Go on with these clients from the next round; the plan stands, since it does not go by how many there are."""
        self.participants.renew(nodes, answers)
        self._early = {}
        if self._sums is not None and masking is not None:
            self._sums.renew(masking, answers.enough)

    # --- the round ----------------------------------------------------------------------------------------------

    def raise_noise(self, factor: float) -> None:
        """Let the rounds from now on have so many times the noise that is planned, and charged.

        What is chosen from what was released may not lower a charge, unless a filter counts.
        """
        self.more_noise = factor

    def skip_to(self, number: int, choices: Choices | None = None) -> None:
        """Continue after round `number`, which an earlier process finished, with the choices it led to."""
        self._reserved = self._finished = number
        self.choices = choices or self.choices
        if self._rows is not None:
            self._rows.skip_to(number)

    def draw(self, number: int) -> list[int]:
        """Return the cohort of round `number`; where the randomness is seeded, the same one at every call."""
        earlier = [] if self._rows is None else self._rows.cohorts
        if number in self._early:
            return self._early[number]
        if number <= len(earlier):
            return earlier[number - 1]
        return self.participants.draw(self._randomness.stream("cohort", number), earlier)

    def reserve(self, number: int) -> None:
        """Draw the cohort of round `number` and reserve its release, durably, before anything is configured.

        Raises:
          BudgetExhausted: the release does not fit; nothing was written and nothing will be sent.
          Refusal: another run of this name has released the round with noise that cannot be repeated.
        """
        self._row = number if self._rows is None else self._rows.next()
        self.drawn = self.draw(self._row)
        if self._privacy is not None:
            self._privacy.ledger.reserve_new(self._release(self._row))
        if self._rows is not None:
            self._rows.cohorts.append(self.drawn)
        self._reserved = number

    def _reserve_next(self) -> int | None:
        try:
            self.reserve(self._reserved + 1)
        except BudgetExhausted as spent:
            self.exhausted = spent
            return None
        return self._reserved

    def _release(self, row: int) -> Release:
        assert self._privacy is not None
        plan = self._plan()
        events = dict.fromkeys(plan.adversaries, plan.event_of(row))
        cohort = None if self._rows is None else tuple(self.drawn)
        rng = self._randomness.kind
        order = plan.filter_order if self._privacy.adaptation.noise else None
        return Release(
            Unit.CLIENT, self._run_name, row, MECHANISM, events, rng, cohort=cohort, filter_order=order
        )

    def _private_sum(
        self, number: int, content: RecordDict, request: Message, timeout: float | None
    ) -> list[Message]:
        """Return the noisy mean as one reply; nothing below the quorum."""
        arrays = only_arrays(content)
        layout = layout_of(arrays)
        spec = self._spec(layout)
        outgoing = instruct(content, spec, self._run_name, self._row)
        order = Message(outgoing, 0, request.metadata.message_type, group_id=str(number))
        cohort_sum, dummies = self.participants.sum(order, self.drawn, spec, size_of(layout, spec), timeout)
        total = self._noised(cohort_sum, self._row, spec)
        asked = self.participants.asked(self.drawn)
        done = Round(number, len(asked), cohort_sum.replies, cohort_sum.dropped)
        if cohort_sum.replies < self.participants.answers.quorum:
            self._note(replace(done, abandoned=True))
            return []
        mean, scalars = self._decoded(total, layout, spec, cohort_sum)
        self.released = self._watched(number, mean, self.participants.expected)
        if dummies is not None:  # whole numbers: nothing of them is left
            mean, scalars = self._decoded(total - dummies, layout, spec, cohort_sum)
        self._note(replace(done, clipped_again=cohort_sum.clipped_again, scalars=scalars))
        reply = mean_reply(arrays, mean, scalars, request)
        if self._privacy is not None:
            self._privacy.ledger.commit(self._release(self._row).key, durable=False)
            assert self.choices is not None
            self.choices = self._privacy.adaptation.next(self.choices, number, scalars)
        return [reply]

    def _secure_sum(
        self, number: int, content: RecordDict, request: Message, sums: SecureSums, timeout: float | None
    ) -> list[Message]:
        """Return the opened mean as one reply; nothing where no sum was opened, and what was reserved stays spent."""
        arrays = only_arrays(content)
        layout = layout_of(arrays)
        spec = masked_spec(self._spec(layout), sums.masking)
        noise = self._plan().noise_over_clip * self.more_noise if self._privacy is not None else 0.0
        wanted = Sum(
            self._run_name,
            self._row,
            content,
            request.metadata.message_type,
            spec,
            size_of(layout, spec) - len(spec.scalars),
            noise,
        )
        self._early = {self._row + 1: self.draw(self._row + 1)}  # keys go out a round ahead: draw once
        opened = sums.sum(self.drawn, wanted, timeout, self._early[self._row + 1])
        asked, exchanges = len(self.drawn), opened.exchanges
        if opened.total is None or opened.spec is None:
            self._note(Round(number, asked, 0, opened.dropped, exchanges=exchanges, abandoned=True))
            return []
        seed = rotation_seed(opened.model, self._row)
        real = max(1.0, float(len(self.participants.real(opened.nodes))))
        mean, scalars = decode_sum(opened.total, layout, opened.spec, opened.survivors, real, seed)
        self.released = self._watched(number, mean, real)
        self._note(
            Round(number, asked, opened.survivors, opened.dropped, scalars=scalars, exchanges=exchanges)
        )
        if self._privacy is not None:
            self._settle(opened)
        return [mean_reply(arrays, mean, scalars, request)]

    def _settle(self, opened: Opened) -> None:
        """Commit what the sum of these survivors costs, which is no more than what was reserved."""
        assert self._privacy is not None and opened.spec is not None
        event = sum_event(opened.spec, opened.survivors)
        if event.noise_multiplier < self._plan().noise_over_clip:
            raise AssertionError("the sum has less noise than was reserved")
        self._privacy.ledger.commit(self._release(self._row).key, durable=False)

    def _note(self, done: Round) -> None:
        self.rounds.append(replace(done, choices=self.choices))
        self._finished = done.number

    def _spec(self, layout: Layout) -> SumSpec:
        if self._privacy is None:
            return SumSpec(None, (*self._scalars, Scalar(WEIGHT, MAX_EXAMPLES)))
        cells = cells_for(sum(int(np.prod(shape)) for shape in layout.values()))
        plan, expected = self._plan(), self.participants.expected
        scalars = (*self._scalars, *self._privacy.adaptation.scalars(plan, expected))
        return SumSpec(plan.clipping_norm, scalars, self._privacy.metrics_share, cells)

    def _plan(self) -> Plan:
        """Return the plan with what this round goes by: the noise follows the norm that clients clip to."""
        assert self._privacy is not None and self.choices is not None
        now = self.choices
        return replace(
            self._privacy.plan, clipping_norm=now.clipping_norm, noise_multiplier=now.noise_multiplier
        )

    def _watched(self, number: int, mean: dict[str, np.ndarray], denominator: float) -> Released | None:
        """Return the sum as an audit reads it; None where nothing is claimed of it."""
        if self._privacy is None:
            return None
        dummies = self.participants.dummies(self.drawn)
        drawn = (len(self.drawn) - len(dummies), dummies, self.participants.clients)
        return released_sum(number, mean, denominator, (self._plan(), self._row), self.more_noise, drawn)

    def _noised(self, cohort_sum: CohortSum, row: int, spec: SumSpec) -> np.ndarray:
        if self._privacy is None:
            return cohort_sum.total
        plan = self._plan()
        if self._rows is not None:
            noised, event = self._rows.add_noise(cohort_sum.total, row, spec)
        else:
            stream = self._randomness.stream("noise", row)
            noised, event = add_noise(cohort_sum.total, plan.noise_over_clip * self.more_noise, spec, stream)
        if self.more_noise == 1 and plan.sampling.event(event) != plan.event():
            raise AssertionError("the mechanism's event is not the one that was reserved")
        return noised

    def _decoded(
        self, total: np.ndarray, layout: Layout, spec: SumSpec, cohort_sum: CohortSum
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        if self._privacy is None and cohort_sum.replies == 0:
            return {name: np.zeros(shape) for name, shape in layout.items()}, {}
        return decode(total, layout, spec, self.participants.expected)
