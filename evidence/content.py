"""Content of a report: all values of `report.json` for a run, computed only from its folder.

The same run gives the same bytes: no time of making, no path of this machine and no draw is in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any

from ..configs.round_line import AUDIT, GROUPS, is_metric, main_metric
from ..privacy.audit.run_audit import AuditTerms
from ..privacy.audit.summary import UNCLAIMED, untested
from ..run.files import RECEIPTS
from ..run.promise import FALSE_POSITIVE, REFUTED, VIOLATED, main_row, promise_rows, row_by_sums, sentences
from ..run.run_files import MIXED, Fields, RunFiles, flat
from .answers import describe_evaluations, read_answers
from .cost import cost
from .coverage import not_covered
from .forms import count_items, facts_of_run, forms, nist_blocks
from .held_out import intervals_of
from .ledger_history import ledger_history, plan_curve
from .memorisation import memorisation_of
from .model import model_of

FORMAT = "fedveil report 1"
PERSONAL = (
    "A personal model has no privacy towards whoever gets it: epsilon is infinite for that client's data. It is with its client "
    "alone, in no message, checkpoint or report, and costs nothing at server, clients and model."
)
NOT_ENDED, RUNNING = "not ended", "running"
TAIL, MIN_TAIL = 0.1, 5  # share, and least number, of the last rounds over which a metric is averaged
LOOK = ("claimed", "epsilon", "low", "high", "ceiling")  # values of a `Measured` in a round's line
DIGITS, ROUNDING = (
    6,
    1e-6,
)  # digits of a shape's value, and the share of its largest that float32 does not have


def report_of(
    run: RunFiles,
    commands: Sequence[str] = (),
    shapes: Fields | None = None,
    as_of: str | None = None,
    other: RunFiles | None = None,
) -> dict[str, Any]:
    """Return the report of a run, as JSON.

    Args:
      run: its files.
      commands: that make the run again.
      shapes: of its model, if that is a sum of one shape for each column.
      as_of: time of its files, UTC, while the run's process is alive; None for a report to keep.
      other: run whose curve of memorisation is shown beside; None without one.
    """
    rows, ledger = promise_rows(run), ledger_history(run)
    rounds = [_round(row) for row in run.rounds]
    run_cost, stamps = cost(run), _stamps(run, rows)
    report: dict[str, Any] = {
        "format": FORMAT,
        "run": {**_about(run, ledger, as_of), "parameters": run_cost["parameters"]},
        "model": model_of(run),
        "stamps": stamps,
        "promise": sentences(rows, bool(run.result), _refuted(run, stamps)),
        "false_positive": FALSE_POSITIVE,
        "privacy": rows,
        "not_covered": not_covered(run, rows, ledger),
        "ledger": ledger,
        "plan": plan_curve(run),
        "rosters": _rosters(run.result),
        "tuning": _tuning(run.result),
        "metrics": [
            {"name": name, "value": value}
            for name, value in _last_metrics(run).items()
            if is_metric(name, value)
        ],
        "metric": main_metric(run.rounds),
        "tail": _tail(run),
        "rounds": rounds,
        "looks": _looks(run, rows),
        "audit": _audit(run, stamps),
        "answers": _answers(run, ledger),
        "groups": _groups(run),
        "evaluations": describe_evaluations(_evaluations(run)),
        "shapes": describe_shapes(shapes),
        "receipts": receipts_of(run),
        "cost": run_cost,
        "config": [{"key": key, "value": value} for key, value in flat(run.publishable)],
        "seed": run.result.get("seed"),
        "noise_multiplier": run.result.get("noise_multiplier"),
        "versions": dict(run.result.get("versions", {})),
        "commands": list(commands),
        "missing": _missing(run, ledger),
    }
    report |= intervals_of(run)
    if shapes is not None and "survival" in shapes:
        report["survival"] = shapes["survival"]
    if (lost := row_by_sums(run)) is not None:
        report["record_by_sums"] = lost
    if (memorisation := memorisation_of(run, other)) is not None:
        report["memorisation"] = memorisation
    if (personal := run.result.get("personal")) is not None:
        report["personal"] = {"name": run.setting("personal", "name"), **_personal(personal)}
    report["nist"] = nist_blocks(report)
    report["forms"] = forms(run.assessment.answers, facts_of_run(report) if run.result else {})
    report["forms_counted"] = count_items(report["forms"])
    report["bibtex"] = _bibtex(report)
    return report


def _answers(run: RunFiles, ledger: Fields | None) -> list[dict[str, Any]]:
    """Return the answers in the run folder and in that of a deployment's questions."""
    charged = [each["name"] for each in ledger["questions"]] if ledger else []
    folders = [run.folder, run.questions] if run.questions else [run.folder]
    return [each for folder in folders for each in read_answers(folder, charged)]


