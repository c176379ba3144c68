"""Device commands beside its agent: status, roster, forget, uninstall."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...base.durable_files import replace_file
from ...base.refusal import Refusal
from ...configs.bundle_files import ROLLOVERS, ROSTER, read_signed_roster, read_toml
from ...links.device_answers import PAID, UNPAID, Journal
from ...messages.training_order import display_name
from ...privacy.budget import Budget
from ...privacy.ledger.question_caps import LedgerQuestion
from ...privacy.secagg.roster_change import change_between
from ...privacy.statistics.inquiry import CLIPPED
from ...server.query_rows import FIRST_ROW
from ..probe import AGENT_LOCK
from . import agent, ledger_heads, owner_roles, roster_changes
from .authority import WAITING, describe_rollover, new_fingerprint
from .authority import pending_rollovers as waiting_rollovers
from .client_bundle import POLICY, read_client_bundle, read_device_file
from .cosignature import write_cosignature
from .device import device_name
from .device_ledger import DeviceLedger, LedgerSpending, questions_of, spent_on
from .ledger_heads import LEDGERS, RECEIPTS
from .order_policy import DEALS
from .owner_decisions import OwnerDecision, OwnerVerdict
from .owner_desk import read_desk, require_role, summary
from .owner_policy import OwnerPolicy
from .owner_query import query_in_json, query_line
from .owner_requests import ROSTER as ROSTER_REQUEST
from .run_end import OWN_MODEL, LastRun, read_ended, sha256_of_final

if TYPE_CHECKING:
    from ...personal.state import OwnModel

NOT_RUNNING, REFUSED = 1, 2
JSON_KEYS = {"reason": "why", "segments": "asked", "time": "when"}  # of a question, which programs read
# Files of the state that are never forgotten: a revoked member stays so, an answered instruction is not answered again, a
# replaced authority does not return, and the page stays locked.
ROSTERS = {ROSTER, roster_changes.CHANGES, roster_changes.PENDING, roster_changes.PENDING_ROSTER}
LASTING = ROSTERS | {agent.JOURNAL, ROLLOVERS, WAITING, owner_roles.FILE}
# The ledgers, and what goes with them: without it an owner opens no receipt of them, a run may have the device in a second
# arm, and the device does not notice an older copy of a ledger.
WITH_LEDGERS = {LEDGERS, RECEIPTS, DEALS, ledger_heads.FILE}
UNIT = "fedveil-client.service"
UNIT_FOLDER = Path("/etc/systemd/system")
STOP_SECONDS = 60.0
POLL_SECONDS = 0.1
WHAT_LEDGERS_ARE = (
    "the ledgers record the epsilon that this device's data have spent: without them the record starts at zero, "
    "although past releases cannot be undone"
)


def status(folder: Path, as_json: bool) -> int:
    """Print the device's state; return 1 if its agent does not run."""
    state = state_of(folder)
    pid, health, ended = agent.running(state), agent.read_health(state), read_ended(state)
    waiting, changes = roster_changes.pending(state), roster_changes.changes(state)
    rollovers = waiting_rollovers(state, read_device_file(folder).federation)
    paths = sorted((state / LEDGERS).glob("*.ledger"))
    spent, own = spent_on(state / LEDGERS), _own_model(state)
    questions, owner = [each for path in paths for each in questions_of(path)], summary(folder)
    if as_json:
        plain = {} if health is None else asdict(health)
        over = None if ended is None else {**asdict(ended), "model": _model(state, ended)}
        more = {
            "running": pid is not None,
            "ended": over,
            "ledgers": {name: _spending_in_json(each) for name, each in spent.items()},
            "questions": [{JSON_KEYS.get(k, k): v for k, v in asdict(each).items()} for each in questions],
            "roster_pending": None if waiting is None else asdict(waiting),
            **owner,
            "roster_changes": [asdict(each) for each in changes],
            **({} if own is None else {"personal": _own_in_json(state, own)}),
            **_query_in_json(folder),
            "authority_pending": new_fingerprint(rollovers[-1]) if rollovers else None,
        }
        print(json.dumps({**plain, **more}))
    else:
        print(_status_lines(folder, health, pid is not None, spent))
        if owner["paused"]:
            print(f"paused by its owner; to go on: fedveil client resume {folder}")
        if owner["waiting"]:
            print(f"requests wait for a decision: fedveil client pending {folder}")
        if ended is not None:
            model = _model(state, ended)
            print(f"{ended}; {f'its model: {model}' if model else 'it left no model'}")
        if own is not None:
            print(_own_model_line(state, own))
        for each in questions:
            print(_question_line(each))
        for each in changes[-1:]:
            print(f"last change, {each.at}: {each}")
        if waiting is not None:
            print(f"waits: {waiting}")
        if rollovers:
            print(
                f"waits (fedveil client authority {folder} --approve FINGERPRINT): {describe_rollover(rollovers[-1])}"
            )
    return NOT_RUNNING if pid is None else 0


