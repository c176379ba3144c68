"""Ledger: a file of all releases, written before each result is released, so that a budget is never exceeded.

A release is reserved, then committed, or voided with proof that nothing was released. Reserved and committed releases
both count: after a crash the outcome is unknown, so a reservation stays spent. Entries contain the parameters of the
releases, from which epsilon is computed, and never an epsilon.
"""

import contextlib
import json
import math
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Protocol, Self

from ...base.refusal import Refusal, disk_remedy
from ..accounting.epsilon import GATE_INTERVAL, PUBLISH_INTERVAL
from ..accounting.events import event_to_json
from ..accounting.gate import GATE
from ..accounting.gaussian import exact_epsilon
from ..accounting.renyi_filter import admits, filter_order, spent_epsilon
from ..budget import Adversary, Budget, Release
from .caps import Cap, CapEnded, capped, caps_on
from .hash_chain import (
    Chain,
    Draft,
    Entry,
    EntryChain,
    Head,
    LedgerUnavailable,
    Lock,
    canonical,
    holds_entries,
)
from .ledger_state import (
    CLOSE,
    COMMIT,
    NOTE,
    OPEN,
    RESERVE,
    VERSION,
    VOID,
    LedgerRelease,
    LedgerState,
    ReleaseState,
    Verification,
    event_of,
    read_entries,
    require_unit,
    verify,
)
from .question_caps import question_excess
from .store import Store

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

__all__ = [
    "BudgetExhausted",
    "Entry",
    "Head",
    "Key",
    "Ledger",
    "LedgerUnavailable",
    "ReleaseState",
    "Verification",
    "read_entries",
    "verify",
]

Key = tuple[str, int, str]
# Largest relative difference between epsilon by PLD and the exact epsilon of Gaussian noise; within it, PLD decides.
ACCOUNTANTS_DIFFER = 1e-6
MAX_CONVERSIONS = 64  # events whose JSON a process keeps: clients with the same plan have one event


class BudgetExhausted(Exception):
    """Error of a release that would exceed the budget; nothing was written and nothing was spent.

    Attributes:
      budget: budget of the ledger.
      adversary: adversary against whom the budget would be exceeded.
      would_be: epsilon including the release; infinite if an owner's cap refuses it.

    Example:
      >>> import fedveil as fv
      >>> raise fv.BudgetExhausted(fv.Budget("record", 1.0, 1e-6), fv.Adversary.MODEL, 1.04)
      Traceback (most recent call last):
      fedveil.privacy.ledger.ledger.BudgetExhausted: the record budget is spent: against the model this release would bring epsilon to 1.04 of 1 at delta 1e-06
    """

    def __init__(self, budget: Budget, adversary: Adversary, would_be: float, why: str | None = None) -> None:
        super().__init__(
            why
            or f"the {budget.unit} budget is spent: against the {adversary} this release would bring epsilon to "
            f"{would_be:.4g} of {budget.target_epsilon:.4g} at delta {budget.target_delta:.3g}"
        )
        self.budget = budget
        self.adversary = adversary
        self.would_be = would_be


class SharedBudget(Protocol):
    """Second budget that the releases of a ledger spend too, such as that of a client's records (`RecordsBudget`)."""

    path: Path
    budget: Budget
    book: LedgerState

    def require(self, release: Release) -> None:
        """Raise BudgetExhausted if a release would exceed the budget."""
        ...

    def add(self, release: Release) -> None:
        """Count a release that is about to be written."""
        ...


