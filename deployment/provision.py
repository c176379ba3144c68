"""Provisioning of a federation: from federation.yaml to the authority and its bundles, and what changes them later.

What is issued stands in the authority's register. It is written after the private keys and before everything that is
public, so that a command which was cut short is completed by giving it again.
"""

from __future__ import annotations

import difflib
import fcntl
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from ..client.device.cosignature import read_cosignature
from ..client.device.enrolment import TLS, Enrolment, make_keys, new_tls_key, pem_of, read_request
from ..configs.bundle_files import read_file
from ..links.core_dumps import without_core_dumps
from ..links.server_bundle import SERVER
from ..privacy.ledger.durable_files import replace_file
from ..privacy.refusal import Refusal
from ..tasks.table_schema import SCHEMA
from .authority import Authority, issue, open_authority
from .federation_yaml import HASHED, UNVERIFIED, FederationFile, read_federation
from .register import Issued, Register, read_register, write_register
from .requirements import installed_requirements, unverified, wheel_requirements
from .write_bundles import REQUIREMENTS, write_clients, write_server

AUTHORITY, CLIENTS = "authority", "clients"
FILE, REGISTER = "federation.yaml", "register.json"


@dataclass(frozen=True)
class Desk:
    """The operator's folder: what is wanted, who signs, what was issued and what had been before."""

    folder: Path
    federation: FederationFile
    authority: Authority
    before: Register
    register: Register


def provision(file: Path, out: Path | None, wheels: Path | None = None, lock: Path | None = None) -> Desk:
    """Make or complete the federation that a file describes.

    Clients that are new are admitted; the others keep their keys and certificates.

    Args:
      file: federation.yaml.
      out: the folder to make it in; None stands for one of the federation's name.
      wheels: a folder of what a device installs; None leaves the requirements as they are, or has none.
      lock: hashes of what is not in `wheels`; see `wheel_requirements`.

    Raises:
      Refusal: of a mistake, before anything is written.
    """
    federation = read_federation(file)
    requests = {each.name: read_request(each.request) for each in federation.clients if each.request}
    folder = Path(federation.name) if out is None else out
    requirements = _wanted_requirements(folder / AUTHORITY / REQUIREMENTS, federation, wheels, lock)
    _check(federation, read_register(folder / AUTHORITY / REGISTER), requests)
    with _writing(folder):
        before = read_register(folder / AUTHORITY / REGISTER)
        _check(federation, before, requests)  # again: another process may have been here in between
        authority = open_authority(folder / AUTHORITY, federation.name, federation.care)
        desk = _with_server(Desk(folder, federation, authority, before, before))
        for entry in federation.clients:
            if before.find(entry.name) is None:
                desk = _admit(desk, entry.name, requests.get(entry.name))
        if requirements:
            replace_file(folder / AUTHORITY / REQUIREMENTS, requirements.encode())
        if federation.schema is not None:
            replace_file(folder / AUTHORITY / SCHEMA, federation.schema.encode())
        replace_file(folder / AUTHORITY / FILE, file.read_bytes())
        return _publish(desk)


def rotate(folder: Path, name: str, request: Path | None) -> Desk:
    """Give a client, or the server, new keys and a new certificate; its old ones are admitted no longer.

    Args:
      folder: that `provision` made.
      name: of a client, or "server".
      request: by which a device asks for keys that it made itself; None makes them here.

    Raises:
      Refusal: there is no such client, or its keys are on the device and no request is given.
    """
    with _opened(folder) as desk:
        if name == SERVER:
            return _publish(_with_server(replace(desk, register=replace(desk.register, server=""))))
        issued = _find(desk.register, name)
        if request is None and issued.on_device:
            remedy = f"has its keys on the device; run fedveil client request NEW --name {name} there, give --request"
            raise Refusal("name", name, remedy)
        enrolment = None if request is None else read_request(request)
        if enrolment is not None:
            _check_request(name, enrolment)
            if enrolment.identity.hex() == issued.identity:
                raise Refusal("request", str(request), "asks for the keys that are to be replaced")
            desk.register.refuse_shared([enrolment])
        return _publish(_admit(desk, name, enrolment))