def _query_in_json(folder: Path) -> dict[str, Any]:
    """Return the query of a device, if its bundle can be used and has one."""
    with suppress(Refusal):
        choice, policy = read_device_file(folder).task, read_toml(OwnerPolicy, folder / POLICY)
        return {} if choice.query is None else {"query": query_in_json(choice, policy)}
    return {}


def roster(
    folder: Path,
    version: int | None = None,
    sign: Path | None = None,
    reason: str | None = None,
    *,
    as_json: bool = False,
) -> int:
    """Print the members that the device may be summed with, and their changes; or approve or sign a change.

    Arguments as of `fedveil client roster`.

    Raises:
      Refusal: the bundle cannot be used, no such version waits, or the roster in the file is not to be signed.
    """
    if version is not None:
        _approve_roster(folder, version, reason)
        return 0
    bundle = read_client_bundle(folder)
    if sign is not None:
        new_roster, _ = read_signed_roster(sign, *bundle.authority.keys(time.time()))
        written = write_cosignature(bundle, new_roster)
        print(change_between(bundle.identity.roster, new_roster))
        print(f"signed: send {written} to the holder of the authority")
        return 0
    current, peers = bundle.identity.roster, bundle.identity.policy.peers
    waiting, changes = roster_changes.pending(bundle.state), roster_changes.changes(bundle.state)
    if as_json:
        members = [
            {"name": m.name, "node": m.node, "fingerprint": m.fingerprint, "vouched": m.fingerprint in peers}
            for m in current.members
        ]
        plain = {"version": current.version, "hash": current.hash.hex(), "members": members}
        pending = None if waiting is None else asdict(waiting)
        print(json.dumps({**plain, "pending": pending, "changes": [asdict(each) for each in changes]}))
        return 0
    print(f"version {current.version}, hash {current.hash.hex()}")
    width = max(len(member.name) for member in current.members)
    for member in current.members:
        note = "this device" if member.node == bundle.settings.node else ""
        if member.fingerprint in peers:
            note = "vouched for"
        print(f"  {member.name:{width}}  {member.fingerprint}  {note}".rstrip())
    for each in changes:
        print(f"{each.at}  {each}")
    if waiting is not None:
        demands = [f"--approve {waiting.version}"] * bundle.policy.approve_rosters
        if least := bundle.policy.cosigned_by_at_least:
            demands.append(f"{least} signatures of others")
        if least := bundle.policy.peers_at_least:
            demands.append(f"{least} of [peers]")
        print(f"waits ({', '.join(demands)}): {waiting}")
    return 0


def _approve_roster(folder: Path, version: int, reason: str | None) -> None:
    """Record the owner's approval of the roster that waits; the bundle may not be usable before it."""
    state, policy = state_of(folder), read_toml(OwnerPolicy, folder / POLICY)
    waiting = roster_changes.waiting_for(state, version)
    approval = OwnerDecision(OwnerVerdict.APPROVED, ROSTER_REQUEST, f"version {version}", waiting.hash)
    require_role(read_desk(folder), approval)
    ledger = DeviceLedger(state / LEDGERS, device_name(read_device_file(folder)), policy.cap)
    ledger.record_approval(waiting.version, waiting.hash, reason)
    roster_changes.approve(state, waiting.hash)
    print(f"approved: {waiting}")


