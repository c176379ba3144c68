"""Verbs of `fedveil client`: a device that enrols, runs, is shown to its owner, and is removed."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.refusal import Refusal, refusing
from .grammar import (
    GROUP,
    Bundle,
    Json,
    PagePort,
    Probe,
    Reason,
    allow_local_modules,
    argument,
    flag,
    option,
    port_of,
    verb,
)
from .table_source import Encoding, Query, tables_at

if TYPE_CHECKING:
    from ..deployment.device.authority import TrustedAuthority

group = typer.Typer(**GROUP)
APPROVALS = "authorities.jsonl"  # in the state folder: who approved what authority, and why
MIN_SHOWN = 5e-5  # least contribution to a score that an explanation shows
FORKED = NOT_YET = 1  # exit codes
STANDARD_INPUT = Path("-")
PASSPHRASE = "FEDVEIL_PASSPHRASE"  # environment variable
Ledgers = Annotated[
    bool, flag("--ledgers", "Remove the ledgers too: the record of the spent budget is then lost.")
]

Why = Annotated[str, option("TEXT", "Reason, recorded with the decision on the device's ledger.", "--reason")]
Role = Annotated[str, option("ROLE", "Role of the decision: ", "--role", words=("owner", "officer"))]
Request = Annotated[str, argument("ID", "Id of the request, as fedveil client pending shows it.")]


@verb(group, "enrol", "Enrol this device by token.", needs="client")
def enrol(
    token: Annotated[
        str,
        argument(
            "TOKEN", "File of the operator's token; - for standard input. Others can see a token itself."
        ),
    ],
    folder: Annotated[Path, argument("FOLDER", "Folder of the new bundle.", file_okay=False)],
    wait: Annotated[
        float | None, option("SECONDS", "Time to wait for the authority; no limit by default.")
    ] = None,
) -> int:
    """Make this device's keys, get them admitted, and complete its bundle. Exit code 1 if no answer has come yet.

    Example:
      fedveil client enrol cleveland.token hearts-cleveland
    """
    from ..base.core_dumps import without_core_dumps
    from ..deployment.device import enrol as device
    from ..links.enrolment.token import read_token

    without_core_dumps()
    say = partial(print, flush=True)
    seconds = float("inf") if wait is None else wait
    if device.enrol(read_token(_token_in(token)), folder, wait=seconds, notify=say):
        print(f"enrolled; start it with: fedveil client start {folder}")
        return 0
    say("not admitted yet; repeat the command to continue")
    return NOT_YET


def _token_in(text: str) -> str:
    """Return the token that an argument names: a line of standard input for -, a file's content, or the argument itself."""
    from ..configs.bundle_files import read_secret
    from ..links.enrolment.token import SCHEME

    if text == str(STANDARD_INPUT):
        return sys.stdin.readline()
    if os.path.isfile(text):
        return read_secret(Path(text)).decode(errors="replace")
    if not text.startswith(f"{SCHEME}:"):
        remedy = f"is no file, and no token, which begins with {SCHEME}:; give the token's file, or -"
        raise Refusal("token", "what was given", remedy)  # the text itself may be a token with a mistake
    print("warning: the process list shows the token to all users; give its file, or -", file=sys.stderr)
    return text


@verb(group, "request", "Make a device's keys.", needs="client")
def request(
    folder: Annotated[Path, argument("FOLDER", "Folder for the keys.", file_okay=False)],
    name: Annotated[str, option("NAME", "Name of the client in federation.yaml.")],
    as_json: Json = False,
) -> int:
    """Make a device's keys on the device, and a request to admit them.

    Example:
      fedveil client request harbour --name harbour
    """
    from ..deployment.device.enrolment import write_request

    path = write_request(folder, name)
    message = f"send {path} to the operator; the keys stay on the device"
    print(json.dumps({"request": str(path)}) if as_json else message)
    return 0