class Ledger:
    """Record of all releases of one owner's data, charged before anything is released.

    One process at a time can open a ledger; its threads may share it. A failed write raises `LedgerUnavailable` and closes
    the ledger, because the state on disk is then unknown until the file is read again.

    Attributes:
      purpose: purpose of this process's releases in words, stored with each reservation; None for no purpose.
      caps: caps of the owner on questions, in addition to those stored with the ledger.
      shared: other budgets that new releases are charged to as well.

    Example:
      >>> import tempfile
      >>> import fedveil as fv
      >>> from dp_accounting import GaussianDpEvent
      >>> path, budget = tempfile.mkdtemp() + "/ages.ledger", fv.Budget("record", 1.0, 1e-6)
      >>> with fv.Ledger.open(path, budget, owner="clinic-7", simulated=False) as ledger:
      ...     mean = fv.Release("record", "monday", 1, "mean age", {"model": GaussianDpEvent(8.0)}, rng="system")
      ...     entry = ledger.reserve_new(mean)  # on disk: the noised mean may be released
      ...     ledger.commit(mean.key)
      ...     round(ledger.epsilon(), 2)
      0.5
    """

    def __init__(
        self,
        chain: EntryChain,
        lock: Lock | Store,
        book: LedgerState,
        budget: Budget,
        resources: contextlib.ExitStack,
    ) -> None:
        """Take the parts that `open` or `stored` prepares; `resources` closes the chain and releases the lock."""
        self._chain = chain
        self._lock = lock
        self._book = book
        self._budget = budget  # before the owner's caps
        self._resources = resources
        self.purpose: str | None = None
        # Of the next run's releases: who began it, on which data and model.
        self.origin: Mapping[str, Any] = {}
        self.caps: tuple[Cap, ...] = ()
        self.shared: tuple[SharedBudget, ...] = ()
        self._threads = threading.RLock()  # held by a thread of this process while it reads or writes
        # By key, what is said in commits that are still to be written, in their order.
        self._pending: dict[str, dict[str, Any]] = {}

    @classmethod
    def open(
        cls,
        path: Path | str,
        budget: Budget,
        *,
        owner: str,
        simulated: bool,
        durable: bool = True,
        expect: Head | None = None,
        wait: float = 0.0,
    ) -> Self:
        """Open a ledger, or create a new one.

        Args:
          path: file in an existing folder; `<path>.lock` names the process that has it open.
          budget: budget of the ledger; unit and adjacency must be those of an existing ledger.
          owner: fingerprint of the data set, or name of the population.
          simulated: whether the data are declared simulated; only then may noise come from a seed.
          durable: whether a reservation survives a power cut; with False it survives only the end of the process.
          expect: head from a checkpoint, which the ledger must contain; None accepts any ledger of this owner.
          wait: seconds to wait for another process that has the ledger open.

        Raises:
          Refusal: the file is not a ledger, damaged, truncated, rolled back, of other data, in use, or not writable.
        """
        path = Path(path)
        if not holds_entries(path) and expect is not None:
            remedy = f"missing, though entry {expect.seq} of it is known; restore it"
            raise Refusal("ledger", str(path), remedy)
        identity = _identity(budget, owner, simulated)
        with contextlib.ExitStack() as stack:
            lock = stack.enter_context(Lock(path, wait))
            chain = Chain.for_writing(path, _first(identity), durable=durable)
            stack.callback(chain.close)
            book = _replayed(chain, identity)
            if expect is not None:
                chain.require(expect)
            return cls(chain, lock, book, budget, stack.pop_all())

    @classmethod
    def stored(cls, store: Store, path: Path, budget: Budget, *, owner: str) -> Self:
        """Open a simulated client's ledger in a store, or begin it there.

        Several processes may have it open, since each write reads first what others wrote. `close` writes what is pending, and
        leaves the store and this object open.

        Args:
          store: of the ledger's folder, open for writing.
          path: path that a file of its own would have.
          budget: as of `open`.
          owner: as of `open`.

        Raises:
          Refusal: the ledger is damaged, of other data, or cannot be written.
        """
        identity = _identity(budget, owner, simulated=True)
        chain = store.chain(path, _first(identity))
        return cls(chain, store, _replayed(chain, identity), budget, contextlib.ExitStack())

    @property
    def path(self) -> Path:
        """Path of the ledger's file."""
        return self._chain.path

    @property
    def budget(self) -> Budget:
        """Budget from `open`, lowered to the owner's current caps.

        Raises:
          Refusal: the caps have expired, or cannot be read.
        """
        return capped(self.path, self._budget)

    @property
    def head(self) -> Head:
        """Last written entry; store it in a checkpoint, and pass it to `open` as `expect`."""
        return self._book.head

    @property
    def book(self) -> LedgerState:
        """State of the ledger after its last write."""
        return self._book

    @property
    def is_open(self) -> bool:
        """Whether the ledger can be written; false after `close`, and after a failed write."""
        return self._lock.is_held

    def require(self, head: Head) -> None:
        """Check that the ledger contains the head that was stored in a checkpoint.

        Raises:
          Refusal: it does not: the file was truncated, rolled back or replaced.
        """
        with self._threads:
            self._require_open()
            self._chain.require(head)

    def reserve(self, release: Release) -> Entry:
        """Charge a release and return its entry, which is then on disk; only then may the result be released.

        To reserve a key again with the same events is free and returns the first entry. New noise needs a new key: a
        reservation pays for one result only.

        Raises:
          BudgetExhausted: the release would exceed the budget; nothing is written.
          Refusal: its unit or `rng` does not fit this ledger, or its key was voided or reserved with other events.
          LedgerUnavailable: the entry could not be written.
        """
        self._require_admissible(release)
        key = key_text(release.key)
        events = events_to_json(release)
        with self._writing() as drafts:
            earlier = self._book.releases.get(key)
            if earlier is None:
                budget = self._budget_for(release)
                self.require_question(release)
                require_affordable(release, events, budget, self._book)
                for each in self.shared:  # all admit the release before any counts it
                    each.require(release)
                for each in self.shared:
                    each.add(release)
                origin = self._new_origin(release.run)
                drafts.append(Draft(RESERVE, key, _payload(release, events, budget, self.purpose, origin)))
            else:
                _require_same(release, earlier, events)
        return self._book.releases[key].entry

    def charge(self, drafts_of: Callable[[LedgerState], Iterable[Draft]]) -> None:
        """Charge results that were released already, even beyond the budget; either all entries are written or none.

        Args:
          drafts_of: function of the ledger's state that returns the new entries.
        """
        with self._writing() as drafts:
            drafts.extend(drafts_of(self._book))

    def charge_unlimited(self, release: Release, purpose: str) -> None:
        """Charge a release that may have happened already, even beyond the budget.

        Args:
          release: release with a new key.
          purpose: purpose of the charge in words.
        """
        payload = _payload(release, events_to_json(release), self._budget, purpose)
        self.charge(lambda _: [Draft(RESERVE, key_text(release.key), payload)])

    def require_question(self, release: Release) -> None:
        """Check a question against the owner's rules and caps; nothing is written.

        Args:
          release: release that will be reserved; for several releases of one question, one with their composed event.

        Raises:
          BudgetExhausted: the question would exceed a cap, or the caps have expired.
          Refusal: the question's purpose is not allowed.
        """
        if release.kind is None:
            return
        budget, caps = self._budget_for(release), (*caps_on(self.path), *self.caps)
        if excess := question_excess(release, caps, self._book, budget):
            raise BudgetExhausted(budget, next(iter(release.events)), math.inf, excess)

    def reserve_new(self, release: Release) -> Entry:
        """Charge a release as `reserve` does, for a caller that is about to draw noise.

        Seeded noise is the same at every repetition, so a repeated release reveals nothing more and is free. The
        system's generator never repeats its noise: a second result under one key would be an uncharged release.

        Raises:
          BudgetExhausted: as for `reserve`.
          Refusal: as for `reserve`, or the key was reserved before and its noise is from the system's generator.
          LedgerUnavailable: as for `reserve`.
        """
        with self._threads:
            if release.rng == "system" and self.state(release.key) is not None:
                remedy = "was charged before and its noise cannot be repeated; take a new key, a question a new name"
                raise Refusal("key", release.key, remedy)
            return self.reserve(release)

    def commit(self, key: Key, durable: bool = True) -> None:
        """Record that a result was released. The loss of this entry changes no epsilon: the reservation stays spent.

        Args:
          key: key of the release.
          durable: whether to write the entry at once; with False it is written with the next reservation.

        Raises:
          Refusal: the key was never reserved, or was voided.
          LedgerUnavailable: the entry could not be written.
        """
        with self._threads:
            booked = self._booked(key)
            if booked.state is ReleaseState.VOID:
                raise Refusal("key", key, "was voided: nothing of it may leave; reserve a new key")
            if booked.state is ReleaseState.RESERVED:
                self._pending.setdefault(key_text(key), {})
            if durable and self._pending:
                self._flush()

    def describe(self, key: Key, what: Mapping[str, Any]) -> None:
        """Add to a commit that is still to be written, such as the hash of the model after a round; else do nothing.

        Args:
          key: key of the release.
          what: JSON values by name.
        """
        with self._threads:
            if key_text(key) in self._pending:
                self._pending[key_text(key)] |= what

    def settle(self) -> None:
        """Write pending commits, so that `head` includes them; a closed ledger has none."""
        with self._threads:
            if self._pending and self.is_open:
                self._flush()

    def void(self, key: Key, proof: str) -> None:
        """Cancel a reservation and refund its cost.

        Args:
          key: key of the release.
          proof: sentence that proves that nothing was released.

        Raises:
          Refusal: the proof is empty, or the release was never reserved or is committed.
          LedgerUnavailable: the entry could not be written.
        """
        if not proof.strip():
            raise Refusal("proof", proof, "say how it is known that nothing left, or leave it reserved")
        with self._writing() as drafts:
            booked = self._booked(key)
            if booked.state is ReleaseState.COMMITTED or key_text(key) in self._pending:
                raise Refusal("key", key, "was committed: it has left and stays spent")
            if booked.state is ReleaseState.RESERVED:
                drafts.append(Draft(VOID, key_text(key), canonical({"proof": proof, "time": _now()})))

    def note(self, key: Key, what: Mapping[str, Any]) -> None:
        """Add a note without privacy cost, such as an alarm.

        Args:
          key: key of the note, in the form of a release's; a second note with the same key is ignored.
          what: JSON values by name.
        """
        with self._writing() as drafts:
            if key_text(key) not in self._book.notes:
                drafts.append(Draft(NOTE, key_text(key), canonical({**what, "time": _now()})))

    def note_of(self, key: Key) -> dict[str, Any]:
        """Return the note with a key; empty if there is none."""
        with self._threads:
            return json.loads(self._book.notes.get(key_text(key), "{}"))

    def act(self, kind: str, key: Key, what: Mapping[str, Any]) -> None:
        """Record a decision of a person or of the budget, without privacy cost.

        Args:
          kind: one of `acts.ACTS`.
          key: key of the act, in the form of a release's; a second act of this kind with the same key is ignored.
          what: JSON values by name: `who`, `reason` and the act's own fields.
        """
        with self._writing() as drafts:
            if (kind, key_text(key)) not in self._book.acts:
                drafts.append(Draft(kind, key_text(key), canonical({**what, "time": _now()})))

    def noted(self, run: str, number: int) -> list[dict[str, Any]]:
        """Return the notes of one round of a run."""
        with self._threads:
            return [
                json.loads(text)
                for key, text in self._book.notes.items()
                if json.loads(key)[:2] == [run, number]
            ]

    def close_run(self, run: str, manifest: str, status: str) -> Entry:
        """Record the hash of a run's manifest, to detect later changes of its files; without privacy cost.

        A run that is already closed with this manifest is not closed again. A run that continued or changed its files
        gets another entry, and the last one applies.

        Args:
          run: name of the run.
          manifest: SHA-256 of the manifest in hexadecimal.
          status: outcome of the run, a word such as `completed`.
        """
        with self._writing() as drafts:
            last_close = self._book.closes.get(run)
            if last_close is None or json.loads(last_close.payload)["manifest"] != manifest:
                payload = {"manifest": manifest, "status": status, "time": _now()}
                # Kind and key are unique: the number of earlier entries distinguishes several closes of one run.
                key: Key = (run, self._book.head.seq, CLOSE)
                drafts.append(Draft(CLOSE, key_text(key), canonical(payload)))
        return self._book.closes[run]

    def closed(self, run: str) -> Entry | None:
        """Return the entry that closed a run; None if the run continued, or was never closed."""
        with self._threads:
            return self._book.closes.get(run)

    def state(self, key: Key) -> ReleaseState | None:
        """Return the state of a release; None if it was never reserved."""
        with self._threads:
            booked = self._book.releases.get(key_text(key))
            if booked is None:
                return None
            return ReleaseState.COMMITTED if key_text(key) in self._pending else booked.state

    def events(self, adversary: Adversary) -> "list[DpEvent]":
        """Return the events charged against an adversary, reserved or committed; equal ones are one event with a count."""
        with self._threads:
            return self._book.events(adversary)

    def cohorts(self, run: str, mechanism: str) -> list[list[int]]:
        """Return the clients of each reserved round, from round 1 on; all of them were reserved with a cohort.

        Args:
          run: name of the run.
          mechanism: mechanism of the releases.
        """
        cohorts: list[list[int]] = []
        with self._threads:
            while booked := self._book.releases.get(key_text((run, len(cohorts) + 1, mechanism))):
                cohorts.append([int(client) for client in json.loads(booked.entry.payload)["cohort"]])
        return cohorts

    @property
    def filter_order(self) -> float | None:
        """Order of the ledger's RDP filter; None before the first adaptive release."""
        with self._threads:
            return self._book.filter_order

    def epsilon(self, delta: float | None = None, interval: float = PUBLISH_INTERVAL) -> float:
        """Return the epsilon spent against the adversary with the largest loss.

        After an adaptive release it is the epsilon that the RDP filter counts, and only the whole budget is guaranteed.

        Args:
          delta: in (0, 1); None uses the budget's.
          interval: grid step of the PLD accountant, in nats.
        """
        delta = self._budget.target_delta if delta is None else delta
        with self._threads:
            past = [self._book.events(adversary) for adversary in self._book.spent]
            order = self._book.filter_order
        adjacency = self._budget.adjacency
        return max((spent_epsilon(events, delta, adjacency, order, interval) for events in past), default=0.0)

    def close(self) -> None:
        """Write pending commits and release the lock. A second call does nothing."""
        with self._threads:
            if not self._lock.is_held:
                return
            with self._resources:
                if self._pending:
                    self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def _require_admissible(self, release: Release) -> None:
        """Refuse a release of another unit, or seeded noise on real data."""
        if release.unit != self._budget.unit:
            raise Refusal("unit", str(release.unit), f"this ledger counts by {self._budget.unit}")
        if release.rng != "system" and not self._book.identity["simulated"]:
            raise Refusal("rng", release.rng, "noise on real data comes from the system; leave out the seed")

    def _budget_for(self, release: Release) -> Budget:
        """Return the budget within the owner's caps; an expired cap raises BudgetExhausted, as a spent budget does."""
        try:
            return self.budget
        except CapEnded as ended:
            adversary = next(iter(release.events))
            raise BudgetExhausted(self._budget, adversary, math.inf, str(ended)) from ended

    def _new_origin(self, run: str) -> Mapping[str, Any] | None:
        """Return the origin for the run's next reservation; None if there is none, or the ledger has it from this run."""
        return self.origin if self.origin and self._book.origins.get(run) != self.origin else None

    def _booked(self, key: Key) -> LedgerRelease:
        """Return a release on the ledger; refuse a key that was never reserved."""
        self._require_open()
        booked = self._book.releases.get(key_text(key))
        if booked is None:
            raise Refusal("key", key, "was never reserved on this ledger; reserve it before anything leaves")
        return booked

    def _require_open(self) -> None:
        if not self._lock.is_held:
            raise Refusal("ledger", str(self.path), "closed, or opened by the parent process; open it here")

    def _flush(self) -> None:
        """Write pending commits."""
        with self._writing():
            pass

    @contextlib.contextmanager
    def _writing(self) -> Generator[list[Draft]]:
        """Yield a list for drafts, and write them with pending commits in one transaction; a failed write closes the ledger."""
        with self._threads:
            self._require_open()
            try:
                with self._chain.transaction():
                    self._book.replay(self._chain)
                    drafts = [
                        Draft(COMMIT, key, canonical({**what, "time": _now()}))
                        for key, what in self._pending.items()
                        if self._book.releases[key].state is ReleaseState.RESERVED
                    ]
                    yield drafts
                    entries = self._chain.append(drafts, self._book.head)
            except LedgerUnavailable:
                self._resources.close()
                raise
            except sqlite3.Error as error:
                self._resources.close()
                mend = disk_remedy(error) or "mend the disk"
                remedy = f"could not be written ({error}); nothing may leave until it can: {mend}; resume"
                raise LedgerUnavailable("ledger", str(self.path), remedy) from error
            for entry in entries:
                self._book.take(entry, str(self.path))
            self._pending.clear()