def _evaluations(run: RunFiles) -> Sequence[Fields]:
    """Return clients' evaluations of the run's models, also for an unfinished run."""
    so_far = [row["evaluation"] for row in run.rounds if row.get("evaluation")]
    return run.result.get("evaluations") or so_far


def to_json(report: Fields) -> str:
    """Return the text of `report.json`; the same report gives the same bytes."""
    return json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _about(run: RunFiles, ledger: Fields | None, as_of: str | None) -> dict[str, Any]:
    """Return what was run: with which task, mode and clients, for how many rounds, and with what end."""
    result = run.result
    times: Fields = next((each for each in ledger["runs"] if each["this"]), {}) if ledger else {}
    return {
        "name": run.name,
        "task": result.get("task") or run.setting("task", "name"),
        "target": run.setting("task", "target"),
        "data": result.get("data"),
        "deployed": run.deployed,
        "mode": run.setting("privacy", "name"),
        "status": result.get("status", RUNNING if as_of else NOT_ENDED),
        "as_of": as_of,
        "reason": result.get("reason"),
        "rounds_completed": result.get("rounds_completed", len(run.rounds)),
        "rounds_planned": _planned(run),
        "clients": _clients(run),
        "cohort": result.get("cohort") or run.setting("cohort", "name"),
        "strategy": result.get("strategy") or run.setting("strategy", "name"),
        "partition": result.get("partition") or run.setting("partition", "name"),
        "rng": result.get("rng"),
        "models_averaged": result.get("models_averaged"),
        "model_sha256": run.model,
        "begun": times.get("begun"),
        "ended": times.get("ended"),
    }


def _planned(run: RunFiles) -> int | None:
    """Return the planned number of rounds: those of every arm, and those of all clients."""
    planned, tuning = run.setting("num_rounds"), run.result.get("tuning")
    if not isinstance(planned, int) or not tuning:
        return planned
    return planned + (len(tuning["arms"]) - 1) * tuning["rounds"]


def _clients(run: RunFiles) -> int | None:
    """Return the number of clients, which a server's configuration and older results lack."""
    configured = None if run.deployed else run.setting("population") or run.setting("task", "num_clients")
    return run.result.get("population") or run.saved.get("population") or configured


def _tuning(result: Fields) -> dict[str, Any] | None:
    """Return the values that arms tried, and the winner; None without tuning."""
    tuning = result.get("tuning")
    if not tuning:
        return None
    names = ("key", "rounds", "metric", "arms", "winner", "value", "scored_by", "apart")
    return {name: tuning.get(name) for name in names}


def _personal(personal: Fields) -> dict[str, Any]:
    """Return the three columns of personal models, and how many clients chose which."""
    columns = personal["columns"]
    names = [name for name in columns["personal"] if name in columns["local_only"]]
    return {
        "rows": personal["rows"],
        "columns": [
            {"name": name, "values": [means.get(name) for means in columns.values()]} for name in names
        ],
        "clients": [{"name": name, "count": count} for name, count in sorted(personal["clients"].items())],
        "worst": personal["worst"],
        "said": PERSONAL,
    }


def _rosters(result: Fields) -> list[dict[str, Any]]:
    """Return the members, a row for each roster in force; none in a simulation."""
    return [
        {name: each.get(name) for name in ("version", "hash", "round", "at", "members", "added", "removed")}
        for each in result.get("rosters", ())
    ]


