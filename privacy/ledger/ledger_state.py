"""State of a ledger, replayed from its entries: the state of each release, each adversary's events, and their verification.

Reading needs no lock, so an auditor can do it on a copy. A ledger that cannot be read, or has a broken chain, is refused.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...base.refusal import Refusal
from ..accounting.epsilon import (
    GATE_INTERVAL,
    MIN_PLD_DELTA,
    PUBLISH_INTERVAL,
    coarsened,
    grouped,
    in_order,
    rounded,
    with_one_gaussian,
)
from ..accounting.events import event_from_json, is_mixture
from ..accounting.gaussian import exact_epsilon
from ..accounting.renyi import quiet_orders, relation_of
from ..accounting.renyi_filter import admits, filter_order, spent_epsilon
from ..arms import Arm, charged
from ..budget import Adjacency, Adversary, Budget, Unit
from .acts import ACTS
from .hash_chain import START, Entry, EntryChain, Head, canonical
from .store import chains_of, ledger_exists, reading

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent
    from dp_accounting.privacy_accountant import PrivacyAccountant

VERSION = 1
# Kinds of entries.
OPEN, RESERVE, COMMIT, VOID, NOTE, CLOSE = "open", "reserve", "commit", "void", "note", "close"
SETTINGS_OF_UNIT = {  # by which a run goes on with a ledger of this unit
    Unit.RECORD.value: "leave out privacy.per_person",
    Unit.PERSON.value: "set privacy.per_person, without clients_per_person,",
    Unit.PERSON_EVERYWHERE.value: "set privacy.clients_per_person",
}
BUDGET_TEXT = re.compile(r'"budget":{[^}]*}')  # finds the budget of a reservation without parsing it
WITH_TIME = re.compile(r'(.*),"time":"[0-9T:+-]*"}')  # the time is the last key of a canonical payload

MAX_CHARGES = 256  # whose payloads a ledger keeps read
# Larger differences between accountants do not come from their grids (PLD's shows most at small epsilon).
DISPUTE_RATIO, DISPUTE_SIZE = 0.05, 0.01
COARSEST = 1e-6  # PLD's grid step per epsilon when verifying: a vacuous epsilon must not take all memory


class Epsilons(NamedTuple):
    """Epsilon of a ledger as reported, by PLD alone, and by RDP alone; None if an accountant does not cover the events."""

    reported: float
    by_pld: float | None
    by_rdp: float | None


class ReleaseState(StrEnum):
    """State of a release. All but `VOID` are spent."""

    RESERVED = "reserved"
    COMMITTED = "committed"
    VOID = "void"


@dataclass(slots=True)
class LedgerRelease:
    """Release as recorded by its entries: the reservation, its events as canonical JSON, its state, arm and source.

    A long run has many, so they share texts, and the entry is put together when read.
    """

    events: dict[Adversary, str]
    _seq: int
    _key: str
    _payload: tuple[str, str]  # what releases of a run have in common, and the rest
    _hashes: bytes  # of the entry before, and its own
    state: ReleaseState = ReleaseState.RESERVED
    arm: Arm | None = None
    source: str | None = None

    @property
    def entry(self) -> Entry:
        """Entry that reserved the release."""
        text = self._hashes.hex()
        before, own = text[: len(text) // 2], text[len(text) // 2 :]
        return Entry(self._seq, RESERVE, self._key, "".join(self._payload), before, own)


@dataclass(frozen=True)
class _Charge:
    """Content of a reservation that determines what it charges; `payload` is the text without its time."""

    payload: str
    events: dict[Adversary, str]
    budget: Budget
    filter_order: float | None
    arm: Arm | None
    source: str | None
    origin: dict[str, Any] | None


def _charge_of(text: str, payload: dict[str, Any], identity: dict[str, Any]) -> _Charge:
    """Return the charge of a reservation.

    Args:
      text: its payload without the time.
      payload: its payload, which is untrusted.
      identity: first entry of its ledger, which is untrusted.
    """
    order = filter_order(payload["filter_order"]) if "filter_order" in payload else None
    events = {Adversary(name): canonical(event) for name, event in payload["events"].items()}
    arm = Arm.from_json(payload["arm"]) if "arm" in payload else None
    budget = Budget(identity["unit"], adjacency=identity["adjacency"], **payload["budget"])
    origin = _checked_origin(payload.get("origin"))
    return _Charge(text, events, budget, order, arm, payload.get("source"), origin)


def _checked_origin(origin: Any) -> dict[str, Any] | None:
    """Return the origin of a run as a reservation has it, None without one; it is untrusted, and costs nothing.

    Raises:
      ValueError: it names nobody, or a part of it has another type than in `export.schema.json`.
    """
    if origin is None:
        return None
    roster = origin.get("roster", {"version": 1, "hash": ""})
    texts = [
        origin["who"],
        roster["hash"],
        *(origin.get(name, "") for name in ("task", "data", "schema", "model")),
    ]
    if not all(type(each) is str for each in texts):
        raise ValueError("an origin of its run with a name that is no text")
    if type(roster["version"]) is not int or type(origin.get("clients", 0)) not in (int, float):
        raise ValueError("an origin of its run with a number that is none")
    return origin


@dataclass
class LedgerState:
    """Ledger's content, replayed from its entries in their order.

    Attributes:
      identity: the payload of the first entry.
      releases: by key, as the ledger writes keys.
      spent: count of each event, as canonical JSON, charged against each adversary: events that were seen and not
        voided; for the arms of a deal, the maximum over the arms.
      granted: the budget of the latest reservation against each adversary.
      filter_order: order of the RDP filter; None before the first adaptive release.
      notes: by key, as JSON.
      acts: decisions of people or of the budget, by kind and key, as JSON.
      origins: by the run's name, who began or resumed it last, and on what; of the runs that say so.
      closes: by the run's name, the entry that closed it, unless the run reserved something after it.
      head: the last entry that was replayed.
      _charges: charge of each payload without its time: the releases of a run differ in nothing else.
      _events: events of releases, each once.
      _deals: number of arms by the deal's key.
      _in_arms: count of each event by arm, by the deal's key, adversary and canonical JSON.
    """

    identity: dict[str, Any] = field(default_factory=dict[str, Any])
    releases: dict[str, LedgerRelease] = field(default_factory=dict[str, LedgerRelease])
    spent: dict[Adversary, Counter[str]] = field(default_factory=dict[Adversary, Counter[str]])
    granted: dict[Adversary, Budget] = field(default_factory=dict[Adversary, Budget])
    filter_order: float | None = None
    notes: dict[str, str] = field(default_factory=dict[str, str])
    acts: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    origins: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    closes: dict[str, Entry] = field(default_factory=dict[str, Entry])
    head: Head = START
    _charges: dict[str, _Charge] = field(default_factory=dict[str, _Charge])
    _events: dict[tuple[tuple[Adversary, str], ...], dict[Adversary, str]] = field(
        default_factory=dict[tuple[tuple[Adversary, str], ...], dict[Adversary, str]]
    )
    _deals: dict[str, int] = field(default_factory=dict[str, int])
    _in_arms: dict[tuple[str, Adversary, str], Counter[int]] = field(
        default_factory=dict[tuple[str, Adversary, str], Counter[int]]
    )

    def replay(self, chain: EntryChain) -> None:
        """Apply the chain's entries after `head`."""
        for entry in chain.after(self.head):
            self.take(entry, str(chain.path))

    def take(self, entry: Entry, source: str) -> None:
        """Apply the next entry, which is untrusted.

        Raises:
          Refusal: it is invalid; the sentence names it.
        """
        try:
            self.apply(entry)
        except (ValueError, LookupError, TypeError, AttributeError, Refusal) as error:
            remedy = f"entry {entry.seq} makes no sense ({error}); restore a true copy"
            raise Refusal("ledger", source, remedy) from error

    def apply(self, entry: Entry) -> None:
        """Apply the next entry.

        Raises:
          ValueError: it cannot follow the entries before it.
        """
        if (entry.kind == OPEN) != (entry.seq == 1):
            raise ValueError(f"a {entry.kind} in this place")
        if entry.kind == OPEN:
            self.identity = json.loads(entry.payload)
        elif entry.kind == RESERVE:
            self._reserve(entry)
        elif entry.kind in (COMMIT, VOID):
            self._settle(self.releases[entry.key], entry.kind)
        elif entry.kind == NOTE:
            self.notes[entry.key] = entry.payload
        elif entry.kind == CLOSE:
            self.closes[run_of(entry)] = entry
        elif entry.kind in ACTS:
            self.acts[entry.kind, entry.key] = entry.payload
        else:
            raise ValueError(f"unknown kind {entry.kind}")
        self.head = entry.head

    def _reserve(self, entry: Entry) -> None:
        """Apply a reservation: check it, count its events, and add its release."""
        if entry.key in self.releases:
            raise ValueError("its key was reserved before")
        if self.closes:
            self.closes.pop(run_of(entry), None)  # a closed run that reserves again goes on
        match = WITH_TIME.fullmatch(entry.payload)
        without_time = match[1] if match else entry.payload
        if without_time not in self._charges:
            if len(self._charges) >= MAX_CHARGES:  # each release may have a cohort of its own
                self._charges.clear()
            self._charges[without_time] = _charge_of(without_time, json.loads(entry.payload), self.identity)
        charge = self._charges[without_time]
        if charge.origin is not None:
            self.origins[run_of(entry)] = charge.origin
        if charge.filter_order is not None:
            if self.filter_order not in (None, charge.filter_order):
                raise ValueError(
                    f"a filter at order {charge.filter_order:g} on a ledger whose filter is at {self.filter_order:g}"
                )
            self.filter_order = charge.filter_order
        if charge.arm is not None:
            deal = charge.arm.deal
            if self._deals.setdefault(deal.key, deal.arms) != deal.arms:
                raise ValueError(f"a deal of {deal.arms} arms that has {self._deals[deal.key]}")
        for adversary, text in charge.events.items():
            self._charge(charge.arm, adversary, text, 1)
            self.granted[adversary] = charge.budget
        events = self._events.setdefault(tuple(charge.events.items()), charge.events)
        payload = charge.payload, entry.payload[len(charge.payload) :]
        hashes = bytes.fromhex(entry.prev_hash + entry.hash)
        self.releases[entry.key] = LedgerRelease(
            events, entry.seq, entry.key, payload, hashes, arm=charge.arm, source=charge.source
        )

    def _charge(self, arm: Arm | None, adversary: Adversary, text: str, times: int) -> None:
        """Change the count of an event by `times`, 1 or -1; an arm with fewer of it than another arm changes nothing."""
        spent = self.spent.setdefault(adversary, Counter())
        if arm is not None:
            counts = self._in_arms.setdefault((arm.deal.key, adversary, text), Counter())
            previous_max = max(counts.values(), default=0)
            counts[arm.number] += times
            times = max(counts.values()) - previous_max
        spent[text] += times
        if not spent[text]:
            del spent[text]

    def is_paid(self, arm: Arm, adversary: Adversary, text: str) -> bool:
        """Return whether one more such event of an arm costs nothing, since another arm has released more of it."""
        counts = self._in_arms.get((arm.deal.key, adversary, text), Counter[int]())
        return counts[arm.number] < max(counts.values(), default=0)

    def _settle(self, booked: LedgerRelease, kind: str) -> None:
        """Apply a commit or a void."""
        if booked.state is not ReleaseState.RESERVED:
            raise ValueError(f"a {kind} of a {booked.state} release")
        booked.state = ReleaseState.COMMITTED if kind == COMMIT else ReleaseState.VOID
        if booked.state is ReleaseState.VOID:
            for adversary, text in booked.events.items():
                self._charge(booked.arm, adversary, text, -1)

    def events(
        self, adversary: Adversary, selects: Callable[[LedgerRelease], bool] | None = None
    ) -> "list[DpEvent]":
        """Return the events that an adversary saw, equal ones as one composed event; voided releases have none.

        Args:
          adversary: adversary that saw the events.
          selects: returns whether to include a release; None includes all.
        """
        event_counts = self.spent.get(adversary, Counter[str]())
        if selects is not None:
            spent = (each for each in self.releases.values() if each.state is not ReleaseState.VOID)
            selected = [each for each in spent if selects(each) and adversary in each.events]
            event_counts = charged((each.events[adversary], each.arm) for each in selected)
        return [repeated(event_of(text), count) for text, count in event_counts.items()]


