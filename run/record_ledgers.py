"""Clients' own ledgers on a machine that holds all of them: their heads, and the privacy loss of records."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import DpEvent

from ..messages.client_settings import ClientSettings
from ..modes.federation import Federation
from ..privacy.accounting.curve import largest
from ..privacy.accounting.epsilon import GATE_INTERVAL, epsilon, within
from ..privacy.accounting.renyi_filter import counted
from ..privacy.budget import Adversary, Budget
from ..privacy.ledger.book import read_events
from ..privacy.ledger.caps import CapEnded, capped
from ..privacy.ledger.hash_chain import Chain
from ..privacy.ledger.ledger import Head
from ..privacy.plan import Plan
from ..strategies.record_plan import plans_of_sizes, record_plan, steps_of
from .prepared_run import Run

OUTSIDE = "a record that occurs at two clients: its losses at both add up"
MOST_COMPOSED = 20  # combinations of clients of one person
Kind = tuple[tuple[DpEvent, ...], Plan]
TWO_UNITS = "a person at m clients is m units: the losses at all of them add up"


def spending(
    federation: Federation, client: ClientSettings, took_part: Collection[int]
) -> dict[str, Any] | None:
    """Return the loss of each client's records, in the clients' order, and the number of exhausted clients.

    A client counts as exhausted when its budget affords it no further round.

    Returns:
      The content of ``records`` in result.json; None where records are not protected.
    """
    if client.record is None:
        return None
    lost, exhausted = [0.0] * federation.task.num_clients, 0
    budget = client.record.terms.budget
    paths = client_ledgers(federation, Path(client.record.ledger_dir))

    @cache  # most clients share size and number of rounds with another
    def cost(events: tuple[DpEvent, ...]) -> float:
        return counted(events, budget.target_delta, budget.adjacency, None)

    for number, name in federation.population.opened_ledgers(client.record, took_part, paths):
        path = client.record.ledger_path(name)
        if not path.exists():
            continue
        events = read_events(path, Adversary.MODEL)
        lost[number] = cost(tuple(events))
        records = len(federation.mode.data_of(number))
        try:
            allowed = capped(path, budget)
            exhausted += records > 0 and not within(
                [
                    *events,
                    record_plan(
                        client.record.of_ledger(name), records + client.record.canaries, client
                    ).event(),
                ],
                allowed,
            )
        except CapEnded:
            exhausted += 1
    outside, found = (
        OUTSIDE if client.record.terms.per_person is None else TWO_UNITS,
        federation.mode.clients_per_person,
    )
    across: dict[str, Any] = {}
    if found is not None:
        outside = f"nobody: at most {found} clients train on one person; `person` is the loss at all of them"
        across = {"person": _across(paths, found, budget)}
    return {
        **across,
        "epsilon": lost,
        "delta": budget.target_delta,
        "exhausted": exhausted,
        "outside": outside,
    }


def _across(paths: Collection[Path], clients: int, budget: Budget) -> float | None:
    """Return the largest loss of a person at this many clients, for any choice of clients; their noise is independent.

    Args:
      paths: of the clients' ledgers.
      clients: largest number that train on one person.
      budget: gives delta and adjacency.

    Returns:
      None where there are too many kinds of clients to compose.
    """
    kinds = largest([[], *(read_events(path, Adversary.MODEL) for path in paths)])
    if math.comb(len(kinds) + clients - 1, clients) > MOST_COMPOSED:
        return None
    sums = [
        sum(map(Counter[Any], map(dict, each)), Counter[Any]())
        for each in combinations_with_replacement(kinds, clients)
    ]
    return max(epsilon(each, budget.target_delta, budget.adjacency, GATE_INTERVAL) for each in sums)


@dataclass
class KnownHeads:
    """The heads of the clients' ledgers; a changed file is read again."""

    federation: Federation
    client: ClientSettings
    _read: dict[str, tuple[int, Head]] = field(default_factory=dict[str, tuple[int, Head]])

    def now(self) -> dict[str, Head]:
        """Return the head of every ledger of this federation's clients, by the ledger's name."""
        if self.client.record is None:
            return {}
        folder = Path(self.client.record.ledger_dir)
        for name, changed in sorted(self._changed(folder)):
            with closing(Chain.for_reading(folder / name)) as chain:
                self._read[name] = (changed, chain.last())
        return {name: head for name, (_, head) in self._read.items()}

    def _changed(self, folder: Path) -> Iterable[tuple[str, int]]:
        """Yield names and times of new or changed ledgers; a simulation's folder holds only its clients' ledgers."""
        if self.federation.simulated and folder.exists():
            with os.scandir(folder) as files:  # a quarter of the time that paths take: 0.4 s of 100 000
                found = [
                    (each.name, each.stat().st_mtime_ns) for each in files if each.name.endswith(".ledger")
                ]
        else:
            paths = client_ledgers(self.federation, folder)
            found = [(path.name, path.stat().st_mtime_ns) for path in paths]
        return (each for each in found if self._read.get(each[0], (0,))[0] != each[1])


