"""Checks of a run's ledgers: their chains, the entry that closes the run, and every epsilon that the run states."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...privacy.accounting.epsilon import GATE_INTERVAL, PUBLISH_INTERVAL, grouped
from ...privacy.accounting.events import Counts
from ...privacy.accounting.renyi_filter import spent_epsilon
from ...privacy.budget import Adjacency, Adversary, Budget, Unit
from ...privacy.ledger.caps import ledger_folder
from ...privacy.ledger.client_sums import lost_by_records
from ...privacy.ledger.hash_chain import Entry
from ...privacy.ledger.ledger_state import (
    CLOSE,
    COMMIT,
    RESERVE,
    VOID,
    LedgerState,
    event_of,
    repeated,
    run_of,
    verify_entries,
)
from ...run.files import CONFIG, MANIFEST, RECEIPTS
from ...run.run_files import read_config
from ...server.query_rows import round_of
from .bound_folder import SAME, BoundFolder, NotShown, Wrong, entries_in, is_close, state_of
from .signatures import SHORT

BATCHES = "poisson batches"  # begin of `sampling` in rows that the clients' ledgers account for
PARTICIPATION = f"{BATCHES}, in the rounds taken part in"
MIN_TOGETHER = 32  # rounds whose epsilons are computed together
UNLIMITED = 1e6  # a target epsilon from here on is no limit


def check_ledger(folder: BoundFolder) -> str:
    """Check that every entry chains to the one before, and that the spent epsilon stayed within the budget."""
    verification = verify_entries(folder.entries, folder.ledger.name)
    if not verification.ok:
        raise Wrong(str(verification.problem))
    finding = f"{verification.entries} entries, every hash is correct, all spending was granted"
    epsilon, delta = verification.epsilon, verification.delta
    if epsilon is None or delta is None:
        return finding
    return f"{finding}: epsilon {epsilon:.4g} at delta {delta:.3g}"


def check_close(folder: BoundFolder) -> str:
    """Check that the run's last entry binds this manifest and its status, and that a bundle ends at this entry."""
    folder.require_final()
    try:
        entries = folder.entries
    except NotShown as reason:
        if folder.bundled and folder.listing.close is not None:
            raise Wrong("the bundle names the closing entry, but holds no ledger") from None
        also = ", and by the receipts of devices" if (folder.path / RECEIPTS).exists() else " alone"
        raise NotShown(f"{reason}: its files are bound by a signature{also}") from None
    manifest = folder.manifest
    entry = folder.ledger_state.closes.get(manifest.run)
    if entry is None:
        if any(each.kind == CLOSE and run_of(each) == manifest.run for each in entries):
            raise Wrong("the run continued after it was closed; resume it")
        raise Wrong("the run was never closed: nothing binds its files; resume it")
    payload = json.loads(entry.payload)
    if payload["manifest"] != manifest.hash:
        raise Wrong(f"entry {entry.seq} closed the run with files other than those of {MANIFEST}")
    if payload["status"] != manifest.status:
        fault = f"the status is {payload['status']} in entry {entry.seq} and {manifest.status} in {MANIFEST}"
        raise Wrong(fault)
    if folder.bundled:
        listing = folder.listing
        if listing.close != entry.head or entries[-1] != entry or listing.run != manifest.run:
            raise Wrong(f"the bundle was made from a closing entry other than {entry.seq}")
    return f"entry {entry.seq} binds the run's files, {entry.hash[:SHORT]}"


def check_known_heads(folder: BoundFolder) -> str:
    """Check that the ledger contains the entries that the result and the verifier name."""
    entries = folder.entries
    heads = {"the result": folder.last_head}
    if folder.knowledge.head:
        heads["--head"] = folder.knowledge.head
    for source, head in heads.items():
        if head.seq > len(entries) or head.seq < 1 or entries[head.seq - 1].hash != head.hash:
            raise Wrong(f"the ledger lacks entry {head.seq} of {source}")
    return "the ledger holds " + " and ".join(
        f"entry {head.seq} of {source}" for source, head in heads.items()
    )


def check_epsilon(folder: BoundFolder) -> str:
    """Recompute the result's epsilon against each adversary by the entries up to its head, and compare it with the budget."""
    entries = folder.entries
    last = folder.last_head.seq
    state = state_of([entry for entry in entries if entry.seq <= last], folder.ledger.name)
    rows = {
        row["adversary"]: row
        for row in folder.result["privacy"]
        if row["unit"] == state.identity["unit"] and row["sampling"] != "none"
    }
    # Runs on one ledger may have other adversaries; a run that released nothing states what earlier runs spent.
    adversaries = _adversaries_of(folder) or set(rows) & set(map(str, state.spent))
    if set(rows) != adversaries:
        fault = f"the adversaries are {', '.join(sorted(rows))} in the result and {', '.join(sorted(adversaries))} on the ledger"
        raise Wrong(fault)
    findings = [_check_row(row, state) for _, row in sorted(rows.items())]
    if (stated := folder.result.get("record_by_sums")) is not None:
        lost = lost_by_records(state, stated["delta"])
        if lost is None or not is_close(lost, float(stated["epsilon"])):
            raise Wrong(f"a record has lost {stated['epsilon']} in the result and {lost} by the ledger")
    return f"recomputed and within the budget: {'; '.join(findings)}" if findings else "nothing was released"