@verb(group, "start", "Run the client until SIGTERM.", needs="client")
def start(
    folder: Bundle,
    once: Annotated[bool, flag("--once", "Exit when a run ends.")] = False,
    page: Annotated[bool, flag("--page", "Serve the owner's page, on this machine only.")] = False,
    page_port: PagePort = None,
) -> int:
    """Run the client until SIGTERM. The final model of a run is saved in the bundle's state folder.

    Example:
      fedveil client start hearts/clients/cleveland
      fedveil client start hearts/clients/cleveland --page
    """
    from ..deployment.device import agent

    port = port_of(page, page_port)
    if port is None:
        return agent.start(folder, once=once)
    from ..deployment.owner_page.serve import page_beside  # only a device with a page needs it

    with page_beside(folder, port):
        return agent.start(folder, once=once)


@verb(group, "page", "Serve the owner's page.", needs="client")
def page(folder: Bundle, page_port: PagePort = None) -> int:
    """Serve the owner's page on this machine until Ctrl-C: requests, spending, decisions. The client need not run.

    Example:
      fedveil client page hearts/clients/cleveland
    """
    from ..deployment.owner_page.serve import serve_here

    return serve_here(folder, page_port or 0)


@verb(group, "passphrase", "Set a passphrase of the page.", needs="client")
def passphrase(
    folder: Bundle,
    role: Annotated[str, option("ROLE", "Role: ", "--role", words=("owner", "officer"))] = "owner",
) -> int:
    """Set the passphrase of a role, read from FEDVEIL_PASSPHRASE or the terminal. Then the page asks for one.

    Example:
      fedveil client passphrase hearts/clients/cleveland --role officer
    """
    from ..deployment.device.commands import state_of
    from ..deployment.device.owner_roles import set_passphrase

    set_passphrase(state_of(folder), role, _new_passphrase())
    print(f"the {role} has a passphrase; the page now asks for one")
    return 0


def _new_passphrase() -> str:
    """Return a passphrase from FEDVEIL_PASSPHRASE, or typed twice at a terminal."""
    first = _passphrase()
    if not os.environ.get(PASSPHRASE) and _passphrase("the same again: ") != first:
        raise Refusal("passphrase", "two", "they differ; type the same twice")
    return first


def _passphrase(prompt: str = "passphrase: ") -> str:
    """Return a passphrase from FEDVEIL_PASSPHRASE, or typed at a terminal."""
    from getpass import getpass

    if text := os.environ.get(PASSPHRASE):
        return text
    if not sys.stdin.isatty():
        raise Refusal("passphrase", "", f"there is no terminal; set {PASSPHRASE}")
    return getpass(prompt)


@verb(group, "status", "Show the state of the device.", needs="client")
def status(folder: Bundle, as_json: Json = False, probe: Probe = False) -> int:
    """Show the state of the device and the changes of its roster. Exit code 1 if its agent does not run.

    Example:
      fedveil client status hearts/clients/cleveland
    """
    if probe:
        from ..deployment.probe import client_is_well

        return int(not client_is_well(folder))
    from ..deployment.device.commands import status

    return status(folder, as_json)


@verb(group, "pending", "Show what waits for the owner.", needs="client")
def pending(folder: Bundle, as_json: Json = False) -> int:
    """Show the runs, questions and rosters that wait for the owner's decision, with their terms, and the last decisions.

    Example:
      fedveil client pending hearts/clients/cleveland
    """
    from ..deployment.device.owner_desk import show_pending

    return show_pending(folder, as_json=as_json)


@verb(group, "approve", "Approve a request.", needs="client")
def approve(folder: Bundle, request: Request, reason: Why, role: Role = "owner") -> int:
    """Approve a run, a question or a roster that waits. A running client follows without a restart.

    Example:
      fedveil client approve hearts/clients/boston 3fa9c1d2ab4f --reason "vote 17"
    """
    return _decide(folder, "approved", request, reason, role)


