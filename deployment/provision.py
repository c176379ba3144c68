"""Provisioning of a federation: from federation.yaml to the authority and its bundles, and their later changes.

Everything issued is in the authority's register. It is written after the private keys and before all public files, so
that an interrupted command is completed by repeating it.
"""

from __future__ import annotations

import difflib
import fcntl
import fnmatch
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from ..base.core_dumps import without_core_dumps
from ..base.durable_files import replace_file
from ..base.refusal import Refusal
from ..configs.bundle_files import SCHEMA, issued_by, read_file
from ..configs.strict import nearest
from ..links.server_bundle import SERVER
from ..privacy.secagg.rollover import MAX_DAYS
from ..tasks import TASKS
from .authority import Authority, issue, open_authority
from .device.cosignature import read_cosignature
from .device.enrolment import TLS, Enrolment, make_keys, new_tls_key, pem_of, read_request
from .federation_yaml import HASHED, UNVERIFIED, ClientEntry, FederationFile, is_pattern, read_federation
from .register import Issued, Register, read_register, write_register
from .requirements import installed_requirements, unverified, wheel_requirements
from .write_bundles import REQUIREMENTS, write_clients, write_server

AUTHORITY, CLIENTS = "authority", "clients"
DAY_SECONDS = 86400
FILE, REGISTER = "federation.yaml", "register.json"


@dataclass(frozen=True)
class Desk:
    """The operator's folder, open.

    Attributes:
      folder: that `provision` made.
      federation: described by its federation.yaml.
      authority: of the federation.
      before: the register as it was when the desk was opened.
      register: with the changes since, which `publish` stores.
    """

    folder: Path
    federation: FederationFile
    authority: Authority
    before: Register
    register: Register


def provision(file: Path, out: Path | None, wheels: Path | None = None, lock: Path | None = None) -> Desk:
    """Create or complete the federation that a file describes.

    Clients that are new are admitted; the others keep their keys and certificates.

    Args:
      file: federation.yaml.
      out: the folder to make it in; None takes the federation's name.
      wheels: a folder of what a device installs; None leaves the requirements as they are.
      lock: hashes of what is not in `wheels`; see `wheel_requirements`.

    Raises:
      Refusal: of a mistake, before anything is written.
    """
    federation = read_federation(file)
    requests = {each.name: read_request(each.request) for each in federation.clients if each.request}
    folder = Path(federation.name) if out is None else out
    requirements = _new_requirements(folder / AUTHORITY / REQUIREMENTS, federation, wheels, lock)
    _check(federation, read_register(folder / AUTHORITY / REGISTER), requests)
    with _exclusive_folder(folder):
        before = read_register(folder / AUTHORITY / REGISTER)
        _check(federation, before, requests)  # again: another process may have been here in between
        authority = open_authority(folder / AUTHORITY, federation.name, federation.content.authority.care)
        desk = _with_server(Desk(folder, federation, authority, before, before))
        for entry in federation.clients:
            if before.find(entry.name) is None:
                desk = admit(desk, entry.name, requests.get(entry.name))
        if requirements:
            replace_file(folder / AUTHORITY / REQUIREMENTS, requirements.encode())
        if federation.schema is not None:
            replace_file(folder / AUTHORITY / SCHEMA, federation.schema.encode())
        replace_file(folder / AUTHORITY / FILE, federation.source)
        return publish(desk)


def rotate(folder: Path, names: Sequence[str], request: Path | None) -> Desk:
    """Give clients, or the server, new keys and new certificates; the old ones are no longer admitted.

    Args:
      folder: that `provision` made.
      names: of clients, also as patterns with * and ?, or "server".
      request: of the one device in `names`, for keys that it made itself; None makes the keys here.

    Raises:
      Refusal: there is no such client, or its keys are on the device and no request is given; nobody is rotated then.
    """
    with open_desk(folder) as desk:
        if request is not None and (len(names) > 1 or is_pattern(names[0]) or SERVER in names):
            raise Refusal("request", str(request), "belongs to one device; name only that client")
        if SERVER in names:
            desk = _with_server(replace(desk, register=replace(desk.register, server="")))
        clients = _select_clients(desk.register, [name for name in names if name != SERVER])
        for issued in clients:
            if issued.on_device and request is None:
                remedy = (
                    f"has its keys on the device; create a token (fedveil provision token FOLDER {issued.name}), "
                    f"or run fedveil client request NEW --name {issued.name} there, and pass --request"
                )
                raise Refusal("name", issued.name, remedy)
        for issued in clients:
            enrolment = None if request is None else _read_new_keys(desk, issued, request)
            desk = admit(desk, issued.name, enrolment)
        return publish(desk)