def run_of(entry: Entry) -> str:
    """Return the name of the run of an entry; empty if it belongs to none."""
    return str(json.loads(entry.key)[0]) if entry.key else ""


@lru_cache(maxsize=1 << 14)
def event_of(text: str) -> "DpEvent":
    """Return the event of its canonical JSON."""
    return event_from_json(json.loads(text))


def repeated(event: "DpEvent", count: int) -> "DpEvent":
    """Return `count` equal events as one."""
    from dp_accounting.dp_event import SelfComposedDpEvent

    return event if count == 1 else SelfComposedDpEvent(event, count)


@dataclass(frozen=True)
class Verification:
    """Result of recomputing a ledger from its entries alone.

    Attributes:
      ok: whether the ledger is valid.
      entries: number of entries of the intact part of the chain.
      head: the last entry of the intact part.
      problem: one sentence; None if the ledger is valid.
      delta: delta at which every epsilon is computed.
      epsilon: as reported everywhere, against the adversary with the largest loss; with a filter, the amount that it has
        counted.
      epsilon_pld: by dp_accounting's PLD accountant alone; None if it does not cover the events.
      epsilon_rdp: by its RDP accountant alone, at the filter's order if there is one; None if it does not cover the
        events.
      filter_order: order of the RDP filter, if a release was chosen adaptively.
      by_adversary: the three epsilons for each adversary.
    """

    ok: bool
    entries: int
    head: Head
    problem: str | None = None
    delta: float | None = None
    epsilon: float | None = None
    epsilon_pld: float | None = None
    epsilon_rdp: float | None = None
    filter_order: float | None = None
    by_adversary: Mapping[Adversary, Epsilons] = field(default_factory=dict[Adversary, Epsilons])


