"""Server bundle, the folder that `fedveil provision` makes for the server: its identity, address and admission list."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, cast

from ..base.bounded_decoding import Undecodable, read_json
from ..base.refusal import Range, Refusal
from ..configs.bundle_files import (
    ROLLOVERS,
    ROSTER,
    Address,
    Credentials,
    Link,
    check_certificate,
    read_authority_key,
    read_credentials,
    read_file,
    read_rollovers,
    read_signed_roster,
    read_toml,
    refuse_writable,
)
from ..privacy.secagg.rollover import Rollover
from ..privacy.secagg.roster import Roster

SERVER = "server"  # common name of the server's certificate, and name of its folder
FORMER = "tls.former.pem"  # its certificate by the former authority, until the overlap ends
OWNERS = "owners.toml"  # a file of its own, since a server of an earlier release refuses unknown keys in server.toml
FINGERPRINT = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class OwnersBudget:
    """Budget that every owner's policy allows as provisioned: the least epsilon, at the least delta."""

    target_epsilon: Annotated[float, Range(gt=0)]
    target_delta: Annotated[float, Range(gt=0, lt=1)]


@dataclass(frozen=True)
class ServerFile:
    """Content of the file server.toml; `ServerBundle` explains its keys."""

    federation: str
    listen: Address
    link: Link = "grpc"
    enrolment: Address | None = None


@dataclass(frozen=True)
class ServerBundle:
    """Server bundle, read and checked.

    Attributes:
      folder: of its files.
      federation: name of the federation.
      listen: address and port, for instance "0.0.0.0:8443".
      link: one of `LINKS`.
      credentials: of the server's end of mutual TLS.
      authority: that signs the roster, as `privacy.secagg.roster.read_roster` takes it.
      roster: members of the federation; its nodes are the link's node numbers.
      signed_roster: the roster's bytes as they were signed, for clients that hold an older one.
      enrolment: address and port for devices that enrol; None has none.
      allowed: what the policies allowed when they were provisioned; None in a bundle of an earlier release.
      rollovers: of the authority, the first one's first.
    """

    folder: Path
    federation: str
    listen: str
    link: str
    credentials: Credentials
    authority: bytes
    roster: Roster
    signed_roster: bytes
    enrolment: str | None = None
    allowed: OwnersBudget | None = None
    rollovers: tuple[Rollover, ...] = ()

    @property
    def first_authority(self) -> bytes:
        """The key of the federation's first authority, by which its ledgers are known."""
        return bytes.fromhex(self.rollovers[0].old) if self.rollovers else self.authority

    @property
    def admitted(self) -> Path:
        """Path of the admission list, which provisioning replaces while the server runs."""
        return self.folder / "admitted.json"


def read_server_bundle(folder: Path) -> ServerBundle:
    """Return the bundle in `folder`, each file checked by itself and against the others.

    Raises:
      Refusal: a file is missing, holds a mistake or does not belong to the others, or others may read a secret.
    """
    if (folder / SERVER / "server.toml").is_file():
        raise Refusal(
            "FOLDER", str(folder), f"is the provisioned folder; name the server's, {folder / SERVER}"
        )
    refuse_writable(folder, "server.toml", "authority.pub", "admitted.json")
    settings = read_toml(ServerFile, folder / "server.toml")
    authority, rollovers = read_authority(folder, settings.federation)
    roster, signed = read_signed_roster(folder / ROSTER, authority)
    bundle = ServerBundle(
        folder,
        settings.federation,
        settings.listen,
        settings.link,
        read_served(folder, settings.federation).newest,
        authority,
        roster,
        signed,
        settings.enrolment,
        read_toml(OwnersBudget, folder / OWNERS) if (folder / OWNERS).is_file() else None,
        rollovers,
    )
    read_admitted(bundle.admitted)
    return bundle


def read_authority(folder: Path, federation: str) -> tuple[bytes, tuple[Rollover, ...]]:
    """Return the authority's public key in a server's bundle, and the rollovers that led to it.

    Raises:
      Refusal: a file cannot be read, or the rollovers lead to another key.
    """
    authority = read_authority_key(folder / "authority.pub")
    chain = read_rollovers(folder / ROLLOVERS, federation)
    if chain and bytes.fromhex(chain[-1].new) != authority:
        remedy = "leads to another key than authority.pub beside it; copy both from the desk"
        raise Refusal("file", str(folder / ROLLOVERS), remedy)
    return authority, chain


@dataclass(frozen=True)
class ServedCredentials:
    """Credentials of a server and, until the Unix second `until`, those by the former authority, which all devices trust."""

    newest: Credentials
    former: Credentials | None = None
    until: int = 0

    def at(self, now: float) -> Credentials:
        """Return the credentials that the server shows to devices at a Unix second."""
        return self.former if self.former is not None and now < self.until else self.newest


def read_served(folder: Path, federation: str) -> ServedCredentials:
    """Return the credentials in a server's bundle, and during a rollover's overlap the former authority's certificate.

    Raises:
      Refusal: a file cannot be read, or a certificate or rollover is invalid.
    """
    chain, path = read_rollovers(folder / ROLLOVERS, federation), folder / FORMER
    earlier = "\n".join(each.old_ca for each in chain).encode()
    newest = replace(read_credentials(folder, federation, SERVER), earlier=earlier)
    if not chain or time.time() >= chain[-1].until:
        return ServedCredentials(newest)
    # Devices that do not follow the rollover yet can verify only the certificate by the former authority.
    former = replace(newest, ca=chain[-1].old_ca.encode(), certificate=read_file(path))
    check_certificate(path, former.certificate, former, federation, SERVER)
    return ServedCredentials(newest, replace(newest, certificate=former.certificate), chain[-1].until)


def read_admitted(path: Path) -> dict[str, int]:
    """Return the admission list: SHA-256 of a public key, in hexadecimal, to its node.

    Raises:
      Refusal: the list cannot be read, or holds something else.
    """
    try:
        content = cast(object, read_json(read_file(path)))
    except Undecodable:
        raise Refusal("file", str(path), "is not JSON") from None
    if not isinstance(content, dict):
        raise Refusal("file", str(path), "must be a mapping of fingerprints to nodes")
    admitted = cast(dict[str, object], content)
    for fingerprint, node in admitted.items():
        if not FINGERPRINT.fullmatch(fingerprint) or type(node) is not int or node < 2:
            remedy = f"{fingerprint[:64]!r}: {node!r} is not a fingerprint and a node"
            raise Refusal("file", str(path), remedy)
    return cast(dict[str, int], admitted)
