"""Record of an audit: the files of a run's auditor, the recomputation from them, and the result as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.bounded_decoding import json_number
from ..base.refusal import Refusal
from ..configs.round_line import AUDIT
from ..privacy.audit import round_rows
from ..privacy.audit.alarms import CANNOT_UNDO, Alarm
from ..privacy.audit.canary_clients import coins_of, commitment
from ..privacy.audit.memorisation import MemorisationResult
from ..privacy.audit.run_audit import AuditTerms, Evidence, Measured
from ..privacy.audit.summary import Raised, Summary, summarise
from ..privacy.budget import Adjacency
from ..run.files import AUDIT_ROWS, AUDIT_TERMS, METRICS, RESULT
from ..run.run_files import read_object, rows_in
from .auditor import ACTING, Auditor

JSON_KEYS = {"figures": "shown"}  # names in result.json of fields of a `MemorisationResult`


@dataclass(frozen=True)
class RecomputedAudit:
    """A run's audit, recomputed.

    Attributes:
      terms: that were fixed before round 1.
      summary: of the rounds.
      raised: the alarms, in the order of their rounds.
      on_alarm: reaction to an alarm.
      rounds: number of audited rounds.
    """

    terms: AuditTerms
    summary: Summary
    raised: list[Raised]
    on_alarm: str
    rounds: int

    def to_json(self) -> dict[str, Any]:
        """Return the audit for a result, without those of `memorised`, which need the planted data."""
        return as_json(self.terms, self.summary, self.raised, self.on_alarm)


def recompute_audit(folder: Path) -> RecomputedAudit:
    """Recompute the audit of a finished run from its auditor's files.

    Raises:
      Refusal: the folder holds no audit of a finished run, or the canaries do not match their commitment.
    """
    fields = audit_fields(folder)
    terms = read_terms(fields["terms"])
    coins = _coins(folder, terms, fields)
    auditor = Auditor(terms, folder / AUDIT_ROWS, coins=coins)
    final = None  # row of the whole run, which `Auditor.end` appended
    for chunk in round_rows.chunks(folder / AUDIT_ROWS, terms.canaries):
        auditor.replay([chunk])
        whole = chunk[chunk["round"] == 0]
        final = np.asarray(whole[-1]) if len(whole) else final
    rows = auditor.rows
    if not len(rows):
        raise Refusal("audit", str(folder), "holds no audited round; give the folder of a run that has some")
    _require_rows(folder, len(rows))
    summary = summarise(Evidence(terms, coins, rows), auditor.raised, final)
    return RecomputedAudit(terms, summary, auditor.raised, str(fields["on_alarm"]), len(rows))


def _require_rows(folder: Path, rows: int) -> None:
    """Refuse an audit with fewer rows than rounds whose lines say that their sums were checked: one may have had an alarm."""
    audited = sum(f"{AUDIT}norm_p" in line for line in rows_in(folder / METRICS))
    if rows < audited:
        remedy = f"has {rows} rows of {audited} audited rounds; restore it"
        raise Refusal("audit", str(folder / AUDIT_ROWS), remedy)


def memorised(folder: Path) -> list[MemorisationResult]:
    """Return the results of the last look for planted data, as the run's result has them; none before its end."""
    fields = {field: JSON_KEYS.get(field, field) for field in MemorisationResult.__dataclass_fields__}
    rows = (read_object(folder / RESULT).get("audit") or {}).get("memorisation") or []
    return [MemorisationResult(**{field: row[name] for field, name in fields.items()}) for row in rows]


def audit_fields(folder: Path) -> dict[str, Any]:
    """Return the terms of a run's audit, as in its file; refuse a folder without a readable one."""
    try:
        return dict(json.loads((folder / AUDIT_TERMS).read_text()))
    except FileNotFoundError:
        remedy = "holds no audit that is over; give the folder of a run with audit=light or audit=full that has ended"
        raise Refusal("audit", str(folder), remedy) from None
    except (OSError, ValueError) as problem:
        raise Refusal("audit", str(folder / AUDIT_TERMS), f"cannot be read ({problem})") from problem


def _coins(folder: Path, terms: AuditTerms, fields: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Return the canaries' coins from the opened seed, shape (canaries,); refuse others than the commitment has."""
    if not terms.canaries:
        return np.zeros(0, np.bool_)
    if "opened" not in fields:
        remedy = "the canaries' coins are not opened before the run is over; resume it"
        raise Refusal("audit", str(folder), remedy)
    seed = bytes.fromhex(fields["opened"]["seed"])
    coins = coins_of(seed, terms.canaries)
    if commitment(seed, coins) != fields["commitment"]:
        remedy = "its coins do not match the commitment from before the first round; the audit is invalid"
        raise Refusal("audit", str(folder), remedy)
    return coins


def read_terms(fields: Mapping[str, Any]) -> AuditTerms:
    """Return the terms in a file of `observer.write_terms`."""
    terms: dict[str, Any] = dict(fields)
    terms |= {"looks": tuple(terms["looks"]), "adjacency": Adjacency(terms["adjacency"])}
    return AuditTerms(**terms)


def as_json(
    terms: AuditTerms, summary: Summary | None, raised: list[Raised], on_alarm: str
) -> dict[str, Any]:
    """Return an audit as plain data.

    Args:
      terms: that were fixed before round 1.
      summary: of the rounds; None if none was released.
      raised: the alarms, in the order of their rounds.
      on_alarm: the action on an alarm.
    """
    alarms: list[dict[str, Any]] = []
    for each in raised:
        action = action_of(on_alarm, each.alarm)
        fields = {**each.content, "threshold": each.alarm.threshold, "action": action}
        alarms.append({**fields, "cannot_undo": CANNOT_UNDO.get(action)})
    fields: dict[str, Any] = {
        "alpha": terms.alpha,
        "canaries": terms.canaries,
        "alarms": alarms,
        "on_alarm": on_alarm,
    }
    if summary is None:
        return fields | {"verdict": None, "said": "no round was released"}
    measurement, records = summary.measured, summary.records
    return fields | {
        "verdict": None if summary.verdict is None else str(summary.verdict),
        "said": summary.sentence,
        "claimed": measurement and json_number(measurement.claimed),
        "measured": measurement and _measured(measurement),
        "ceiling": measurement and json_number(measurement.ceiling),
        "lower_bounds": {each.method: json_number(each.lower) for each in summary.findings},
        "final_model": summary.final and {k: json_number(v) for k, v in asdict(summary.final).items()},
        "norm_p": summary.norm_p if terms.delta else None,
        "visible_shortfall": summary.visible_shortfall if terms.delta else None,
        "reuse_p": summary.reuse_p if terms.delta else None,
        "records": records and _of_records(records),
    }


def action_of(on_alarm: str, alarm: Alarm) -> str:
    """Return what an alarm does: the configured action, or no more than a note."""
    return on_alarm if alarm.level in ACTING else "note"


def _of_records(measurement: Measured) -> dict[str, Any]:
    """Return a measurement by canary records as plain data."""
    return {
        "claimed": json_number(measurement.claimed),
        "ceiling": json_number(measurement.ceiling),
        "lower_bounds": {name: json_number(value) for name, value in measurement.lower.items()},
        "measured": _measured(measurement),
        "p_values": dict(measurement.p_values),
    }


def _measured(measurement: Measured) -> dict[str, Any]:
    """Return the estimate of a measurement with its interval as plain data."""
    return {name: json_number(getattr(measurement, name)) for name in ("epsilon", "low", "high")}
