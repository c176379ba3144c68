"""Instructions to clients: the settings of simulated clients, with their own noise, and the order to real ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.notice import warn
from ..base.refusal import Refusal
from ..configs.schema import CsvTask, FlwrPartition, Record, RecordDistributed, SimulationSettings
from ..messages.client_settings import (
    NO_CANARY_RECORDS,
    CanaryRecords,
    ClientSettings,
    Encryption,
    RecordPrivacy,
    StepTerms,
)
from ..messages.training_order import ORDER_KEY, ClientClaim, RecordOrder, TrainingOrder
from ..modes.federation import Federation
from ..privacy.budget import UNLIMITED_EPSILON, Adjacency, Adversary, check_delta
from ..privacy.ledger.book import identity_of, read_events, require_unit
from ..privacy.ledger.caps import CapEnded, capped
from ..privacy.ledger.client_sums import read_records
from ..privacy.ledger.data_sets import Owed
from ..privacy.plan import LEAST_NOISE, Unaffordable
from ..strategies.cohorts import likely_participations
from ..strategies.record_plan import calibrated_noise, poisson_batches, record_plan
from ..tasks import DEALT, GROUP_EQUAL_ROWS, HELD_ALONE, HELD_BACK, PLANTED
from .prepared_run import Run
from .record_audit import plants_examples
from .scaling_plan import scaling_events
from .sum_plan import require_one_round

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

TRACES = "client_traces"  # folder of each client's own loss traces, in a simulation
MAX_NOISE_LEVELS = 8  # with more different sizes, clients share the noise level of the size that needs most


def question_settings(federation: Federation, folder: Path) -> ClientSettings:
    """Return the clients' settings for a question; at the record level with their ledgers, but without training noise.

    Args:
      federation: its parts.
      folder: of the answers; in a simulation the clients' ledgers lie there too.
    """
    settings = _plain_settings(federation, folder)
    if federation.record is None or not federation.population.reads_data:
        return settings
    return replace(settings, record=_unplanned_record(federation, federation.record, folder))


def client_settings(
    federation: Federation, folder: Path, rounds: int | None = None, resumed: bool = False
) -> ClientSettings:
    """Return the clients' settings; record-level noise is planned here, once for each size of data set.

    Real clients plan it themselves and get the other settings by `order_of`.

    Args:
      federation: its parts.
      folder: of the run; nothing is written there.
      rounds: remaining ones, planned with the remaining budget of ledgers of real data; None plans all rounds for empty
        ledgers, and so does 0, for a run that has none left.
      resumed: whether the run has begun; a ledger with too little left for a plan keeps the noise of an empty one.

    Raises:
      Unaffordable: the budget affords no round at this noise.
      Refusal: the audit asks for loss traces of real data.
    """
    settings = _plain_settings(federation, folder)
    if not federation.population.reads_data:
        return settings
    if federation.together is not None:
        together = federation.together
        terms = StepTerms(
            together.sample_rate,
            together.max_grad_norm,
            together.gradients,
            together.per_person,
            together.clients_per_person,
            canaries=_canaries_of_a_step(federation, together),
        )
        return replace(settings, step=terms)
    if federation.record is None:
        return settings
    told = _record_privacy(federation, federation.record, settings, folder)
    if federation.simulated or not rounds:
        return replace(settings, record=told)
    left = (
        _with_a_round_left
        if federation.record.noise_multiplier
        else partial(_within_what_is_left, rounds, resumed)
    )
    return replace(settings, record=left(federation, told, settings, scaling_events(federation)))


def with_task_of(federation: Federation, client: ClientSettings) -> ClientSettings:
    """Return the clients' settings with the scaled task; noise that was planned with the scaling question stays.

    Args:
      federation: whose clients have answered the scaling question.
      client: settings before scaling.
    """
    told = replace(client, task_options=_plain_settings(federation, Path()).task_options)
    if client.record is None:
        return told
    return replace(told, record=replace(client.record, ledgers=tuple(federation.population.client_ledgers)))


def _plain_settings(federation: Federation, folder: Path) -> ClientSettings:
    s, told = federation.settings, {} if federation.moments is None else {"moments": federation.moments}
    return ClientSettings(
        task=s.task.target or s.task.name,
        task_options=task_options(s, federation.seed) | told if federation.population.reads_data else {},
        training=s.local_training,
        seed=federation.seed,
        allow_modules=s.allow_modules,
        encryption=_encryption(federation),
        loss_traces=traces_of(federation, folder),
        accelerator=s.engine.device,
        dtype=s.engine.dtype,
    )


def _canaries_of_a_step(federation: Federation, together: RecordDistributed) -> CanaryRecords:
    if not federation.canary_records:
        return NO_CANARY_RECORDS
    seed = federation.randomness.stream("canary records").bytes(32).hex()
    replaced = together.adjacency is Adjacency.REPLACE_ONE
    return CanaryRecords(federation.canary_records, federation.num_clients, seed, replaced)


def _record_privacy(
    federation: Federation, record: Record, settings: ClientSettings, folder: Path
) -> RecordPrivacy:
    """Return a client's record-level settings, with noise planned for empty ledgers of the existing sizes of data sets."""
    sizes, told = federation.sizes, _unplanned_record(federation, record, folder)
    beside = scaling_events(federation)
    path = "privacy" if federation.summed is None else "privacy.record"
    warning = check_delta(path, record.target_delta, sizes[-1], "records", record.allow_large_delta)
    if warning:
        warn(warning)
    if record.noise_multiplier is None:
        return replace(told, noise_by_records=_planned_noise(federation, told, settings, beside))
    told = replace(told, noise_by_records=((0, record.noise_multiplier),))
    require_one_round(record_plan(told, sizes[-1] + told.canaries, settings), told.budget(), beside)
    return told


