"""Audit trail of a ledger: each entry as a row, and as a sentence that says who did what, why, and what it has cost so far.

The ledger is the only source. Ledgers of earlier releases lack origins and hashes of models: their sentences leave them out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.renyi_filter import spent_epsilon
from ..privacy.budget import Adjacency, Adversary
from ..privacy.ledger.acts import ACTS, CAPS, DECISIONS, REFUSAL, ROSTERS
from ..privacy.ledger.hash_chain import Entry
from ..privacy.ledger.ledger_state import CLOSE, COMMIT, OPEN, RESERVE, VOID, LedgerState, run_of
from ..privacy.ledger.question_caps import QUESTION
from ..server.query_rows import FIRST_ROW, NAME

MAX_EPSILONS = 100  # last releases whose epsilon is recomputed, at some milliseconds each
DECIMALS = 3  # of an epsilon in a sentence, as in the lines of a run
SHORT = 12  # characters of a hash in a sentence
OWNERS = (CAPS, ROSTERS, DECISIONS)  # in the place of a run's name, of the data's owner


@dataclass(frozen=True)
class TrailRow:
    """Entry of a ledger, with the outcome of its release.

    Attributes:
      entry: on the ledger.
      payload: of the entry.
      act: training, evaluation, question, close, note, the ledger's creation, or a decision as the ledger names it.
      number: of its round; None where it is of none.
      origin: of its run: who began it, on what; empty where the ledger does not say.
      settled: commit or void of the release.
      model_before: hash of the model before a round of training; None where the ledger does not say.
      model_after: likewise of the model after it.
      epsilon: against the adversary with the largest loss after this entry; None of entries without cost, and of early ones.
    """

    entry: Entry
    payload: dict[str, Any]
    act: str
    number: int | None
    origin: Mapping[str, Any] = field(default_factory=dict[str, Any])
    settled: Entry | None = None
    model_before: str | None = None
    model_after: str | None = None
    epsilon: float | None = None

    @property
    def run(self) -> str:
        """Name of the run, to which its evaluations belong; empty of the first entry."""
        return _run(self.entry)

    @property
    def time(self) -> str:
        """Time of the entry, of the clock of its machine."""
        return str(self.payload.get("time", ""))

    def cells(self) -> dict[str, Any]:
        """Return the cells of this row by the name of the column; None of what the ledger does not say."""
        roster = self.origin.get("roster")
        return {
            "seq": self.entry.seq,
            "time": self.time,
            "run": self.run,
            "act": self.act,
            "round": self.number,
            "who": self.payload.get("who", self.origin.get("who")),
            "purpose": self.payload.get("purpose"),
            **{name: self.origin.get(name) for name in ("task", "data", "schema")},
            "roster": roster and f"{roster['version']} {roster['hash']}",
            "model_before": self.model_before,
            "model_after": self.model_after,
            "epsilon": self.epsilon,
            "target_epsilon": self.payload.get("budget", {}).get("target_epsilon"),
            "sentence": sentence(self),
        }


def audit_trail(entries: Sequence[Entry], epsilons: int = MAX_EPSILONS) -> list[TrailRow]:
    """Return the rows of a ledger's entries, in their order. A commit or void is part of the row of its release.

    Args:
      entries: all of the ledger.
      epsilons: number of last releases whose epsilon is recomputed.
    """
    settled = {each.key: each for each in entries if each.kind in (COMMIT, VOID)}
    state, rows = LedgerState(), list[TrailRow]()
    composed = {each.seq for each in [each for each in entries if each.kind == RESERVE][-epsilons:]}
    models: dict[str, str | None] = {}  # the last of each run
    for entry in entries:
        state.take(entry, "these entries")
        if entry.kind in (COMMIT, VOID):
            continue
        payload, run = json.loads(entry.payload), _run(entry)
        row = TrailRow(entry, payload, _act(entry, payload), _number(entry), state.origins.get(run, {}))
        if entry.kind == RESERVE:
            outcome, before = settled.get(entry.key), models.get(run)
            if "origin" in payload and row.act != NAME:
                before = payload["origin"].get("model")
            after = _model_of(outcome)
            models[run] = after or before
            epsilon = _epsilon(state, payload) if entry.seq in composed else None
            row = TrailRow(entry, payload, row.act, row.number, row.origin, outcome, before, after, epsilon)
        rows.append(row)
    return rows


def _run(entry: Entry) -> str:
    """Return the run of an entry, also of its evaluations."""
    return run_of(entry).removesuffix(f" {NAME}")


def _model_of(outcome: Entry | None) -> str | None:
    """Return the hash of a model in a commit; None where there is none."""
    return json.loads(outcome.payload if outcome else "{}").get("model")


def by_run(rows: Sequence[TrailRow]) -> Iterator[tuple[str, list[TrailRow]]]:
    """Yield a heading and the rows of each run, that with the newest entry last; the heading of the first entry is empty."""
    runs: dict[str, list[TrailRow]] = {}
    for row in rows:
        runs.setdefault(row.run, []).append(row)
    for run, of_run in sorted(runs.items(), key=lambda item: item[1][-1].entry.seq):
        yield _heading(run, of_run), of_run


def _heading(run: str, rows: Sequence[TrailRow]) -> str:
    """Return a run with its purposes, and who began it on what."""
    if run in ("", *OWNERS):
        return run and "decisions of the data's owner"
    purposes = sorted({str(row.payload["purpose"]) for row in rows if "purpose" in row.payload})
    parts = [f"run {run}"]
    if purposes:
        parts.append(f"purpose {', '.join(purposes)}")
    origins = [row.payload["origin"] for row in rows if "origin" in row.payload and row.act != NAME]
    if origins:
        parts += _origin(origins[0])
    parts += [clause for pair in pairwise(origins) for clause in _changes(*pair)]
    return ", ".join(parts)


def _origin(origin: Mapping[str, Any]) -> Iterator[str]:
    """Yield the clauses of an origin."""
    yield f"started by {origin['who']}"
    if "task" in origin:
        data = f" on {origin['data']}" if "data" in origin else ""
        schema = f" (schema {origin['schema'][:SHORT]})" if "schema" in origin else ""
        yield f"task {origin['task']}{data}{schema}"
    if "clients" in origin:
        yield f"{origin['clients']:g} clients planned a round"
    if roster := origin.get("roster"):
        yield f"roster {roster['version']} ({roster['hash'][:SHORT]})"
    if "model" in origin:
        yield f"from model {origin['model'][:SHORT]}"


def _changes(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> Iterator[str]:
    """Yield the clauses of an origin after another of its run: a device's has a new roster, a resumed run another model."""
    if (roster := later.get("roster")) and roster != earlier.get("roster"):
        yield f"then roster {roster['version']} ({roster['hash'][:SHORT]})"
    if later.get("model") != earlier.get("model") or later["who"] != earlier["who"]:
        yield f"resumed by {later['who']}"


