"""Mode `record`: DP-SGD at each client hides single records from everybody else; each client's own ledger decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.notice import warn
from ..base.refusal import Refusal
from ..configs.privacy_settings import Record
from ..messages.client_settings import TRAIN_LOSS, ClientSettings
from ..messages.record_settings import RecordPrivacy
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


class RecordMode(Mode):
    """Hides single records of a client from everybody else, by full noise of its own."""

    charges_records = str(ModeName.RECORD)
    sum_source = OF_RECORDS
    sums_cost_records = False  # in `record_and_client`, too: DP-SGD pays for what the records lose
    share_of_models = 1 / 4  # measured on digits and mnist5k: docs/evidence/accuracy.md
    group = "privacy"  # path of the settings of DP-SGD, for refusals

    @property
    def dp_sgd(self) -> Record:
        """The settings of DP-SGD at the clients."""
        privacy = self.parts.settings.privacy
        assert isinstance(privacy, Record)
        return privacy

    @property
    def promises(self) -> tuple[Promise, ...]:
        """The promises of the sums, if there are any, and last the one that each client keeps."""
        dp_sgd = self.dp_sgd
        promise = Promise(
            unit=dp_sgd.unit,
            target_epsilon=dp_sgd.target_epsilon,
            target_delta=dp_sgd.target_delta,
            adjacency=dp_sgd.adjacency,
            noise_multiplier=dp_sgd.noise_multiplier,
            adversaries=EVERYBODY,
            sampling="poisson batches, in the rounds taken part in",
            per_client=True,
        )
        return (*super().promises, promise)

    @property
    def client_budget(self) -> Budget:
        """The budget of each client's own ledger."""
        return self.promises[-1].budget

    @property
    def metrics(self) -> tuple[Segment, ...]:
        """Which metrics may leave a client: not its loss, for which no record is charged."""
        return tuple(each for each in super().metrics if each.name != TRAIN_LOSS)

    # --- persons and records ---------------------------------------------------------------------------------------

    @property
    def per_person(self) -> int | None:
        """Largest number of one person's examples that a client trains on; None without a bound."""
        return self.dp_sgd.per_person

    @property
    def clients_per_person(self) -> int | None:
        """Largest number of clients that train on one person; None without a bound."""
        return self.parts.population.max_clients(self.dp_sgd.clients_per_person)

    @property
    def gradients(self) -> str:
        """The requested engine of DP-SGD."""
        return self.dp_sgd.gradients

    # --- questions -------------------------------------------------------------------------------------------------

    @property
    def question_sampling(self) -> Sampling:
        """How a question samples a client's records: all of them."""
        return PoissonBatches(1.0, 1)

    def noise_of_answers(self, plan: Plan) -> float:
        """Return the noise of a question's sum over the norm of one record: the full noise of every client, added up."""
        return plan.noise_over_clip * math.sqrt(self.parts.declared_clients)

    def question_ledgers(self) -> list[Path]:
        """Return the ledgers of the clients of this machine."""
        population = self.parts.population
        home = population.client_ledger_home(Path())
        return [home / f"{name[:NAME_LENGTH]}.ledger" for name in population.client_ledger_names]

    # --- clients ---------------------------------------------------------------------------------------------------

    def instruct(
        self, client: ClientSettings, folder: Path, rounds: int, resumed: bool, events: Events
    ) -> ClientSettings:
        """Return the settings of clients of this machine, with noise for empty ledgers or, on real data, for what is left."""
        client = super().instruct(client, folder, rounds, resumed, events)
        privacy = self._planned(client, folder, events)
        if self.parts.simulated or not rounds:
            return replace(client, record=privacy)
        if self.dp_sgd.noise_multiplier:
            self._require_one_round(privacy, client, events())
        else:
            privacy = self._with_noise_by_ledger(privacy, client, rounds, resumed, events())
        return replace(client, record=privacy)

    def instruct_for_question(self, client: ClientSettings, folder: Path) -> ClientSettings:
        """Return the settings with which clients of this machine answer a question: with ledgers, without training noise."""
        return replace(client, record=self._unplanned(folder))

    def _planned(self, client: ClientSettings, folder: Path, events: Events) -> RecordPrivacy:
        """Return record-level privacy with noise for empty ledgers, by size; refuse a large delta, or no affordable round."""
        sizes, privacy, dp_sgd = self.sizes, self._unplanned(folder), self.dp_sgd
        warning = check_delta(self.group, dp_sgd.target_delta, sizes[-1], "records", dp_sgd.allow_large_delta)
        if warning:
            warn(warning)
        if dp_sgd.noise_multiplier is None:
            return replace(privacy, noise_by_records=self._noise_of_sizes(privacy, client, events()))
        privacy = replace(privacy, noise_by_records=((0, dp_sgd.noise_multiplier),))
        plan = record_plan(privacy, sizes[-1] + privacy.canaries, client)
        plan.require_one_round(privacy.terms.budget, events())
        return privacy

    def _unplanned(self, folder: Path) -> RecordPrivacy:
        """Return the clients' record-level privacy before its noise is planned."""
        population, dp_sgd = self.parts.population, self.dp_sgd
        return RecordPrivacy(
            terms=self.record_order(),
            noise_by_records=(),
            ledger_dir=str(population.client_ledger_home(folder)),
            allow_large_delta=dp_sgd.allow_large_delta,
            canaries=self.extra_records,
            ledgers=population.ledger_names,
            clients_per_person=dp_sgd.clients_per_person,
            own_files=bool(self.parts.settings.engine.address),
        )

    def _noise_of_sizes(
        self, privacy: RecordPrivacy, client: ClientSettings, events: Sequence[DpEvent]
    ) -> tuple[tuple[int, float], ...]:
        """Return pairs (records, noise multiplier) for the sizes of the clients' data sets, canaries included.

        Planning takes long, so there are at most `MAX_NOISE_LEVELS` pairs, and neighbouring sizes share one.
        """
        sizes = [size + privacy.canaries for size in self.sizes]
        rounds = self._participations(self.parts.settings.num_rounds)
        sizes_per_pair = -(-len(sizes) // MAX_NOISE_LEVELS)
        pairs: list[tuple[int, float]] = []
        for first in range(0, len(sizes), sizes_per_pair):
            neediest = _neediest(sizes[first : first + sizes_per_pair], client)
            noise = (calibrated_noise(privacy, n, client, rounds, other_events=events) for n in neediest)
            pairs.append((sizes[first], max(noise)))
        return tuple(pairs)

    def _with_noise_by_ledger(
        self,
        privacy: RecordPrivacy,
        client: ClientSettings,
        rounds: int,
        resumed: bool,
        events: Sequence[DpEvent],
    ) -> RecordPrivacy:
        """Return the record-level privacy with separate noise for each ledger that has entries or a cap.

        A client with a spent budget keeps the noise of an empty ledger, and its ledger makes it sit out. In a run that has
        begun, ledgers with too little left for a plan keep that noise if one affords a round.

        Raises:
          Refusal: no client has enough left.
        """
        rounds_left, all_rounds = map(self._participations, (rounds, self.parts.settings.num_rounds))
        noise: dict[str, float] = {}
        refusals: list[Refusal] = []
        pending = self.parts.population.pending_charges()
        for name, records in self._ledgers().items():
            count = records + privacy.canaries
            try:
                own, prior = _within_ledger(privacy, name, pending)
                if not prior and own == privacy:
                    noise[name] = privacy.noise_multiplier(count)
                else:
                    noise[name] = calibrated_noise(own, count, client, rounds_left, prior, all_rounds, events)
            except Refusal as refusal:
                refusals.append(refusal)
        if resumed and not noise:  # a plan needs a hundredth of the budget; a round may need less
            self._require_one_round(privacy, client, events)
            return privacy
        if refusals and not noise:
            raise _most_telling(refusals)
        if refusals:
            warn(f"{len(refusals)} clients sit out: too little of their budgets is left: {refusals[-1]}")
        return replace(privacy, noise_by_ledger=tuple(noise.items()))

    def _require_one_round(
        self, privacy: RecordPrivacy, client: ClientSettings, events: Sequence[DpEvent]
    ) -> None:
        """Refuse a run if no ledger affords even one round with the noise of empty ledgers."""
        refusals: list[Refusal] = []
        pending = self.parts.population.pending_charges()
        for name, records in self._ledgers().items():
            try:
                own, prior = _within_ledger(privacy, name, pending)
                plan = record_plan(own, records + privacy.canaries, client)
                plan.require_one_round(own.terms.budget, [*prior, *events])
                return
            except Refusal as refusal:
                refusals.append(refusal)
        if refusals:
            raise _most_telling(refusals)

    def _participations(self, rounds: int) -> int:
        """Return in how many of these rounds a client is planned to take part: few clients are drawn more often."""
        return likely_participations(self.parts.cohort, self.parts.num_clients, rounds)

    def _ledgers(self) -> dict[str, int]:
        """Return the number of records by ledger's name, for clients with records; clients with equal data share a ledger."""
        parts = self.parts
        sizes = (len(self.data_of(client)) for client in range(parts.num_clients))
        names = parts.population.client_ledger_names
        return {name: size for name, size in zip(names, sizes, strict=True) if size}

    def record_order(self) -> RecordTerms:
        """Return the terms of DP-SGD at the clients in an order."""
        dp_sgd, settings = self.dp_sgd, self.parts.settings
        return RecordTerms(
            target_epsilon=dp_sgd.target_epsilon or UNLIMITED_EPSILON,
            target_delta=dp_sgd.target_delta,
            max_grad_norm=dp_sgd.max_grad_norm,
            adjacency=dp_sgd.adjacency,
            participations=self._participations(settings.num_rounds),
            gradients=dp_sgd.gradients,
            runs=settings.budget.runs,
            per_person=dp_sgd.per_person,
        )

    def client_plan(self, client: ClientSettings) -> Plan:
        """Return the plan of the rounds of the client whose records lose most, by settings that `instruct` returned."""
        privacy, dp_sgd = client.record, self.dp_sgd
        assert privacy is not None
        rounds = self._participations(self.parts.settings.num_rounds)
        plan = record_plan(privacy, self.sizes[0], client)
        # Planned noise spends the same budget at each size; with given noise the sizes lose differently.
        if dp_sgd.noise_multiplier is not None:
            plans = plans_of_sizes(self.sizes, privacy, client)
            plan = max(plans, key=lambda each: each.epsilon(dp_sgd.target_delta, rounds))
        return replace(plan, num_rounds=rounds)

    def limits(self, plan: Plan, masking: Masking | None) -> list[str]:
        """Return sentences on what the plan does not protect from; its unit tells whether it is of clients' own noise."""
        if plan.unit is not self.dp_sgd.unit:
            return super().limits(plan, masking)
        return ["Client sampling hides no record: messages and models reveal who took part.", self.unit_limit]


MODE = RecordMode


def _most_telling(refusals: Sequence[Refusal]) -> Refusal:
    """Return the first refusal that a person can mend, unlike a spent budget or an ended cap; else the last one."""
    mendable = (each for each in refusals if not isinstance(each, Unaffordable | CapEnded))
    return next(mendable, refusals[-1])


def _within_ledger(
    privacy: RecordPrivacy, name: str, pending: PendingCharges
) -> tuple[RecordPrivacy, list[DpEvent]]:
    """Return the record-level privacy within a ledger's caps, and the events on the ledger and those that it still owes.

    Raises:
      Refusal: the ledger has another unit or adjacency, or its cap has ended.
    """
    path = privacy.ledger_path(name)
    identity = identity_of(path)
    require_unit(path, identity.get("unit"), str(privacy.terms.budget.unit))
    adjacency = privacy.terms.adjacency
    if identity.get("adjacency", adjacency) != adjacency:
        remedy = f"ledgers of these records are kept for {identity['adjacency']}; use that adjacency"
        raise Refusal("privacy.adjacency", str(adjacency), remedy)
    budget = capped(path, privacy.terms.budget)
    limits = {"target_epsilon": budget.target_epsilon, "target_delta": budget.target_delta}
    within = replace(privacy, terms=replace(privacy.terms, **limits))
    ledger, _ = read_records(pending.clients, path, budget.adjacency)
    return within, [*ledger.events(Adversary.MODEL), *pending.events(name, Adversary.MODEL)]


def _neediest(sizes: Sequence[int], client: ClientSettings) -> set[int]:
    """Return the sizes of data sets, among ascending ones, of which one needs the most noise.

    The privacy loss grows with the number of steps times the squared sampling rate. With equally many steps the smallest
    size has the highest rate; so these are the smallest size, and the smallest that takes more steps.
    """
    batch, epochs = client.training.batch_size, client.training.local_epochs
    steps = {n: poisson_batches(n, batch, epochs).steps for n in sizes}
    with_more_steps = (n for n in sizes if steps[n] > steps[sizes[0]])
    return {sizes[0], next(with_more_steps, sizes[0])}