def _read_new_keys(desk: Desk, issued: Issued, request: Path) -> Enrolment:
    """Return the new keys in an admitted client's request; refuse those that it, or another client, has or had."""
    enrolment = read_request(request)
    check_request(issued.name, enrolment, desk.federation.content.post_quantum)
    if enrolment.identity.hex() == issued.identity:
        raise Refusal(
            "request", str(request), "holds the keys that are to be replaced; make new keys on the device"
        )
    desk.register.refuse_shared([enrolment])
    return enrolment


def renew(folder: Path, names: Sequence[str], within: float) -> Desk:
    """Give clients new certificates, valid for `certificate_days`, for their existing keys; the server delivers them.

    Arguments as of `rotate`; no names stand for all. Certificates that end later than `within` days stay.

    Raises:
      Refusal: there is no such client.
    """
    with open_desk(folder) as desk:
        latest = time.time() + within * DAY_SECONDS
        for issued in _select_clients(desk.register, names or ["*"]):
            if issued.not_after <= latest:
                pem = _certificate(desk, issued.name, _p256(issued.certificate))
                desk = replace(desk, register=desk.register.with_client(replace(issued, certificate=pem)))
        return publish(desk)


def revoke(folder: Path, names: Sequence[str]) -> Desk:
    """Revoke clients: later rosters exclude them, and their certificates open no connection; arguments as of `rotate`.

    Raises:
      Refusal: there is no such client, or it is the server; nobody is revoked then.
    """
    with open_desk(folder) as desk:
        if SERVER in names:
            raise Refusal("name", SERVER, "the server can only be rotated")
        register = desk.register
        for issued in _select_clients(register, names):
            register = register.with_client(replace(issued, revoked=True))
        return publish(replace(desk, register=register))


def _select_clients(register: Register, names: Sequence[str]) -> list[Issued]:
    """Return the admitted clients that match these names and patterns, each once, by node.

    Raises:
      Refusal: a name is nobody's, or a pattern fits nobody.
    """
    clients: dict[int, Issued] = {}
    for name in names:
        matches = [each for each in register.admitted if fnmatch.fnmatchcase(each.name, name)]
        if not is_pattern(name):
            matches = [_find(register, name)]
        if not matches:
            raise Refusal("name", name, "matches no admitted client")
        clients |= {each.node: each for each in matches}
    return [clients[node] for node in sorted(clients)]


def cosign(folder: Path, files: Sequence[Path]) -> Desk:
    """Add the signatures in members' files to the newest roster, and publish it.

    Raises:
      Refusal: a file is none, is of another roster, or of a key that was never admitted.
    """
    with open_desk(folder) as desk:
        register, keys = desk.register, {each.identity: each.name for each in desk.register.clients}
        cosignatures = {each.name: each for each in register.cosignatures}
        for path in files:
            cosignature = read_cosignature(path, register.roster())
            if keys.get(cosignature.public) != cosignature.name:
                remedy = f"was not signed with the key admitted as {cosignature.name}"
                raise Refusal("cosignature", str(path), remedy)
            cosignatures[cosignature.name] = cosignature
        collected = tuple(cosignatures[name] for name in sorted(cosignatures))
        return publish(replace(desk, register=replace(register, cosignatures=collected)))


def _new_requirements(path: Path, federation: FederationFile, wheels: Path | None, lock: Path | None) -> str:
    """Return the new content of the bundles' requirements; empty for none. Refuse names without a hash."""
    if wheels is not None:
        return wheel_requirements(wheels, lock)
    if lock is not None:
        raise Refusal("lock", str(lock), "needs --wheels, a folder with fedveil's own wheel")
    if federation.content.requirements == UNVERIFIED:
        return installed_requirements(("client",) if federation.schema is None else ("client", "tables"))
    current = _read_requirements(path)
    if line := unverified(current):
        remedy = (
            f"{line!r} has no hash, so the owner of that package can run code on every device; give --wheels, "
            f"remove the file, or set requirements: {UNVERIFIED} in federation.yaml"
        )
        raise Refusal("requirements", str(path), remedy)
    return current


