"""The command line of `fedveil provision`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from ..deployment.provision import AUTHORITY, CLIENTS, Desk, provision, revoke, rotate
from ..deployment.register import Issued, Register
from ..links.server_bundle import SERVER

USAGE = """\
fedveil provision FILE [--out FOLDER] [--wheels FOLDER]
       fedveil provision rotate FOLDER NAME [--request FILE]
       fedveil provision revoke FOLDER NAME"""
SOON_SECONDS = 30 * 86400


def run(argv: Sequence[str]) -> int:
    """Run `fedveil provision`; return the exit code."""
    parser = argparse.ArgumentParser("fedveil provision", usage=USAGE, allow_abbrev=False)
    if argv and argv[0] in ("rotate", "revoke"):
        parser.add_argument("verb", help=argparse.SUPPRESS)
        parser.add_argument("folder", type=Path, help="that provisioning made")
        parser.add_argument("name", help="of a client; rotate takes server as well")
        if argv[0] == "rotate":
            parser.add_argument("--request", type=Path, help="of the device, which made its new keys itself")
    else:
        parser.add_argument("file", type=Path, help="federation.yaml")
        parser.add_argument("--out", type=Path, help="where to; a folder of the federation's name by default")
        parser.add_argument(
            "--wheels", type=Path, help="what a device installs, for requirements with hashes"
        )
    try:
        asked = parser.parse_args(argv)
    except SystemExit as stopped:  # it has said why
        return int(stopped.code or 0)
    match argv[0]:
        case "rotate":
            desk = rotate(asked.folder, asked.name, asked.request)
        case "revoke":
            desk = revoke(asked.folder, asked.name)
        case _:
            desk = provision(asked.file, asked.out, asked.wheels)
    _show(desk)
    return 0


def _show(desk: Desk) -> None:
    register = desk.register
    print(f"{desk.federation.name}: {len(register.admitted)} clients, roster version {register.version}")
    outcomes = {each: _outcome(each, desk.before) for each in register.clients}
    width = max(len(each.name) for each in outcomes)
    for each, outcome in outcomes.items():
        remark = _remark(each, outcome)
        if outcome == "revoked":
            print(f"  node {each.node}  {each.name:{width}}  revoked")
        elif outcome != "kept" or remark:
            where = desk.folder / CLIENTS / each.name
            print(f"  node {each.node}  {each.name:{width}}  {outcome:8}  {where}{remark}")
    if kept := list(outcomes.values()).count("kept"):
        print(f"  kept as they were: {kept}")
    certificate = " (a new certificate)" if register.server != desk.before.server else ""
    copy = ": copy it to the server" if register != desk.before else ""
    print(f"  server  {desk.folder / SERVER}{certificate}{copy}")
    if "rotated" in outcomes.values():
        print(
            "  copy *.key, tls.pem and roster.bin of who was rotated to the device, and start its client again"
        )
    print(f"  keep {desk.folder / AUTHORITY} here: whoever has it admits anybody")


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
