"""Allowance of a federation's owners: the budget of their policies as provisioned, held against what is spent already.

A server knows the ledgers that it keeps, and what its runs asked for. What each device has spent is on its own ledger,
and comes back as a code only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.refusal import Refusal
from ..configs.privacy_settings import Record, RecordAndClient
from ..links.server_bundle import OwnersBudget, ServerBundle
from ..messages.training_order import ModeName
from ..modes.federation import Federation
from ..modes.mode import Promise
from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.events import event_from_json, event_to_json, gaussian_event
from ..privacy.accounting.gaussian import gaussian_epsilon, gaussian_mu
from ..privacy.accounting.record_events import record_event
from ..privacy.accounting.renyi_filter import admits, spent_epsilon
from ..privacy.budget import OF_RECORDS, Adjacency, Adversary, Budget, Unit
from ..privacy.ledger.caps import POPULATION, RECORDS
from ..privacy.ledger.client_sums import sums_of_records
from ..privacy.ledger.ledger_state import state_at
from ..privacy.plan import MIN_SHARE_LEFT, Plan, Unaffordable
from ..run.queries import query_events_of_unit
from ..run.sum_plan import sum_plan
from ..strategies.cohorts import All, likely_participations
from .settings import ServerSettings

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

# Keys of `privacy` under which a mode has its targets. A mode that is not here has them in `privacy` itself.
LEVELS: Mapping[str, tuple[str, ...]] = {ModeName.NONE: (), ModeName.RECORD_AND_CLIENT: ("record", "client")}
WHOLE = (ModeName.CLIENT_CENTRAL, ModeName.CLIENT_DISTRIBUTED)  # records pay for their sums, too
EXHAUSTED = "nothing is left unless owners raise target_epsilon in their policy.toml"


def allowed_targets(
    bundle: ServerBundle, overrides: Sequence[str], resumed: ServerSettings | None
) -> list[str]:
    """Return overrides for the targets that a command leaves out: what owners allow, or what the run began with.

    Owners limit what their records spend, and a device charges records for a sum of whole clients as for half its
    noise. So the target of such sums is lower: where every client takes part in each, records stay within the limit.

    Args:
      bundle: the server's; one of an earlier release does not say what owners allow, so a new run gets no target.
      overrides: Hydra's flags and overrides; with a configuration file of the user's own, no target is added.
      resumed: settings with which a run began; None for a new run. In another privacy mode, no target is added.
    """
    if any(each.startswith("--config") for each in overrides):
        return []
    explicit = {each.partition("=")[0].lstrip("+~"): each.partition("=")[2] for each in overrides}
    mode = explicit.get("privacy", str(ModeName.RECORD))
    if resumed is not None and resumed.privacy.name != mode:
        return []
    targets: list[str] = []
    for level in LEVELS.get(mode, ("",)):
        source: Any = bundle.allowed
        if resumed is not None:
            source = getattr(resumed.privacy, level) if level else resumed.privacy
        elif source is not None and mode in WHOLE:
            source = _for_clients(source)
        for key in ("target_epsilon", "target_delta") if source is not None else ():
            path, value = ".".join(filter(None, ("privacy", level, key))), getattr(source, key)
            if path not in explicit:
                targets.append(f"{path}={'null' if value is None else value}")
    return targets


def _for_clients(allowed: OwnersBudget) -> OwnersBudget:
    """Return the budget of whole clients whose sums cost records `allowed`; epsilon is cut to three digits."""
    delta = allowed.target_delta
    epsilon = gaussian_epsilon(gaussian_mu(allowed.target_epsilon, delta) / 2, delta)
    digit = 10.0 ** (math.floor(math.log10(epsilon)) - 2) if epsilon else 1.0
    return replace(allowed, target_epsilon=float(f"{math.floor(epsilon / digit) * digit:.3g}"))


def budget_line(
    federation: Federation,
    allowed: OwnersBudget | None,
    earlier: Iterable[tuple[str, ServerSettings]],
    min_share_left: float = MIN_SHARE_LEFT,
) -> str:
    """Return one line for the operator: what was spent before a run or question, its target, and what owners allow.

    It is empty if the mode has no target, or if nothing was spent and owners allow the target.

    Args:
      federation: of the run or question.
      allowed: by the owners; None if unknown.
      earlier: names and settings of the finished runs on this server; they tell what clients' own ledgers may hold.
      min_share_left: share of the target that must be left.

    Raises:
      Refusal: less is left on this server's ledger. Where clients' own ledgers decide, the line says so instead.
    """
    level = next(iter(federation.mode.promises), None)
    if level is None or level.target_epsilon is None:
        return ""
    units, target = f"{level.unit.partition('_')[0]}s", level.target_epsilon
    owners = "" if allowed is None else f"owners allow {allowed.target_epsilon:g}"
    spent, spender = _spent(federation, level), f"{units} have spent"
    sums: list[DpEvent] = []
    if level.unit != Unit.CLIENT:
        sums = sums_of_records(_path(federation, Unit.CLIENT), level.adjacency)
    cost = spent_epsilon(sums, level.target_delta, level.adjacency, None, GATE_INTERVAL)
    if cost > spent:
        spent, spender = cost, "sums of whole clients have cost records"
    most = (1 - min_share_left) * target
    budget = federation.mode.budget  # of this server's ledger; None if clients' own ledgers decide
    if budget is not None and budget.target_epsilon == target and spent > most:
        clauses = (f"{spender} {spent:.4g}", owners, _remedy(spent, allowed))
        raise Refusal("privacy.target_epsilon", target, "; ".join(filter(None, clauses)))
    history = f"{spender} epsilon {spent:.4g} before; " if spent else ""
    run_targets = {name: size for name, each in earlier if (size := _record_target(each)) is not None}
    run = max(run_targets, key=run_targets.__getitem__, default="")
    if run and level.unit != Unit.CLIENT and run_targets[run] > spent:
        spent = run_targets[run]
        history = f"run {run} let each client spend epsilon {spent:g} on its records before; "
    if not history and (allowed is None or target <= allowed.target_epsilon):
        return ""
    line = history + ", ".join(filter(None, (f"the target is {target:g}", owners)))
    if budget is None and spent > most:
        return f"{line}: clients that have spent it decline; {_remedy(spent, allowed)}"
    return line


def records_line(
    federation: Federation, allowed: OwnersBudget | None, earlier: Iterable[tuple[str, ServerSettings]]
) -> str:
    """Return one line on what sums of whole clients cost each record at its device; empty if owners allow all of them.

    A device charges a sum to its records as half its noise, without amplification. The server does not see its ledger,
    and counts the most that it can hold: every earlier sum, and the largest target of an earlier run on records.

    Arguments as of `budget_line`.

    Raises:
      Refusal: records cannot pay for one sum. What was spent before counts only if every client takes part in each
        round: otherwise some devices may have spent less.
    """
    if allowed is None or not federation.mode.sums_cost_records:
        return ""
    level = federation.mode.promises[0]
    clients, records = (state_at(_path(federation, unit)) for unit in (Unit.CLIENT, Unit.RECORD))
    prior = tuple(clients.events(Adversary.MODEL))
    plan = sum_plan(federation, prior, None, clients.filter_order)
    assert plan is not None
    adjacency = Adjacency(records.identity.get("adjacency", Adjacency.ZERO_OUT))
    budget = Budget(Unit.RECORD, allowed.target_epsilon, allowed.target_delta, adjacency)

    def of_records(events: Iterable[DpEvent]) -> list[DpEvent]:
        """Return what sums of whole clients cost each record, as its device charges them."""
        plain = map(event_to_json, events)
        return [event_from_json(record_event(each, adjacency, secret=False)) for each in plain]

    sums = clients.events(Adversary.MODEL, lambda booked: booked.source != OF_RECORDS)
    spent = [*of_records(sums), *records.events(Adversary.MODEL)]
    rounds = likely_participations(federation.cohort, federation.num_clients, plan.num_rounds)
    noise = plan.noise_over_clip * plan.mechanism.sensitivity / 2  # as for half the noise
    record_plan = Plan(Unit.RECORD, adjacency, All(), plan.clipping_norm, rounds, noise)
    all_take_part = federation.cohort.expected_size(federation.num_clients) == federation.num_clients
    other_events = [*spent, *of_records(query_events_of_unit(federation, plan))]
    # What earlier runs let each client spend on its own ledger of records counts as one Gaussian release.
    record_target = max((_record_target(each) or 0.0 for _, each in earlier), default=0.0)
    if record_target:
        other_events.append(gaussian_event(1 / gaussian_mu(record_target, budget.target_delta)))
    affordable = record_plan.affordable_rounds(budget, other_events)
    if affordable >= rounds:
        return ""
    allowance = f"of epsilon {budget.target_epsilon:g} at delta {budget.target_delta:g}, which owners allow,"
    reason = "a device charges its records for a sum of whole clients as for half its noise"
    remedy = _fitting_remedy(federation, plan, record_plan, budget, other_events, prior)
    if not admits([*(spent if all_take_part else []), record_plan.event()], budget, None):
        key = "target_epsilon" if level.noise_multiplier is None else "noise_multiplier"
        remedy = f"{reason}: {allowance} records cannot pay for one round; {remedy}"
        raise Refusal(f"privacy.{key}", getattr(level, key), remedy)
    return f"{reason}: {allowance} records pay for {affordable} of {rounds} rounds; {remedy}"


def _fitting_remedy(
    federation: Federation,
    plan: Plan,
    record_plan: Plan,
    budget: Budget,
    other_events: Sequence[DpEvent],
    prior: Sequence[DpEvent],
) -> str:
    """Return the noise of whole clients, if the run sets that, or the target, with which records pay for all rounds.

    Args:
      federation: of the run.
      plan: of the sums of whole clients.
      record_plan: of the same sums as records pay for them, with half the noise.
      budget: that owners allow for records.
      other_events: what records pay for in addition.
      prior: events of whole clients from before the run.
    """
    level, runs = federation.mode.promises[0], federation.settings.budget.runs
    try:
        sufficient_noise = record_plan.calibrate(budget, other_events).noise
    except Unaffordable:
        return EXHAUSTED
    noise = plan.noise * sufficient_noise / record_plan.noise
    if level.noise_multiplier is not None:
        return f"privacy.noise_multiplier={noise:.4g} pays for all"
    question_events = query_events_of_unit(federation, plan) * runs
    fitting = replace(plan, noise_multiplier=noise)
    earlier_events = question_events if runs > 1 else [*prior, *question_events]
    target = fitting.epsilon(level.target_delta, plan.num_rounds * runs, earlier_events)
    target *= 0.99  # a lower target plans more noise, which is the safe side of rounding
    spent = spent_epsilon(prior, level.target_delta, plan.adjacency, plan.filter_order, GATE_INTERVAL)
    if target * (1 - MIN_SHARE_LEFT) <= spent:
        return EXHAUSTED
    return f"privacy.target_epsilon={target:.3g} pays for all"


def _remedy(spent: float, allowed: OwnersBudget | None) -> str:
    """Return the remedy for a target that is spent: a higher one, unless owners allow no more."""
    if allowed is not None and spent > (1 - MIN_SHARE_LEFT) * allowed.target_epsilon:
        return EXHAUSTED
    return f"give a target above {spent:.4g}"


def _spent(federation: Federation, level: Promise) -> float:
    """Return the unit's spent epsilon on this server's ledger; 0 under another adjacency, with which it is refused later."""
    book = state_at(_path(federation, level.unit))
    if book.identity.get("adjacency") != str(level.adjacency):
        return 0.0
    order, delta = book.filter_order, level.target_delta
    events = map(book.events, book.spent)
    epsilons = (spent_epsilon(each, delta, level.adjacency, order, GATE_INTERVAL) for each in events)
    return max(epsilons, default=0.0)


def _path(federation: Federation, unit: Unit | str) -> Path:
    """Return the path of this server's ledger of clients, or of records, which need not exist."""
    prefix = POPULATION if unit == Unit.CLIENT else POPULATION + RECORDS
    return federation.population.ledger_path(prefix, Path())


def _record_target(settings: ServerSettings) -> float | None:
    """Return what a run let each client spend on its own ledger of records; None if the server's ledger holds it."""
    privacy = settings.privacy.record if isinstance(settings.privacy, RecordAndClient) else settings.privacy
    return privacy.target_epsilon if isinstance(privacy, Record) else None
