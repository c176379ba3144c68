"""Register of issued identities of an authority: clients, nodes and keys.

The roster and the lists of who is admitted follow from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..base.bounded_decoding import build, read_json
from ..base.durable_files import replace_file
from ..base.refusal import Refusal
from ..configs.bundle_files import read_file
from ..privacy.secagg.roster import UNKNOWN, Member, Roster, write_roster
from ..strategies.identity import FIRST_NODE
from .device.cosignature import Cosignature
from .device.enrolment import Enrolment

FORMAT = 2
UNCHAINED = 1  # format without the rosters of earlier versions


@dataclass(frozen=True)
class Issued:
    """One client that was ever admitted.

    Attributes:
      name, node: never given to another.
      identity: its Ed25519 public key in hexadecimal.
      certificate: of TLS, in PEM.
      fingerprint: hash of the public key in the certificate; see `Enrolment`.
      supernode, supernode_fingerprint: of its public key for Flower; see `Enrolment`.
      on_device: whether its private keys were made on the device, so that the desk does not have them.
      revoked: whether it is admitted no longer; it stays in the register, so that no name or key is given again.
      post_quantum: its ML-DSA-65 public key in hexadecimal; empty if it was admitted without one.
      enrolled: whether it got its bundle by a token, so that the desk keeps no bundle of it.
    """

    name: str
    node: int
    identity: str
    certificate: str
    fingerprint: str
    supernode: str
    supernode_fingerprint: str
    on_device: bool
    revoked: bool = False
    post_quantum: str = ""
    enrolled: bool = False

    @cached_property
    def not_after(self) -> int:
        """The Unix second at which its certificate ends."""
        certificate = x509.load_pem_x509_certificate(self.certificate.encode())
        return int(certificate.not_valid_after_utc.timestamp())

    @property
    def keys(self) -> tuple[str, str, str]:
        """Identifiers of its public keys."""
        return self.identity, self.fingerprint, self.supernode_fingerprint


@dataclass(frozen=True)
class Register:
    """Everything issued so far.

    Attributes:
      version: of the roster, one more with every change of who is admitted with which keys.
      clients: in order of their nodes, the revoked ones included.
      server: the server's certificate in PEM; empty before there is one.
      hosts: DNS names and IP addresses in that certificate.
      rosters: hashes of the rosters of earlier versions, in hexadecimal and in their order.
      cosignatures: of members under the roster of this version.
      post_quantum: whether the roster holds ML-DSA keys, and one signs it.
      replaced: former keys of clients, as in `Issued.keys`; a request with one of them is refused.
      former_server: the server's certificate by the authority before, during an overlap; else empty.
    """

    version: int = 0
    clients: tuple[Issued, ...] = ()
    server: str = ""
    hosts: tuple[str, ...] = ()
    rosters: tuple[str, ...] = ()
    cosignatures: tuple[Cosignature, ...] = ()
    post_quantum: bool = False
    replaced: tuple[str, ...] = ()
    former_server: str = ""

    @property
    def admitted(self) -> tuple[Issued, ...]:
        """The clients that are not revoked."""
        return tuple(each for each in self.clients if not each.revoked)

    @property
    def next_node(self) -> int:
        """The node of the next client; no node is assigned twice."""
        return max((each.node for each in self.clients), default=FIRST_NODE - 1) + 1

    def find(self, name: str) -> Issued | None:
        """Return the client of this name, revoked or not; None without one."""
        return next((each for each in self.clients if each.name == name), None)

    def roster(self) -> Roster:
        """Return the roster of admitted clients."""
        members: list[Member] = []
        for each in self.admitted:
            identity = bytes.fromhex(each.identity)
            post_quantum = bytes.fromhex(each.post_quantum) if self.post_quantum else b""
            members.append(Member(each.node, each.name, identity, each.not_after, post_quantum))
        return Roster(self.version, tuple(members), tuple(map(bytes.fromhex, self.rosters)))

    @property
    def cosigners(self) -> tuple[str, ...]:
        """Names of the members that have signed the roster, in order."""
        return tuple(each.name for each in self.cosignatures)

    def signed_roster(
        self, authority: Ed25519PrivateKey, successor: Ed25519PrivateKey | None = None
    ) -> bytes:
        """Return the roster with the signatures of the authority, of its successor in an overlap, and of members."""
        signed = {bytes.fromhex(each.public): bytes.fromhex(each.signature) for each in self.cosignatures}
        return write_roster(self.roster(), authority, signed, doubly=self.post_quantum, successor=successor)

    @property
    def chain(self) -> tuple[str, ...]:
        """Hashes of the rosters up to this version, in hexadecimal, to include in the next one."""
        if not self.version:
            return ()
        # A placeholder stands for each version from before the register kept hashes.
        unknown_versions = self.version - 1 - len(self.rosters)
        return (*self.rosters, *[UNKNOWN.hex()] * unknown_versions, self.roster().hash.hex())

    def with_client(self, issued: Issued) -> Register:
        """Return the register with this client, replacing the one of its name, whose former keys stay refused."""
        others = [each for each in self.clients if each.name != issued.name]
        previous = self.find(issued.name)
        replaced_keys = [] if previous is None else [key for key in previous.keys if key not in issued.keys]
        clients = tuple(sorted([*others, issued], key=lambda each: each.node))
        return replace(self, clients=clients, replaced=(*self.replaced, *replaced_keys))

    def refuse_shared(self, enrolments: Iterable[Enrolment]) -> None:
        """Refuse enrolments with a key that belongs or belonged to another client, or was replaced."""
        holders = {key: each.name for each in self.clients for key in each.keys}
        for each in enrolments:
            for key in (
                each.identity.hex(),
                each.fingerprint,
                each.supernode_fingerprint,
            ):  # as `Issued.keys`
                if key in self.replaced:
                    remedy = "holds a key that was replaced; make new keys on the device"
                    raise Refusal("request", each.name, remedy)
                if holders.setdefault(key, each.name) != each.name:
                    remedy = f"holds a key of {holders[key]}; make new keys on the device"
                    raise Refusal("request", each.name, remedy)


def read_register(path: Path) -> Register:
    """Return the register in the file, empty without a file.

    Raises:
      Refusal: it cannot be read.
    """
    if not path.exists():
        return Register()
    try:
        content = read_json(read_file(path))
        version = cast(dict[str, object], content).pop("format", None) if isinstance(content, dict) else None
        if version not in (UNCHAINED, FORMAT):
            raise ValueError("another version of fedveil wrote it")
        return build(Register, content)
    except ValueError as error:
        raise Refusal("file", str(path), f"cannot be read ({error}); restore it from a backup") from None


def write_register(path: Path, register: Register) -> None:
    """Write the register to the file at `path`; it is on disk when this returns."""
    replace_file(path, (json.dumps({"format": FORMAT, **asdict(register)}, indent=1) + "\n").encode())