def _spending_in_json(spending: LedgerSpending) -> dict[str, float] | None:
    """Return a ledger's spending as plain data; None if nothing was spent."""
    if spending.spent is None:
        return None
    as_client = {"as_client": spending.as_client} if spending.as_client else {}
    return spending.spent._asdict() | as_client


def own_model_text(state: Path) -> str:
    """Return what stands of the device's own model, with its figures here, in words; empty if it has none."""
    own = _own_model(state)
    return "" if own is None else _own_model_line(state, own)


def _own_model(state: Path) -> OwnModel | None:
    """Return the device's own model; None if it has none, or its file is damaged, which the agent mends."""
    if not (state / OWN_MODEL).is_file():  # then the extension need not be here
        return None
    from ...personal.state import read_own

    with suppress(Refusal):
        return read_own(state / OWN_MODEL)
    return None


def _own_in_json(state: Path, own: OwnModel) -> dict[str, object]:
    """Return what stands of the own model as plain data."""
    return {"run": own.run, "stands": own.shared == sha256_of_final(state), **asdict(own.choice)}


def _own_model_line(state: Path, own: OwnModel) -> str:
    """Return which own model stands, with its figures: they are private, and this is the owner's screen."""
    from .own_models import describe, describe_figures

    later = "" if own.shared == sha256_of_final(state) else ", until one of the later final model is made"
    line = f"own model, of run {own.run}: {describe(own.choice)}{later}"
    figures = describe_figures(own.choice)
    return f"{line}; {figures}" if figures else line


def _question_line(question: LedgerQuestion) -> str:
    """Return one line with a question, its purpose and its cost."""
    reason = f" ({question.reason})" if question.reason else ""
    figures = ", ".join(each for each in question.segments if not each.endswith(f": {CLIPPED}"))
    void = question.state == "void"
    cost = "cost nothing: no answer was made" if void else f"cost epsilon {question.epsilon:.3g}"
    return f"{question.time}  question {question.name}, for {', '.join(question.purposes)}: {figures}{reason}; {cost}"


def _model(state: Path, ended: LastRun) -> str | None:
    """Return the path of a finished run's model; None if it left none."""
    return str(state / ended.model) if ended.model else None


def _status_lines(
    folder: Path, health: agent.Health | None, is_running: bool, spent: dict[str, LedgerSpending]
) -> str:
    """Return lines on the agent's state, its last answer, what its ledgers have spent, and its owner's budget."""
    if health is None:
        history = "no run is recorded" if spent else "never started"
        parts = [f"{folder}: starting" if is_running else f"{folder}: {history}"]
    else:
        state = health.state if is_running else "not running"
        parts = [f"{health.name}, node {health.node} of {health.federation}: {state}"]
    if health is not None and health.at:
        ago = time.time() - datetime.fromisoformat(health.at).timestamp()
        parts.append(
            f"{_describe_row(health.round)} of {display_name(health.run) or '?'} {health.outcome} {ago:.0f} s ago"
        )
    for name, each in spent.items():
        unit = "as a client" if name.startswith("client-") else "by its records"
        size = f"epsilon {each.spent.epsilon:.3g} at delta {each.spent.delta:g}" if each.spent else "nothing"
        if each.as_client:
            size += f", of which sums of the whole client would spend {each.as_client:.3g} alone"
        parts.append(f"spent {unit}: {size}")
    with suppress(Refusal):  # a policy that cannot be used is the agent's to refuse
        allowed = read_toml(OwnerPolicy, folder / POLICY)
        until = "" if allowed.until is None else f" until {allowed.until}"
        parts.append(
            f"owner's budget: epsilon {allowed.target_epsilon:g} at delta {allowed.target_delta:g}{until}"
        )
        if (choice := read_device_file(folder).task).query is not None:
            parts.append(query_line(choice, allowed))
    return "\n  ".join(parts)


def _describe_row(number: int) -> str:
    """Return what a device was asked, by its row of a run: those of evaluations and scaling lie beyond those of rounds."""
    if number < FIRST_ROW:
        return f"round {number}"
    return f"evaluation after round {number % FIRST_ROW}" if number % FIRST_ROW else "scaling"


