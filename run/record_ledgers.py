"""Clients' own ledgers on a machine that holds all of them: their heads, and the privacy loss of records."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dp_accounting.dp_event import DpEvent, SelfComposedDpEvent

from ..base.durable_files import make_folder
from ..base.notice import warn
from ..privacy.accounting.curve import largest
from ..privacy.accounting.custom_events import OpenlySampledDpEvent
from ..privacy.accounting.epsilon import GATE_INTERVAL, epsilon
from ..privacy.accounting.gate import GATE
from ..privacy.accounting.renyi_filter import spent_epsilon
from ..privacy.budget import UNLIMITED_EPSILON, Adversary, Budget, Unit
from ..privacy.ledger.caps import CapEnded, capped
from ..privacy.ledger.hash_chain import START, Chain, require_heads
from ..privacy.ledger.ledger import Head
from ..privacy.ledger.ledger_state import read_events, read_events_of
from ..privacy.ledger.store import FILE, Store, store_in
from ..privacy.plan import Plan
from ..strategies.record_plan import plans_of_sizes, record_plan, steps_of

if TYPE_CHECKING:
    from ..messages.client_settings import ClientSettings
    from ..messages.record_settings import RecordPrivacy
    from ..modes.federation import Federation
    from ..server.participants import Participants

# Whom the loss of each client's records does not cover, in a result.
OUTSIDE_RECORD = "a record that occurs at two clients: its losses at both add up"
OUTSIDE_PERSON = "a person at m clients is m units: the losses at all of them add up"
MAX_COMPOSED = 20  # combinations of clients of one person
NO_BUDGET = Budget(Unit.RECORD, UNLIMITED_EPSILON, 1e-5)  # of a meter that measures nothing


@dataclass(frozen=True)
class ClientKind:
    """Clients whose records lose equally much in a round.

    Attributes:
      prior: events on each of their ledgers before this run.
      plan: plan of one round at such a client.
    """

    prior: tuple[DpEvent, ...]
    plan: Plan


class NoClientLedgers:
    """Clients' own ledgers on this machine where there are none: records are not protected, or their owners keep them."""

    @property
    def folder(self) -> str | None:
        """Folder of the ledgers; None without them."""
        return None

    def make_folder(self) -> None:
        """Create the folder."""

    def require(self, heads: Mapping[str, Head]) -> None:
        """Check that each named ledger contains its known head; refuse one that is missing or rolled back."""

    def settle(self) -> None:
        """Charge the ledgers with earlier losses of their people that are not on them yet."""

    def files(self) -> list[Path]:
        """Return the ledgers of this federation's clients; with real data the folder holds others as well."""
        return []

    def heads(self) -> dict[str, Head]:
        """Return heads that prove at a later time that no entry is missing: of each ledger, and of a store of ledgers."""
        return {}

    def final_heads(self) -> dict[str, Head]:
        """Return the head of every ledger of this federation's clients, by the ledger's name, once no client trains."""
        return {}

    def charged(self, name: str, number: int, clients: Sequence[int]) -> list[int]:
        """Return which of these clients' ledgers hold round `number` of the run `name`; all, if ledgers may be elsewhere."""
        return list(clients)

    def open_draws(self, rounds: int) -> list[DpEvent]:
        """Return a record's cost of so many rounds before its client's draws are known.

        One event for each kind of client. A draw of clients does not hide a record: a changed model reveals that a client
        took part, with or without this record. So the draw counts as public, but still as random, and a client that was
        drawn unusually often loses no more than the others.

        Returns:
          The events; none where the ledgers also hold other runs, as those of real data may, or where clients are not drawn
          by Poisson coins.
        """
        return []

    def spending(self, took_part: Collection[int]) -> dict[str, Any] | None:
        """Return the loss of each client's records, in the clients' order, and the number of exhausted clients.

        A client counts as exhausted when its budget affords it no further round. This is the content of ``records`` in
        result.json; None where records are not protected.
        """

    def meter(self) -> RecordMeter:
        """Return the meter of a new run."""
        return RecordMeter((), NO_BUDGET, limited=False)