def _identity(budget: Budget, owner: str, simulated: bool) -> dict[str, Any]:
    """Return what a ledger is kept for, as its first entry has it; arguments as of `Ledger.open`."""
    unit, adjacency = budget.unit.value, budget.adjacency.value
    return {
        "version": VERSION,
        "unit": unit,
        "adjacency": adjacency,
        "owner": owner,
        "simulated": simulated,
    }


def _first(identity: dict[str, Any]) -> Draft:
    """Return the first entry of a new ledger."""
    return Draft(OPEN, "", canonical({**identity, "id": token_hex(16), "time": _now()}))


def _replayed(chain: EntryChain, identity: dict[str, Any]) -> LedgerState:
    """Return the state of a ledger's chain; refuse one that is kept for another identity."""
    book = LedgerState()
    book.replay(chain)
    _require_identity(chain.path, identity, book.identity)
    return book


def _require_identity(path: Path, expected: dict[str, Any], identity: dict[str, Any]) -> None:
    """Refuse a ledger whose first entry, `identity`, differs from what this process expects."""
    require_unit(path, str(identity.get("unit")), expected["unit"])
    for name, value in expected.items():
        if identity.get(name) != value:
            remedy = f"kept for {name} {identity.get(name)!r}, not {value!r}; give the ledger that belongs to this data, or another folder"
            raise Refusal("ledger", str(path), remedy)