def requirements_of(desk: Desk) -> str:
    """Return the current content of the bundles' requirements; empty for none."""
    current = _read_requirements(desk.folder / AUTHORITY / REQUIREMENTS)
    if desk.federation.content.requirements == HASHED and unverified(current):
        return ""  # of an older desk; a bundle without requirements names no package that others may own
    return current


def _read_requirements(path: Path) -> str:
    return read_file(path).decode() if path.exists() else ""


def _check(federation: FederationFile, before: Register, requests: Mapping[str, Enrolment]) -> None:
    """Refuse a description that contradicts the register, or requests, by client, for other keys than its."""
    _require_members(federation, before.admitted)
    for entry in federation.clients:
        if before.find(entry.name) is None:
            _require_service(entry)
    for name, enrolment in requests.items():
        check_request(name, enrolment, federation.content.post_quantum)
        issued = before.find(name)
        if issued is not None and issued.identity != enrolment.identity.hex():
            remedy = "holds keys other than the admitted ones; use fedveil provision rotate"
            raise Refusal("request", name, remedy)
    before.refuse_shared(requests.values())


def _require_service(entry: ClientEntry) -> None:
    """Refuse a new client that could serve no run: its policy is over, or no release has its task."""
    name, until = entry.task["name"], entry.policy["until"]
    if name is not None and name not in TASKS:
        remedy = f"{nearest(str(name), TASKS)}; name your own task as target: module:Class"
        raise Refusal("task.name", name, f"of {entry.name} is not a shipped task; {remedy}")
    if until is not None and until < datetime.now(UTC).date():
        remedy = f"of {entry.name} is over, and its device would decline every request; give a later day"
        raise Refusal("policy.until", str(until), remedy)


def _require_members(federation: FederationFile, admitted: Sequence[Issued]) -> None:
    """Refuse members that the file does not describe, and members without an ML-DSA key if all must have one."""
    for name in [each.name for each in admitted if federation.entry(each.name) is None]:
        raise Refusal("clients", name, "was admitted and is not in the file; revoke it first")
    for name in [each.name for each in admitted if federation.content.post_quantum and not each.post_quantum]:
        remedy = f"has no ML-DSA key, which post_quantum requires; rotate {name} without post_quantum, then set it again"
        raise Refusal("post_quantum", name, remedy)


def check_request(name: str, enrolment: Enrolment, doubly: bool) -> None:
    """Refuse the request of another client, or one without an ML-DSA key if members sign doubly."""
    if enrolment.name != name:
        raise Refusal("request", enrolment.name, f"was made for a client other than {name}")
    if doubly and not enrolment.post_quantum:
        remedy = "has no ML-DSA key, which post_quantum requires; update fedveil on the device, and repeat the request"
        raise Refusal("request", name, remedy)