@dataclass
class RecordMeter:
    """Meter of record-level loss in a running run: the loss at the client with the most rounds so far.

    It assumes that this client is of the kind whose rounds cost most. If cohorts are secret, it assumes a client that takes
    part in every round.

    Attributes:
      kinds: of clients: events on the ledger before this run, and the plan of one round.
      budget: of each ledger, which refuses what the budget does not afford.
      limited: whether the budget has a target; without one, counting the affordable rounds takes long.
      secret: whether cohorts are secret.
      took_part: numbers of all clients that were drawn.
    """

    kinds: Sequence[Kind]
    budget: Budget
    limited: bool
    secret: bool = False
    took_part: set[int] = field(default_factory=set[int])
    _rounds: dict[int, int] = field(default_factory=dict[int, int])
    _known: dict[int, float] = field(default_factory=dict[int, float])
    _affordable: list[int] = field(default_factory=list[int])

    def add(self, clients: Sequence[int]) -> None:
        """Count one more round for each of these clients, by their numbers."""
        self.took_part.update(clients)
        for client in [0] if self.secret else clients:
            self._rounds[client] = self._rounds.get(client, 0) + 1

    def epsilon(self) -> float:
        """Return the epsilon at the client with the most rounds, with the gate's discretisation."""
        most = max(self._rounds.values(), default=0)
        if most not in self._known:
            self._known[most] = max(map(self._cost, self._possible()))
        return self._known[most]

    def events(self) -> list[DpEvent]:
        """Return the events at the client with the most rounds."""
        return max(self._possible(), key=self._cost)

    def _cost(self, events: Sequence[DpEvent]) -> float:
        return epsilon(events, self.budget.target_delta, self.budget.adjacency, GATE_INTERVAL)

    def _possible(self) -> list[list[DpEvent]]:
        """Return the events at a client of each kind with the most rounds that its budget affords."""
        most = max(self._rounds.values(), default=0)
        if self.limited and not self._affordable:
            self._affordable = [plan.affordable_rounds(self.budget, prior) for prior, plan in self.kinds]
        rounds = [min(most, each) for each in self._affordable] or [most] * len(self.kinds)
        return [[*prior, *[plan.event()] * n] for (prior, plan), n in zip(self.kinds, rounds, strict=True)]


def record_meter(federation: Federation, client: ClientSettings) -> RecordMeter | None:
    """Return the meter of a new run; None where records are not protected."""
    record, mode = client.record, federation.mode
    if record is None:
        return None
    limited = mode.promises[-1].target_epsilon is not None
    if federation.simulated:
        kinds = [(federation.simulated_cost, plan) for plan in plans_of_sizes(mode.sizes, record, client)]
        return RecordMeter(kinds, record.terms.budget, limited, mode.hides_counts)
    names = enumerate(federation.population.client_ledgers)
    sizes = sorted(((len(mode.data_of(each)), name) for each, name in names), reverse=True)
    # Of clients that spent equally, and take equally many steps of equal noise, the one with the fewest records.
    held: dict[tuple[Any, ...], Kind] = {}
    for records, name in sizes:
        if records:
            prior = tuple(read_events(record.ledger_path(name), Adversary.MODEL))
            plan = record_plan(record.of_ledger(name), records, client)
            held[prior, steps_of(plan), plan.noise_multiplier] = prior, plan
    return RecordMeter(tuple(held.values()), record.terms.budget, limited, mode.hides_counts)


def charged(run: Run, number: int, clients: Sequence[int]) -> list[int]:
    """Return those of a simulation's clients whose ledgers hold a round; all, where the ledgers may lie elsewhere.

    Args:
      run: of the round.
      number: of the round.
      clients: that were drawn, and did not answer.
    """
    federation, record = run.federation, run.client.record
    if record is None or federation.settings.engine.elsewhere:  # on which ledgers may lie elsewhere
        return list(clients)
    return federation.population.charged(record, (run.name, number), clients)


def client_ledgers(federation: Federation, folder: Path | None) -> list[Path]:
    """Return the ledgers of this federation's clients; with real data the folder holds others as well.

    Args:
      federation: its parts.
      folder: of the ledgers; None where records are not protected.
    """
    return [] if folder is None else federation.population.client_ledger_files(folder)
