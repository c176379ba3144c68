"""Verbs of `fedveil provision`, at the operator's desk: bundles, keys, tokens, admissions and revocations."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.extras import require_extra
from .grammar import GROUP, Json, argument, flag, option, verb

if TYPE_CHECKING:
    from ..deployment.provision import Desk
    from ..deployment.register import Issued, Register

group = typer.Typer(**GROUP)
Folder = Annotated[Path, argument("FOLDER", "Folder made by fedveil provision.", file_okay=False)]
SOON_SECONDS = 30 * 86400  # time before the end of a certificate from which it is mentioned


@verb(group, "FILE", "Make the bundles of a federation.", hidden=True, needs="server")
def provision(
    file: Annotated[Path, argument("FILE", "federation.yaml, which lists the clients.")],
    out: Annotated[
        Path | None, option("FOLDER", "Output folder; named after the federation by default.")
    ] = None,
    wheels: Annotated[
        Path | None, option("FOLDER", "Folder of a device's wheels, for requirements with hashes.")
    ] = None,
    lock: Annotated[
        Path | None, option("FILE", "Lock file with the hashes of packages that --wheels lacks.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Make the bundles of a federation from one file, or complete them.

    Example:
      fedveil provision federation.yaml
    """
    from ..deployment.provision import provision as body

    return _show(body(file, out, wheels, lock), as_json=as_json)


@verb(group, "rotate", "Give a client new keys.", needs="server")
def rotate(
    folder: Folder,
    names: Annotated[list[str], argument("NAME", "Clients (or 'hospital-*'), or server.")],
    request: Annotated[Path | None, option("FILE", "Request of a device that made its own new keys.")] = None,
    as_json: Json = False,
) -> int:
    """Give clients or the server new keys. The old keys are no longer admitted.

    Example:
      fedveil provision rotate hearts cleveland
      fedveil provision rotate hearts 'hospital-*' server
    """
    from ..deployment.provision import rotate as body

    return _show(body(folder, names, request), as_json=as_json)


@verb(group, "renew", "Renew clients' certificates.", needs="server")
def renew(
    folder: Folder,
    names: Annotated[list[str] | None, argument("NAME", "Clients (or 'hospital-*'); all by default.")] = None,
    within: Annotated[
        float, option("DAYS", "Renew only certificates that expire within this many days.")
    ] = 30.0,
    as_json: Json = False,
) -> int:
    """Renew the certificates of clients' present keys. The server delivers them.

    Example:
      fedveil provision renew hearts
      fedveil provision renew hearts 'hospital-*' --within 60
    """
    from ..deployment.provision import renew as body

    return _show(body(folder, names or [], within), as_json=as_json)


@verb(group, "rollover", "Replace the authority's keys.", needs="server")
def rollover(
    folder: Folder,
    days: Annotated[float, option("N", "Days in which devices accept the old keys too.")] = 30.0,
    as_json: Json = False,
) -> int:
    """Replace the authority's keys by new ones, which the old key signs. Open tokens end.

    Example:
      fedveil provision rollover hearts
    """
    from ..configs.bundle_files import ROLLOVERS
    from ..deployment.device.authority import new_fingerprint
    from ..deployment.rollover import roll_over
    from ..links.server_bundle import SERVER

    desk = roll_over(folder, days)
    last, server = desk.authority.rollovers[-1], desk.folder / SERVER
    new, end = new_fingerprint(last), datetime.fromtimestamp(last.until, UTC).isoformat()
    if as_json:
        fields = {"rollover": last.number, "fingerprint": new, "until": end, "file": str(server / ROLLOVERS)}
        print(json.dumps(fields))
        return 0
    print(f"rollover {last.number} of {desk.federation.name}: the old keys count until {end}")
    print(f"  new fingerprint {new}: tell it to the owners by another way than the server")
    print(f"  copy {server} to the server: connected devices follow at once")
    print(f"  to a device that is offline until then, send {server / ROLLOVERS}")
    print("  open tokens have ended: create new ones")
    return 0


@verb(group, "token", "Print a token to enrol a device.", needs="server")
def tokens(
    folder: Folder,
    names: Annotated[list[str], argument("NAME", "Clients, one device each.")],
    hours: Annotated[float, option("N", "Hours until the tokens expire.")] = 24.0,
    qr: Annotated[bool, flag("--qr", "Print the tokens as QR codes too.")] = False,
    as_json: Json = False,
) -> int:
    """Print a token for each name. A token enrols one device once: fedveil client enrol FILE FOLDER.

    Example:
      fedveil provision token hearts cleveland --hours 2 > cleveland.token
    """
    from ..deployment.enrolment import issue_tokens

    if qr:
        require_extra("qr", "fedveil provision token --qr")
    token_list = issue_tokens(folder, names, hours)
    if as_json:
        print(json.dumps({each.name: each.text() for each in token_list}))
        return 0
    for token in token_list:
        print(token.text())
        if qr:
            from importlib import import_module

            print(import_module("segno").make(token.text()).terminal(compact=True) or "")
    return 0