def _unplanned_record(federation: Federation, record: Record, folder: Path) -> RecordPrivacy:
    """Return a client's record-level settings before the noise is planned."""
    s, budget = federation.settings, federation.record_budget
    assert budget is not None
    where = federation.population.client_ledger_home(folder)
    return RecordPrivacy(
        budget.target_epsilon,
        record.target_delta,
        record.max_grad_norm,
        str(record.adjacency),
        (),
        str(where),
        record.allow_large_delta,
        record.gradients,
        federation.canary_records,
        s.budget.runs,
        ledgers=federation.population.ledger_names,
        per_person=record.per_person,
        clients_per_person=record.clients_per_person,
    )


def _within_what_is_left(
    rounds: int,
    resumed: bool,
    federation: Federation,
    record: RecordPrivacy,
    settings: ClientSettings,
    beside: Sequence[DpEvent],
) -> RecordPrivacy:
    """Return the record-level settings with separate noise for each ledger that has entries or a cap.

    A client with a spent budget keeps the noise of an empty ledger, and its ledger makes it sit out.

    Raises:
      Refusal: no client has enough left.
    """
    participations, whole = (
        likely_participations(federation.cohort, federation.num_clients, each)
        for each in (rounds, federation.settings.num_rounds)
    )
    planned: dict[str, float] = {}
    refusals: list[Refusal] = []
    owed = federation.population.owed()
    for name, records in _ledgers(federation).items():
        try:
            own, prior = _left(record, name, owed)
            count = records + record.canaries
            if prior or own != record:
                noise = calibrated_noise(own, count, settings, participations, prior, whole, beside)
            else:
                noise = record.noise_multiplier(count)
            planned[name] = noise
        except Refusal as refusal:
            refusals.append(refusal)
    planned_record = replace(record, noise_by_ledger=tuple(planned.items()))
    if resumed and not planned:  # a hundredth of a budget may be many of its rounds
        return _with_a_round_left(federation, record, settings, beside)
    return _unless_all_refuse(planned_record, planned, refusals)


