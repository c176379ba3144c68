"""History of a ledger for a report: its runs, their joint cost, its refusals and its questions."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.events import event_from_json
from ..privacy.accounting.renyi_filter import spent_epsilon
from ..privacy.arms import Arm, charged
from ..privacy.budget import Adjacency, Adversary
from ..privacy.ledger.acts import REFUSAL
from ..privacy.ledger.hash_chain import Entry
from ..privacy.ledger.ledger_state import (
    CLOSE,
    COMMIT,
    NOTE,
    OPEN,
    RESERVE,
    VOID,
    LedgerState,
    Verification,
    run_of,
)
from ..privacy.ledger.ledger_state import verify as verify_ledger
from ..privacy.ledger.question_caps import QUESTION, ledger_questions
from ..run.audit_trail import audit_trail, by_run, rounded_up, sentence
from ..run.run_files import Fields, RunFiles

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

TRAINING = "private_sum"
EVALUATION = " evaluation"  # suffix of a run's name, in the names of its clients' evaluations on ledgers
DECIMALS = 4  # of epsilons that are composed again; rounded up
MAX_RUNS = 40  # number of last runs whose epsilon is composed; that of earlier ones is None
MAX_TRAIL = 40  # last entries that the time line has; fedveil ledger show has all
MARKS = 12  # intervals of a plan's curve


def ledger_history(run: RunFiles) -> dict[str, Any] | None:
    """Return the history of the ledger of all clients; None if the folder has none."""
    if run.ledger is None or not run.entries:
        return None
    identity = json.loads(run.entries[0].payload)
    verification = verify_ledger(run.ledger)
    return {
        "unit": identity.get("unit"),
        "adjacency": identity.get("adjacency"),
        "simulated": identity.get("simulated"),
        "begun": identity.get("time"),
        "entries": len(run.entries),
        "head": {"seq": run.entries[-1].seq, "hash": run.entries[-1].hash},
        "known_head": _known_head(run),
        "verified": describe_verification(verification),
        "runs": _runs(run, verification.delta),
        "refusals": _refusals(run),
        "releases": _releases(run.entries),
        "acts": _acts(run.entries),
        "trail": _trail(run.entries),
        "close": _close(run),
        "events": _events(run),
        "questions": questions_on(run.entries, run.name),
    }


def questions_on(entries: Sequence[Entry], run: str | None = None) -> list[dict[str, Any]]:
    """Return the questions that a ledger has charged, in their order, each with what one release of it cost by itself.

    Args:
      entries: of the ledger.
      run: name of the reported run, which is cut from its evaluations' names; None cuts nothing.
    """
    state = LedgerState()
    for entry in entries:
        state.apply(entry)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for question in ledger_questions(state):
        row = {
            "name": question.name.replace(f"{run}{EVALUATION}", EVALUATION.strip()),
            "purposes": ", ".join(question.purposes),
            "why": question.reason or None,
            "epsilon": stated_epsilon(question.epsilon),
            "time": question.time,
            "state": question.state,
        }
        # A question that was asked again has these in common.
        same = row["name"], row["why"], row["epsilon"], row["state"]
        rows.setdefault(same, {**row, "times": 0})["times"] += 1
    return list(rows.values())


def plan_curve(run: RunFiles) -> list[list[Any]]:
    """Return [round, epsilon] of the plan of this run alone, evaluations included.

    The charges so far must be alike, since later ones are taken to equal them. So it is empty for arms, with adaptive
    noise, and where one release covers several rounds.
    It is also empty before the first of planned evaluations.
    """
    charges = [json.loads(each.payload) for each in _reserved(run.entries) if _source(each) == run.name]
    rounds = [each for each in charges if each.get("kind") != QUESTION]
    evaluations = [each for each in charges if each.get("kind") == QUESTION]
    num_rounds, schedule = run.setting("num_rounds"), run.setting("evaluate", "clients") or "none"
    varies = any("filter_order" in each or "arm" in each for each in charges)
    if varies or not isinstance(num_rounds, int) or len(rounds) < len(run.rounds):
        return []
    of_round, of_evaluation = _common_event(rounds), _common_event(evaluations)
    if not of_round or (schedule != "none" and not of_evaluation):
        return []
    delta, interval = rounds[0]["budget"]["target_delta"], int(schedule.partition(":")[2] or num_rounds)
    adjacency = Adjacency(json.loads(run.entries[0].payload)["adjacency"])
    curve: list[list[Any]] = []
    for number in sorted({max(1, round(num_rounds * part / MARKS)) for part in range(MARKS + 1)}):
        counts = Counter(dict.fromkeys(of_round, number))
        if schedule != "none":  # after each interval, and after the last round
            is_between = number == num_rounds and num_rounds % interval > 0
            counts.update(dict.fromkeys(of_evaluation, number // interval + is_between))
        curve.append([number, stated_epsilon(spent_epsilon(counts, delta, adjacency, None, GATE_INTERVAL))])
    return curve


def _common_event(charges: Sequence[Fields]) -> list[DpEvent]:
    """Return the one event that all charges have against the model, in a list; empty if they differ or have none."""
    texts = {json.dumps(each["events"].get(str(Adversary.MODEL))) for each in charges}
    if len(texts) != 1 or texts == {"null"}:
        return []
    return [event_from_json(json.loads(text)) for text in texts]


def stated_epsilon(value: float | None) -> float | str | None:
    """Return an epsilon rounded up to `DECIMALS`; infinity becomes a word, since JSON has no number for it."""
    if value is None:
        return None
    if math.isinf(value):
        return "infinity"
    return rounded_up(value, DECIMALS)


def _known_head(run: RunFiles) -> dict[str, Any] | None:
    """Return the ledger head in the result, and whether this ledger holds it; None if the result has none."""
    head = run.result.get("ledger_head")
    if not head:
        return None
    holds = any(each.seq == head[0] and each.hash == head[1] for each in run.entries)
    return {"seq": head[0], "hash": head[1], "held": holds}


def _close(run: RunFiles) -> dict[str, Any] | None:
    """Return the entry that closed the run, and whether the folder's files are those that it binds; None without one."""
    closes = [each for each in run.entries if each.kind == CLOSE and run_of(each) == run.name]
    if not closes:
        return None
    payload = json.loads(closes[-1].payload)
    is_same = payload["manifest"] == run.manifest
    return {
        "seq": closes[-1].seq,
        "time": payload.get("time"),
        "manifest": payload["manifest"],
        "held": is_same and not run.changed,
        "changed": list(run.changed) if is_same else ["manifest.json"],
    }