# --- claimed, measured, could have shown --------------------------------------------------------------------------


def _stamps(run: RunFiles, rows: Sequence[Fields]) -> dict[str, Any]:
    """Return the first guarantee beside its measurement: claimed, measured, and the largest measurable epsilon."""
    index = main_row(rows)
    row = None if index is None else rows[index]
    audit = run.result.get("audit") or _last_look(run, rows)
    of_records = audit.get("records") if _hides_records(rows) else None
    of_unit = of_records or audit
    measured = of_unit.get("measured")
    return {
        "row": index,
        "unit": row and row["unit"],
        "whom": row and row["whom"],
        "claimed": row and {"epsilon": row["epsilon"], "delta": row["delta"]},
        "measured": measured and {**measured, "confidence": 0.95},
        "ceiling": of_unit.get("ceiling"),
        "canaries": None if of_records else audit.get("canaries"),
        "verdict": audit.get("verdict"),
        "said": _audit_sentence(audit, row) or _unmeasured(run),
    }


def _hides_records(rows: Sequence[Fields]) -> bool:
    """Return whether the first guarantee's unit is smaller than a client, so that canary records measure it."""
    index = main_row(rows)
    return index is not None and rows[index]["unit"] != "client"


def _audit_sentence(audit: Fields, row: Fields | None) -> str | None:
    """Return an audit's sentence; an older release's on a promise that nothing tested becomes that of this release."""
    if audit.get("said") != UNCLAIMED:
        return audit.get("said")
    return untested(AuditTerms(1, 1.0, own_noise="" if row is None else row["unit"]))


def _refuted(run: RunFiles, stamps: Fields) -> str | None:
    """Return the sentence in the place of a promise that the run itself, or its audit, refuted; None for any other."""
    if str(run.result.get("reason")).startswith(MIXED):
        return REFUTED
    return VIOLATED if stamps["verdict"] == "violated" else None


def _last_look(run: RunFiles, rows: Sequence[Fields]) -> dict[str, Any]:
    """Return the last measurement of an unfinished run's audit; empty before the first."""
    looks = [] if run.result else _looks(run, rows)
    if not looks:
        return {}
    last = looks[-1]
    measured = {name: last[name] for name in ("epsilon", "low", "high")}
    terms: Fields = run.audit.get("terms", {})
    canaries = None if _hides_records(rows) else terms.get("canaries")
    return {"measured": measured, "ceiling": last["ceiling"], "canaries": canaries}


def _is_audited(run: RunFiles) -> bool:
    return run.setting("audit", "name") not in (None, "off")


def _unmeasured(run: RunFiles) -> str:
    """Return why there is no sentence of an audit."""
    if not run.result and (run.audit or _is_audited(run)):
        return "the run has not ended, and its audit has no result yet"
    return "this run had no audit, so leakage was not measured"


def _looks(run: RunFiles, rows: Sequence[Fields]) -> list[dict[str, Any]]:
    """Return the audit's measurements of the first guarantee's unit."""
    before = f"{AUDIT}records/" if _hides_records(rows) else AUDIT
    return [
        {"round": row["round"], **{name: row.get(f"{before}{name}") for name in LOOK}}
        for row in run.rounds
        if row.get(f"{before}epsilon") is not None
    ]


def _audit(run: RunFiles, stamps: Fields) -> dict[str, Any] | None:
    """Return the result of the audit, its alarms and its commitment; None without an audit."""
    audit = run.result.get("audit")
    if not audit:
        return None
    records: Fields = audit.get("records") or {}
    names = ("verdict", "norm_p", "visible_shortfall", "reuse_p", "draw_p", "final_model")
    bounds: Fields = audit.get("lower_bounds") or records.get("lower_bounds") or {}
    return {
        **{name: audit.get(name) for name in names},
        "said": stamps["said"],
        "lower_bounds": [{"method": method, "epsilon": size} for method, size in bounds.items()],
        "by_heart": [
            {name: each.get(name) for name in ("name", "p_value", "shown")}
            for each in audit.get("memorisation") or ()
        ],
        "alarms": [
            {name: each.get(name) for name in ("round", "level", "test", "p_value", "action")}
            for each in audit.get("alarms", ())
        ],
        "commitment": run.audit.get("commitment"),
        "opened": run.audit.get("opened") is not None,
    }