@verb(group, "refuse", "Refuse a request.", needs="client")
def refuse(folder: Bundle, request: Request, reason: Why, role: Role = "owner") -> int:
    """Refuse a run, a question or a roster. A later approval of it takes the refusal back.

    Example:
      fedveil client refuse hearts/clients/boston 3fa9c1d2ab4f --reason "no need"
    """
    return _decide(folder, "refused", request, reason, role)


@verb(group, "stop", "Stop a run or a question.", needs="client")
def stop(
    folder: Bundle,
    name: Annotated[str, argument("NAME", "Name of the run or question.")],
    reason: Why,
    role: Role = "owner",
) -> int:
    """Stop what goes on under a name, whatever its terms. What has left the device stays charged.

    Example:
      fedveil client stop hearts/clients/boston run-1 --reason "no consent"
    """
    return _decide(folder, "stopped", name, reason, role)


@verb(group, "pause", "Pause the device.", needs="client")
def pause(folder: Bundle, reason: Why, role: Role = "owner") -> int:
    """Begin nothing new on this device until fedveil client resume. The server waits, or goes on without.

    Example:
      fedveil client pause hearts/clients/cleveland --reason "audit this week"
    """
    return _decide(folder, "paused", "", reason, role)


@verb(group, "resume", "End a pause.", needs="client")
def resume(folder: Bundle, reason: Why, role: Role = "owner") -> int:
    """End a pause of the device.

    Example:
      fedveil client resume hearts/clients/cleveland --reason "audit is over"
    """
    return _decide(folder, "resumed", "", reason, role)


def _decide(folder: Path, verdict: str, subject: str, reason: str, role: str) -> int:
    """Decide, and print the decision; where roles have passphrases, that of the role is needed.

    Args:
      folder: of the bundle.
      verdict: word of the decision.
      subject: id or name of what is decided.
      reason: recorded with the decision.
      role: of the decision.
    """
    from ..deployment.device.commands import state_of
    from ..deployment.device.owner_decisions import OwnerVerdict
    from ..deployment.device.owner_desk import decide
    from ..deployment.device.owner_roles import read_roles

    roles = read_roles(state_of(folder))
    if (roles.keys or role != "owner") and not roles.opens(role, _passphrase()):
        remedy = "has another passphrase, or none yet: fedveil client passphrase FOLDER --role ROLE"
        raise Refusal("role", role, remedy)
    print(decide(folder, OwnerVerdict(verdict), subject, reason, role))
    return 0


@verb(group, "roster", "Show the roster of the device.", needs="client")
def roster(
    folder: Bundle,
    approve: Annotated[int | None, option("VERSION", "Approve the pending roster of this version.")] = None,
    sign: Annotated[
        Path | None, option("FILE", "Sign the roster in this file, for owners who require cosignatures.")
    ] = None,
    reason: Reason = None,
    as_json: Json = False,
) -> int:
    """Show the members of the device's roster with their key fingerprints, and its changes.

    Example:
      fedveil client roster hearts/clients/cleveland
      fedveil client roster hearts/clients/cleveland --sign roster.bin
    """
    from ..deployment.device.commands import roster

    return roster(folder, approve, sign, reason, as_json=as_json)