def read_ledger(path: Path) -> LedgerState:
    """Return the state of a ledger, read without its lock."""
    book = LedgerState()
    with reading(path) as chain:
        book.replay(chain)
    return book


def state_at(path: Path) -> LedgerState:
    """Return the state of a ledger as `read_ledger` does, and an empty one where there is no ledger."""
    if not ledger_exists(path):
        return LedgerState()
    return read_ledger(path)


def read_events(path: Path, adversary: Adversary) -> "list[DpEvent]":
    """Return an adversary's events, from a ledger that need not be open; none if there is no ledger."""
    return state_at(path).events(adversary)


def read_events_of(paths: Iterable[Path], adversary: Adversary) -> "Iterator[tuple[Path, list[DpEvent]]]":
    """Yield the path of each of many ledgers that exists, and an adversary's events from it, as `read_events` does."""
    for chain in chains_of(paths):
        book = LedgerState()
        book.replay(chain)
        yield chain.path, book.events(adversary)


def identity_of(path: Path) -> dict[str, Any]:
    """Return the payload of a ledger's first entry, such as its unit and owner; empty if there is no ledger."""
    if not ledger_exists(path):
        return {}
    with reading(path) as chain:
        return next((json.loads(entry.payload) for entry in chain.after(START)), {})


def require_unit(path: Path, ledger_unit: str | None, run_unit: str) -> None:
    """Refuse a change of a ledger's unit between record, person at one client and person at all clients.

    The loss of a record does not bound the loss of a person with several, and a further record would break the promise
    to a person.

    Args:
      path: path of the ledger.
      ledger_unit: the ledger's unit; None if there is no ledger.
      run_unit: the unit of the run.
    """
    if ledger_unit in SETTINGS_OF_UNIT and run_unit in SETTINGS_OF_UNIT and ledger_unit != run_unit:
        fault = f"counts what one {ledger_unit} has lost, from which nobody knows what one {run_unit} has"
        remedy = f"{fault}; {SETTINGS_OF_UNIT[ledger_unit]} as before"
        raise Refusal("ledger", str(path), remedy)


