"""Status of a server: its last written status, and whether it is running."""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..base.refusal import Refusal
from ..privacy.budget import Unit
from ..run.display import console_for
from ..server.round_terms import describe_fault
from ..server.run_status import OVER
from .probe import STATUS, server_runs

NOT_RUNNING = 1
DIGITS = 16  # hexadecimal, of a displayed fingerprint
NOTHING = 0.0005  # of epsilon: what rounds to 0.000


def show(folder: Path, *, as_json: bool) -> int:
    """Print the status; return 1 if no server runs on the folder and its run is not over.

    Raises:
      Refusal: no server ever ran there.
    """
    status, runs = read_status(folder), server_runs(folder)
    if as_json:
        print(json.dumps({**status, "running": runs}))
    else:
        _print(console_for(100), status, runs)
    return 0 if runs or status["state"] in OVER else NOT_RUNNING


def read_status(folder: Path) -> dict[str, Any]:
    """Return the last status of a server on this folder; refuse if there is none that is readable."""
    path = folder / STATUS
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        remedy = "no server has run there; start one with: fedveil server FOLDER task=..."
        raise Refusal("status", str(path), remedy) from error


def served_roster(folder: Path) -> int:
    """Return the roster version that a server on this folder served last; 0 if unknown. An older one is refused."""
    try:
        return int(read_status(folder)["roster"])
    except (Refusal, KeyError, TypeError, ValueError):
        return 0


def earlier_clients(folder: Path) -> dict[int, Mapping[str, Any]]:
    """Return an earlier server's facts of each node; empty if there are none that are readable."""
    try:
        return {int(each["node"]): each for each in read_status(folder)["clients"]}
    except (Refusal, KeyError, TypeError, ValueError):
        return {}


def _print(console: Console, status: Mapping[str, Any], runs: bool) -> None:
    """Print a status; `runs` says whether its server is alive."""
    state, clients = status["state"], status["clients"]
    if not runs:
        state = "killed" if state in ("training", "waiting", "starting") else state
        clients = [{**each, "since": None} for each in clients]
    reason = f": {status['reason']}" if status["reason"] else ""
    console.print(Text.assemble((status["federation"], "bold"), f", run {status['run']}: {state}{reason}"))
    lost = [("abandoned", status["abandoned"]), ("with a sum that cannot be true", status.get("untrue", 0))]
    faults = "".join(f", {count} {what}" for what, count in lost if count)
    dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(status["dropped"].items()))
    counts = f"invited {status['invited']}, added {status['replies']}"
    if status["replies"] is None:
        counts = f"{status['invited']:g} invitations planned; the run's operator.jsonl has the counts"
    suspected = status.get("suspected", {}).items()
    lines = [
        f"round {status['round']} of {status['num_rounds']}{faults}",
        *(_budget(row, status["budgets_spent"]) for row in status["privacy"]),
        *(f"audit: {sentence}" for sentence in (status.get("audit") or {}).get("said", ())),
        f"{counts}, not added: {dropped}" if dropped else counts,
        *(describe_fault(name, rows[-1], len(rows)) for name, rows in status.get("blamed", {}).items()),
        *(f"{name} {sentences[-1]}" for name, sentences in suspected),
        *authority_lines(clients),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    console.print(_table(clients) if clients else "no client is on the roster")


def authority_lines(clients: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each authority that devices report, if there are several: a rollover has not reached all of them."""
    members: dict[str, list[str]] = {}
    for each in clients:
        if each.get("authority"):
            members.setdefault(each["authority"], []).append(each["name"])
    if len(members) < 2:
        return []
    return [f"authority {key[:DIGITS]}: {len(names)}, {', '.join(names)}" for key, names in members.items()]


def _budget(row: Mapping[str, Any], refused: int) -> str:
    """Return a line on one unit's budget; `refused` clients reported theirs as spent."""
    unit, target = f"{row['unit'].partition('_')[0]}s", row["target"]
    of, limit = "no target", "without a target"
    if target is not None:
        of, limit = f"{target:g}", f"at most epsilon {target:g}"
    if row.get("own_ledgers", row["unit"] != Unit.CLIENT):
        spent_clause = f"; in the last round {refused} reported theirs as spent" if refused else ""
        return f"{unit}: each client spends {limit} by its own ledger{spent_clause}"
    if row["spent"] is None:
        return f"{unit}: no round has ended yet; {limit} at delta {row['delta']:g}"
    spent = row["spent"] if isinstance(row["spent"], str) else f"{row['spent']:.3f}"
    left_clause = ""
    if row["left"] is not None:
        left_clause = f", {row['left']:.3f} left" if row["left"] >= NOTHING else ", nothing left"
    return f"{unit}: epsilon {spent} of {of} spent at delta {row['delta']:g}{left_clause}"


def _table(clients: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("node", "client", "connected", "certificate", "version", "suites"):
        table.add_column(column, justify="right" if column == "node" else "left")
    for each in clients:
        ends = each.get("certificate_ends")
        version, suites = each.get("version") or "-", each.get("suites") or ()
        table.add_row(
            str(each["node"]),
            Text(each["name"]),
            _presence(each),
            _until(ends) if ends else "-",
            Text(version),
            ", ".join(map(str, suites)) or "-",
        )
    return table


def _presence(client: Mapping[str, Any]) -> str:
    """Return how long a client is connected, or when it was last."""
    if client.get("restored"):
        return "[red]restored or copied[/red]"
    if client["since"] is not None:
        return f"for {_ago(client['since'])}"
    return f"{_ago(client['seen'])} ago" if client.get("seen") else "-"


def _until(end: str) -> str:
    """Return how many days a certificate is still valid."""
    seconds_left = datetime.fromisoformat(end).timestamp() - time.time()
    return "[red]ended[/red]" if seconds_left < 0 else f"{seconds_left / 86400:.0f} d left"


def _ago(start: str) -> str:
    """Return the time since a moment in the largest unit of which it has one."""
    seconds = max(0.0, time.time() - datetime.fromisoformat(start).timestamp())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
