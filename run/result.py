"""Result of a run: its model, its figures and its curve, and the close that binds them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.durable_files import replace_file
from ..base.refusal import disk_remedy
from ..base.tensor_file import safetensors_parts
from ..configs.privacy_settings import record_level
from ..configs.round_line import OF_THE_ROUND
from ..configs.settings import publishable_keys
from ..configs.task_settings import CustomTask
from ..messages.traffic import Carried
from ..modes.federation import Federation
from ..privacy.budget import Budget
from ..privacy.ledger.ledger import Head, Ledger, LedgerUnavailable, read_entries
from ..server import noise_key
from ..server.checkpoint import State
from ..server.rounds import Ending
from ..server.run_status import Status
from .acts import write_refusal
from .average import early_of
from .curve import curve
from .files import AUDIT_KEY, CURVE, FAREWELL, MANIFEST, MODEL, RESULT, SAVED, SCALING, locate_ledger
from .final_model import final_model
from .learning_rate import rise_of
from .manifest import TASK_FILES, manifest_of, write_manifest
from .prepared_run import Run
from .progress import Progress, save
from .report import encryption, record_by_sums, spent, versions
from .round_lines import History, RoundsOfArm, drops_in, members_in, tell_operator
from .run_files import TOTALS
from .tuning import tuning_result

if TYPE_CHECKING:
    from .machine_time import MachineTime

# An interrupted or paused run is resumed. A failed one may be resumed, and is then closed again.
CLOSED = (Status.COMPLETED, Status.EXHAUSTED, Status.ALARMED, Status.FAILED)
ANY = 1.0  # epsilon, and twice the delta, of a budget to open a ledger with that is not charged


def finish(
    progress: Progress,
    ending: Ending,
    used: MachineTime,
    title: str,
    metrics: Mapping[str, float],
    confusion: Sequence[Sequence[int]] | None,
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """Write model, result and curve, close the run and return the result; if one cannot be written, the run has failed.

    Args:
      progress: the run's progress after its last round.
      ending: how the run ended, and with which state.
      used: time and energy of this process.
      title: one line above the pictures.
      metrics: metrics of a released model that is an average, or was not measured after its round; else empty.
      confusion: confusion matrix of the released model on public held-out examples; None without classes.
      fields: fields that queries of the released model add; `metrics` among them join the run's.
    """
    run, costs = progress.run, _costs(progress, used)
    if run.ledger is not None:
        with suppress(LedgerUnavailable):  # of notes only: what was reserved stays spent
            write_refusal(run, ending)
            run.ledger.settle()
    result = _result(progress, ending, costs)
    last = progress.history.last
    result["early"] = early_of(last, metrics, result["models_averaged"])
    joined = {**metrics, **fields.get("metrics", {})}
    result |= {**fields, "metrics": result["metrics"] | joined}
    if confusion is not None:
        result["confusion"] = confusion
    try:
        if run.federation.mode.hides_counts:
            tell_operator(run.folder, {key: costs[key] for key in ("records", *TOTALS)})
        save(progress, ending.state, progress.remembered)
        result["audit"] = progress.observer.end(ending, title)
        write_results(progress, ending.state, result, title)
        if ending.status in CLOSED:
            close_run(run)
        if ending.status in (Status.COMPLETED, Status.EXHAUSTED, Status.ALARMED):
            noise_key.erase(run.folder)
            noise_key.erase(run.folder, AUDIT_KEY)
    except (OSError, LedgerUnavailable) as problem:
        if ending.status is not Status.FAILED:
            result |= {"status": str(Status.FAILED), "reason": cannot_write(progress, problem)}
    return result


def cannot_write(progress: Progress, problem: OSError | LedgerUnavailable) -> str:
    """Return the sentence for a run whose folder or ledger can no longer be written."""
    text = (isinstance(problem, OSError) and problem.strerror) or str(problem)
    again = progress.run.federation.population.resumption(progress.run.folder)
    remedy = disk_remedy(problem) or "mend it"
    return f"stopped after round {progress.state.round}: {text}; {remedy}, then {again} goes on from there"


def _result(progress: Progress, ending: Ending, costs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of result.json; `costs` are left out where only the operator may know them."""
    run, history, state = progress.run, progress.history, ending.state
    federation, ledger = run.federation, run.ledger
    hides = federation.mode.hides_counts
    rounds = (row for row in history if row["round"] <= state.round)
    final = max(rounds, key=itemgetter("round"), default=dict[str, Any]())
    return {
        "status": str(ending.status),
        "reason": ending.reason,
        "rounds_completed": state.round,
        "rounds_abandoned": sum(bool(row.get("abandoned")) for row in history),
        "rounds_untrue": sum(bool(row.get("untrue")) for row in history),
        "blamed": members_in(history, "blamed"),
        "suspected": members_in(history, "suspected"),
        "data": federation.population.words.data,
        "rng": federation.randomness.kind,
        **_configured(federation),
        "privacy": _privacy(progress, state),
        "record_by_sums": record_by_sums(federation, ledger) if federation.reported else None,
        "evaluations": [row["evaluation"] for row in history if "evaluation" in row],
        **_scaling(run),
        "secagg": encryption(federation),
        "rosters": _rosters(run),
        "audit": None,
        "message_bytes": final.get("message_bytes"),
        "tuning": tuning_result(run, state, history),
        "rise": rise_of(_rounds_of_model(history, state), federation.settings) if history else None,
        "models_averaged": max(1, state.average.models),
        "metrics": {
            k: v for k, v in final.items() if isinstance(v, float) and not k.startswith(OF_THE_ROUND)
        },
        "seed": federation.seed,
        "noise_multiplier": run.privacy.plan.noise_multiplier if run.privacy else None,
        "ledger": str(ledger.path) if ledger else run.client_ledgers.folder,
        "ledger_head": list(head_before_close(ledger, run.name)) if ledger else None,
        "folder": str(run.folder),
        "versions": versions(),
        **(dict.fromkeys(costs) if hides else costs),
    }