# --- rounds and metrics -------------------------------------------------------------------------------------------


def _round(row: Fields) -> dict[str, Any]:
    """Return a metrics line as a round: `epsilon` is a client's, beside `epsilon_record`, or else a record's alone."""
    of_client, of_record = row.get("epsilon_client"), row.get("epsilon_record")
    if of_client is None:
        of_client, of_record = of_record, None
    return {
        "round": row["round"],
        "epsilon": of_client,
        "epsilon_record": of_record,
        "invited": row.get("invited"),
        "replies": row.get("replies"),
        "abandoned": bool(row.get("abandoned")),
        "clipping_norm": row.get("clipping_norm"),
        "metrics": {name: value for name, value in row.items() if is_metric(name, value)},
    }


def _last_metrics(run: RunFiles) -> Fields:
    """Return the metrics in the result, else the line of the last round."""
    return run.result.get("metrics") or (run.rounds[-1] if run.rounds else {})


def _groups(run: RunFiles) -> dict[str, Any] | None:
    """Return the figures of each group on public held-out data, a row for each group; None without groups."""
    metrics = _last_metrics(run)
    names = [name.removeprefix(GROUPS).rpartition("/") for name in metrics if name.startswith(GROUPS)]
    if not names:
        return None
    groups = dict.fromkeys(group for group, _, _ in names)
    figures = list(dict.fromkeys(figure for _, _, figure in names))
    rows = [
        {"group": group, "values": [metrics.get(f"{GROUPS}{group}/{figure}") for figure in figures]}
        for group in groups
    ]
    return {"figures": figures, "rows": rows}


def _tail(run: RunFiles) -> dict[str, Any] | None:
    """Return mean and spread of the main metric over the last rounds that led to the model; None under `MIN_TAIL` of them."""
    name, winner = main_metric(run.rounds), (run.result.get("tuning") or {}).get("winner")
    rows = [row for row in run.rounds if row.get("arm") in (None, winner)]
    values = [row[name] for row in rows if name is not None and is_metric(name, row.get(name))]
    last = values[-max(MIN_TAIL, round(TAIL * len(values))) :]
    if len(last) < MIN_TAIL:
        return None
    return {
        "rounds": len(last),
        "mean": fmean(last),
        "deviation": pstdev(last),
        "low": min(last),
        "high": max(last),
    }


# --- how to make it again -----------------------------------------------------------------------------------------


def _missing(run: RunFiles, ledger: Fields | None) -> list[str]:
    """Return what this folder cannot show, a sentence each."""
    result, history = run.result, ledger or {}
    head, close = history.get("known_head"), history.get("close")
    has_curves = all(row["epsilon"] == "infinity" or "curve" in row for row in result.get("privacy", ()))
    count = run.num_client_ledgers
    where = f"{count} ledgers of single clients" if count else "the owners' ledgers"
    is_private = run.setting("privacy", "name") != "none"
    is_sized = run.shapes or run.saved.get("parameters")
    is_cut, is_changed = head and not head["held"], close and not close["held"]
    is_open = history and result and not close
    changed = ", ".join(close["changed"]) if close else ""
    flaws = {
        "The run has not ended: it has no result, and the values shown are those of its rounds so far.": not result,
        "The release of fedveil that made this run stored one point of its guarantee, and not the curve.": not has_curves,
        f"This run has no ledger of all clients; its epsilon is charged on {where}.": is_private
        and not history,
        "The ledger does not hold the entry in the result: it was truncated, or is another ledger.": is_cut,
        "No entry of the ledger binds the files of this folder: the run was not closed.": is_open,
        f"CHANGED since the run was closed: {changed}. The files are not those that the ledger binds.": is_changed,
        "The run was not audited.": result and not _is_audited(run),
        "No round has been recorded.": not run.rounds,
        "The folder holds no model, so bytes cannot be computed.": not is_sized,
    }
    return [sentence for sentence, is_true in flaws.items() if is_true]


