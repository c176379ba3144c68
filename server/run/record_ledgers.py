"""Clients' own ledgers as one machine that has them all sees them: their heads, and what records have lost."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import DpEvent

from ...privacy.accounting.curve import largest
from ...privacy.accounting.epsilon import GATE_INTERVAL, epsilon, within
from ...privacy.accounting.renyi_filter import counted
from ...privacy.budget import Adversary, Budget
from ...privacy.ledger.book import read_events
from ...privacy.ledger.caps import CapEnded, capped
from ...privacy.ledger.hash_chain import Chain
from ...privacy.ledger.ledger import Head
from ...privacy.plan import Plan
from ...privacy.refusal import Refusal
from ...strategies.client_settings import ClientSettings, RecordPrivacy
from ...strategies.record_plan import record_plan
from ...tasks.data import MOST_LOOKED_AT
from .federation import Federation

OUTSIDE = "a record that occurs at two clients: what it loses at each adds up"
MOST_COMPOSED = 20  # choices of clients at which a person may be
TWO_UNITS = "a person at m clients is m units: what is lost at each adds up"


def spending(
    federation: Federation, client: ClientSettings, took_part: Collection[int]
) -> dict[str, Any] | None:
    """Return what each client's records have lost, in the clients' order, and how many clients cannot go on.

    A client counts as exhausted when its budget affords it no further round.

    Returns:
      The content of ``records`` in result.json; None where records are not protected.
    """
    if client.record is None:
        return None
    lost, exhausted = [0.0] * federation.task.num_clients, 0
    budget = client.record.budget()
    paths = client_ledgers(federation, Path(client.record.ledger_dir))

    @cache  # most clients have taken part as often as another one of their size
    def cost(events: tuple[DpEvent, ...]) -> float:
        return counted(events, budget.target_delta, budget.adjacency, None)

    for number, name in _named(federation, client.record, took_part, paths):
        path = client.record.ledger_path(name)
        if not path.exists():
            continue
        events = read_events(path, Adversary.MODEL)
        lost[number] = cost(tuple(events))
        records = len(federation.data_of(number))
        try:
            allowed = capped(path, budget)
            exhausted += records > 0 and not within(
                [*events, record_plan(client.record.of_ledger(name), records, client).event()], allowed
            )
        except CapEnded:
            exhausted += 1
    outside, found = OUTSIDE if client.record.per_person is None else TWO_UNITS, federation.clients_per_person
    across: dict[str, Any] = {}
    if found is not None:
        outside = f"nobody: at most {found} clients train on one person, who loses at all of them what `person` says"
        across = {"person": _across(paths, found, budget)}
    return {
        **across,
        "epsilon": lost,
        "delta": budget.target_delta,
        "exhausted": exhausted,
        "outside": outside,
    }


def _named(
    federation: Federation, record: RecordPrivacy, took_part: Collection[int], paths: Collection[Path]
) -> Iterable[tuple[int, str]]:
    """Return numbers of clients with the names of their ledgers: of all that may hold something, in the clients' order.

    Of a large population on made-up data these are those that took part, as long as every ledger is one of theirs: to
    name a ledger takes a client's data.
    """
    if federation.simulated and federation.task.num_clients > MOST_LOOKED_AT:
        names = dict[int, str]()
        for number in sorted(took_part):
            with suppress(
                Exception
            ):  # of who was dropped because its data cannot be made, and who has no ledger
                names[number] = federation.fingerprint_of(number)
        if set(paths) <= set(map(record.ledger_path, names.values())):
            return names.items()
    return enumerate(federation.client_ledgers)


def _across(paths: Collection[Path], clients: int, budget: Budget) -> float | None:
    """Return what a person at so many clients has lost at most, whichever they are; each client's noise is its own.

    Args:
      paths: of the clients' ledgers.
      clients: that train on one person at most.
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
    """The heads of the clients' ledgers, read again where a file has changed since."""

    federation: Federation
    client: ClientSettings
    _read: dict[str, tuple[int, Head]] = field(default_factory=dict[str, tuple[int, Head]])

    def now(self) -> dict[str, Head]:
        """Return the head of every ledger that one of this federation's clients has, by the ledger's name."""
        if self.client.record is None:
            return {}
        folder = Path(self.client.record.ledger_dir)
        for name, changed in sorted(self._changed(folder)):
            with closing(Chain.for_reading(folder / name)) as chain:
                self._read[name] = (changed, chain.last())
        return {name: head for name, (_, head) in self._read.items()}

    def _changed(self, folder: Path) -> Iterable[tuple[str, int]]:
        """Yield names of ledgers that are new or have changed, and when; a simulation's folder has no others beside them."""
        if self.federation.simulated and folder.exists():
            with os.scandir(folder) as files:  # a quarter of the time that paths take: 0.4 s of 100 000
                found = [
                    (each.name, each.stat().st_mtime_ns) for each in files if each.name.endswith(".ledger")
                ]
        else:
            paths = client_ledgers(self.federation, folder)
            found = [(path.name, path.stat().st_mtime_ns) for path in paths]
        return (each for each in found if self._read.get(each[0], (0,))[0] != each[1])