def _costs(progress: Progress, used: MachineTime) -> dict[str, Any]:
    """Return the parts of a result that depend on the cohorts, and count the bytes so far as reported."""
    progress.reported_bytes = progress.tally.total()
    traffic = progress.before + progress.reported_bytes
    return {
        "records": progress.run.client_ledgers.spending(progress.meter.took_part),
        "dropped": drops_in(progress.history),
        "seconds": round(used.wall, 3),
        "cpu_seconds": round(used.cpu, 3),
        "joules": None if used.joules is None else round(used.joules, 1),
        "bytes": {"source": progress.run.federation.population.words.traffic, **traffic.to_json()},
    }


def _configured(federation: Federation) -> dict[str, Any]:
    """Return the names of the configuration's groups, and the number of clients."""
    s = federation.settings
    task = publishable_keys(s.source)["task"]
    custom = {name: task.get(name) for name in ("target", "args") if isinstance(s.task, CustomTask)}
    return {
        "task": federation.task_name,
        **custom,
        "population": federation.declared_clients,
        "cohort": s.cohort.name,
        "strategy": s.strategy.target or s.strategy.name,
        "learning_rate": s.local_training.learning_rate,
        **({"max_grad_norm": level.clip} if (level := record_level(s.privacy)) else {}),
        "partition": s.partition.name,
        "budget_runs": s.budget.runs,
    }


def _privacy(progress: Progress, state: State) -> list[dict[str, Any]]:
    """Return the rows of what was spent by the end; for the meter of secret cohorts, count a round that failed."""
    run, federation = progress.run, progress.run.federation
    if not federation.reported:
        return []
    settings, ledgers = federation.settings, run.client_ledgers
    num_drawn = min(state.round + 1, settings.steps)  # rounds; clients of one that failed were drawn, too
    draws = ledgers.open_draws(settings.rounds_begun(num_drawn))
    secret = progress.meter.secret_events(state.round >= settings.steps)
    return spent(federation, run.ledger, ledgers.files(), draws, secret)


def _scaling(run: Run) -> dict[str, Any]:
    """Return the clients' answer on scaling and its cost; empty without the question."""
    moments = run.federation.moments
    if moments is None:
        return {}
    record = json.loads((run.folder / SCALING).read_text(encoding="utf-8"))
    scales = {name: {"mean": pair[0], "deviation": pair[1]} for name, pair in moments.items()}
    columns = {column["name"]: scales.get(column["name"]) for column in record["question"]["ask"]}
    price = {key: record[key] for key in ("epsilon", "noise_multiplier", "released")}
    return {"scaling": {"columns": columns, **price}}