def _require_same(release: Release, earlier: LedgerRelease, events: dict[str, Any]) -> None:
    """Refuse to reserve a key again for another release, whose events are `events` as JSON."""
    if earlier.state is ReleaseState.VOID:
        raise Refusal("key", release.key, "was voided; reserve a new key")
    if release.arm != earlier.arm:
        raise Refusal("key", release.key, "was reserved for another arm; reserve a new key")
    if release.cohort is not None and list(release.cohort) != json.loads(earlier.entry.payload).get("cohort"):
        raise Refusal("key", release.key, "was reserved for other clients; reserve a new key")
    if earlier.events != {Adversary(name): canonical(event) for name, event in events.items()}:
        raise Refusal("key", release.key, "was reserved with other events; reserve a new key")


def events_to_json(release: Release) -> dict[str, Any]:
    """Return a release's events as JSON, by adversary; a shared event is one object, which is then checked once."""
    by_id = {id(event): _as_json(event) for event in release.events.values()}
    return {adversary.value: by_id[id(event)] for adversary, event in release.events.items()}


def _as_json(event: Any) -> dict[str, Any]:
    """Return an event as JSON, of the same object as the same object."""
    # The cache goes by identity, as the gate's does; it keeps the event, so that no other one gets its id.
    other, data = _conversions.get(id(event), (None, {}))
    if other is event:
        return data
    data = event_to_json(event)
    with contextlib.suppress(TypeError):  # of an event with a list, which may change
        hash(event)
        if len(_conversions) >= MAX_CONVERSIONS:
            _conversions.clear()
        _conversions[id(event)] = event, data
    return data