def require_heads(folder: Path, heads: Mapping[str, Head]) -> None:
    """Refuse to go on from a checkpoint that knows a client's ledger which is gone, cut or another one.

    Args:
      folder: of the ledgers.
      heads: that the checkpoint knows, by the names of the ledgers' files.

    Raises:
      Refusal: naming the ledger.
    """
    for name, head in heads.items():
        path = folder / name
        if not path.exists():
            raise Refusal("ledger", str(path), f"missing, though entry {head.seq} of it is known; restore it")
        with closing(Chain.for_reading(path)) as chain:
            chain.require(head)


@dataclass
class RecordMeter:
    """Counts who took part, to say while a run goes on what the client that took part most often has revealed.

    It says so for a client with the fewest records, whose every round costs most. Where who takes part is secret it says
    what a client reveals that takes part in every round.

    Attributes:
      plan: of one round at that client.
      budget: of its ledger, which refuses what the budget does not afford.
      limited: whether the budget has a target at all; counting how many rounds it affords takes long if not.
      prior: what the ledger that is spent most held before this run.
      secret: whether who takes part is.
      took_part: numbers of all clients that were drawn.
    """

    plan: Plan
    budget: Budget
    limited: bool
    prior: tuple[DpEvent, ...] = ()
    secret: bool = False
    took_part: set[int] = field(default_factory=set[int])
    _rounds: dict[int, int] = field(default_factory=dict[int, int])
    _known: dict[int, float] = field(default_factory=dict[int, float])
    _affordable: int | None = None

    def add(self, clients: Sequence[int]) -> None:
        """Count one more round for each of these clients, by their numbers."""
        self.took_part.update(clients)
        for client in [0] if self.secret else clients:
            self._rounds[client] = self._rounds.get(client, 0) + 1

    def epsilon(self) -> float:
        """Return the epsilon of whoever took part most often, with the gate's discretisation."""
        most = self._most()
        if most not in self._known:
            delta, adjacency = self.budget.target_delta, self.budget.adjacency
            self._known[most] = epsilon(self.events(), delta, adjacency, GATE_INTERVAL)
        return self._known[most]

    def events(self) -> list[DpEvent]:
        """Return what whoever took part most often has lost."""
        return [*self.prior, *[self.plan.event()] * self._most()]

    def _most(self) -> int:
        most = max(self._rounds.values(), default=0)
        if self.limited:
            self._affordable = self._affordable or self.plan.affordable_rounds(self.budget, self.prior)
            most = min(self._affordable, most)
        return most


def record_meter(federation: Federation, client: ClientSettings) -> RecordMeter | None:
    """Return the meter of a run that is about to begin; None where records are not protected."""
    if federation.record is None or client.record is None:
        return None
    budget = client.record.budget()
    plan = record_plan(client.record, federation.sizes[0], client)
    limited = federation.record.target_epsilon is not None
    if federation.simulated:
        return RecordMeter(plan, budget, limited, federation.asked, federation.keeps_counts)
    sizes = [(len(federation.data_of(each)), name) for each, name in enumerate(federation.client_ledgers)]
    # Of those that have spent the same the one with the fewest records comes last, and stays.
    held = {
        tuple(read_events(client.record.ledger_path(name), Adversary.MODEL)): (records, name)
        for records, name in sorted(sizes, reverse=True)
        if records
    }

    def cost(events: tuple[DpEvent, ...]) -> float:
        return epsilon(events, budget.target_delta, budget.adjacency, GATE_INTERVAL)

    prior = max(held, key=cost)
    records, name = held[prior]
    plan = record_plan(client.record.of_ledger(name), records, client)
    return RecordMeter(plan, budget, limited, prior, federation.keeps_counts)


def client_ledgers(federation: Federation, folder: Path | None) -> list[Path]:
    """Return the ledgers of this federation's clients; beside real data others live in the same folder.

    Args:
      federation: its parts.
      folder: of the ledgers; None where records are not protected.
    """
    if folder is None:
        return []
    if federation.simulated:
        return sorted(folder.glob("*.ledger"))
    names = set(federation.client_ledgers)
    return sorted(path for name in names if (path := folder / f"{name[:32]}.ledger").exists())
