"""Report of a run's guarantees and losses: the ``privacy`` list of its result, and the versions of its software."""

from __future__ import annotations

import math
import platform
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import DpEvent

from ..base.bounded_decoding import json_number
from ..modes.federation import Federation
from ..modes.mode import EVERYBODY, Promise
from ..privacy.accounting.curve import (
    PrivacyCurve,
    filter_curve,
    group_epsilons,
    largest,
    privacy_curve,
    worst,
)
from ..privacy.accounting.epsilon import (
    GATE_INTERVAL,
    PUBLISH_INTERVAL,
    accountant_name,
    epsilon,
    forget_distributions,
)
from ..privacy.accounting.renyi_filter import accountant
from ..privacy.budget import Adjacency, Adversary, Unit
from ..privacy.ledger.ledger import Ledger
from ..privacy.ledger.ledger_state import read_events_of
from ..strategies.cohorts import invited_size
from .run_files import OWN_LEDGERS

PACKAGES = ("fedveil", "flwr", "opacus", "torch", "dp-accounting", "numpy")
EVERY_ROUND = "poisson batches, in every round that its ledger affords: who took part is secret"
OPEN_DRAW = "poisson batches, at clients drawn by poisson for all to see"
BY_SUMS = "by sums of whole clients"
MAX_KINDS = 8  # of clients, for which the loss of several records is computed


@dataclass(frozen=True)
class _Loss:
    """Bound on a unit's loss against an adversary, and how it was computed; an infinite epsilon has no curve."""

    epsilon: float
    curve: PrivacyCurve | None
    accountant: str
    sampling: str


def spent(
    federation: Federation,
    ledger: Ledger | None,
    client_ledgers: Sequence[Path],
    draws: Sequence[DpEvent] = (),
    largest_loss: Sequence[DpEvent] | None = None,
) -> list[dict[str, Any]]:
    """Return a row for the loss of every unit against every adversary, at the accountant's finest setting.

    Args:
      federation: the federation that ran.
      ledger: ledger of all clients; None without noise on the sums.
      client_ledgers: the clients' own ledgers, if records are protected.
      draws: events of the rounds so far for those who do not see who is asked; see `NoClientLedgers.open_draws`.
      largest_loss: largest possible loss of a record, if cohorts are secret.
    """
    rows: list[dict[str, Any]] = []
    for promise in reversed(federation.mode.promises):
        if promise.per_client:
            rows += _record_rows(federation, promise, client_ledgers, draws, largest_loss)
        else:
            assert ledger is not None
            rows += _sum_rows(federation, promise, ledger)
    if rows:
        forget_distributions()  # the finest ones are not needed again
        return rows
    reason = "not accounted" if federation.masking is None else "not accounted: sums are encrypted, and exact"
    return [_unprotected(adversary, 0.0, reason) for adversary in EVERYBODY]


def record_by_sums(federation: Federation, ledger: Ledger | None) -> dict[str, Any] | None:
    """Return what a real record has lost by the sums on this ledger, as a row; None if it has its own rows, or is simulated."""
    mode = federation.mode
    # The records of a simulation are nobody's.
    if ledger is None or not mode.sums_cost_records or federation.simulated:
        return None
    promise = replace(mode.promises[0], unit=Unit.RECORD, target_epsilon=None, adjacency=Adjacency.ZERO_OUT)
    from ..privacy.ledger.client_sums import lost_by_records

    lost = lost_by_records(ledger.book, promise.target_delta)
    if lost is None:
        return None
    name = accountant_name(promise.target_delta, promise.adjacency, GATE_INTERVAL)
    return _row(promise, Adversary.MODEL, _Loss(lost, None, name, BY_SUMS))


def encryption(federation: Federation) -> dict[str, Any] | None:
    """Return the guarantee of encrypted sums in words; None where vectors travel in the clear."""
    masking = federation.masking
    if masking is None:
        return None
    expected = round(invited_size(federation.cohort, federation.num_clients))
    attendance = masking.attendance(expected)
    caveat = "; the sum itself is exact and has no epsilon: it can reveal much about one client"
    return {
        "promise": "the server sees a cohort's sum and no single vector"
        + ("" if federation.mode.distributed else caveat),
        "profile": str(masking.profile),
        "cohort": expected,
        "minimum_survivors": attendance.least,
        "colluders_assumed": attendance.colluders,
        "identities": federation.population.words.identities,
    }


def _sum_rows(federation: Federation, promise: Promise, ledger: Ledger) -> list[dict[str, Any]]:
    """Return the rows of a promise of the sums, by the ledger of all clients."""
    delta, adjacency = promise.target_delta, promise.adjacency
    rows: list[dict[str, Any]] = []
    if Adversary.SERVER not in promise.adversaries:
        reason = "trusted: it sees single updates"
        rows.append(_unprotected(Adversary.SERVER, delta, reason, adjacency))
    for adversary in promise.adversaries:
        events = ledger.events(adversary)
        if ledger.filter_order is None:
            loss = _largest_loss([events], promise, PUBLISH_INTERVAL, promise.sampling)
        else:
            loss = _loss_by_filter(federation, promise, ledger.filter_order)
        groups = _groups(promise.unit, [events], delta, adjacency)
        rows.append(_row(promise, adversary, loss, groups))
    return rows