_conversions: dict[int, tuple[Any, dict[str, Any]]] = {}


def require_affordable(release: Release, events: dict[str, Any], budget: Budget, book: LedgerState) -> None:
    """Check that a release fits the budget together with those on the ledger.

    Args:
      release: release that is about to be reserved.
      events: `events_to_json` of the release.
      budget: the ledger's budget within the owner's caps.
      book: state of the ledger.

    Raises:
      BudgetExhausted: the release would exceed the budget.
      Refusal: the ledger's filter has another order.
    """
    order = _order_with(release, book)
    checked: list[tuple[Any, Counter[str]]] = []  # equal events after equal pasts are checked once
    for adversary in release.events:
        event, past = events[adversary.value], book.spent.get(adversary, Counter[str]())
        # The same budget has admitted the event for another arm.
        is_free = (
            release.arm is not None
            and book.granted.get(adversary) == budget
            and book.is_paid(release.arm, adversary, canonical(event))
        )
        if not is_free and not any(event is other and past == counts for other, counts in checked):
            checked.append((event, past))
            _require_fit(event, adversary, order, budget, book)


def _require_fit(
    event_json: dict[str, Any], adversary: Adversary, order: float | None, budget: Budget, book: LedgerState
) -> None:
    """Raise BudgetExhausted if one more event exceeds the budget against an adversary.

    `order` is the filter's, None without adaptive releases.
    """
    delta, adjacency = budget.target_delta, budget.adjacency
    counts = book.spent.get(adversary, Counter[str]()) + Counter([text := canonical(event_json)])
    # Plain Gaussian noise has an exact epsilon; within rounding of the target the accountant decides nevertheless.
    exact = exact_epsilon(counts, delta, adjacency)
    if order is None and exact is not None:
        if exact <= budget.target_epsilon:
            return
        if exact > budget.target_epsilon * (1 + ACCOUNTANTS_DIFFER):
            raise BudgetExhausted(budget, adversary, exact)
    past, event = book.events(adversary), event_of(text)  # one object for all rounds: the gate goes by it
    if not (GATE.fits(past, event, budget) if order is None else admits([*past, event], budget, order)):
        would_be = spent_epsilon([*past, event], delta, adjacency, order, GATE_INTERVAL)
        raise BudgetExhausted(budget, adversary, would_be)