@verb(group, "approve", "Admit devices enrolled by token.", needs="server")
def approve(
    folder: Folder,
    names: Annotated[list[str] | None, argument("NAME", "Clients; all with a request by default.")] = None,
    as_json: Json = False,
) -> int:
    """Admit the devices that requested enrolment by token, and sign their bundles. Exit code 1 if one was refused.

    Example:
      fedveil provision approve hearts
    """
    from ..deployment import enrolment
    from ..links.server_bundle import SERVER

    approval = enrolment.approve(folder, names or [])
    desk = approval.desk
    if as_json:
        fields = {"roster": desk.register.version, "admitted": approval.admitted}
        print(json.dumps({**fields, "refused": dict(approval.refused), "waiting": approval.silent}))
        return 1 if approval.refused else 0
    for name in approval.admitted:
        issued = desk.register.find(name)
        assert issued is not None
        print(f"  node {issued.node}  {name}  admitted by its token; key {issued.fingerprint}")
    for name, reason in approval.refused.items():
        print(f"  {name}  refused: {reason}")
    if approval.silent:
        print(f"  no request yet: {', '.join(approval.silent)}")
    print(f"roster version {desk.register.version}: copy {desk.folder / SERVER} to the server")
    return 1 if approval.refused else 0


@verb(group, "revoke", "Revoke a client.", needs="server")
def revoke(
    folder: Folder,
    names: Annotated[list[str], argument("NAME", "Clients, or a pattern such as 'hospital-*'.")],
    as_json: Json = False,
) -> int:
    """Remove clients from the next roster on.

    Example:
      fedveil provision revoke hearts cleveland
    """
    from ..deployment.provision import revoke as body

    return _show(body(folder, names), as_json=as_json)


@verb(group, "cosign", "Collect members' signatures.", needs="server")
def cosign(
    folder: Folder,
    files: Annotated[list[Path], argument("FILE", "Signatures written by fedveil client roster --sign.")],
    as_json: Json = False,
) -> int:
    """Collect members' signatures under the newest roster, for owners who require them.

    Example:
      fedveil provision cosign hearts cosignature-2.toml
    """
    from ..deployment.provision import cosign as body

    return _show(body(folder, files), as_json=as_json)


def _show(desk: Desk, *, as_json: bool) -> int:
    """Print a federation, and what a command has changed in it; return the exit code."""
    print(json.dumps(_as_json(desk)) if as_json else "\n".join(_lines(desk)))
    return 0


def _as_json(desk: Desk) -> dict[str, object]:
    clients = [
        {"node": each.node, "name": each.name, "outcome": _outcome(each, desk.before)}
        for each in desk.register.clients
    ]
    return {
        "federation": desk.federation.name,
        "folder": str(desk.folder),
        "roster": desk.register.version,
        "cosigned": list(desk.register.cosigners),
        "clients": clients,
    }


def _lines(desk: Desk) -> Iterator[str]:
    """Yield the lines of `_show`: members, those that changed or need attention, and what to copy where."""
    from ..deployment.provision import AUTHORITY, CLIENTS
    from ..links.server_bundle import SERVER

    register = desk.register
    members = len(register.admitted)
    yield f"{desk.federation.name}: {members} clients, roster version {register.version}"
    minimum = max((each.policy["minimum_cohort"] for each in desk.federation.clients), default=0)
    if minimum > members and not desk.federation.patterns:
        yield f"  minimum_cohort: {minimum} is above the {members} members; no encrypted sum will be opened"
    if register.cosigners:
        yield f"  signed by {', '.join(register.cosigners)}"
    outcomes = {each: _outcome(each, desk.before) for each in register.clients}
    width = max((len(each.name) for each in outcomes), default=0)
    digits = max((len(str(each.node)) for each in outcomes), default=0)
    for each, outcome in outcomes.items():
        remark = _remark(each, outcome)
        if outcome == "revoked":
            yield f"  node {each.node:<{digits}}  {each.name:{width}}  revoked"
        elif outcome != "kept" or remark:
            where = "by its token" if each.enrolled else desk.folder / CLIENTS / each.name
            yield f"  node {each.node:<{digits}}  {each.name:{width}}  {outcome:8}  {where}{remark}"
    if unchanged := list(outcomes.values()).count("kept"):
        yield f"  unchanged: {unchanged}"
    certificate = " (a new certificate)" if register.server != desk.before.server else ""
    copy = ": copy it to the server" if register != desk.before else ""
    yield f"  server  {desk.folder / SERVER}{certificate}{copy}"
    if "rotated" in outcomes.values():
        yield "  copy *.key, tls.pem and roster.bin of each rotated client to its device, and restart the client"
    yield f"  keep {desk.folder / AUTHORITY} here: its holder can admit any client"


def _outcome(issued: Issued, before: Register) -> str:
    """Return in a word what the command did to a client; `before` is the register as it was."""
    previous = before.find(issued.name)
    if issued.revoked:
        return "revoked"
    if not previous:
        return "admitted"
    if previous == issued:
        return "kept"
    return "renewed" if previous.keys == issued.keys else "rotated"


def _remark(issued: Issued, outcome: str) -> str:
    """Return remarks on a client's keys and the end of its certificate, in brackets; empty without any."""
    remarks = ["its private keys are on the device"] if issued.on_device and outcome != "kept" else []
    if issued.not_after < time.time() + SOON_SECONDS:
        end = datetime.fromtimestamp(issued.not_after, UTC)
        remarks.append(f"its certificate ends on {end:%Y-%m-%d}: fedveil provision renew")
    return f" ({'; '.join(remarks)})" if remarks else ""
