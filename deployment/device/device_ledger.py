"""Ledger on the device of its releases as a client; a cost is reserved there before its vector is sent.

The server keeps the population's ledger; this one trusts no other party. Each sum is charged as one Gaussian, without
amplification, because the device knows that it took part. The device has one ledger for all runs, servers and data: it
is named by the device's identity, because a client's data may change without resetting its budget. What it releases as
a client is charged to its records too, on their ledger or, before there is one, within their budget.
"""

import json
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ...base.refusal import Refusal
from ...client.private_update import NotTrained
from ...messages.wire import BUDGET_SPENT, NOT_READY
from ...privacy.accounting.events import Gaussian, event_to_json
from ...privacy.accounting.gaussian import exact_epsilon, gaussian_mu
from ...privacy.accounting.renyi_filter import spent_epsilon
from ...privacy.budget import OF_RECORDS, UNLIMITED_EPSILON, Adjacency, Adversary, Budget, Release, Unit
from ...privacy.ledger.acts import CAP, DECISION, ROSTER, ROSTERS, acting_user
from ...privacy.ledger.caps import CLIENT, NAME_LENGTH, Cap, CapEnded, cap_acts, lowered
from ...privacy.ledger.client_sums import (
    RecordsBudget,
    as_records,
    charge_records,
    pending_drafts,
    read_records,
    record_release,
)
from ...privacy.ledger.hash_chain import canonical
from ...privacy.ledger.ledger import BudgetExhausted, Key, Ledger
from ...privacy.ledger.ledger_state import (
    LedgerRelease,
    LedgerState,
    identity_of,
    read_ledger,
    run_of,
    state_at,
)
from ...privacy.ledger.question_caps import QUESTION, LedgerQuestion, ledger_questions
from .order_policy import Cost
from .owner_decisions import OwnerDecision

logger = logging.getLogger("fedveil.client")

WAIT_SECONDS = 10.0
MECHANISM = "private_sum"
MISSED = "restored"  # instead of a run's name in the charge of a restore


