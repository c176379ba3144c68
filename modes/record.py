"""Mode `record`: DP-SGD at each client hides single records from everybody else; each client's own ledger decides."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.notice import warn
from ..base.refusal import Refusal
from ..configs.privacy_settings import Record
from ..messages.client_settings import TRAIN_LOSS, ClientSettings, RecordPrivacy
from ..messages.training_order import ModeName, RecordTerms
from ..privacy.budget import OF_RECORDS, UNLIMITED_EPSILON, Adversary, Budget, check_delta
from ..privacy.ledger.caps import NAME_LENGTH, CapEnded, capped
from ..privacy.ledger.client_sums import read_records
from ..privacy.ledger.data_sets import PendingCharges
from ..privacy.ledger.ledger_state import identity_of, require_unit
from ..privacy.mechanisms.sum_spec import Segment
from ..privacy.plan import Plan, Unaffordable
from ..strategies.cohorts import likely_participations
from ..strategies.record_plan import (
    PoissonBatches,
    calibrated_noise,
    plans_of_sizes,
    poisson_batches,
    record_plan,
)
from .mode import EVERYBODY, Events, Mode, Promise

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from ..privacy.plan import Sampling
    from ..server.masking import Masking

MAX_NOISE_LEVELS = 8  # with more different sizes, clients share the noise level of the size that needs most
# of the rounds, on digits and mnist5k: docs/evidence/accuracy.md
SHARE_OF_MODELS = 1 / 4


class RecordMode(Mode):
    """Hides single records of a client from everybody else, by full noise of its own."""

    charges_records = str(ModeName.RECORD)
    sum_source = OF_RECORDS
    sums_cost_records = False
    group = "privacy"  # of the settings, in which the level of records stands

    @property
    def level_of_records(self) -> Record:
        """The settings of DP-SGD at the clients."""
        privacy = self.parts.settings.privacy
        assert isinstance(privacy, Record)
        return privacy

    @property
    def promises(self) -> tuple[Promise, ...]:
        """The promises of the sums, and that of each client."""
        level = self.level_of_records
        promise = Promise(
            level.unit,
            level.target_epsilon,
            level.target_delta,
            level.adjacency,
            level.noise_multiplier,
            EVERYBODY,
            "poisson batches, in the rounds taken part in",
            per_client=True,
        )
        return (*super().promises, promise)

    @property
    def client_budget(self) -> Budget:
        """The budget of each client's own ledger."""
        return self.promises[-1].budget

    @property
    def metrics(self) -> tuple[Segment, ...]:
        """What else may leave a client but its loss, for which nobody accounted."""
        return tuple(each for each in super().metrics if each.name != TRAIN_LOSS)

    @property
    def share_of_models(self) -> float:
        """Share of the rounds whose models are averaged against noise that only clients know."""
        return SHARE_OF_MODELS

    # --- persons and records ---------------------------------------------------------------------------------------

    @property
    def per_person(self) -> int | None:
        """Largest number of one person's examples that a client trains on; None without a bound."""
        return self.level_of_records.per_person

    @property
    def clients_per_person(self) -> int | None:
        """Largest number of clients that train on one person; None without a bound."""
        return self.parts.population.max_clients(self.level_of_records.clients_per_person)

    @property
    def gradients(self) -> str:
        """The requested engine of DP-SGD."""
        return self.level_of_records.gradients

    # --- questions -------------------------------------------------------------------------------------------------

    @property
    def question_sampling(self) -> Sampling:
        """How a question samples a client's records: all of them."""
        return PoissonBatches(1.0, 1)

    def noise_of_answers(self, plan: Plan) -> float:
        """Return the noise of a question's sum over the norm of one record: every client adds the full noise."""
        return plan.noise_over_clip * math.sqrt(self.parts.declared_clients)

    def question_ledgers(self) -> list[Path]:
        """Return the ledgers of the clients of this machine."""
        population = self.parts.population
        home = population.client_ledger_home(Path())
        return [home / f"{name[:NAME_LENGTH]}.ledger" for name in population.client_ledger_names]

    # --- clients ---------------------------------------------------------------------------------------------------

    def instruct(
        self, client: ClientSettings, folder: Path, rounds: int | None, resumed: bool, events: Events
    ) -> ClientSettings:
        """Return the settings of clients of this machine, with their noise, planned once for each size of data set. Arguments as of `Mode`."""
        client = super().instruct(client, folder, rounds, resumed, events)
        level = self._planned(client, folder, events)
        if self.parts.simulated or not rounds:
            return replace(client, record=level)
        if self.level_of_records.noise_multiplier:
            return replace(client, record=self._with_noise_for_one_round(level, client, events()))
        return replace(client, record=self._with_noise_by_ledger(level, client, rounds, resumed, events()))

    def instruct_for_question(self, client: ClientSettings, folder: Path) -> ClientSettings:
        """Return the settings of clients of this machine that answer a question, without noise for training. Arguments as of `Mode`."""
        return replace(client, record=self._unplanned(folder))

    def _planned(self, client: ClientSettings, folder: Path, events: Events) -> RecordPrivacy:
        """Return the level of records, with noise planned for empty ledgers of the sizes of data sets that there are."""
        sizes, level, record = self.sizes, self._unplanned(folder), self.level_of_records
        warning = check_delta(self.group, record.target_delta, sizes[-1], "records", record.allow_large_delta)
        if warning:
            warn(warning)
        if record.noise_multiplier is None:
            return replace(level, noise_by_records=self._noise_of_sizes(level, client, events()))
        level = replace(level, noise_by_records=((0, record.noise_multiplier),))
        plan = record_plan(level, sizes[-1] + level.canaries, client)
        plan.require_one_round(level.terms.budget, events())
        return level

    def _unplanned(self, folder: Path) -> RecordPrivacy:
        """Return the level of records before its noise is planned."""
        parts, record = self.parts, self.level_of_records
        return RecordPrivacy(
            self.record_order(),
            (),
            str(parts.population.client_ledger_home(folder)),
            record.allow_large_delta,
            self.extra_records,
            parts.population.ledger_names,
            clients_per_person=record.clients_per_person,
        )

    def _noise_of_sizes(
        self, level: RecordPrivacy, client: ClientSettings, events: Sequence[DpEvent]
    ) -> tuple[tuple[int, float], ...]:
        """Return (records, noise multiplier) for the sizes of the clients' data sets, canaries included."""
        sizes = [size + level.canaries for size in self.sizes]
        rounds = self._participations(self.parts.settings.num_rounds)
        each = -(-len(sizes) // MAX_NOISE_LEVELS)
        noise: list[tuple[int, float]] = []
        for first in range(0, len(sizes), each):
            neediest = _neediest(sizes[first : first + each], client)
            needed = (calibrated_noise(level, n, client, rounds, other_events=events) for n in neediest)
            noise.append((sizes[first], max(needed)))
        return tuple(noise)

    def _with_noise_by_ledger(
        self,
        level: RecordPrivacy,
        client: ClientSettings,
        rounds: int,
        resumed: bool,
        events: Sequence[DpEvent],
    ) -> RecordPrivacy:
        """Return the level of records with separate noise for each ledger that has entries or a cap.

        A client with a spent budget keeps the noise of an empty ledger, and its ledger makes it sit out. In a run that has
        begun, ledgers with too little left for a plan keep that noise if one affords a round.

        Raises:
          Refusal: no client has enough left.
        """
        rounds_left, whole = map(self._participations, (rounds, self.parts.settings.num_rounds))
        planned: dict[str, float] = {}
        refusals: list[Refusal] = []
        pending = self.parts.population.pending_charges()
        for name, records in self._ledgers().items():
            try:
                capped_level, prior = _within_ledger(level, name, pending)
                count = records + level.canaries
                planned[name] = (
                    calibrated_noise(capped_level, count, client, rounds_left, prior, whole, events)
                    if prior or capped_level != level
                    else level.noise_multiplier(count)
                )
            except Refusal as refusal:
                refusals.append(refusal)
        if resumed and not planned:  # a hundredth of a budget may be many of its rounds
            return self._with_noise_for_one_round(level, client, events)
        return _unless_all_refuse(replace(level, noise_by_ledger=tuple(planned.items())), planned, refusals)

    def _with_noise_for_one_round(
        self, level: RecordPrivacy, client: ClientSettings, events: Sequence[DpEvent]
    ) -> RecordPrivacy:
        """Return the level of records unchanged if some ledger affords a round with its noise.

        Raises:
          Refusal: none does.
        """
        refusals: list[Refusal] = []
        pending = self.parts.population.pending_charges()
        for name, records in self._ledgers().items():
            try:
                capped_level, prior = _within_ledger(level, name, pending)
                plan = record_plan(capped_level, records + level.canaries, client)
                plan.require_one_round(capped_level.terms.budget, [*prior, *events])
                return level
            except Refusal as refusal:
                refusals.append(refusal)
        return _unless_all_refuse(level, (), refusals)

    def _participations(self, rounds: int) -> int:
        return likely_participations(self.parts.cohort, self.parts.num_clients, rounds)

    def _ledgers(self) -> dict[str, int]:
        """Return each client's number of records by the name of its ledger; clients with equal data share one."""
        parts = self.parts
        sizes = (len(self.data_of(client)) for client in range(parts.num_clients))
        names = parts.population.client_ledger_names
        return {name: size for name, size in zip(names, sizes, strict=True) if size}

    def record_order(self) -> RecordTerms:
        """Return what an order says of DP-SGD at the clients."""
        record, settings = self.level_of_records, self.parts.settings
        return RecordTerms(
            record.target_epsilon or UNLIMITED_EPSILON,
            record.target_delta,
            record.max_grad_norm,
            record.adjacency,
            self._participations(settings.num_rounds),
            record.gradients,
            settings.budget.runs,
            record.per_person,
        )

    def client_plan(self, client: ClientSettings) -> Plan:
        """Return the plan of a client's rounds, of the data set whose records lose most. Arguments as of `Mode`."""
        level, record = self.level_of_records, client.record
        assert record is not None
        rounds = self._participations(self.parts.settings.num_rounds)
        plan = record_plan(record, self.sizes[0], client)
        if level.noise_multiplier is not None:  # noise that is planned suits each size
            plans = plans_of_sizes(self.sizes, record, client)
            plan = max(plans, key=lambda each: each.epsilon(level.target_delta, rounds))
        return replace(plan, num_rounds=rounds)

    def limits(self, plan: Plan, masking: Masking | None) -> list[str]:
        """Return sentences on what the plan of a promise does not protect from. Arguments as of `Mode`."""
        if plan.unit is not self.level_of_records.unit:
            return super().limits(plan, masking)
        return ["Client sampling hides no record: messages and models reveal who took part.", self.unit_limit]


MODE = RecordMode


def _unless_all_refuse(
    level: RecordPrivacy, planned: Collection[str], refusals: Sequence[Refusal]
) -> RecordPrivacy:
    if refusals and not planned:
        raise next((each for each in refusals if not isinstance(each, Unaffordable | CapEnded)), refusals[-1])
    if refusals:
        warn(f"{len(refusals)} clients sit out: too little of their budgets is left: {refusals[-1]}")
    return level


def _within_ledger(
    level: RecordPrivacy, name: str, pending: PendingCharges
) -> tuple[RecordPrivacy, list[DpEvent]]:
    """Return the level of records within a ledger's caps, and the events that the ledger holds or owes."""
    path = level.ledger_path(name)
    identity = identity_of(path)
    require_unit(path, identity.get("unit"), str(level.terms.budget.unit))
    adjacency = level.terms.adjacency
    if identity.get("adjacency", adjacency) != adjacency:
        remedy = f"ledgers of these records are kept for {identity['adjacency']}; use that adjacency"
        raise Refusal("privacy.adjacency", str(adjacency), remedy)
    budget = capped(path, level.terms.budget)
    limits = {"target_epsilon": budget.target_epsilon, "target_delta": budget.target_delta}
    within = replace(level, terms=replace(level.terms, **limits))
    whole, _ = read_records(pending.clients, path, budget.adjacency)
    return within, [*whole.events(Adversary.MODEL), *pending.events(name, Adversary.MODEL)]


def _neediest(sizes: Sequence[int], client: ClientSettings) -> set[int]:
    """Return the smallest of ascending sizes, and the smallest that takes one more step: the others need no more noise.

    The privacy loss grows with the number of steps times the squared rate.
    """
    batch, epochs = client.training.batch_size, client.training.local_epochs
    steps = {n: poisson_batches(n, batch, epochs).steps for n in sizes}
    return {sizes[0], next((n for n in sizes if steps[n] > steps[sizes[0]]), sizes[0])}