def describe_verification(verification: Verification) -> dict[str, Any]:
    """Return the verification of a ledger in a report's form."""
    return {
        "ok": verification.ok,
        "problem": verification.problem,
        "delta": verification.delta,
        "epsilon": stated_epsilon(verification.epsilon),
        "epsilon_pld": stated_epsilon(verification.epsilon_pld),
        "epsilon_rdp": stated_epsilon(verification.epsilon_rdp),
    }


def _reserved(entries: Sequence[Entry]) -> Iterator[Entry]:
    return (each for each in entries if each.kind == RESERVE)


def _runs(run: RunFiles, delta: float | None) -> list[dict[str, Any]]:
    """Return the runs and questions in the order of their last releases, and what all had cost when each had ended.

    All epsilons are at `delta`; if it is None, each is at the target delta of the run that ended then.
    """
    last: dict[str, int] = {_source(each): each.seq for each in _reserved(run.entries)}
    composed = set(sorted(last.values())[-MAX_RUNS:])
    releases = Counter(_source(each) for each in _reserved(run.entries))
    first: dict[str, Fields] = {}
    state, runs = LedgerState(), []
    for entry in run.entries:
        state.apply(entry)
        if entry.kind != RESERVE:
            continue
        name, payload = _source(entry), json.loads(entry.payload)
        first.setdefault(name, payload)
        if last[name] != entry.seq:
            continue
        epsilon = None
        if entry.seq in composed:
            adjacency = Adjacency(state.identity["adjacency"])
            at = delta or payload["budget"]["target_delta"]
            events = state.events(Adversary.MODEL)
            epsilon = spent_epsilon(events, at, adjacency, state.filter_order, GATE_INTERVAL)
        runs.append(
            {
                "run": name,
                "this": name == run.name,
                "question": first[name].get("kind") == QUESTION,
                "begun": first[name].get("time"),
                "ended": payload.get("time"),
                "releases": releases[name],
                "epsilon_after": stated_epsilon(epsilon),
                "target_epsilon": payload["budget"]["target_epsilon"],
            }
        )
    return runs