@verb(group, "authority", "Show or replace the authority.", needs="client")
def authority(
    folder: Bundle,
    rollover: Annotated[
        Path | None,
        option("FILE", "rollovers.json of the authority's holder, for a device that was offline."),
    ] = None,
    approve: Annotated[
        str | None, option("FINGERPRINT", "Fingerprint of the new authority, compared with its holder.")
    ] = None,
    reason: Reason = None,
    as_json: Json = False,
) -> int:
    """Show the authority that the device trusts, or follow the rollover of its keys. A running agent needs no restart.

    Example:
      fedveil client authority hearts/clients/cleveland
      fedveil client authority hearts/clients/cleveland --rollover rollovers.json
    """
    from ..base.durable_files import append_line
    from ..deployment.device.authority import adopt_rollovers
    from ..deployment.device.client_bundle import read_pinned
    from ..privacy.ledger.acts import acting_user

    device, policy, trusted = read_pinned(folder)
    state = folder / device.state
    if rollover is not None or approve is not None:
        rollovers = _read_rollovers(state, rollover, device.federation)
        adopt_rollovers(state, policy, rollovers, device.federation, (approve or "").strip().lower())
        before, (_, _, trusted) = trusted, read_pinned(folder)
        if approve is not None:
            act = {"authority": trusted.fingerprint, "who": acting_user(), "reason": reason}
            append_line(state / APPROVALS, {"at": datetime.now(UTC).isoformat(timespec="seconds"), **act})
        if not as_json:
            print("already in force" if trusted == before else "the authority was replaced")
    _show_authority(trusted, state, device.federation, as_json)
    return 0


def _read_rollovers(state: Path, rollover: Path | None, federation: str) -> bytes:
    """Return the signed rollovers to adopt: those of the file `rollover`, else those that the device received."""
    from ..configs.bundle_files import read_file
    from ..deployment.device.authority import WAITING, pending_rollovers

    if rollover is not None:
        return read_file(rollover)
    if not pending_rollovers(state, federation):
        remedy = "no rollover waits; ask the authority's holder for rollovers.json, and give --rollover rollovers.json"
        raise Refusal("approve", str(state), remedy)
    return read_file(state / WAITING)


def _show_authority(trusted: TrustedAuthority, state: Path, federation: str, as_json: bool) -> None:
    """Print the trusted authority, until when the one before it counts, and the rollover that waits for approval."""
    from ..deployment.device.authority import describe_rollover, new_fingerprint, pending_rollovers

    pending = pending_rollovers(state, federation)
    until = trusted.last.until if trusted.last and time.time() < trusted.last.until else None
    if as_json:
        newest = {**asdict(pending[-1]), "fingerprint": new_fingerprint(pending[-1])} if pending else None
        fields = {"authority": trusted.key.hex(), "fingerprint": trusted.fingerprint, "former_until": until}
        print(json.dumps({**fields, "rollovers": len(trusted.earlier), "waiting": newest}))
        return
    print(f"authority {trusted.key.hex()}, fingerprint {trusted.fingerprint}")
    if until:
        print(f"the one before it counts until {datetime.fromtimestamp(until, UTC).isoformat()}")
    if pending:
        print(f"waits (--approve FINGERPRINT): {describe_rollover(pending[-1])}")


