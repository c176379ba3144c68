"""Budget that a ledger has spent, from its file or its export alone, by sqlite3, hashlib and dp_accounting.

usage: python recompute_ledger.py LEDGER   of a ledger, or of its export as JSON; prints {adversary: {"delta", "epsilon"}} as JSON, or raises

Nothing of fedveil is used. Epsilon is the smaller result of dp_accounting's two accountants; with adaptively chosen
releases it is RDP at the filter's order. dp_accounting cannot compose a sample of a composition of samples: this script
computes that mixture from the inner privacy loss distribution on its own grid.
"""

import hashlib
import json
import logging
import math
import os
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from typing import NamedTuple

import dp_accounting as dp
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.rdp import RdpAccountant

STEP = 1e-4
RELATIONS = {
    "zero-out": dp.NeighboringRelation.REPLACE_SPECIAL,
    "add-or-remove-one": dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace-one": dp.NeighboringRelation.REPLACE_ONE,
}


def entries_of(path):
    """Return the entries after checking that every hash is that of its five fields and chains to the previous entry."""
    rows = rows_of(path)
    before = "0" * 64
    for number, row in enumerate(rows, 1):
        text = json.dumps(row[:5], separators=(",", ":"))
        if row[0] != number or row[4] != before or row[5] != hashlib.sha256(text.encode()).hexdigest():
            raise ValueError(f"entry {number}")
        before = row[5]
    return [(kind, key, json.loads(payload)) for _, kind, key, payload, _, _ in rows]


def rows_of(path):
    """Return (seq, kind, key, payload, prev_hash, hash) of every entry of a ledger, or of its export as JSON."""
    names = ("seq", "kind", "key", "payload", "prev_hash", "hash")
    if str(path).endswith(".json"):
        with open(path, encoding="utf-8") as file:
            return [tuple(entry[name] for name in names) for entry in json.load(file)["entries"]]
    if not os.path.exists(path):
        return rows_of_stored(path)
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute(f"SELECT {', '.join(names)} FROM entries ORDER BY seq").fetchall()


def rows_of_stored(path):
    """Return the rows of a simulated client's ledger, which is in one file with others in the folder of its path."""
    folder, name = os.path.split(os.path.splitext(path)[0])
    query = "SELECT seq, kind, key, payload, lower(hex(hash)) FROM entries WHERE ledger = ? ORDER BY seq"
    with closing(
        sqlite3.connect(f"file:{os.path.join(folder, 'ledgers.sqlite')}?mode=ro", uri=True)
    ) as database:
        rows = database.execute(query, (name,)).fetchall()
    if not rows:
        raise ValueError(f"no ledger {path}")
    before = ["0" * 64, *(row[-1] for row in rows)]
    return [(*row[:4], previous, row[4]) for row, previous in zip(rows, before, strict=False)]


def event_of(fields):
    """Return a dp_accounting event from its JSON."""
    match fields["kind"]:
        case "Gaussian":
            return dp.GaussianDpEvent(float(fields["noise_multiplier"]))
        case "PoissonSampled":
            return dp.PoissonSampledDpEvent(float(fields["sampling_probability"]), event_of(fields["event"]))
        case "SelfComposed":
            return dp.SelfComposedDpEvent(event_of(fields["event"]), int(fields["count"]))
        case "Composed":
            return dp.ComposedDpEvent([event_of(part) for part in fields["events"]])
        case "OpenlySampled":
            return Open(float(fields["sampling_probability"]), event_of(fields["event"]))
        case "Exchanged":
            return Exchanged(event_of(fields["event"]))
        case "NonPrivate":
            return dp.NonPrivateDpEvent()
        case "NoOp":
            return dp.NoOpDpEvent()
    raise ValueError(fields["kind"])


class Open(NamedTuple):
    """Sample with a public draw: the event happens with this probability, otherwise nothing does."""

    sampling_probability: float
    event: dp.DpEvent


class Exchanged(NamedTuple):
    """Secret sample of a Gaussian on a vector that is turned around: the neighbours are those of replace-one."""

    event: dp.DpEvent


def is_nested(event):
    """Return whether an event is a sample that dp_accounting cannot compose: of a composition, or with a public draw."""
    return isinstance(event, Open) or (
        isinstance(event, dp.PoissonSampledDpEvent) and not isinstance(event.event, dp.GaussianDpEvent)
    )


def count_events(entries):
    """Return ({adversary: Counter of event texts}, filter's order, last delta); voids are left out.

    The arms of a deal hold disjoint clients, so each event counts as often as in the arm that has most of it.
    """
    void = {key for kind, key, _ in entries if kind == "void"}
    reserved = [(key, payload) for kind, key, payload in entries if kind == "reserve"]
    by_adversary, in_arms = {}, {}
    for key, payload in reserved:
        arm = payload.get("arm")
        for adversary, event in payload["events"].items():
            text, counts = json.dumps(event, sort_keys=True), by_adversary.setdefault(adversary, Counter())
            if arm is None:
                counts[text] += key not in void
            else:
                arms = in_arms.setdefault((adversary, text, arm["deal"]), Counter())
                arms[arm["arm"]] += key not in void
    for (adversary, text, _), arms in in_arms.items():
        by_adversary[adversary][text] += max(arms.values())
    order = next((payload["filter_order"] for _, payload in reserved if "filter_order" in payload), None)
    return by_adversary, order, reserved[-1][1]["budget"]["target_delta"] if reserved else None