def _source(entry: Entry) -> str:
    """Return the run or question of a release; an evaluation belongs to its run."""
    return run_of(entry).removesuffix(EVALUATION)


def _refusals(run: RunFiles) -> list[dict[str, Any]]:
    """Return the refused releases: those on the ledger, or else the one by which the result says that the run ended."""
    refusals = [
        {
            "run": run_of(each),
            "round": json.loads(each.key)[1] if run_of(each) == run.name else None,
            "said": _text(json.loads(each.payload)),
            "seq": each.seq,
        }
        for each in run.entries
        if each.kind == REFUSAL
    ]
    if run.result.get("status") == "exhausted" and not refusals:
        after = run.result.get("rounds_completed")
        number = after + 1 if isinstance(after, int) else None
        refusals.append({"run": run.name, "round": number, "said": run.result.get("reason"), "seq": None})
    return refusals


def _text(payload: Fields) -> str:
    """Return the reason in a refusal's entry, which releases of fedveil have under different keys."""
    return str(payload.get("reason") or payload.get("why") or payload.get("said") or "refused")


def _releases(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the number of releases of each kind on the ledger, with its purpose and the parts of a client's vector."""
    counts: Counter[tuple[str, str | None, str | None]] = Counter()
    for entry in _reserved(entries):
        payload = json.loads(entry.payload)
        parts = [f"{name} ({what})" for name, what in (payload.get("segments") or {}).items()]
        key = json.loads(entry.key)[2], payload.get("purpose"), ", ".join(parts) or None
        counts[key] += 1
    return [
        {
            "mechanism": mechanism,
            "what": "round of training" if mechanism == TRAINING else QUESTION,
            "purpose": purpose,
            "parts": parts,
            "releases": count,
        }
        for (mechanism, purpose, parts), count in counts.items()
    ]


def _acts(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the acts of people on the ledger: who, when and why."""
    usual = (OPEN, RESERVE, COMMIT, VOID, NOTE, CLOSE)
    acts: list[dict[str, Any]] = []
    for entry in entries:
        payload = json.loads(entry.payload)
        if entry.kind not in usual and entry.kind != REFUSAL:
            act = {"seq": entry.seq, "kind": entry.kind, "time": payload.get("time")}
            acts.append({**act, "who": payload.get("who"), "why": payload.get("reason")})
    return acts


def _trail(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the last entries of the ledger in sentences, by run, that with the newest entry last."""
    rows = audit_trail(entries, MAX_TRAIL)[-MAX_TRAIL:]
    return [
        {
            "run": heading or None,
            "rows": [
                {"seq": row.entry.seq, "time": row.time or None, "said": sentence(row)} for row in of_run
            ],
        }
        for heading, of_run in by_run(rows)
    ]


def _events(run: RunFiles) -> list[dict[str, Any]]:
    """Return the distinct events of this run's rounds and evaluations on the ledger, and how often each is charged."""
    releases: list[tuple[str, Arm | None]] = []
    for entry in _reserved(run.entries):
        if _source(entry) == run.name:
            payload = json.loads(entry.payload)
            arm = Arm.from_json(payload["arm"]) if "arm" in payload else None
            releases += [
                (json.dumps([adversary, event], sort_keys=True), arm)
                for adversary, event in payload["events"].items()
            ]
    rows: list[dict[str, Any]] = []
    for text, count in charged(releases).items():
        adversary, event = json.loads(text)
        text = json.dumps(event, sort_keys=True)
        rows.append({"adversary": adversary, "event": event, "text": text, "count": count})
    return rows