@verb(group, "log", "Show the server's log.", needs="client")
def log(
    folder: Bundle,
    against: Annotated[
        Path | None, option("FILE", "Export or proof of another client or of the server, to compare with.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show what the device has seen of the server's log, or compare it offline with another's. --json exports it.

    Exit code 1 if the server has forked its log.

    Example:
      fedveil client log hearts/clients/cleveland --json > cleveland.json
      fedveil client log hearts/clients/hungary --against cleveland.json
    """
    from .log import of_client

    return of_client(folder, against, as_json=as_json)


@verb(group, "witness", "Co-sign a head of a server's log.", needs="client")
def witness(
    log: Annotated[
        Path, argument("LOG", "Export of the log, or proof of its consistency; - for standard input.")
    ],
    key: Annotated[Path, option("F", "Private key of the witness, as fedveil report key makes it.", "--key")],
    ca: Annotated[Path, option("FILE", "The authority's certificate, ca.pem of any bundle.", "--ca")],
) -> int:
    """Print a co-signature of a log's head, if it extends the last head that this key has co-signed.

    Exit code 1 if the log was cut or forked; then nothing is signed. F.heads.json beside the key keeps what it signed.

    Example:
      fedveil client witness server.json --key w.key --ca ca.pem > signed.json
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from ..configs.bundle_files import LARGEST_FILE, read_file
    from ..evidence.binding.signatures import read_key
    from ..links.log_export import parse_log
    from ..links.witness import contradiction, cosign_log, heads_of_key
    from ..privacy.ledger.hash_chain import exclusive_lock

    signer = read_key(key).key
    if not isinstance(signer, Ed25519PrivateKey):
        raise Refusal("--key", str(key), "is not of Ed25519; make one with fedveil report key")
    text = sys.stdin.buffer.read(LARGEST_FILE) if log == STANDARD_INPUT else read_file(log)
    document = parse_log(text, str(log), read_file(ca))
    with refusing("--key", key, "has a folder that cannot be written"), exclusive_lock(key, "witness"):
        last = heads_of_key(key).get(document.head.federation)
        if last is None:
            message = f"the first head of {document.head.federation} that this key co-signs: nothing earlier is compared"
            print(message, file=sys.stderr)
        elif fault := contradiction(last.head, document):
            print(f"REFUSED: {fault}; nothing is signed. Keep this log and {key}.heads.json", file=sys.stderr)
            return FORKED
        print(cosign_log(document, signer, key).to_json())
    return 0


@verb(group, "explain", "Explain one prediction.", needs="client")
def explain(
    folder: Bundle,
    data: Annotated[str, argument("DATA", "A table, a .npy file of inputs or a database, of the owner.")],
    row: Annotated[int, option("N", "Row to explain, counted from 1.")] = 1,
    explain: Annotated[
        str, option("METHOD", "Method of attribution: integrated_gradients.", "--method")
    ] = "integrated_gradients",
    query: Query = None,
    encoding: Encoding = None,
    as_json: Json = False,
) -> int:
    """Show, on the device, what each column adds to one prediction of its model. Nothing is sent or charged.

    Example:
      fedveil client explain hearts/clients/cleveland patients.csv --row 2
    """
    from .predict import explanation

    allow_local_modules()
    columns = explanation(folder, tables_at(data, query, encoding), (), explain)
    count = len(columns["score"])
    if not 1 <= row <= count:
        raise Refusal("--row", row, f"{data} has rows 1 to {count}")
    values = {name: each[row - 1].item() for name, each in columns.items()}
    if as_json:
        print(json.dumps(values))
        return 0
    names = [*values]  # outputs, score, at_baseline, and the contribution of each input
    outputs, inputs = names[: names.index("score")], names[names.index("at_baseline") + 1 :]
    print(f"row {row}: {', '.join(f'{name} {_format(values[name])}' for name in outputs)}")
    print(f"  {values['at_baseline']:+8.4f}  baseline: midpoint of each number, no bin, no category")
    for name in sorted(inputs, key=lambda each: -abs(values[each])):
        if abs(values[name]) >= MIN_SHOWN:
            print(f"  {values[name]:+8.4f}  {name}")
    print(f"  {values['score']:+8.4f}  score. Nothing was sent from this device, and nothing was charged.")
    return 0


def _format(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@verb(group, "forget", "Remove the device's state.", needs="client")
def forget(
    folder: Bundle,
    ledgers: Ledgers = False,
    restored: Annotated[
        bool,
        flag("--restored", "Go on after a restore or a copy: charge all of the budget as missed."),
    ] = False,
) -> int:
    """Remove the device's state, except its ledgers and rosters.

    Example:
      fedveil client forget hearts/clients/cleveland
    """
    from ..deployment.device.commands import forget

    return forget(folder, ledgers, restored)


@verb(group, "uninstall", "Remove the client from the device.", needs="client")
def uninstall(
    folder: Bundle,
    yes: Annotated[bool, flag("--yes", "Confirm; without it nothing is removed.")] = False,
    ledgers: Ledgers = False,
) -> int:
    """Stop the agent; remove its unit, its bundle and its state.

    Example:
      fedveil client uninstall hearts/clients/cleveland --yes
    """
    from ..deployment.device.commands import uninstall

    return uninstall(folder, yes, ledgers)
