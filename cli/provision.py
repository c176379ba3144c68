"""Provisioning as an operator sees it: bundles made, keys changed, clients left out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from ..base.extras import require_extra
from ..configs.bundle_files import ROLLOVERS
from ..deployment.device.authority import new_fingerprint
from ..deployment.enrolment import approve, give_tokens
from ..deployment.provision import AUTHORITY, CLIENTS, Desk
from ..deployment.register import Issued, Register
from ..links.server_bundle import SERVER

SOON_SECONDS = 30 * 86400


def tokens(folder: Path, names: list[str], hours: float, *, qr: bool = False, as_json: bool = False) -> int:
    """Print a token for each name; return the exit code.

    Arguments as of `fedveil provision token`.

    Raises:
      Refusal: a name has no place in the federation.
    """
    if qr:
        require_extra("qr", "fedveil provision token --qr")
    given = give_tokens(folder, names, hours)
    if as_json:
        print(json.dumps({each.name: each.text() for each in given}))
        return 0
    for each in given:
        print(each.text())
        if qr:
            print(import_module("segno").make(each.text()).terminal(compact=True) or "")
    return 0


def admit_asked(folder: Path, names: list[str], *, as_json: bool = False) -> int:
    """Admit the devices that have asked by a token; return 1 if a request was refused.

    Arguments as of `fedveil provision approve`.

    Raises:
      Refusal: a name has no token.
    """
    done = approve(folder, names)
    if as_json:
        told = {"admitted": done.admitted, "refused": dict(done.refused), "waiting": done.silent}
        print(json.dumps({"roster": done.desk.register.version, **told}))
        return 1 if done.refused else 0
    for name in done.admitted:
        issued = done.desk.register.find(name)
        assert issued is not None
        print(f"  node {issued.node}  {name}  admitted by its token; key {issued.fingerprint}")
    for name, why in done.refused.items():
        print(f"  {name}  refused: {why}")
    if done.silent:
        print(f"  no request yet: {', '.join(done.silent)}")
    print(f"roster version {done.desk.register.version}: copy {done.desk.folder / SERVER} to the server")
    return 1 if done.refused else 0


def rolled_over(desk: Desk, *, as_json: bool) -> int:
    """Print the new authority, and what its holder does next; return the exit code."""
    last, server = desk.authority.rollovers[-1], desk.folder / SERVER
    new, end = new_fingerprint(last), datetime.fromtimestamp(last.until, UTC).isoformat()
    if as_json:
        print(
            json.dumps(
                {"rollover": last.number, "fingerprint": new, "until": end, "file": str(server / ROLLOVERS)}
            )
        )
        return 0
    print(f"rollover {last.number} of {desk.federation.name}: the old keys count until {end}")
    print(f"  new fingerprint {new}: tell it to the owners by another way than the server")
    print(f"  copy {server} to the server: connected devices follow at once")
    print(f"  to a device that is offline until then, send {server / ROLLOVERS}")
    print("  open tokens have ended: create new ones")
    return 0


def show(desk: Desk, *, as_json: bool) -> int:
    """Print what a command has changed of a federation; return the exit code."""
    print(json.dumps(_as_json(desk)) if as_json else "\n".join(_in_words(desk)))
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


def _in_words(desk: Desk) -> Iterator[str]:
    register = desk.register
    members = len(register.admitted)
    yield f"{desk.federation.name}: {members} clients, roster version {register.version}"
    least = max((each.policy["minimum_cohort"] for each in desk.federation.clients), default=0)
    if least > members and not desk.federation.many:
        yield f"  minimum_cohort: {least} is above the {members} members; no encrypted sum will be opened"
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
    if kept := list(outcomes.values()).count("kept"):
        yield f"  unchanged: {kept}"
    certificate = " (a new certificate)" if register.server != desk.before.server else ""
    copy = ": copy it to the server" if register != desk.before else ""
    yield f"  server  {desk.folder / SERVER}{certificate}{copy}"
    if "rotated" in outcomes.values():
        yield (
            "  copy *.key, tls.pem and roster.bin of each rotated client to its device, and restart the client"
        )
    yield f"  keep {desk.folder / AUTHORITY} here: its holder can admit any client"


def _outcome(issued: Issued, before: Register) -> str:
    known = before.find(issued.name)
    if issued.revoked:
        return "revoked"
    if known is None:
        return "admitted"
    if known == issued:
        return "kept"
    return "renewed" if known.keys == issued.keys else "rotated"


def _remark(issued: Issued, outcome: str) -> str:
    remarks = ["its private keys are on the device"] if issued.on_device and outcome != "kept" else []
    if issued.not_after < time.time() + SOON_SECONDS:
        end = datetime.fromtimestamp(issued.not_after, UTC)
        remarks.append(f"its certificate ends on {end:%Y-%m-%d}: fedveil provision renew")
    return f" ({'; '.join(remarks)})" if remarks else ""