@dataclass(frozen=True)
class ClientLedgers(NoClientLedgers):
    """Clients' own ledgers on this machine; methods as of `NoClientLedgers`.

    Attributes:
      federation: federation of the clients.
      client: settings of the clients.
      record: record-level privacy of these settings.
    """

    federation: Federation
    client: ClientSettings
    record: RecordPrivacy
    # By ledger's name: the time of its last change, in ns, and its head then.
    _heads: dict[str, tuple[int, Head]] = field(default_factory=dict[str, tuple[int, Head]])

    @property
    def folder(self) -> str:
        return self.record.ledger_dir

    def make_folder(self) -> None:
        make_folder(self.federation.population.words.ledgers, Path(self.folder))

    def require(self, heads: Mapping[str, Head]) -> None:
        folder = Path(self.folder)
        with store_in(folder) as store:
            store.require(heads.get(FILE, START))
        require_heads(folder, {name: head for name, head in heads.items() if name != FILE})

    def settle(self) -> None:
        if moved := self.federation.population.settle(self.record):
            warn(moved)

    def files(self) -> list[Path]:
        return self.federation.population.client_ledger_files(Path(self.folder))

    def heads(self) -> dict[str, Head]:  # a changed file is read again
        for name, changed in sorted(self._times()):
            if self._heads.get(name, (0,))[0] != changed:
                with closing(Chain.for_reading(Path(self.folder) / name)) as chain:
                    self._heads[name] = (changed, chain.last())
        own = {name: head for name, (_, head) in self._heads.items()}
        with store_in(Path(self.folder)) as store:
            if (head := store.head()) != START:
                own[FILE] = head
        return own

    def final_heads(self) -> dict[str, Head]:
        heads, folder = self.heads(), Path(self.folder)
        if FILE not in heads:
            return heads
        del heads[FILE]
        with closing(
            Store.for_writing(folder)
        ) as store:  # closed by the last process that has it: one file is left
            return {**heads, **store.heads()}

    def _times(self) -> list[tuple[str, int]]:
        """Return names and times of the ledgers; a simulation's folder holds only its clients' ledgers."""
        if self.federation.simulated and os.path.exists(self.folder):
            with os.scandir(self.folder) as files:  # a quarter of the time that paths take: 0.4 s of 100 000
                return [(f.name, f.stat().st_mtime_ns) for f in files if f.name.endswith(".ledger")]
        return [(path.name, path.stat().st_mtime_ns) for path in self.files()]

    def charged(self, name: str, number: int, clients: Sequence[int]) -> list[int]:
        if self.federation.settings.engine.elsewhere:  # on machines with ledgers of their own
            return list(clients)
        return self.federation.population.charged(self.record, name, number, clients)

    def open_draws(self, rounds: int) -> list[DpEvent]:
        rate = self.federation.cohort.coin
        if rate is None or not self.federation.simulated:
            return []
        plans = plans_of_sizes(self.federation.mode.sizes, self.record, self.client)
        return [SelfComposedDpEvent(OpenlySampledDpEvent(float(rate), p.event()), rounds) for p in plans]

    def spending(self, took_part: Collection[int]) -> dict[str, Any]:
        federation, record = self.federation, self.record
        epsilons, exhausted = [0.0] * federation.task.num_clients, 0
        budget, paths = record.terms.budget, self.files()

        @cache  # most clients share size and number of rounds with another
        def cost(events: tuple[DpEvent, ...]) -> float:
            return spent_epsilon(events, budget.target_delta, budget.adjacency, None)

        names = dict(federation.population.opened_ledgers(record, took_part, paths))
        ledgers = dict(read_events_of(sorted(set(map(record.ledger_path, names.values()))), Adversary.MODEL))
        for number, name in names.items():
            if (path := record.ledger_path(name)) in ledgers:
                epsilons[number] = cost(tuple(ledgers[path]))
                exhausted += self._is_exhausted(name, len(federation.mode.data_of(number)), ledgers[path])
        of_person: dict[str, Any] = {}
        outside = OUTSIDE_RECORD if record.terms.per_person is None else OUTSIDE_PERSON
        if (max_clients := federation.mode.clients_per_person) is not None:
            outside = f"nobody: at most {max_clients} clients train on one person; `person` is the loss at all of them"
            of_person = {"person": _loss_across(paths, max_clients, budget)}
        measured = {"epsilon": epsilons, "delta": budget.target_delta, "exhausted": exhausted}
        return {**of_person, **measured, "outside": outside}

    def _is_exhausted(self, name: str, records: int, events: Sequence[DpEvent]) -> bool:
        """Return whether a client's budget affords it no further round."""
        try:
            allowed = capped(self.record.ledger_path(name), self.record.terms.budget)
        except CapEnded:
            return True
        return records > 0 and not GATE.fits(events, self._round(name, records).event(), allowed)

    def _round(self, name: str, records: int) -> Plan:
        """Return the plan of one round at the client with this ledger and so many records."""
        return record_plan(self.record.of_ledger(name), records + self.record.canaries, self.client)

    def meter(self) -> RecordMeter:
        record, federation, mode = self.record, self.federation, self.federation.mode
        limited = mode.promises[-1].target_epsilon is not None
        if federation.simulated:
            plans = plans_of_sizes(mode.sizes, record, self.client)
            kinds = [ClientKind(federation.simulated_cost, plan) for plan in plans]
            return RecordMeter(kinds, record.terms.budget, limited, mode.hides_counts)
        names = enumerate(federation.population.client_ledger_names)
        sizes = sorted(((len(mode.data_of(each)), name) for each, name in names), reverse=True)
        # Of clients that spent equally, and take equally many steps of equal noise, the last and smallest one loses most.
        distinct: dict[tuple[Any, ...], ClientKind] = {}
        for records, name in sizes:
            if records:
                prior = tuple(read_events(record.ledger_path(name), Adversary.MODEL))
                plan = self._round(name, records)
                distinct[prior, steps_of(plan), plan.noise_multiplier] = ClientKind(prior, plan)
        return RecordMeter(tuple(distinct.values()), record.terms.budget, limited, mode.hides_counts)