def _find(register: Register, name: str) -> Issued:
    """Return the admitted client of this name; refuse a name that is nobody's, or of a revoked client."""
    issued = register.find(name)
    if issued is None:
        similar = difflib.get_close_matches(name, [each.name for each in register.admitted], n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else "federation.yaml lists them"
        raise Refusal("name", name, f"no such client was admitted; {hint}")
    if issued.revoked:
        raise Refusal("name", name, "was revoked; admit the device under another name")
    return issued


def _with_server(desk: Desk) -> Desk:
    """Return the desk with a certificate for the server's present hosts; if it had none, write a new key first."""
    register, hosts = desk.register, desk.federation.content.server.hosts
    if register.server and register.hosts == hosts:
        return desk
    if register.server:
        public = _p256(register.server)
    else:
        key = new_tls_key()
        public = key.public_key()
        replace_file(desk.folder / SERVER / TLS, pem_of(key))
    days = desk.federation.content.certificate_days
    certificate = issue(desk.authority, SERVER, public, addresses=hosts, days=days).decode()
    return replace(desk, register=replace(register, server=certificate, hosts=hosts))


def admit(desk: Desk, name: str, enrolment: Enrolment | None, *, by_token: bool = False) -> Desk:
    """Return the desk with a certificate for a client's keys; `publish` stores it. A known client keeps its node.

    Args:
      desk: the operator's.
      name: of the client.
      enrolment: its public keys, by its device's request; None makes keys in the client's folder.
      by_token: the device gets its bundle over the enrolment port, and the desk keeps no folder of it.
    """
    existing, on_device = desk.register.find(name), enrolment is not None
    if enrolment is None:
        enrolment = make_keys(desk.folder / CLIENTS / name).enrolment(name)
    issued = Issued(
        name,
        desk.register.next_node if existing is None else existing.node,
        enrolment.identity.hex(),
        _certificate(desk, name, enrolment.tls),
        enrolment.fingerprint,
        enrolment.supernode,
        enrolment.supernode_fingerprint,
        on_device,
        post_quantum=enrolment.post_quantum.hex(),
        enrolled=by_token,
    )
    return replace(desk, register=desk.register.with_client(issued))


def _certificate(desk: Desk, name: str, public: EllipticCurvePublicKey) -> str:
    """Return a client's certificate in PEM."""
    days = desk.federation.content.certificate_days
    return issue(desk.authority, name, public, addresses=(), days=days).decode()


def publish(desk: Desk) -> Desk:
    """Store the register, then all public files; a changed roster gets the next version, without co-signatures."""
    register = replace(_renew_under_authority(desk), post_quantum=desk.federation.content.post_quantum)
    _require_members(desk.federation, register.admitted)
    if (register.admitted, register.post_quantum) != (desk.before.admitted, desk.before.post_quantum):
        version, earlier_rosters = register.version + 1, desk.before.chain
        register = replace(register, version=version, rosters=earlier_rosters, cosignatures=())
    write_register(desk.folder / AUTHORITY / REGISTER, register)
    write_server(desk.folder / SERVER, desk.federation, desk.authority, register)
    write_clients(desk.folder / CLIENTS, desk.federation, desk.authority, register, requirements_of(desk))
    return replace(desk, register=register)


def _renew_under_authority(desk: Desk) -> Register:
    """Return the register with all certificates by the present authority, also after an interrupted rollover.

    During an overlap the server has another one by the former authority, for devices that have not followed yet.
    """
    register, authority, days = desk.register, desk.authority, desk.federation.content.certificate_days
    for issued in register.admitted:
        if not _is_by(authority, issued.certificate):
            pem = _certificate(desk, issued.name, _p256(issued.certificate))
            register = register.with_client(replace(issued, certificate=pem))
    public, hosts = _p256(register.server), register.hosts
    if not _is_by(authority, register.server):
        server = issue(authority, SERVER, public, addresses=hosts, days=days).decode()
        register = replace(register, server=server)
    if authority.former is None:
        return replace(register, former_server="")
    if not register.former_server or register.server != desk.before.server:
        days = max(days, MAX_DAYS + 1)  # longer than any overlap
        former = issue(authority.former, SERVER, public, addresses=hosts, days=days).decode()
        register = replace(register, former_server=former)
    return register


def _is_by(authority: Authority, certificate: str) -> bool:
    """Return whether an authority signed a certificate, in PEM."""
    return issued_by(x509.load_pem_x509_certificate(certificate.encode()), authority.ca_pem)


def _p256(certificate: str) -> EllipticCurvePublicKey:
    """Return the key of a certificate, in PEM, that this desk has issued."""
    public = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    assert isinstance(public, EllipticCurvePublicKey)
    return public


@contextmanager
def open_desk(folder: Path) -> Generator[Desk]:
    """Open the operator's folder for this process alone; Refusal if it holds no federation, or is in use."""
    if not (folder / AUTHORITY / REGISTER).exists():
        raise Refusal("folder", str(folder), "holds no federation; create one with fedveil provision FILE")
    with _exclusive_folder(folder):
        federation = read_federation(folder / AUTHORITY / FILE)
        register = read_register(folder / AUTHORITY / REGISTER)
        authority = open_authority(folder / AUTHORITY, federation.name, federation.content.authority.care)
        yield Desk(folder, federation, authority, register, register)


@contextmanager
def _exclusive_folder(folder: Path) -> Generator[None]:
    """Create and lock the folder for this process; raise an error of the system as a refusal."""
    without_core_dumps()
    folders = (folder, folder / AUTHORITY, folder / CLIENTS, folder / SERVER)
    fresh = [each for each in folders if not each.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for each in folders:
            each.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder / AUTHORITY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with _removing_empty_folders(fresh):
                yield
        finally:
            os.close(descriptor)
    except BlockingIOError:
        raise Refusal("folder", str(folder), "is being provisioned by another process") from None
    except OSError as error:
        raise Refusal("folder", str(folder), f"cannot be written ({error})") from None


@contextmanager
def _removing_empty_folders(fresh: Sequence[Path]) -> Generator[None]:
    """Remove new folders that are empty after a refusal."""
    try:
        yield
    except BaseException:
        for each in reversed(fresh):
            with suppress(OSError):  # it holds something
                each.rmdir()
        raise