def _act(entry: Entry, payload: Mapping[str, Any]) -> str:
    """Return in a word what an entry is about."""
    if entry.kind != RESERVE:
        return "creation" if entry.kind == OPEN else entry.kind
    if payload.get("kind") != QUESTION:
        return "training"
    return NAME if run_of(entry).endswith(f" {NAME}") else QUESTION


def _number(entry: Entry) -> int | None:
    """Return the round of an entry; None where it is of none."""
    if entry.kind in (OPEN, CLOSE) or run_of(entry) in OWNERS:
        return None
    return json.loads(entry.key)[1] % FIRST_ROW  # rows of queries are FIRST_ROW and more beyond their round


def _epsilon(state: LedgerState, payload: Mapping[str, Any]) -> float:
    """Return the epsilon of a ledger at the delta of a reservation, against the adversary with the largest loss."""
    delta, adjacency = payload["budget"]["target_delta"], Adjacency(state.identity["adjacency"])
    events = {json.dumps(sorted(counts.items())): adversary for adversary, counts in state.spent.items()}
    return max(
        spent_epsilon(state.events(adversary), delta, adjacency, state.filter_order, GATE_INTERVAL)
        for adversary in events.values()
    )


# --- sentences ----------------------------------------------------------------------------------------------------


def sentence(row: TrailRow) -> str:
    """Return a row in a sentence."""
    entry, payload = row.entry, row.payload
    if entry.kind == OPEN:
        return "The ledger was created."
    if entry.kind == RESERVE:
        return f"Round {row.number}, {_release(row)}; {_outcome(row)}."
    if entry.kind == CLOSE:
        return f"The run was closed, {payload['status']}, with manifest {payload['manifest'][:16]}."
    if entry.kind == REFUSAL:
        return f"Round {row.number} was refused at no cost: {payload['reason']}."
    if entry.kind in ACTS:
        who, why = payload["who"] or "an unknown person", payload["reason"] or "no reason given"
        return f"{entry.kind.capitalize()} by {who}{_detail(payload)}: {why}."
    clients = {name: f"of {len(each)}" for name, each in payload.items() if isinstance(each, list)}
    fields = ", ".join(f"{name} {value}" for name, value in {**payload, **clients}.items() if name != "time")
    return f"Noted in round {row.number}, {json.loads(entry.key)[2]}: {fields}."


