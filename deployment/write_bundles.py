"""Bundles made by provisioning: a folder for the server, one for each client. Private keys are made elsewhere."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from ..base.durable_files import PUBLIC, replace_files
from ..configs.bundle_files import ROLLOVERS, ROSTER, SCHEMA
from ..links.server_bundle import FORMER, OWNERS
from ..privacy.secagg.rollover import write_chain
from ..strategies.identity import FIRST_NODE
from .authority import Authority
from .device.client_bundle import TABLES
from .device.enrolment import PRIVATE
from .device.personal_choice import NONE
from .federation_yaml import OF_SCHEMA, POLICY_DEFAULTS, ClientEntry, FederationFile
from .register import Issued, Register

# Keys of a policy that a device of an earlier release refuses as unknown; they are written only where they are set.
LATER = (
    *("approve_authority", "approve_runs", "approve_questions", "approve_within"),
    *("queries", "witnesses", "witnessed_by_at_least"),
)
REQUIREMENTS, SUPERNODES = "requirements.txt", "supernodes"
CLIENT_UNIT, SERVER_UNIT = "fedveil-client.service", "fedveil-server.service"
ENROLMENT_UNIT = "fedveil-enrolment.service"

# Training a small convolutional network under DP-SGD peaks at 530 MiB; a server keeps a few models.
_CLIENT = """\
ExecStart=/opt/fedveil/bin/fedveil client start %S/fedveil-client
Restart=always
MemoryMax=1G
CPUWeight=20
Nice=10"""
_SERVER = """\
ExecStart=/opt/fedveil/bin/fedveil server %S/fedveil-server $RUN
EnvironmentFile=-%S/fedveil-server/run.env
Restart=on-failure
RestartPreventExitStatus=2 3 4 5
MemoryMax=8G"""

# The user is the server's, whose bundle it shares. It ends once no token is open.
_ENROLMENT = """\
ExecStart=/opt/fedveil/bin/fedveil server enrol %S/fedveil-server
User=fedveil-server
Restart=on-failure
RestartPreventExitStatus=2 3 4 5
MemoryMax=512M"""

# Folder in /var/lib, which is the bundle, and lines of the service. What a unit runs is in /opt/fedveil. `run.env` in the
# server's bundle names its run; a run that is refused, has no budget, or was ended or left in doubt by an alarm of its
# audit is not tried again.
_SERVICES = {
    CLIENT_UNIT: ("fedveil-client", _CLIENT),
    SERVER_UNIT: ("fedveil-server", _SERVER),
    ENROLMENT_UNIT: ("fedveil-server", _ENROLMENT),
}

# The bundle is the state folder: systemd gives it to the service's own, fresh user. Nothing of torch, OpenBLAS or
# SQLite needs what is taken away; MemoryDenyWriteExecute is not set since torch generates code. Of the open files
# `base/open_files.py` lets in a quarter as connections.
_UNIT = """\
[Unit]
Description=fedveil {what} of the federation {federation}
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target
StartLimitIntervalSec=0

[Service]
{service}
RestartSec=10
KillMode=control-group
TimeoutStopSec=60
DynamicUser=yes
StateDirectory={folder}
StateDirectoryMode=0700
WorkingDirectory=%S/{folder}
UMask=0077
LimitCORE=0
LimitNOFILE=65536
CapabilityBoundingSet=
LockPersonality=yes
NoNewPrivileges=yes
PrivateDevices=yes
PrivateTmp=yes
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged

[Install]
WantedBy=multi-user.target
"""


def write_server(folder: Path, federation: FederationFile, authority: Authority, register: Register) -> None:
    """Write the server's bundle except its private key; remove what has ended. Arguments as of `write_clients`."""
    server, link = federation.content.server, federation.content.link
    settings = {"federation": federation.name, "listen": server.listen_address, "link": link}
    files = {  # in the order of their replacement: a key is admitted before the roster has it
        "admitted.json": _json({each.fingerprint: each.node for each in register.admitted}),
        "supernodes.json": _json({each.supernode_fingerprint: each.node for each in register.admitted}),
        ROSTER: _roster(authority, register),
        "certificates.json": _json({str(each.node): each.certificate for each in register.admitted}),
        OWNERS: tomli_w.dumps(_owners_budget(federation, register)).encode(),
        "authority.pub": f"{authority.public(register.post_quantum).hex()}\n".encode(),
        "ca.pem": authority.ca_pem,
        "tls.pem": register.server.encode(),
        **_rollovers(authority),
        SERVER_UNIT: unit_of(SERVER_UNIT, "server", federation.name),
        **_tables(federation),
    }
    if addresses := server.enrolment_addresses:
        settings["enrolment"] = addresses.listen
        files[ENROLMENT_UNIT] = unit_of(ENROLMENT_UNIT, "enrolment", federation.name)
    if register.former_server:
        files[FORMER] = register.former_server.encode()
    _write(folder, {**files, "server.toml": tomli_w.dumps(settings).encode()})
    if not register.former_server:
        (folder / FORMER).unlink(missing_ok=True)
    keys = {f"{each.name}.pub": each.supernode.encode() for each in register.admitted}
    _write(folder / SUPERNODES, keys)
    for path in (folder / SUPERNODES).iterdir():
        if path.name not in keys:  # a revoked client's, or half of a file that a power cut left
            path.unlink()