@dataclass(frozen=True)
class DeviceLedger:
    """Location of the ledger, and its owner's cap.

    Attributes:
      folder: of the device's ledgers; it must exist.
      device: name of the device, 64 hexadecimal digits.
      cap: the owner's; `caps.json` in the folder may lower it.
      origin: whose rounds are charged, and the roster in force; empty for the owner's own entries.
    """

    folder: Path
    device: str
    cap: Cap
    origin: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def path(self) -> Path:
        """File of the ledger of the device's releases as a client."""
        return self.folder / f"{CLIENT}{self.device[:NAME_LENGTH]}.ledger"

    @property
    def records(self) -> Path:
        """File of the ledger of its records, shared by all modes."""
        return self.folder / f"{self.device[:NAME_LENGTH]}.ledger"

    @property
    def budget(self) -> Budget:
        """Owner's budget of the whole client."""
        # Zero-out, because an event is noise over the clipping norm, whatever the adjacency of a server.
        return Budget(Unit.CLIENT, self.cap.target_epsilon, self.cap.target_delta)

    @property
    def budget_of_records(self) -> Budget:
        """Owner's budget of its records, in the unit and adjacency of their ledger; without one, of single records."""
        identity = identity_of(self.records)
        unit, adjacency = identity.get("unit", Unit.RECORD), identity.get("adjacency", Adjacency.ZERO_OUT)
        return Budget(unit, self.cap.target_epsilon, self.cap.target_delta, adjacency)

    def _open(self, path: Path, budget: Budget) -> Ledger:
        return Ledger.open(path, budget, owner=self.device, simulated=False, wait=WAIT_SECONDS)

    def charge_records(self, budget: Budget) -> None:
        """Charge the records with earlier releases of the whole client, before a release of their own is planned.

        `budget` is that of the records' next release, and gives unit and adjacency of their ledger.

        Raises:
          Refusal: a ledger cannot be read or written, or is kept for another unit or adjacency.
        """
        if not self.path.exists():
            return
        records = state_at(self.records)
        if pending_drafts(read_ledger(self.path), records, budget):
            with self._open(self.records, budget) as ledger:
                charge_records(ledger, self.path, budget)

    @contextmanager
    def charged(self, run: str, number: int, attempt: int, cost: Cost) -> Generator[None]:
        """Reserve one vector's cost, and commit it once the vector is computed; void it if there is none.

        Run, round and attempt are its key. After a kill inside the context, or a failure at the record level, the
        reservation stays spent, and the same attempt is refused.

        Raises:
          NotTrained: BUDGET_SPENT, or NOT_READY if the ledger cannot be written or read.
          Refusal: the attempt was answered before.
        """
        is_of_client = cost.budget is None  # and not of its records
        unit, events = (cost.budget or self.budget).unit, dict.fromkeys(cost.adversaries, cost.event)
        source = OF_RECORDS if cost.is_of_records else None
        release = Release(unit, run, number, f"{MECHANISM} {attempt}", events, "system", source=source)
        inquiry, purpose = cost.inquiry, None
        if inquiry is not None:
            release, purpose = replace(release, segments=inquiry.purposes, kind=QUESTION), inquiry.why or None
        with self._reserve_on_all(release, cost.budget, purpose) as reservations:
            try:
                yield
            except Exception as error:
                # At the record level a failure on records may reveal one: only a failure before any record is read is
                # free.
                if is_of_client or isinstance(error, NotTrained | Refusal):
                    for ledger, key in reservations:
                        ledger.void(key, "no vector was made")
                raise
            for ledger, key in reservations:
                _commit(ledger, key)

    @contextmanager
    def _reserve_on_all(
        self, release: Release, of_records: Budget | None, purpose: str | None
    ) -> Generator[list[tuple[Ledger, Key]]]:
        """Reserve a release on each ledger that pays, the records' first, open in the context; a refusal voids all."""
        reservations: list[tuple[Ledger, Key]] = []
        with ExitStack() as stack:
            try:
                if of_records is None and release.source is None and self.records.exists():
                    budget = self.budget_of_records
                    charge = record_release(release, budget)
                    reserved = self._reserve(charge, budget, purpose)
                    reservations.append((stack.enter_context(closing(reserved)), charge.key))
                reserved = self._reserve(release, of_records, purpose)
                reservations.append((stack.enter_context(closing(reserved)), release.key))
            except (NotTrained, Refusal) as error:
                for ledger, key in reservations:
                    ledger.void(key, "the client's own ledger refused: no vector was made")
                raise _not_trained(error) from error
            yield reservations

    def record_approval(self, version: int, digest: str, reason: str | None) -> None:
        """Record the owner's approval of a roster: user, time and reason.

        Raises:
          Refusal: the ledger cannot be written.
        """
        fields = {"version": version, "hash": digest, "who": acting_user(), "reason": reason}
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._open(self.path, self.budget) as ledger:
            ledger.act(ROSTER, (ROSTERS, version, digest), fields)

    def record_decisions(self, decisions: Sequence[OwnerDecision]) -> None:
        """Record the owner's decisions that are not on the ledger yet, each as an act.

        Raises:
          Refusal: the ledger cannot be written, or another process writes it.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._open(self.path, self.budget) as ledger:
            for each in decisions:
                ledger.act(DECISION, *each.act)

    def charge_restored(self, is_repeated: bool) -> Budget:
        """Charge what a device that was restored or copied may have missed, and return the budget that it can have spent.

        No record tells what left in its name, and neither the server nor a copy is trusted for that. But no device
        exceeds its budget, so one Gaussian release with all of it is charged beside what the ledger holds, for the
        largest of its owner's budgets, now and in the entries of both ledgers. Records pay for it as for any other.

        Args:
          is_repeated: whether an earlier command may have charged it: then not again if it is the last release.

        Raises:
          Refusal: the ledger cannot be read or written.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._open(self.path, self.budget) as ledger:
            records = state_at(self.records)
            targets = {(self.cap.target_epsilon, self.cap.target_delta)}
            targets |= {*_targets(ledger.book), *_targets(records)}
            epsilon, delta = max(targets, key=lambda target: gaussian_mu(*target))
            event = Gaussian(1 / gaussian_mu(epsilon, delta))
            release = Release(
                Unit.CLIENT, MISSED, ledger.head.seq, MECHANISM, dict.fromkeys(Adversary, event), "system"
            )
            last = next(reversed(ledger.book.releases.values()), None)
            if not (is_repeated and last is not None and _is_same(last, release)):
                ledger.charge_unlimited(release, "what a restored device may have missed")
        return Budget(Unit.CLIENT, epsilon, delta)

    def _reserve(self, release: Release, of_records: Budget | None, purpose: str | None) -> Ledger:
        """Reserve a release on the records' ledger if it has a budget `of_records`, else on the client's; return it open."""
        path, budget = (self.path, self.budget) if of_records is None else (self.records, of_records)
        try:
            ledger = self._open(path, lowered(budget, [self.cap]))
        except CapEnded as ended:
            logger.warning("%s", ended)
            raise NotTrained(BUDGET_SPENT) from ended
        except Refusal as refusal:  # a full disk, a damaged file
            logger.error("%s", refusal)
            raise NotTrained(NOT_READY) from refusal
        ledger.purpose, ledger.origin, ledger.caps = purpose, self.origin, (self.cap,)
        try:
            for key, fields in cap_acts(path):  # the owner's decisions in `caps.json`
                ledger.act(CAP, key, fields)
            if of_records is not None:
                charge_records(ledger, self.path, budget)
            elif release.source is None and not self.records.exists():
                ledger.shared = (self._shared(ledger.book),)
            ledger.reserve_new(release)
        except BaseException as error:
            ledger.close()
            raise _not_trained(error) from error
        return ledger

    def _shared(self, clients: LedgerState) -> RecordsBudget:
        """Return the budget of records that have no ledger yet, which the client's releases must fit as well."""
        budget = self.budget_of_records
        spent = as_records(clients, LedgerState(), budget)
        return RecordsBudget(self.records, lowered(budget, [self.cap]), spent, (self.cap,))