def _adversaries_of(folder: BoundFolder) -> set[str]:
    """Return the adversaries of a run's releases; empty for a run that released nothing."""
    releases = (each for each in folder.entries if each.kind == RESERVE and run_of(each) == folder.run)
    return {adversary for each in releases for adversary in json.loads(each.payload)["events"]}


def _check_row(row: Mapping[str, Any], state: LedgerState) -> str:
    """Compare the epsilon in a row of the result with the ledger and its budget; return both as a clause."""
    name, claimed = row["adversary"], float(row["epsilon"])
    budget, events = state.granted[Adversary(name)], state.events(Adversary(name))
    adjacency = Adjacency(row["adjacency"])
    spent = spent_epsilon(events, row["delta"], adjacency, state.filter_order, PUBLISH_INTERVAL)
    # Under a filter a result claims the whole budget, whatever was spent of it.
    if state.filter_order is None and not is_close(spent, claimed):
        raise Wrong(
            f"epsilon against the {name} is {claimed:.6g} in the result and {spent:.6g} by the ledger"
        )
    if spent > claimed * (1 + SAME):
        raise Wrong(f"epsilon {spent:.6g} is spent against the {name}, and {claimed:.6g} is claimed")
    if adjacency != budget.adjacency or row["delta"] < budget.target_delta:
        raise Wrong(f"adjacency or delta against the {name} differs between the result and the budget")
    target = budget.target_epsilon
    if claimed > target * (1 + SAME):
        raise Wrong(f"epsilon {claimed:.6g} against the {name} exceeds the budget {target:.6g}")
    limit = f"{target:.4g}" if target < UNLIMITED else "an unlimited budget"
    return f"{claimed:.4g} of {limit} against the {name}"


@dataclass(frozen=True)
class _Spending:
    """Spending on a ledger against whoever gets the model."""

    events: tuple[tuple[str, int], ...]  # each event as JSON text, and how often it is charged
    filter_order: float | None  # of the ledger's RDP filter; None without one

    def epsilon(self, budget: Budget) -> float:
        events = [repeated(event_of(text), count) for text, count in self.events]
        return spent_epsilon(events, budget.target_delta, budget.adjacency, self.filter_order, GATE_INTERVAL)

    def leaf_counts(self) -> Counts:
        counts: Counter[Any] = Counter()
        for text, count in self.events:
            for leaf, times in _leaves_of(text):
                counts[leaf] += times * count
        return tuple(counts.items())


@cache
def _leaves_of(text: str) -> Counts:
    """Return the leaves of an event, a JSON text."""
    return grouped([event_of(text)])


def check_epsilon_of_rounds(folder: BoundFolder) -> str:
    """Recompute the epsilon in each round's line from the entries up to that round."""
    folder.require_final()
    of_clients = folder.entries and folder.ledger_state.identity["unit"] == Unit.CLIENT
    column = "epsilon_client" if of_clients else "epsilon_record"
    by_round = dict(_spending_by_round(folder.entries, folder.manifest.run))
    rows = [row for row in folder.rounds if row["round"] in by_round and row[column] is not None]
    budgets = list(folder.ledger_state.granted.values())
    if not rows or not budgets:
        raise NotShown("no round has entries under the last name of the run")
    spendings = [by_round[row["round"]] for row in rows]
    claims = [float(row[column]) for row in rows]
    epsilons = _epsilons_together(dict(zip(spendings, claims, strict=True)), budgets[0])
    for row, spending, stated in zip(rows, spendings, claims, strict=True):
        if not is_close(epsilons.get(spending, math.nan), stated):
            epsilons[spending] = spending.epsilon(budgets[0])
        if not is_close(epsilons[spending], stated):
            fault = f"round {row['round']} has epsilon {stated:.6g}, and the ledger {epsilons[spending]:.6g}"
            raise Wrong(fault)
    return f"{len(rows)} of {len(folder.rounds)} rounds recomputed"