def write_clients(
    folder: Path, federation: FederationFile, authority: Authority, register: Register, requirements: str
) -> None:
    """Write the bundles of all admitted clients, except private keys; a device that enrolled by a token has none here.

    Args:
      folder: of all bundles.
      federation: whose clients they are.
      authority: signs the roster.
      register: lists the admitted clients.
      requirements: of every device; empty removes earlier ones.
    """
    roster = {ROSTER: _roster(authority, register)}
    for issued in register.admitted:
        bundle = folder / issued.name
        # Private keys that the desk made before the device made its own.
        outdated = {*PRIVATE} if issued.on_device else set[str]()
        if not issued.enrolled:
            files = client_files(federation, authority, register, issued, requirements)
            _write(bundle, {**files, **roster})
            outdated |= {REQUIREMENTS, ROLLOVERS} - files.keys()
        for name in outdated:
            (bundle / name).unlink(missing_ok=True)


def client_files(
    federation: FederationFile, authority: Authority, register: Register, issued: Issued, requirements: str
) -> dict[str, bytes]:
    """Return the files of one client's bundle, except private keys and the roster; arguments as of `write_clients`."""
    entry = federation.entry(issued.name)
    assert entry is not None  # an admitted member that is not in the file was refused before
    authority_key = authority.public(register.post_quantum).hex()
    trust = {"authority": authority_key, "minimum_roster_version": register.version}
    policy = {
        key: value for key, value in entry.policy.items() if key not in LATER or value != POLICY_DEFAULTS[key]
    }
    return {
        "ca.pem": authority.ca_pem,
        **({REQUIREMENTS: requirements.encode()} if requirements else {}),
        "client.toml": tomli_w.dumps(_settings(federation, entry, issued)).encode(),
        "policy.toml": tomli_w.dumps(_present_values({**policy, **trust})).encode(),
        "tls.pem": issued.certificate.encode(),
        **(_rollovers(authority) if authority.former else {}),
        CLIENT_UNIT: unit_of(CLIENT_UNIT, f"client {issued.name}", federation.name),
        **(_tables(federation) if entry.task["name"] == TABLES else {}),
    }


def _roster(authority: Authority, register: Register) -> bytes:
    """Return the signed roster; until an overlap ends, the former authority signs it before its successor."""
    if authority.former is None:
        return register.signed_roster(authority.signer)
    return register.signed_roster(authority.former.signer, authority.signer)


def _rollovers(authority: Authority) -> dict[str, bytes]:
    """Return the file of the rollovers, if there were any."""
    return {ROLLOVERS: write_chain(authority.rollovers).encode()} if authority.rollovers else {}


def _owners_budget(federation: FederationFile, register: Register) -> dict[str, float]:
    """Return the budget that every member's policy allows; without members, that all of the file's policies allow."""
    entries = [federation.entry(each.name) for each in register.admitted]
    entries = entries or [*federation.clients, *federation.patterns]
    policies = [each.policy for each in entries if each is not None]
    return {key: min(float(each[key]) for each in policies) for key in ("target_epsilon", "target_delta")}


def _tables(federation: FederationFile) -> dict[str, bytes]:
    """Return the file of the schema, if there is one."""
    return {} if federation.schema is None else {SCHEMA: federation.schema.encode()}


def _settings(federation: FederationFile, entry: ClientEntry, issued: Issued) -> dict[str, Any]:
    """Return the content of a client's client.toml; the options that its schema holds are not repeated."""
    task = _present_values(entry.task)
    if entry.task["name"] == TABLES:
        options = {key: value for key, value in entry.task["options"].items() if key not in OF_SCHEMA}
        task = {**task, "options": {**options, "schema": SCHEMA}}
    return {
        "federation": federation.name,
        "name": issued.name,
        "node": issued.node,
        "server": federation.content.server.address,
        "link": federation.content.link,
        "task": {"client": issued.node - FIRST_NODE, **task},
        "eligibility": _present_values(entry.eligibility),
        **_own_model(entry),
    }


def _own_model(entry: ClientEntry) -> dict[str, Any]:
    """Return the table of the device's own model; nothing without one, since earlier releases know no such table."""
    return {"personal": _present_values(entry.personal)} if entry.personal["name"] != NONE else {}


def _present_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _json(values: Mapping[str, int | str]) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write those files of a bundle that differ from the ones on disk."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    current = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in files}
    if fresh := {name: data for name, data in files.items() if current.get(name) != data}:
        replace_files(folder, fresh, PUBLIC)


def unit_of(name: str, what: str, federation: str) -> bytes:
    """Return systemd's unit of this name, for `what` of the federation."""
    folder, service = _SERVICES[name]
    return _UNIT.format(what=what, federation=federation, folder=folder, service=service).encode()