def _order_with(release: Release, book: LedgerState) -> float | None:
    """Return the filter's order once `release` is on the ledger: the first adaptive release fixes it."""
    order, fixed = release.filter_order, book.filter_order
    if order is None:
        return fixed
    if fixed is None:
        return filter_order(order)
    if order != fixed:
        remedy = f"this ledger's filter is at order {fixed:g} for good; plan with that one"
        raise Refusal("filter_order", order, remedy)
    return fixed


def _payload(
    release: Release,
    events: dict[str, Any],
    budget: Budget,
    purpose: str | None,
    origin: Mapping[str, Any] | None = None,
) -> str:
    """Return the payload of a reservation.

    Args:
      release: what is reserved.
      events: `events_to_json` of the release.
      budget: that grants it.
      purpose: purpose of its run in words.
      origin: who began its run, on which data and model, where the ledger does not have it yet.
    """
    granted = {"target_epsilon": budget.target_epsilon, "target_delta": budget.target_delta}
    optional = {
        "filter_order": release.filter_order and float(release.filter_order),
        "cohort": release.cohort,
        "purpose": purpose,
        "origin": origin,
        "segments": release.segments,
        "kind": release.kind,
        "arm": release.arm and release.arm.to_json(),
        "source": release.source,
    }
    used = {name: value for name, value in optional.items() if value is not None}
    return canonical({"events": events, "budget": granted, "rng": release.rng, "time": _now(), **used})


def key_text(key: Key) -> str:
    """Return a release's key as entries of the ledger have it."""
    return canonical(list(key))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