def _release(row: TrailRow) -> str:
    """Return a reservation in clauses: act, epsilon, events with adversaries, arm, source of noise, order of the filter."""
    payload, mechanism = row.payload, json.loads(row.entry.key)[2]
    clauses = [f"{row.act} ({mechanism})"]
    if row.epsilon is not None:
        clauses[0] += f", epsilon {_shown(row.epsilon)} of {payload['budget']['target_epsilon']:g}"
    by_event: dict[str, list[str]] = {}
    for adversary, event in payload["events"].items():
        by_event.setdefault(format_event(event), []).append(adversary)
    for event, names in by_event.items():
        who = "everyone" if len(names) == len(Adversary) else f"the {' and the '.join(names)}"
        clauses.append(f"{event} against {who}")
    if arm := payload.get("arm"):
        clauses.append(f"arm {arm['arm']} of {arm['arms']}")
    clauses.append(f"rng {payload['rng']}")
    if order := payload.get("filter_order"):
        clauses.append(f"chosen adaptively, filter at order {order:g}")
    return "; ".join(clauses)


def _shown(epsilon: float) -> str:
    """Return an epsilon with `DECIMALS`."""
    if math.isinf(epsilon):
        return "infinity"
    return f"{rounded_up(epsilon, DECIMALS):.{DECIMALS}f}"


def rounded_up(epsilon: float, decimals: int) -> float:
    """Return a finite epsilon rounded up to so many decimals, but for the dust of binary fractions."""
    return math.ceil(round(epsilon * 10**decimals, 3)) / 10**decimals


def _outcome(row: TrailRow) -> str:
    """Return what became of a reservation, and of the model."""
    if not row.settled:
        return "reserved, and spent whether or not it was released"
    if row.settled.kind == VOID:
        return f"given back: {json.loads(row.settled.payload)['proof']}"
    return "released" + (f", model {row.model_after[:SHORT]}" if row.model_after else "")


def _detail(payload: Mapping[str, Any]) -> str:
    """Return the object of a person's decision: a roster's version, or a cap; empty for any other."""
    if "version" in payload:
        return f", version {payload['version']}"
    if "verdict" in payload:
        return f" ({payload['role']}): {payload['kind']} {payload['name']} {payload['verdict']}"
    if "target_epsilon" not in payload:
        return ""
    until = f" until {payload['until']}" if payload["until"] else ""
    return f" to epsilon {payload['target_epsilon']:g} at delta {payload['target_delta']:g}{until}, {payload['decided']}"


def format_event(event: Mapping[str, Any]) -> str:
    """Return an event of a ledger as short text, such as ``Poisson(0.25, Gaussian(3.2192))``."""
    kind, inner = str(event["kind"]), event.get("event")
    numbers = [f"{v:.5g}" for v in event.values() if isinstance(v, int | float) and not isinstance(v, bool)]
    parts = numbers + ([format_event(inner)] if isinstance(inner, dict) else [])
    return f"{kind.removesuffix('Sampled')}({', '.join(parts)})"