def revoke(folder: Path, name: str) -> Desk:
    """Admit a client no longer: it is in no roster from now on, and its certificate opens no connection.

    Raises:
      Refusal: there is no such client, or it is the server.
    """
    with _opened(folder) as desk:
        if name == SERVER:
            raise Refusal("name", name, "the server can be rotated only")
        issued = _find(desk.register, name)
        return _publish(replace(desk, register=desk.register.having(replace(issued, revoked=True))))


def cosign(folder: Path, files: Sequence[Path]) -> Desk:
    """Put signatures of members under the newest roster, and publish it with them.

    Args:
      folder: that `provision` made.
      files: that devices wrote.

    Raises:
      Refusal: a file is none, is of another roster, or of a key that was never admitted.
    """
    with _opened(folder) as desk:
        register, keys = desk.register, {each.identity: each.name for each in desk.register.clients}
        given = {each.name: each for each in register.cosignatures}
        for path in files:
            found = read_cosignature(path, register.roster())
            if keys.get(found.public) != found.name:
                raise Refusal(
                    "cosignature", str(path), f"is not by the key that was admitted as {found.name}"
                )
            given[found.name] = found
        collected = tuple(given[name] for name in sorted(given))
        return _publish(replace(desk, register=replace(register, cosignatures=collected)))


def _wanted_requirements(
    path: Path, federation: FederationFile, wheels: Path | None, lock: Path | None
) -> str:
    """Return what the bundles' requirements shall hold; empty: they have none. Refuse names without a hash."""
    if wheels is not None:
        return wheel_requirements(wheels, lock)
    if lock is not None:
        raise Refusal("lock", str(lock), "comes beside --wheels, a folder with fedveil's own wheel")
    if federation.requirements == UNVERIFIED:
        return installed_requirements(("client",) if federation.schema is None else ("client", "tables"))
    kept = _kept_requirements(path)
    if (line := unverified(kept)) is not None:
        remedy = (
            f"{line!r} has no hash, so that whoever serves that name runs code on every device; give --wheels, "
            f"remove the file, or say requirements: {UNVERIFIED} in federation.yaml"
        )
        raise Refusal("requirements", str(path), remedy)
    return kept


def _kept_requirements(path: Path) -> str:
    return read_file(path).decode() if path.exists() else ""


def _check(federation: FederationFile, before: Register, requests: Mapping[str, Enrolment]) -> None:
    """Refuse what contradicts what was issued."""
    wanted = {entry.name for entry in federation.clients}
    for issued in before.admitted:
        if issued.name not in wanted:
            raise Refusal("clients", issued.name, "was admitted and is not in the file; revoke it first")
    for name, enrolment in requests.items():
        _check_request(name, enrolment)
        issued = before.find(name)
        if issued is not None and issued.identity != enrolment.identity.hex():
            remedy = "asks for other keys than were admitted; use fedveil provision rotate"
            raise Refusal("request", name, remedy)
    before.refuse_shared(requests.values())
    known = {each.name: each.post_quantum for each in before.admitted}
    asked = {name: each.post_quantum.hex() for name, each in requests.items() if name not in known}
    _require_second_keys(federation.post_quantum, known | asked)


def _require_second_keys(post_quantum: bool, keys: Mapping[str, str]) -> None:
    """Refuse members without an ML-DSA key where all must have one."""
    for name, key in keys.items() if post_quantum else ():
        if not key:
            remedy = f"has no ML-DSA key, which post_quantum asks of all; without it rotate {name}, then give it again"
            raise Refusal("post_quantum", name, remedy)


def _check_request(name: str, enrolment: Enrolment) -> None:
    if enrolment.name != name:
        raise Refusal("request", enrolment.name, f"was made for another client than {name}")