def read_entries(path: Path | str) -> list[Entry]:
    """Return the entries of a ledger, which may be in use."""
    with reading(Path(path)) as chain:
        return list(chain.after(START))


def verify(path: Path | str, delta: float | None = None) -> Verification:
    """Check a ledger's chain and recompute its epsilon.

    Args:
      path: path of the ledger; it may be in use.
      delta: in (0, 1); by default that of the latest reservation.

    Returns:
      The result; a broken chain is a `problem` and raises nothing.
    """
    try:
        with reading(Path(path)) as chain:
            return verify_entries(chain.after(START), str(path), delta)
    except Refusal as refusal:
        return Verification(False, 0, START, str(refusal))


def verify_entries(entries: Iterable[Entry], source: str, delta: float | None = None) -> Verification:
    """Recompute the epsilon of a ledger from its entries, and check each entry.

    The spent epsilon must be within the budget of each reservation. Unless a release is voided, it only grows, so it is
    compared before each change of the budget, and at the end.

    Args:
      entries: all entries of a ledger; a Refusal that they raise is a problem of the ledger.
      source: file or name of the entries, for a problem's sentence.
      delta: in (0, 1); by default that of the latest reservation.
    """
    book, granted = LedgerState(), ""
    try:
        for entry in entries:
            budget = _budget_text(entry)
            is_changed = granted and budget not in ("", granted)
            if is_changed and (problem := _overspent(book)):
                raise Refusal("ledger", source, f"before entry {entry.seq} {problem}")
            granted = budget or granted
            book.take(entry, source)
        if book.head == START:
            raise Refusal("ledger", source, "holds no entry, not even its first; restore a true copy")
        return _verified(book, delta)
    except Refusal as refusal:
        return Verification(False, book.head.seq, book.head, str(refusal))