def _with_a_round_left(
    federation: Federation, record: RecordPrivacy, settings: ClientSettings, beside: Sequence[DpEvent]
) -> RecordPrivacy:
    """Return the record-level settings unchanged if some ledger affords a round with the given noise.

    Raises:
      Refusal: none does.
    """
    refusals: list[Refusal] = []
    owed = federation.population.owed()
    for name, records in _ledgers(federation).items():
        try:
            own, prior = _left(record, name, owed)
            plan = record_plan(own, records + record.canaries, settings)
            require_one_round(plan, own.budget(), [*prior, *beside])
            return record
        except Refusal as refusal:
            refusals.append(refusal)
    return _unless_all_refuse(record, (), refusals)


def _unless_all_refuse(
    record: RecordPrivacy, planned: Collection[str], refusals: Sequence[Refusal]
) -> RecordPrivacy:
    if refusals and not planned:
        raise next((each for each in refusals if not isinstance(each, Unaffordable | CapEnded)), refusals[-1])
    if refusals:
        warn(f"{len(refusals)} clients sit out: too little of their budgets is left: {refusals[-1]}")
    return record


def _ledgers(federation: Federation) -> dict[str, int]:
    """Return each client's number of records by the name of its ledger; clients with equal data share one."""
    sizes = (len(federation.data_of(client)) for client in range(federation.num_clients))
    return {
        name: size for name, size in zip(federation.population.client_ledgers, sizes, strict=True) if size
    }


def _left(record: RecordPrivacy, name: str, owed: Owed | None) -> tuple[RecordPrivacy, list[DpEvent]]:
    """Return the record-level settings within a ledger's caps, and the events that the ledger holds or owes."""
    path = record.ledger_path(name)
    kept = identity_of(path)
    require_unit(path, kept.get("unit"), str(record.unit))
    if kept.get("adjacency", record.adjacency) != record.adjacency:
        remedy = f"ledgers of these records are kept for {kept['adjacency']}; use that adjacency"
        raise Refusal("privacy.adjacency", record.adjacency, remedy)
    budget = capped(path, record.budget())
    within = replace(record, target_epsilon=budget.target_epsilon, target_delta=budget.target_delta)
    if owed is None:
        return within, read_events(path, Adversary.MODEL)
    whole, _ = read_records(owed.clients, path, budget.adjacency)
    return within, [*whole.events(Adversary.MODEL), *owed.events(name, Adversary.MODEL)]


def traces_of(federation: Federation, folder: Path) -> str:
    """Return the folder of simulated owners' loss traces; empty if they keep none.

    Raises:
      Refusal: the data are real, and a run folder must not hold such losses.
    """
    audit = federation.settings.audit
    if audit is None or not audit.loss_traces:
        return ""
    if not federation.simulated:
        remedy = "these data are real: only its owner may see a record's losses; leave it out"
        raise Refusal("audit.loss_traces", True, remedy)
    return str(folder / TRACES)


def _encryption(federation: Federation) -> Encryption | None:
    """Return the encryption that a simulated owner requires: that of the settings."""
    asked = federation.settings.secagg
    if asked is None or not federation.population.reads_data:
        return None
    return Encryption(
        identities=federation.identities,
        clients=federation.num_nodes,
        minimum_cohort=2,
        collusion=asked.collusion,
        dropout=asked.dropout,
        maximum_clipping_norm=federation.longest_norm if federation.summed else asked.clipping_norm,
        minimum_noise_multiplier=LEAST_NOISE if federation.distributed else 0.0,
        profile=asked.profile,
        doubly=federation.doubly_signed,
    )