def forget(folder: Path, ledgers: bool, restored: bool = False) -> int:
    """Remove the device's state except `LASTING`, and its ledgers only if `ledgers`; charge a restored device first."""
    if restored and ledgers:
        raise Refusal("--ledgers", ledgers, "a restored device keeps its ledgers; leave out one of both")
    state = state_of(folder)
    with agent.exclusive_lock(state):
        budget = _charge_restore(folder, state) if restored else None
        _empty(state, LASTING if ledgers else LASTING | WITH_LEDGERS)
        if restored:
            ledger_heads.store_heads(state)
            replace_file(state / agent.JOURNAL, f"{PAID}\n".encode())
    print(f"{state}: forgotten{_ledgers_clause(state, ledgers)}")
    if budget is not None:
        print(
            f"charged what it may have missed: all of its budget, epsilon {budget.target_epsilon:g} at delta "
            f"{budget.target_delta:g}; to go on, its owner raises target_epsilon in {folder / POLICY}"
        )
    return 0


def _charge_restore(folder: Path, state: Path) -> Budget:
    """Charge a restore; only once if the command is interrupted or repeated before the device meets its server."""
    bundle = read_client_bundle(folder)
    journal = Journal(state / agent.JOURNAL)
    is_repeated = journal.restore is not None  # then an earlier command noted it, and may have charged it
    if not is_repeated:
        journal.note(UNPAID)
    journal.close()
    ledger = DeviceLedger(bundle.state / LEDGERS, device_name(bundle.settings), bundle.policy.cap)
    return ledger.charge_restored(is_repeated)


def uninstall(folder: Path, yes: bool, ledgers: bool) -> int:
    """Stop the agent; remove its unit, bundle and state, ledgers only if `ledgers`. Without `yes`, only describe this."""
    state = state_of(folder)
    if not yes:
        print(
            f"would stop the agent and remove {folder}, its keys and {state}; confirm with --yes. The device then needs "
            f"new keys to take part{_ledgers_clause(state, ledgers)}",
            file=sys.stderr,
        )
        return REFUSED
    _remove_unit(folder)
    _stop(state)
    with agent.exclusive_lock(state):
        _empty(state, set() if ledgers else WITH_LEDGERS)
        for path in folder.iterdir():
            if not state.resolve().is_relative_to(path.resolve()):
                _remove(path)
        (state / f"{AGENT_LOCK}.lock").unlink(missing_ok=True)
    for path in (state, folder):
        with suppress(OSError):  # ledgers, or what is not ours
            path.rmdir()
    print(f"{folder}: uninstalled{_ledgers_clause(state, ledgers)}")
    return 0


def state_of(folder: Path) -> Path:
    """Return the state folder of a bundle's device. Refusal if `folder` holds no client's bundle."""
    return folder / read_device_file(folder).state


def _ledgers_clause(state: Path, ledgers: bool) -> str:
    """Return a clause that says whether the ledgers are removed as well, or where they stay."""
    folder = state / LEDGERS
    if ledgers:
        return f"; its ledgers as well ({WHAT_LEDGERS_ARE})"
    return f"; the ledgers stay in {folder}" if folder.exists() else ""


def _empty(state: Path, excepted: Collection[str]) -> None:
    """Remove all files of the state folder except these, and except the lock that this process holds."""
    for path in state.iterdir():
        if path.name != f"{AGENT_LOCK}.lock" and path.name not in excepted:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _stop(state: Path) -> None:
    """End the device's agent, if one runs, and wait until it has ended."""
    pid = agent.running(state)
    if pid is None:
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while agent.running(state) is not None:
        if time.monotonic() > deadline:
            raise Refusal("client", str(state), f"process {pid} does not end; kill it, then uninstall again")
        time.sleep(POLL_SECONDS)


def _remove_unit(folder: Path) -> None:
    """Disable and remove the unit that was copied from this bundle."""
    shipped, installed = folder / UNIT, UNIT_FOLDER / UNIT
    if not installed.exists() or not shipped.exists() or shipped.read_bytes() != installed.read_bytes():
        return
    if systemctl := shutil.which("systemctl"):
        subprocess.run([systemctl, "disable", "--now", UNIT], check=False)
    installed.unlink()