def _budget_text(entry: Entry) -> str:
    """Return the budget in a reservation's text; empty for any other entry."""
    match = BUDGET_TEXT.search(entry.payload) if entry.kind == RESERVE else None
    return match[0] if match else ""


def _verified(book: LedgerState, delta: float | None) -> Verification:
    """Return the verification of a ledger whose chain is intact."""
    if delta is None:
        delta = next((budget.target_delta for budget in reversed(book.granted.values())), None)
    if delta is None:
        return Verification(True, book.head.seq, book.head, epsilon=0.0)
    adjacency, order = Adjacency(book.identity["adjacency"]), book.filter_order
    epsilons = {each: _epsilons(tuple(book.events(each)), delta, adjacency, order) for each in book.spent}
    largest = max(epsilons.values(), key=lambda each: each.reported)
    problem = _overspent(book) or next(filter(None, map(_dispute, epsilons.values())), "")
    return Verification(
        not problem, book.head.seq, book.head, problem or None, delta, *largest, order, epsilons
    )


@lru_cache(maxsize=16)  # it takes most of the time, and adversaries have often seen the same events
def _epsilons(
    events: "tuple[DpEvent, ...]", delta: float, adjacency: Adjacency, order: float | None
) -> Epsilons:
    """Return the epsilon of events by the package, and by each of dp_accounting's accountants."""
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    relation = relation_of(adjacency)
    reported = spent_epsilon(events, delta, adjacency, order)
    by_pld = by_rdp = None
    if order is None and delta >= MIN_PLD_DELTA:
        grid = GATE_INTERVAL if any(is_mixture(leaf) for leaf, _ in grouped(events)) else PUBLISH_INTERVAL
        by_pld = _composed(PLDAccountant(relation, max(grid, reported * COARSEST)), events, delta)
    # dp_accounting's RDP reads a noise multiplier under replace-one as half of what PLD reads.
    if adjacency is not Adjacency.REPLACE_ONE:
        by_rdp = _composed(RdpAccountant(None if order is None else [order], relation), events, delta)
    return Epsilons(reported, by_pld, by_rdp)


def _composed(accountant: "PrivacyAccountant", events: "tuple[DpEvent, ...]", delta: float) -> float | None:
    """Return the epsilon of events by one accountant; None if it does not cover one of them."""
    # Events are merged into as few kinds as `epsilon` uses: each kind takes a distribution of its own.
    parts = in_order(coarsened(with_one_gaussian(dict(grouped(events))), rounded))
    if not all(accountant.supports(leaf) for leaf, _ in parts):
        return None
    with quiet_orders():
        for leaf, count in parts:
            accountant.compose(leaf, count)
    return float(accountant.get_epsilon(delta))


def _overspent(book: LedgerState) -> str:
    """Return a clause if more is spent against an adversary than its last reservation allowed; empty if not."""
    for adversary, budget in book.granted.items():
        exact = exact_epsilon(book.spent[adversary], budget.target_delta, budget.adjacency)
        if book.filter_order is None and exact is not None and exact <= budget.target_epsilon:
            continue
        if not admits(book.events(adversary), budget, book.filter_order):
            size = f"epsilon {budget.target_epsilon:.4g} at delta {budget.target_delta:.3g}"
            return f"more is spent against the {adversary} than was granted, {size}"
    return ""


def _dispute(epsilons: Epsilons) -> str:
    """Return a clause if the reported epsilon is not close to the smaller of the accountants'; empty if it is."""
    reported, *others = epsilons
    best = min((each for each in others if each is not None), default=reported)
    if math.isclose(reported, best, rel_tol=DISPUTE_RATIO, abs_tol=DISPUTE_SIZE):
        return ""
    return f"the accountants disagree: epsilon {reported:.6g} against {best:.6g} recomputed"