def _is_same(booked: LedgerRelease, release: Release) -> bool:
    """Return whether a charge on a ledger is one of a restore, with the same events."""
    events = {adversary: canonical(event_to_json(event)) for adversary, event in release.events.items()}
    return run_of(booked.entry) == MISSED and booked.events == events


def _targets(book: LedgerState) -> Iterator[tuple[float, float]]:
    """Yield target epsilon and delta of the budgets under which a ledger's releases were ever granted."""
    for booked in book.releases.values():
        budget = json.loads(booked.entry.payload)["budget"]
        if budget["target_epsilon"] < UNLIMITED_EPSILON:  # or no budget granted it, as for sums of its client
            yield budget["target_epsilon"], budget["target_delta"]


def _not_trained(error: BaseException) -> BaseException:
    """Return `NotTrained`, whose code the server sees, for a spent budget or an unusable ledger; else the error."""
    if isinstance(error, BudgetExhausted):
        logger.warning("%s", error)
        return NotTrained(BUDGET_SPENT)
    if isinstance(error, Refusal) and error.field == "ledger":
        logger.error("%s", error)
        return NotTrained(NOT_READY)
    return error


def _commit(ledger: Ledger, key: Key) -> None:
    try:
        ledger.commit(key)
    except Refusal as refusal:  # a commit changes no epsilon: the reservation stays spent
        logger.warning("%s", refusal)


def questions_of(path: Path) -> list[LedgerQuestion]:
    """Return the questions on a ledger, in order, read without its lock.

    Raises:
      Refusal: the ledger is damaged.
    """
    return ledger_questions(read_ledger(path))


class Spending(NamedTuple):
    """Epsilon and delta that releases have spent."""

    epsilon: float
    delta: float


class LedgerSpending(NamedTuple):
    """Spending of a ledger, None for nothing; `as_client`: epsilon that releases of the whole client alone cost records."""

    spent: Spending | None
    as_client: float


def epsilon_of(path: Path) -> Spending | None:
    """Return what was spent on a ledger, read without its lock; None if nothing was.

    Raises:
      Refusal: the ledger is damaged.
    """
    return spent_in(state_at(path))


def spent_on(folder: Path) -> dict[str, LedgerSpending]:
    """Return what the ledgers in a device's folder have spent, by name; of records, with what their client released.

    Raises:
      Refusal: a ledger is damaged.
    """
    spent = {path.stem: LedgerSpending(epsilon_of(path), 0.0) for path in sorted(folder.glob("*.ledger"))}
    for client in [name for name in spent if name.startswith(CLIENT)]:
        name = client.removeprefix(CLIENT)
        whole, of_client_sums = read_records(folder / f"{client}.ledger", folder / f"{name}.ledger")
        if whole.releases:
            of_client = spent_in(of_client_sums)
            spent[name] = LedgerSpending(spent_in(whole), of_client.epsilon if of_client else 0.0)
    return spent


def spent_in(book: LedgerState) -> Spending | None:
    """Return what a book's releases have spent, at its least delta against the worst adversary; None for nothing."""
    if not book.granted:
        return None
    delta = min(budget.target_delta for budget in book.granted.values())
    return Spending(max((_epsilon(book, adversary, delta) for adversary in book.spent), default=0.0), delta)


def _epsilon(book: LedgerState, adversary: Adversary, delta: float) -> float:
    """Return what releases have spent against an adversary, exactly if all of them are Gaussian."""
    adjacency = Adjacency(book.identity["adjacency"])
    exact = exact_epsilon(book.spent[adversary], delta, adjacency) if book.filter_order is None else None
    if exact is not None:
        return exact
    return spent_epsilon(book.events(adversary), delta, adjacency, book.filter_order)
