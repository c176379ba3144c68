"""Ledger on the device of its releases as a client; a cost is reserved there before its vector is sent.

The server keeps the population's ledger; this one trusts no other party. Each sum is charged as one Gaussian, without
amplification, because the device knows that it took part. The device has one ledger for all runs, servers and data: it
is named by the device's identity, because a client's data may change without resetting its budget.
"""

import logging
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...privacy.accounting.gaussian import exact_epsilon
from ...privacy.accounting.renyi_filter import counted
from ...privacy.budget import Adjacency, Adversary, Budget, Release, Unit
from ...privacy.ledger.acts import CAP, ROSTER, ROSTERS, acting_user
from ...privacy.ledger.book import Book, read_book
from ...privacy.ledger.caps import CLIENT, NAMED, Cap, CapEnded, cap_acts, lowered
from ...privacy.ledger.ledger import BudgetExhausted, Key, Ledger
from ...privacy.ledger.question_caps import QUESTION, AskedQuestion, asked_questions
from ...privacy.refusal import Refusal
from ...strategies.wire import BUDGET_SPENT, NOT_READY
from ..private_update import NotTrained
from .order_policy import Charged

logger = logging.getLogger("fedveil.client")

WAIT_SECONDS = 10.0
MECHANISM = "private_sum"


@dataclass(frozen=True)
class OwnLedger:
    """Location of the ledger, and its owner's cap.

    Attributes:
      folder: of the device's ledgers; it must exist.
      device: name of the device, 64 hexadecimal digits.
      cap: the owner's; `caps.json` in the folder may lower it.
    """

    folder: Path
    device: str
    cap: Cap

    @property
    def path(self) -> Path:
        """File of the ledger of the device's releases as a client."""
        return self.folder / f"{CLIENT}{self.device[:NAMED]}.ledger"

    @property
    def records(self) -> Path:
        """File of the ledger of its records, shared by all record-level modes."""
        return self.folder / f"{self.device[:NAMED]}.ledger"

    @contextmanager
    def charged(self, run: str, number: int, attempt: int, cost: Charged) -> Generator[None]:
        """Reserve one vector's cost, and commit it once the vector is computed; void it if there is none.

        After a kill inside the context, or a failure at the record level, the reservation stays spent, and the same
        attempt is refused.

        Raises:
          NotTrained: BUDGET_SPENT, or NOT_READY if the ledger cannot be written or read.
          Refusal: the attempt was answered before.
        """
        key = (run, number, f"{MECHANISM} {attempt}")
        unit = Unit.CLIENT if cost.budget is None else cost.budget.unit
        events, asked = dict.fromkeys(cost.adversaries, cost.event), cost.inquiry
        told = None if asked is None else asked.asked
        kind = None if asked is None else QUESTION
        release = Release(unit, *key, events, "system", segments=told, kind=kind)
        why = None if asked is None else asked.why or None
        with closing(self._reserved(release, cost.budget, why)) as ledger:
            try:
                yield
            except Exception as error:
                # At the record level a failure on records may reveal one: only a failure before any record is read is
                # free.
                if cost.budget is None or isinstance(error, NotTrained | Refusal):
                    ledger.void(key, "no vector was made")
                raise
            _commit(ledger, key)

    def approved(self, version: int, digest: str, reason: str | None) -> None:
        """Record the owner's approval of a roster: user, time and reason.

        Raises:
          Refusal: the ledger cannot be written.
        """
        budget = Budget(Unit.CLIENT, self.cap.target_epsilon, self.cap.target_delta)
        said = {"version": version, "hash": digest, "who": acting_user(), "reason": reason}
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with Ledger.open(self.path, budget, owner=self.device, simulated=False, wait=WAIT_SECONDS) as ledger:
            ledger.act(ROSTER, (ROSTERS, version, digest), said)

    def _reserved(self, release: Release, of_records: Budget | None, why: str | None) -> Ledger:
        path = self.path if of_records is None else self.records
        try:
            # Counted as zero-out: an event is noise over the clipping norm, for any adjacency of a server.
            asked = of_records or Budget(Unit.CLIENT, self.cap.target_epsilon, self.cap.target_delta)
            budget = lowered(asked, [self.cap])
            ledger = Ledger.open(path, budget, owner=self.device, simulated=False, wait=WAIT_SECONDS)
        except CapEnded as ended:
            logger.warning("%s", ended)
            raise NotTrained(BUDGET_SPENT) from ended
        except Refusal as refusal:  # a full disk, a damaged file
            logger.error("%s", refusal)
            raise NotTrained(NOT_READY) from refusal
        ledger.purpose, ledger.caps = why, (self.cap,)
        try:
            for key, said in cap_acts(path):
                ledger.act(CAP, key, said)
            ledger.reserve_new(release)
        except BaseException as error:
            ledger.close()
            raise _named(error) from error
        return ledger


def _named(error: BaseException) -> BaseException:
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


def questions_of(path: Path) -> list[AskedQuestion]:
    """Return the questions on a ledger, in order, read without its lock.

    Raises:
      Refusal: the ledger is damaged.
    """
    return asked_questions(read_book(path))


def epsilon_of(path: Path) -> tuple[float, float] | None:
    """Return epsilon and delta spent on a ledger, read without its lock; None if nothing was spent.

    Raises:
      Refusal: the ledger is damaged.
    """
    if not path.exists():
        return None
    book = read_book(path)
    if not book.granted:
        return None
    delta = next(iter(book.granted.values())).target_delta
    return max(_epsilon(book, who, delta) for who in book.spent), delta


def _epsilon(book: Book, who: Adversary, delta: float) -> float:
    adjacency = Adjacency(book.identity["adjacency"])
    exact = exact_epsilon(book.spent[who], delta, adjacency) if book.filter_order is None else None
    return counted(book.events(who), delta, adjacency, book.filter_order) if exact is None else exact