def _planned_noise(
    federation: Federation, record: RecordPrivacy, settings: ClientSettings, beside: Sequence[DpEvent]
) -> tuple[tuple[int, float], ...]:
    """Return (records, noise multiplier) for the sizes of the clients' data sets, canaries included."""
    sizes = [size + record.canaries for size in federation.sizes]
    rounds = likely_participations(federation.cohort, federation.num_clients, federation.settings.num_rounds)
    each = -(-len(sizes) // MAX_NOISE_LEVELS)
    levels = (sizes[first : first + each] for first in range(0, len(sizes), each))
    found: list[tuple[int, float]] = []
    for level in levels:
        needed = (
            calibrated_noise(record, n, settings, rounds, beside=beside) for n in _neediest(level, settings)
        )
        found.append((level[0], max(needed)))
    return tuple(found)


def _neediest(sizes: Sequence[int], settings: ClientSettings) -> set[int]:
    """Return the smallest of ascending sizes, and the smallest that takes one more step: the others need no more noise.

    The privacy loss grows with the number of steps times the squared rate.
    """
    batch, epochs = settings.training.batch_size, settings.training.local_epochs
    steps = {n: poisson_batches(n, batch, epochs).steps for n in sizes}
    return {sizes[0], next((n for n in sizes if steps[n] > steps[sizes[0]]), sizes[0])}


def task_options(settings: SimulationSettings, seed: int | None) -> dict[str, Any]:
    """Return the task's constructor options; a user's task gets its arguments and the seed of planted examples.

    Args:
      settings: of the federation.
      seed: of the simulation; None stands for 0.
    """
    share = held_out_share(settings)
    held: dict[str, Any] = {} if share is None else {HELD_BACK: share}
    if held and isinstance(settings.privacy, RecordDistributed):
        held[HELD_ALONE] = True
    if settings.group_equal_rows:
        held[GROUP_EQUAL_ROWS] = True
    if settings.task.target is not None:
        how = {"num_clients": settings.task.num_clients, "seed": seed or 0}
        partition = settings.partition.model_dump() | how
        planted = {PLANTED: seed or 0} if plants_examples(settings) else {}
        return settings.task.options | planted | {DEALT: partition} | held
    options: dict[str, Any] = {
        "num_clients": settings.task.num_clients,
        "partition": settings.partition.name,
        "alpha": settings.partition.alpha,
        "dealer": settings.partition.model_dump() if isinstance(settings.partition, FlwrPartition) else None,
        "seed": seed or 0,
        **settings.task.options,
        PLANTED: (seed or 0) if plants_examples(settings) else None,
        "group_equal_rows": (isinstance(settings.task, CsvTask) and settings.group_equal_rows) or None,
        **held,
    }
    return {key: value for key, value in options.items() if value is not None}


def held_out_share(settings: SimulationSettings) -> float | None:
    """Return the share of its records that a client holds out for evaluation; None without one."""
    evaluated = settings.evaluate.clients != "none" or settings.scored_at_clients
    return settings.evaluate.share if evaluated else None


def order_of(run: Run) -> dict[str, str]:
    """Return the order that travels in the strategy's configuration, the same in every round of a process."""
    from ..tasks.arrays import agreement_of  # torch, and plans know these instructions too

    s = run.federation.settings
    order = TrainingOrder(
        run=run.name,
        privacy=run.federation.mode,
        training=s.local_training,
        client=_claim(run),
        record=_record_order(run.federation),
        agreement=agreement_of(run.federation.task),
        held_out=held_out_share(s),
        group_equal_rows=s.group_equal_rows and held_out_share(s) is not None,
        moments=run.federation.moments,
    )
    return {ORDER_KEY: order.to_json()}


def _claim(run: Run) -> ClientClaim | None:
    if run.privacy is None or run.federation.together is not None:
        return None
    plan = run.privacy.plan
    assert plan.noise_multiplier is not None
    # Cost of one round. With clients in turns, the plan's own figure is the cost of all of a client's rounds.
    return ClientClaim(plan.noise_multiplier * plan.mechanism.sensitivity, plan.adjacency)


def _record_order(federation: Federation) -> RecordOrder | None:
    record, together, budget = federation.record, federation.together, federation.sum_budget
    if together is not None and budget is not None:
        return RecordOrder(
            budget.target_epsilon,
            budget.target_delta,
            together.max_grad_norm,
            together.adjacency,
            gradients=together.gradients,
            per_person=together.per_person,
            clients_per_person=together.clients_per_person,
            sample_rate=together.sample_rate,
        )
    if record is None:
        return None
    rounds = likely_participations(federation.cohort, federation.num_clients, federation.settings.num_rounds)
    return RecordOrder(
        record.target_epsilon or UNLIMITED_EPSILON,
        record.target_delta,
        record.max_grad_norm,
        record.adjacency,
        rounds,
        record.gradients,
        federation.settings.budget.runs,
        record.per_person,
    )