def _rosters(run: Run) -> list[dict[str, Any]]:
    if not run.federation.population.rosters:
        return []
    from .rosters_in_force import roster_rows  # of real clients alone

    return roster_rows(run.folder, names=not run.federation.mode.hides_counts)


def _rounds_of_model(history: History, state: State) -> RoundsOfArm:
    """Return the rounds that led to the model; with arms, those of the winner, or of the last arm."""
    return RoundsOfArm(history, state.winner or history.last.get("arm"))


def write_results(progress: Progress, state: State, result: dict[str, Any], title: str) -> None:
    """Write model, result and, last, the curve."""
    folder = progress.run.folder
    arrays = final_model(progress.run.federation.task, state)
    model = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    replace_file(folder / MODEL, safetensors_parts(model), mode=None)
    finite = {name: value if math.isfinite(value) else None for name, value in result["metrics"].items()}
    text = json.dumps({**result, "metrics": finite}, indent=2) + "\n"
    replace_file(folder / RESULT, text.encode(), mode=None)
    if progress.history and progress.run.federation.reported:
        picture = curve(_rounds_of_model(progress.history, state), result["privacy"], title)
        if picture:
            picture.save(folder / CURVE)


def close_run(run: Run) -> None:
    """Close the run unless a disk error has shut its ledger; `fedveil verify` reports that it was not closed."""
    if run.ledger is None or run.ledger.is_open:
        close(run.folder, run.ledger, run.client_ledgers.final_heads() if run.federation.simulated else {})


def note_farewell(folder: Path, carried: Carried, *, secret: bool) -> None:
    """Record the traffic after a run was closed: its final model, and receipts; only for the operator if it is secret."""
    if secret:
        return tell_operator(folder, {"farewell": carried.to_json()})
    replace_file(folder / FAREWELL, (json.dumps(carried.to_json()) + "\n").encode(), mode=None)


def head_before_close(ledger: Ledger, run: str) -> Head:
    """Return a ledger's head before the close of this run, so that repeating a finished run gives the same result."""
    entry = ledger.closed(run)
    if entry is None or entry.head != ledger.head:
        return ledger.head
    return Head(entry.seq - 1, entry.prev_hash)


def close(folder: Path, ledger: Ledger | None, heads: Mapping[str, Head]) -> None:
    """Write a run's manifest, and its hash as the run's last entry on the ledger.

    Args:
      folder: folder of the run, which holds its result.
      ledger: ledger of the run, open; None where it has none of its own.
      heads: heads of the clients' own ledgers, where a simulation holds them.

    Raises:
      OSError: the folder cannot be written.
      LedgerUnavailable: the ledger cannot.
    """
    manifest = manifest_of(folder, heads)
    write_manifest(folder, manifest)
    if ledger is not None:
        ledger.close_run(manifest.run, manifest.hash, manifest.status)


def close_again(folder: Path) -> None:
    """Close a run, by its folder, whose process ended between its result and its close; do nothing for any other.

    Raises:
      Refusal: its ledger cannot be read or written.
    """
    saved, result = (json.loads((folder / name).read_bytes()) for name in (SAVED, RESULT))
    path = None if result["ledger"] is None else locate_ledger(folder, result["ledger"])
    if TASK_FILES not in saved or Status(result["status"]) not in CLOSED:
        return  # made before runs were closed, or paused
    noise_key.erase(folder)
    noise_key.erase(folder, AUDIT_KEY)
    if path is None or not path.is_file():  # charged on no ledger of its own
        if not (folder / MANIFEST).exists():
            close(folder, None, {})
        return
    identity: dict[str, Any] = json.loads(read_entries(path)[0].payload)
    budget = Budget(identity["unit"], ANY, ANY / 2, adjacency=identity["adjacency"])
    with Ledger.open(path, budget, owner=identity["owner"], simulated=identity["simulated"]) as ledger:
        if ledger.closed(saved["run"]) is None:
            close(folder, ledger, {})
