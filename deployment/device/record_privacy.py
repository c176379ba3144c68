"""Record-level privacy on a device, planned for each run from the owner's records and what is left of their budget."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ...base.refusal import Refusal
from ...client.private_update import NotTrained
from ...messages.client_settings import ClientSettings, RecordPrivacy, StepTerms
from ...messages.training_order import ModeName, RecordTerms, TrainingOrder, display_name
from ...messages.wire import BUDGET_SPENT, NO_EXAMPLES, NOT_READY
from ...privacy.budget import Adversary
from ...privacy.ledger.caps import CapEnded, lowered
from ...privacy.ledger.ledger_state import LedgerRelease, run_of, state_at
from ...privacy.ledger.question_caps import is_question
from ...strategies.identity import Identity
from .device_ledger import DeviceLedger

logger = logging.getLogger("fedveil.client")


@dataclass
class RecordPlanner:
    """Planner of the privacy of an owner's records.

    Attributes:
      ledger: of the device, with its owner's cap.
      minimum_noise: least noise of the owner's policy, standard deviation over clipping norm.
      count: returns the number of the owner's records that train; see `torch_task.TorchTask.count`.
    """

    ledger: DeviceLedger
    minimum_noise: float
    count: Callable[[int | None, float | None], int]
    # By privacy, number of records, training and run: planned once, so that the noise of a run stays the same.
    _planned: dict[tuple[object, ...], float] = field(default_factory=dict[tuple[object, ...], float])

    def forget(self) -> None:
        """Forget the noise planned so far: a plan from before a question does not include its cost."""
        self._planned.clear()

    def protected(self, settings: ClientSettings, order: TrainingOrder, identity: Identity) -> ClientSettings:
        """Return the settings of a training with the privacy of records that its order demands, if any.

        Args:
          settings: of the training.
          order: of the server, which the owner's policy allows.
          identity: of the device, with the roster of the cohort.

        Raises:
          NotTrained: NO_EXAMPLES if the owner has none; BUDGET_SPENT if the owner's cap has expired, or too little of the
            budget is left; NOT_READY if a ledger cannot be read or written.
        """
        terms = order.record
        if terms is None:
            return settings
        if terms.sample_rate is not None:  # one step on the records of all clients, with noise on its sum
            nodes = tuple(member.node for member in identity.roster.members)
            return replace(settings, step=StepTerms(terms, identity.node, nodes))
        records = self.count(terms.per_person, settings.held_out)
        if records:
            record = self._record_privacy(terms, records, settings, display_name(order.run))
            return replace(settings, record=record)
        if order.privacy is ModeName.RECORD:
            raise NotTrained(NO_EXAMPLES)
        return settings  # it answers with a zero update, so that the server does not see that it has none

    def _record_privacy(
        self, terms: RecordTerms, records: int, settings: ClientSettings, run: str
    ) -> RecordPrivacy:
        """Return the privacy of a run's rounds, with the terms' budget lowered to the owner's; its noise is planned once."""
        try:
            budget = lowered(terms.budget, [self.ledger.cap])
        except CapEnded as ended:
            logger.warning("%s", ended)
            raise NotTrained(BUDGET_SPENT) from ended
        owners_terms = replace(terms, target_epsilon=budget.target_epsilon, target_delta=budget.target_delta)
        privacy = RecordPrivacy(
            owners_terms, (), str(self.ledger.folder), origin=json.dumps(self.ledger.origin)
        )
        try:  # what is planned must fit beside earlier releases of the whole client
            self.ledger.charge_records(budget)
        except Refusal as refusal:
            logger.warning("%s", refusal)
            raise NotTrained(NOT_READY) from refusal
        plan = (privacy, records, settings.training, run)
        if plan not in self._planned:
            self._planned[plan] = self._plan(privacy, records, settings, run)
        # The policy counts noise in clipping norms, the terms in sensitivities: two norms under replace-one.
        minimum = self.minimum_noise / terms.adjacency.distance
        return replace(privacy, noise_by_records=((0, max(self._planned[plan], minimum)),))

    def _plan(self, privacy: RecordPrivacy, records: int, settings: ClientSettings, run: str) -> float:
        """Return the noise multiplier for a run, planned from the budget that earlier runs left.

        The plan includes the rounds that this run has already spent, so that the noise is the same after a restart; its
        earlier questions are charged in addition.
        """
        from ...strategies.record_plan import calibrated_noise  # dp_accounting, not needed by other modes

        def is_of_run(booked: LedgerRelease) -> bool:
            return booked.source is None and display_name(run_of(booked.entry)) == run

        try:
            book = state_at(self.ledger.records)
            # The model is all releases; of sums of whole clients a trusted server is charged nothing.
            prior = book.events(Adversary.MODEL, lambda booked: not is_of_run(booked))
            questions = book.events(Adversary.MODEL, lambda booked: is_of_run(booked) and is_question(booked))
            rounds = privacy.terms.participations
            return calibrated_noise(privacy, records, settings, rounds, prior, other_events=questions)
        except Refusal as refusal:
            if refusal.field not in ("ledger", "target_epsilon"):
                raise
            logger.warning("%s", refusal)
            raise NotTrained(NOT_READY if refusal.field == "ledger" else BUDGET_SPENT) from refusal