def client_ledgers_of(federation: Federation, client: ClientSettings) -> NoClientLedgers:
    """Return the own ledgers of clients with these settings."""
    return ClientLedgers(federation, client, client.record) if client.record else NoClientLedgers()


@dataclass
class RecordMeter:
    """Meter of record-level loss in a running run: the loss at the client with the most rounds so far.

    It assumes that this client is of the kind whose rounds cost most. If cohorts are secret, it assumes a client that takes
    part in every round.

    Attributes:
      kinds: kinds of clients; empty where no client has a ledger of its own here, so that nothing is measured.
      budget: budget of each ledger, which refuses a round that the budget does not afford.
      limited: whether the budget has a target; without one, counting the affordable rounds takes long.
      secret: whether cohorts are secret.
    """

    kinds: Sequence[ClientKind]
    budget: Budget
    limited: bool
    secret: bool = False
    _participants: set[int] = field(default_factory=set[int])
    _rounds: dict[int, int] = field(default_factory=dict[int, int])  # by client; if secret, of client 0 alone
    _epsilon_by_rounds: dict[int, float] = field(default_factory=dict[int, float])
    _affordable: list[int] = field(default_factory=list[int])  # rounds, by kind; empty until needed

    @property
    def counts(self) -> bool:
        """Whether rounds are counted."""
        return bool(self.kinds)

    @property
    def took_part(self) -> Collection[int]:
        """Numbers of all clients that were drawn."""
        return self._participants

    def clients(self, participants: Participants, nodes: Sequence[int]) -> list[int]:
        """Return the numbers of those of the drawn nodes whose rounds are counted."""
        return participants.numbers(nodes) if self.counts else []

    def add_unfinished(self, clients: Sequence[int]) -> None:
        """Note clients of a round that did not end: it may be charged as well."""
        self._participants.update(clients)

    def add(self, clients: Sequence[int]) -> None:
        """Count a round for each of these clients or, if cohorts are secret, for one that takes part in every round."""
        self._participants.update(clients)
        for client in [0] if self.secret else clients:
            self._rounds[client] = self._rounds.get(client, 0) + 1

    def epsilons(self) -> dict[str, float]:
        """Return the epsilon at the client with the most rounds by its unit, with the gate's discretisation."""
        if not self.counts:
            return {}
        max_rounds = max(self._rounds.values(), default=0)
        if max_rounds not in self._epsilon_by_rounds:
            self._epsilon_by_rounds[max_rounds] = max(map(self._cost, self._possible()))
        return {str(self.budget.unit): self._epsilon_by_rounds[max_rounds]}

    def secret_events(self, whole: bool) -> list[DpEvent] | None:
        """Return the events at a client that takes part in every round, where cohorts are secret; otherwise None.

        Args:
          whole: whether the run made all its rounds; clients of a round that failed were drawn, too.
        """
        if not self.secret:
            return None
        if not whole:
            self.add(())  # counts one more round
        return max(self._possible(), key=self._cost)

    def _cost(self, events: Sequence[DpEvent]) -> float:
        return epsilon(events, self.budget.target_delta, self.budget.adjacency, GATE_INTERVAL)

    def _possible(self) -> list[list[DpEvent]]:
        """Return the events at a client of each kind with the most rounds that its budget affords."""
        max_rounds = max(self._rounds.values(), default=0)
        if self.limited and not self._affordable:
            self._affordable = [each.plan.affordable_rounds(self.budget, each.prior) for each in self.kinds]
        rounds = [min(max_rounds, each) for each in self._affordable] or [max_rounds] * len(self.kinds)
        pairs = zip(self.kinds, rounds, strict=True)
        return [[*kind.prior, *[kind.plan.event()] * num_rounds] for kind, num_rounds in pairs]


def _loss_across(paths: Collection[Path], clients: int, budget: Budget) -> float | None:
    """Return the largest loss of a person at this many clients, whichever these are; their noise is independent.

    None where there are too many kinds of clients to compose.
    """
    kinds = largest([[], *(each for _, each in read_events_of(paths, Adversary.MODEL))])
    if math.comb(len(kinds) + clients - 1, clients) > MAX_COMPOSED:
        return None
    losses: list[float] = []
    for ledgers in combinations_with_replacement(kinds, clients):
        counts = Counter[Any]()  # of equal events
        for events in ledgers:
            counts.update(dict(events))
        losses.append(epsilon(counts, budget.target_delta, budget.adjacency, GATE_INTERVAL))
    return max(losses)