def _find(register: Register, name: str) -> Issued:
    issued = register.find(name)
    if issued is None:
        near = difflib.get_close_matches(name, [each.name for each in register.admitted], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "federation.yaml lists them"
        raise Refusal("name", name, f"no such client was admitted; {hint}")
    if issued.revoked:
        raise Refusal("name", name, "was revoked; admit the device under another name")
    return issued


def _with_server(desk: Desk) -> Desk:
    """Make a key for the server where it has none, and a certificate where its hosts have changed."""
    register, hosts = desk.register, desk.federation.hosts
    if register.server and register.hosts == hosts:
        return desk
    if register.server:
        public = x509.load_pem_x509_certificate(register.server.encode()).public_key()
        assert isinstance(public, EllipticCurvePublicKey)
    else:
        key = new_tls_key()
        public = key.public_key()
        replace_file(desk.folder / SERVER / TLS, pem_of(key))
    days = desk.federation.certificate_days
    certificate = issue(desk.authority, SERVER, public, addresses=hosts, days=days).decode()
    return replace(desk, register=replace(register, server=certificate, hosts=hosts))


def _admit(desk: Desk, name: str, enrolment: Enrolment | None) -> Desk:
    """Issue a certificate for the keys of the request, or for new ones in the client's folder."""
    known, on_device = desk.register.find(name), enrolment is not None
    if enrolment is None:
        enrolment = make_keys(desk.folder / CLIENTS / name).enrolment(name)
    days = desk.federation.certificate_days
    issued = Issued(
        name,
        desk.register.next_node if known is None else known.node,
        enrolment.identity.hex(),
        issue(desk.authority, name, enrolment.tls, addresses=(), days=days).decode(),
        enrolment.fingerprint,
        enrolment.supernode,
        enrolment.supernode_fingerprint,
        on_device,
        post_quantum=enrolment.post_quantum.hex(),
    )
    return replace(desk, register=desk.register.having(issued))


def _publish(desk: Desk) -> Desk:
    """Keep what was issued, with a new number for a roster that has changed, and write all that is public."""
    register = replace(desk.register, post_quantum=desk.federation.post_quantum)
    _require_second_keys(register.post_quantum, {each.name: each.post_quantum for each in register.admitted})
    if (register.admitted, register.post_quantum) != (desk.before.admitted, desk.before.post_quantum):
        numbered = replace(register, version=register.version + 1, rosters=desk.before.chain)
        register = replace(numbered, cosignatures=())
    write_register(desk.folder / AUTHORITY / REGISTER, register)
    requirements = _kept_requirements(desk.folder / AUTHORITY / REQUIREMENTS)
    if desk.federation.requirements == HASHED and unverified(requirements) is not None:
        requirements = ""  # an older desk's; a bundle without any names nothing that a stranger could own
    write_server(desk.folder / SERVER, desk.federation, desk.authority, register)
    write_clients(desk.folder / CLIENTS, desk.federation, desk.authority, register, requirements)
    return replace(desk, register=register)


@contextmanager
def _opened(folder: Path) -> Generator[Desk]:
    if not (folder / AUTHORITY / REGISTER).exists():
        raise Refusal("folder", str(folder), "holds no federation; fedveil provision FILE makes one")
    with _writing(folder):
        federation = read_federation(folder / AUTHORITY / FILE)
        register = read_register(folder / AUTHORITY / REGISTER)
        authority = open_authority(folder / AUTHORITY, federation.name, federation.care)
        yield Desk(folder, federation, authority, register, register)


@contextmanager
def _writing(folder: Path) -> Generator[None]:
    """Hold the folder for this process alone; what the system refuses is a refusal."""
    without_core_dumps()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for each in (folder, folder / AUTHORITY, folder / CLIENTS, folder / SERVER):
            each.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder / AUTHORITY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(descriptor)
    except BlockingIOError:
        raise Refusal("folder", str(folder), "is being provisioned by another process") from None
    except OSError as error:
        raise Refusal("folder", str(folder), f"cannot be written ({error})") from None