def _epsilons_together(claims: Mapping[_Spending, float], budget: Budget) -> dict[_Spending, float]:
    """Return the epsilon of each spending without a filter, those of all rounds at once; NaN for the ones that need their own.

    Args:
      claims: stated epsilon of each spending, from which its epsilon is searched.
      budget: its delta and adjacency are used.
    """
    spendings = [each for each in claims if not each.filter_order]
    if len(spendings) < MIN_TOGETHER:
        return {}
    from ...privacy.accounting.many_epsilons import epsilons as many_epsilons  # needs parts of SciPy

    guesses = np.array([claims[each] for each in spendings])
    compositions = [each.leaf_counts() for each in spendings]
    sizes = many_epsilons(compositions, budget.target_delta, budget.adjacency, guesses)
    return dict(zip(spendings, sizes.tolist(), strict=True))


def _spending_by_round(entries: Sequence[Entry], run: str) -> Iterator[tuple[int, _Spending]]:
    """Yield (round, spending) after each charge of a run's rounds and evaluations; the last one of a round counts."""
    state = LedgerState()
    for entry in entries:
        state.apply(entry)
        if entry.kind not in (RESERVE, COMMIT, VOID):
            continue
        number = round_of(run, run_of(entry), int(json.loads(entry.key)[1]))
        if number is not None:
            counts = +state.spent.get(Adversary.MODEL, Counter[str]())
            yield number, _Spending(tuple(sorted(counts.items())), state.filter_order)


def check_client_ledgers(folder: BoundFolder) -> str:
    """Check that the clients' ledgers hold the manifest's heads, and that the result states a record's largest epsilon."""
    folder.require_final()
    heads = folder.manifest.heads
    if not heads:
        if not any(row["sampling"].startswith(BATCHES) for row in folder.result["privacy"]):
            raise NotShown("the run has none")
        return _check_ledgers_of_this_machine(folder)
    for name, entries in folder.client_entries.items():
        head = heads[name]
        if head.seq > len(entries) or entries[head.seq - 1].head != head:
            raise Wrong(f"{name} lacks entry {head.seq} of the manifest")
    largest = _largest_epsilon(each[: heads[name].seq] for name, each in folder.client_entries.items())
    for claimed in _epsilons_of_records(folder):
        if not is_close(largest, claimed):
            raise Wrong(f"the result states {claimed:.6g} for records, and the ledgers give {largest:.6g}")
    return f"{len(folder.client_entries)} ledgers are correct, epsilon at most {largest:.4g}"


def _check_ledgers_of_this_machine(folder: BoundFolder) -> str:
    """Check the ledgers of real clients on this machine up to their last entry of the run; those of others stay there."""
    home = _ledger_home(folder)
    paths = [path for path in sorted(home.glob("*.ledger")) if "-" not in path.stem]  # each of one client
    ledgers = [_until_last_entry_of(folder.run, entries_in(path)) for path in paths]
    ledgers = [entries for entries in ledgers if entries]
    if not ledgers:
        raise NotShown("no ledger of this run's clients is on this machine")
    largest = _largest_epsilon(ledgers)
    for claimed in _epsilons_of_records(folder):
        if largest > claimed * (1 + SAME):
            fault = f"the result states {claimed:.6g} for records, and a ledger on this machine {largest:.6g}"
            raise Wrong(fault)
    return f"{len(ledgers)} ledgers on this machine are correct, epsilon at most {largest:.4g}"


def _ledger_home(folder: BoundFolder) -> Path:
    """Return the folder of this machine's ledgers of real data; a verifier without OmegaConf has the usual one."""
    try:
        configured = read_config(folder.path / CONFIG)[0]
    except ImportError:
        configured = {}
    return ledger_folder("ledger.dir", configured.get("ledger", {}).get("dir"))


def _until_last_entry_of(run: str, entries: Sequence[Entry]) -> Sequence[Entry]:
    """Return a ledger's entries up to the last one of a run; empty for a ledger that the run did not charge."""
    return entries[: max((each.seq for each in entries if run_of(each) == run), default=0)]


def _largest_epsilon(ledgers: Iterable[Sequence[Entry]]) -> float:
    """Return the largest epsilon of clients' ledgers; of those with the same charges, only one is verified."""
    distinct: dict[tuple[str, ...], Sequence[Entry]] = {}
    for entries in ledgers:
        # The time of a charge stands behind all that it costs.
        charges = (each.payload.partition(',"time"')[0] for each in entries if each.kind == RESERVE)
        distinct[tuple(sorted(charges))] = entries
    verifications = [verify_entries(entries, "a client's ledger") for entries in distinct.values()]
    for verification in verifications:
        if not verification.ok:
            raise Wrong(str(verification.problem))
    return max((each.epsilon or 0.0 for each in verifications), default=0.0)


def _epsilons_of_records(folder: BoundFolder) -> list[float]:
    """Return the epsilons that the result states for records of clients in the rounds that they took part in."""
    rows = (row for row in folder.result["privacy"] if row["adversary"] == "server")
    return [float(row["epsilon"]) for row in rows if row["sampling"] == PARTICIPATION]
