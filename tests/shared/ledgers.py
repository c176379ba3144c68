"""Ledgers of one population for tests: a budget of some rounds, their releases, and a file that somebody tampers with."""

import sqlite3
from contextlib import closing

from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

from fedveil.privacy.accounting.epsilon import within
from fedveil.privacy.budget import Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.hash_chain import GUARDS
from fedveil.privacy.ledger.ledger import Ledger, read_entries

BUDGET = Budget(Unit.CLIENT, target_epsilon=1.0, target_delta=1e-5)
EVENT = GaussianDpEvent(10.0)
SAMPLED = PoissonSampledDpEvent(0.5, GaussianDpEvent(6.0))
AFFORDABLE = next(n for n in range(1, 100) if not within({EVENT: n + 1}, BUDGET))
COLUMNS = "seq, kind, key, payload, prev_hash, hash"


def release(
    round=1, event=EVENT, *, mechanism="update", rng="system", unit=Unit.CLIENT, sees=(Adversary.MODEL,)
):
    return Release(unit, "run", round, mechanism, dict.fromkeys(sees, event), rng)


def opened(path, budget=BUDGET, *, owner="population", simulated=False, durable=False, **more):
    return Ledger.open(path, budget, owner=owner, simulated=simulated, durable=durable, **more)


def filled(path, rounds=3):
    """Close a ledger of `rounds` committed rounds; return its last head."""
    with opened(path) as ledger:
        for number in range(rounds):
            ledger.commit(reserved(ledger, release(number)))
        return ledger.head


def reserved(ledger, release):
    ledger.reserve(release)
    return release.key


def kinds(path):
    return [entry.kind for entry in read_entries(path)]


def tamper(path, *statements):
    """Rewrite the file as an attacker would, and restore its guards."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for event in ("UPDATE", "DELETE"):
            database.execute(f"DROP TRIGGER no_{event}")
        for statement in statements:
            database.execute(statement)
        for guard in GUARDS:
            database.execute(guard)
