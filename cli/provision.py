"""Provisioning as an operator sees it: bundles made, keys changed, clients left out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..deployment.provision import AUTHORITY, CLIENTS, Desk, cosign, provision, revoke, rotate
from ..deployment.register import Issued, Register
from ..links.server_bundle import SERVER

SOON_SECONDS = 30 * 86400


def make(
    file: Path, out: Path | None, wheels: Path | None, lock: Path | None = None, *, as_json: bool = False
) -> int:
    """Make or complete the bundles that a federation.yaml describes; return the exit code.

    Args:
      file: federation.yaml.
      out: where to; None is a folder of the federation's name.
      wheels: what a device installs.
      lock: hashes of what is not among them.
      as_json: print one JSON object.

    Raises:
      Refusal: of a mistake, before anything is written.
    """
    return _show(provision(file, out, wheels, lock), as_json)


def new_keys(folder: Path, name: str, request: Path | None, *, as_json: bool = False) -> int:
    """Give a client, or the server, new keys; return the exit code.

    Args:
      folder: that provisioning made.
      name: of a client, or "server".
      request: of a device that made its new keys itself.
      as_json: print one JSON object.

    Raises:
      Refusal: nobody has the name, or the request is not the client's.
    """
    return _show(rotate(folder, name, request), as_json)


def leave_out(folder: Path, name: str, *, as_json: bool = False) -> int:
    """Leave a client out from the next roster on; return the exit code.

    Raises:
      Refusal: nobody has the name.
    """
    return _show(revoke(folder, name), as_json)


def collect(folder: Path, files: Sequence[Path], *, as_json: bool = False) -> int:
    """Put members' signatures under the newest roster; return the exit code.

    Args:
      folder: that provisioning made.
      files: of the members.
      as_json: print one JSON object.

    Raises:
      Refusal: a file is none, is of another roster, or of nobody in the federation.
    """
    return _show(cosign(folder, files), as_json)


def _show(desk: Desk, as_json: bool) -> int:
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
    yield f"{desk.federation.name}: {len(register.admitted)} clients, roster version {register.version}"
    if register.cosigners:
        yield f"  signed by {', '.join(register.cosigners)}"
    outcomes = {each: _outcome(each, desk.before) for each in register.clients}
    width = max(len(each.name) for each in outcomes)
    for each, outcome in outcomes.items():
        remark = _remark(each, outcome)
        if outcome == "revoked":
            yield f"  node {each.node}  {each.name:{width}}  revoked"
        elif outcome != "kept" or remark:
            where = desk.folder / CLIENTS / each.name
            yield f"  node {each.node}  {each.name:{width}}  {outcome:8}  {where}{remark}"
    if kept := list(outcomes.values()).count("kept"):
        yield f"  kept as they were: {kept}"
    certificate = " (a new certificate)" if register.server != desk.before.server else ""
    copy = ": copy it to the server" if register != desk.before else ""
    yield f"  server  {desk.folder / SERVER}{certificate}{copy}"
    if "rotated" in outcomes.values():
        yield (
            "  copy *.key, tls.pem and roster.bin of who was rotated to the device, and start its client again"
        )
    yield f"  keep {desk.folder / AUTHORITY} here: whoever has it admits anybody"


def _outcome(issued: Issued, before: Register) -> str:
    known = before.find(issued.name)
    if issued.revoked:
        return "revoked"
    if known is None:
        return "admitted"
    return "kept" if known == issued else "rotated"


def _remark(issued: Issued, outcome: str) -> str:
    remarks = ["its private keys are on the device"] if issued.on_device and outcome != "kept" else []
    if issued.not_after < time.time() + SOON_SECONDS:
        end = datetime.fromtimestamp(issued.not_after, UTC)
        remarks.append(f"its certificate ends on {end:%Y-%m-%d}: rotate it")
    return f" ({'; '.join(remarks)})" if remarks else ""