def _loss_by_filter(federation: Federation, promise: Promise, order: float) -> _Loss:
    """Return the loss under an RDP filter of this order, which guarantees exactly the whole budget."""
    name, budget = accountant(promise.target_delta, promise.adjacency, order), federation.mode.budget
    if budget is None or not promise.target_epsilon:
        return _Loss(math.inf, None, name, promise.sampling)
    return _Loss(budget.target_epsilon, filter_curve(budget, order), name, promise.sampling)


def _largest_loss(
    units: Collection[Sequence[DpEvent]], promise: Promise, interval: float, sampling: str
) -> _Loss:
    """Return the bound on the separate losses of several units, each with its events, at the accountant's interval."""
    delta, adjacency = promise.target_delta, promise.adjacency
    kinds = [dict(each) for each in largest(units)] or [{}]
    cost = max(epsilon(each, delta, adjacency, interval) for each in kinds)
    curve = None if math.isinf(cost) else worst(privacy_curve(each, adjacency, interval) for each in kinds)
    return _Loss(cost, curve, accountant_name(delta, adjacency, interval), sampling)


def _groups(
    unit: Unit, units: Collection[Sequence[DpEvent]], delta: float, adjacency: Adjacency
) -> Sequence[tuple[int, float]]:
    """Return bounds (records, epsilon) of the loss of several records of one person; empty if the unit is not a record.

    It is also empty if there are too many kinds of clients to compose again.
    """
    kinds = largest(units) if unit is Unit.RECORD else []
    if not kinds or len(kinds) > MAX_KINDS:
        return ()
    bounds = [group_epsilons(dict(each), delta, adjacency) for each in kinds]
    return [max(each) for each in zip(*bounds, strict=True)] if all(bounds) else ()


def _record_rows(
    federation: Federation,
    promise: Promise,
    client_ledgers: Sequence[Path],
    draws: Sequence[DpEvent],
    largest_loss: Sequence[DpEvent] | None,
) -> list[dict[str, Any]]:
    """Return a row for each adversary with the largest loss of any client's records.

    Clients hold disjoint records, so that their losses do not add up.

    The losses of real clients' records are on their own ledgers, and a ledger's loss reveals how often its client took
    part. If that is secret, or clients are real, the rows hold the largest possible loss.
    """
    events: Collection[Sequence[DpEvent]] = ()
    if not federation.population.reads_data:
        target = math.inf if promise.target_epsilon is None else promise.target_epsilon
        loss = _Loss(target, None, OWN_LEDGERS, promise.sampling)
    elif largest_loss is not None:
        events = [largest_loss]
        loss = _largest_loss(events, promise, GATE_INTERVAL, EVERY_ROUND)
    else:
        events = {tuple(each) for _, each in read_events_of(client_ledgers, Adversary.MODEL)}
        loss = _largest_loss(events, promise, PUBLISH_INTERVAL, promise.sampling)
    groups = _groups(promise.unit, events, promise.target_delta, promise.adjacency)
    losses = dict.fromkeys(EVERYBODY, loss)
    if draws:  # those who do not see who is asked
        units = [[each, *federation.simulated_cost] for each in draws]
        open_loss = _largest_loss(units, promise, GATE_INTERVAL, OPEN_DRAW)
        if open_loss.epsilon < loss.epsilon:
            losses |= {Adversary.CLIENTS: open_loss, Adversary.MODEL: open_loss}
    return [_row(promise, adversary, each, groups) for adversary, each in losses.items()]


def _unprotected(
    adversary: Adversary, delta: float, reason: str, adjacency: Adjacency = Adjacency.ZERO_OUT
) -> dict[str, Any]:
    """Return the row of clients without a guarantee against an adversary: an infinite epsilon, and the reason."""
    promise = Promise(Unit.CLIENT, None, delta, adjacency, None, (), sampling="none")
    return _row(promise, adversary, _Loss(math.inf, None, reason, promise.sampling))


def _row(
    promise: Promise, adversary: Adversary, loss: _Loss, groups: Sequence[tuple[int, float]] = ()
) -> dict[str, Any]:
    """Return a row of a result; JSON has no infinity, so it is spelled.

    `groups` are pairs (records, epsilon): the joint loss of several records of one person.
    """
    return {
        "unit": str(promise.unit),
        "adversary": str(adversary),
        "adjacency": str(promise.adjacency),
        "epsilon": json_number(loss.epsilon),
        "delta": promise.target_delta,
        "target_epsilon": promise.target_epsilon,
        "accountant": loss.accountant,
        "sampling": loss.sampling,
        "curve": None if loss.curve is None else loss.curve.to_json(),
        "groups": [[records, json_number(each)] for records, each in groups],
    }


def versions() -> dict[str, str]:
    """Return the software versions that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