def nested_epsilon(events, delta):
    """Return epsilon of [(event, count)], zero-out, composed by the fast Fourier transform; some are samples of compositions.

    For the pair (P, Q) of a sample's queries, a unit that is drawn with probability p gives the pair (M, Q) of the
    mixture M = (1-p) Q + p P. With l the inner loss, the loss is log(1 - p + p exp(l)) under M, and its negative under Q
    in the other direction.
    """
    epsilons = []
    for sign in (1, -1):
        size = 1 << 20  # circular: index i is i steps, or i - size in the upper half
        spectrum = np.ones(size, complex)
        for event, count in events:
            losses, mass = _outer(event, sign)
            grid = np.ceil(losses / STEP).astype(int)  # rounded up: epsilon is never too small
            spectrum *= np.fft.fft(np.bincount(grid % size, mass, size)) ** count
        composed = np.maximum(np.fft.ifft(spectrum).real, 0)
        steps = np.where(np.arange(size) < size // 2, np.arange(size), np.arange(size) - size)
        epsilons.append(_epsilon_of(steps * STEP, composed, delta))
    return max(epsilons)


def _outer(event, sign):
    """Return losses and their probabilities of an event in one direction, without infinity (below 1e-10)."""
    if not isinstance(event, dp.PoissonSampledDpEvent | Open | Exchanged):
        event = dp.PoissonSampledDpEvent(1.0, event)
    relation = "replace-one" if isinstance(event, Exchanged) else "add-or-remove-one"
    pld = _composed([(event.event, 1)], relation)
    inner = pld._pmf_remove.to_dense_pmf()
    losses = (np.arange(inner._probs.size) + inner._lower_loss) * 1e-4
    under_p = inner._probs
    if isinstance(event, Exchanged):
        return losses, under_p  # the same in both directions
    rate = event.sampling_probability
    under_q = under_p * np.exp(-losses)
    if isinstance(event, Open):
        mass = np.append(rate * (under_p if sign > 0 else under_q), 1 - rate)
        return np.append(sign * losses, 0.0), mass
    outer = np.log1p(rate * np.expm1(losses))
    if sign > 0:
        return outer, (1 - rate) * under_q + rate * under_p
    return -outer, under_q


def _composed(events, adjacency):
    """Return the privacy loss distribution of [(event, count)]; each direction of a pair is composed with its own."""
    accountants = [PLDAccountant(RELATIONS[each], 1e-4) for each in (adjacency, "replace-one")]
    for event, count in events:
        swapped = isinstance(event, Exchanged)
        accountants[swapped].compose(event.event if swapped else event, count)
    whole, swapped = (each._pld for each in accountants)
    return whole.compose(swapped) if any(isinstance(event, Exchanged) for event, _ in events) else whole


def _epsilon_of(losses, mass, delta):
    """Return the least epsilon at which a privacy loss distribution has this delta, by bisection."""
    low, high = 0.0, float(losses.max())
    while high - low > 1e-4:
        middle = (low + high) / 2
        above = losses > middle
        spent = float(np.sum(mass[above] * -np.expm1(middle - losses[above])))
        low, high = (middle, high) if spent > delta else (low, middle)
    return high


def epsilon(counts, adjacency, delta, order):
    """Return the epsilon of {event as JSON text: how often}."""
    events = [(event_of(json.loads(text)), count) for text, count in counts.items() if count]
    if not events:
        return 0.0
    if any('"NonPrivate"' in text for text, count in counts.items() if count):
        return math.inf
    if any(is_nested(event) for event, _ in events):
        return nested_epsilon(events, delta)
    if any(isinstance(event, Exchanged) for event, _ in events):
        if order is not None:
            raise ValueError("an exchanged vector beside a filter's order")
        pld: PrivacyLossDistribution = _composed(events, adjacency)
        return pld.get_epsilon_for_delta(delta)
    accountants = [PLDAccountant(RELATIONS[adjacency], 1e-4)] if order is None else []
    if adjacency != "replace-one":
        orders = {} if order is None else {"orders": [order]}
        accountants.append(RdpAccountant(neighboring_relation=RELATIONS[adjacency], **orders))
    for accountant in accountants:
        for event, count in events:
            accountant.compose(event, count)
    return min((a.get_epsilon(delta) for a in accountants), default=math.inf)


def main(path):
    """Return {adversary: {"delta", "epsilon"}} of a ledger, or of its export."""
    entries = entries_of(path)
    by_adversary, order, delta = count_events(entries)
    adjacency = entries[0][2]["adjacency"]
    return {
        adversary: {"delta": delta, "epsilon": float(epsilon(counts, adjacency, delta, order))}
        for adversary, counts in by_adversary.items()
    }


if __name__ == "__main__":
    # The accountant logs a line for every order of RDP that it leaves out; its bound is valid without them.
    logging.getLogger("absl").setLevel(logging.ERROR)
    print(json.dumps(main(sys.argv[1])))