def _bibtex(report: Fields) -> str:
    """Return an entry of BibTeX for citing the run."""
    run, versions = report["run"], report["versions"]
    version = versions.get("fedveil", "unknown")
    head = report["ledger"]["head"]["hash"][:16] if report["ledger"] else "none"
    year = str(run["ended"])[:4] if run["ended"] else ""
    lines = [
        "@misc{fedveil-run,",
        f"  title = {{Federated model for {_plain(run['task'])}, trained with fedveil {version}}},",
        *([f"  year = {{{year}}},"] if year else []),
        f"  note = {{run {_plain(run['name'])}, ledger head {head}}},",
        "}",
    ]
    return "\n".join(lines)


def _plain(text: object) -> str:
    """Return a text without BibTeX's special characters."""
    return "".join(each for each in str(text) if each not in '{}\\"@#%' and each.isprintable())


def receipts_of(run: RunFiles) -> dict[str, Any] | None:
    """Return how many devices signed the run's files, as far as the number is public; None for a simulation."""
    if not run.deployed:
        return None
    # Where a trusted server draws in secret, only its operator may read the membership.
    public = bool(run.result) and run.result.get("seconds") is not None
    count, of_this_run = _count_receipts(run) if public else (None, None)
    rosters = run.result.get("rosters") or [{}]
    return {
        "public": public,
        "ended": bool(run.result),
        "given": count,
        "members": rosters[-1].get("members") if public else None,
        "of_this_run": of_this_run,
    }


def _count_receipts(run: RunFiles) -> tuple[int, bool | None]:
    """Return the number of receipts in the folder, and whether they match its manifest; None without a file."""
    try:
        receipts: Any = json.loads((run.folder / RECEIPTS).read_bytes())
        return len(receipts["receipts"]), receipts["manifest"] == run.manifest
    except FileNotFoundError:
        return 0, None
    except (OSError, ValueError, LookupError, TypeError):
        return 0, False


def describe_shapes(shapes: Fields | None) -> dict[str, Any] | None:
    """Return the shapes of an additive model by column and score, the widest range first; None for other models."""
    if shapes is None:
        return None
    rows = [
        _shape(shape, score, index)
        for shape in map(_flat, shapes["shapes"])
        for index, score in enumerate(shapes["scores"])
    ]
    rows.sort(key=lambda each: each["lowest"] - each["highest"])
    return {"intercept": [_round_value(each) for each in shapes["intercept"]], "shapes": rows}


def _flat(shape: Fields) -> Fields:
    """Return the shape of a pair of columns as one of words, one for each combination of levels; others as they are."""
    if "levels" not in shape:
        return shape
    first, second = (_level_names(each) for each in shape["levels"])
    words = [f"{one}, {two}" for one in first for two in second]
    return {
        **shape,
        "words": words,
        "values": [[each for row in score for each in row] for score in shape["values"]],
    }


def _level_names(level: Fields) -> list[str]:
    """Return the words of a column in a pair, or its bins as ranges."""
    if "words" in level:
        return list(level["words"])
    return [f"{low:g} to {high:g}" for low, high in pairwise(level["edges"])]


def _shape(shape: Fields, score: str, index: int) -> dict[str, Any]:
    """Return what a column adds to one score, by the edges of its bins or by its words; `index` is that of the score."""
    values = [_round_value(each) for each in shape["values"][index]]
    more = {name: shape[name] for name in ("constraint", "levels") if name in shape}
    return {
        **more,
        "column": shape["column"],
        "score": score,
        "edges": shape.get("edges"),
        "words": shape.get("words"),
        "values": values,
        "lowest": min(values),
        "highest": max(values),
        "missing": _missing_value(shape, index),
    }


def _missing_value(shape: Fields, index: int) -> float | None:
    """Return what a missing value adds to one score; None where none is missing, 0 for the rounding of a sum of float32."""
    if "missing" not in shape:
        return None
    value = shape["missing"][index]
    return _round_value(value) if abs(value) > ROUNDING * max(map(abs, shape["values"][index])) else 0.0


def _round_value(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
