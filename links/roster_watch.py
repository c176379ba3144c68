"""Watch of a running server's roster, admission list and credentials, which provisioning replaces while it runs."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from cryptography import x509

from ..base.refusal import Refusal
from ..configs.bundle_files import ROLLOVERS, ROSTER, Credentials, read_signed_roster, spki
from ..privacy.secagg.rollover import Rollover
from ..privacy.secagg.roster import Roster
from .server_bundle import FORMER, ServedCredentials, ServerBundle, read_admitted, read_authority, read_served

logger = logging.getLogger("fedveil.server")

T = TypeVar("T")
SignedRoster = tuple[Roster, bytes]  # a roster, and its bytes as its authority signed them
# Functions that return the nodes of the newest roster, and the admitted nodes by the fingerprints of their keys.
Nodes = Callable[[], Collection[int]]
Admitted = Callable[[], Mapping[str, int]]


@dataclass
class Followed(Generic[T]):
    """Value that is read from files; calling it reads them again after a change, and returns the value.

    An error is logged once and never raised.

    Attributes:
      paths: the files.
      read: reads them and returns the new value, given the present one; raises Refusal or OSError.
      value: the value read last.
      fallback: the value while the files cannot be read; None stands for `value`.
      optional: further files, which may be missing.
    """

    paths: tuple[Path, ...]
    read: Callable[[T], T]
    value: T
    fallback: T | None = None
    optional: tuple[Path, ...] = ()
    _stamp: object = None  # time, inode and size of the files that `value` is from; None: read them again
    _error: str = ""  # the error that was logged last; empty once the files can be read
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self) -> T:
        """Return the current value, from any thread."""
        with self._one_at_a_time:
            try:
                here = (*self.paths, *(path for path in self.optional if path.exists()))
                if (stamp := [(path, *_stamp_of(path)) for path in here]) != self._stamp:
                    self.value, self._stamp, self._error = self.read(self.value), stamp, ""
            except (OSError, Refusal) as error:
                return self._fall_back(str(error))
            return self.value

    def _fall_back(self, error: str) -> T:
        """Log an error, unless it is the last one again, and return the value to go on with."""
        self._stamp = None
        if error != self._error:
            self._error = error
            continuation = "going on as before" if self.fallback is None else f"going on with {self.fallback}"
            logger.error("not taken, %s: %s", continuation, error)
        return self.value if self.fallback is None else self.fallback


def _stamp_of(path: Path) -> tuple[int, int, int]:
    """Return what changes with a file's content."""
    state = path.stat()
    return state.st_mtime_ns, state.st_ino, state.st_size


def followed_roster(bundle: ServerBundle) -> Followed[SignedRoster]:
    """Return the roster of a running server: always the newest that its authority signed."""
    path = bundle.folder / ROSTER

    def read(value: SignedRoster) -> SignedRoster:
        """Return the roster in the file; raise Refusal unless it is the present one or a newer one that follows from it."""
        roster, signed = read_signed_roster(path, read_authority(bundle.folder, bundle.federation)[0])
        if (roster.version, roster.hash) == (value[0].version, value[0].hash):
            return value[0], signed  # members may have signed it since
        if roster.version <= value[0].version:
            remedy = f"is not newer than the server's version {value[0].version}; copy the newest roster"
            raise Refusal("roster", f"version {roster.version}", remedy)
        if not roster.follows(value[0]):
            remedy = f"does not follow from the server's version {value[0].version}: the authority signed two histories"
            raise Refusal("roster", f"version {roster.version}", remedy)
        return roster, signed

    return Followed((path,), read, (bundle.roster, bundle.signed_roster))


def followed_credentials(bundle: ServerBundle) -> Callable[[], Credentials]:
    """Return a function that returns the credentials of a running server.

    A new certificate is used once its key is present, and until an overlap ends the one by the authority before.
    """
    paths = (bundle.folder / "tls.pem", bundle.folder / "tls.key")
    served = Followed(
        paths,
        lambda _: read_served(bundle.folder, bundle.federation),
        ServedCredentials(bundle.credentials),
        optional=(bundle.folder / ROLLOVERS, bundle.folder / FORMER),
    )
    return lambda: served().at(time.time())


def followed_rollovers(bundle: ServerBundle) -> Callable[[], tuple[Rollover, ...]]:
    """Return a function that returns the rollovers of a running server's authority."""
    path = bundle.folder / ROLLOVERS
    return Followed[tuple[Rollover, ...]](
        (), lambda _: read_authority(bundle.folder, bundle.federation)[1], bundle.rollovers, optional=(path,)
    )


def nodes_of(rosters: Callable[[], SignedRoster]) -> Nodes:
    """Return a function that returns the nodes of the newest roster."""
    return lambda: [member.node for member in rosters()[0].members]


def fingerprint(certificate: bytes) -> str:
    """Return SHA-256, in hexadecimal, of the SubjectPublicKeyInfo of a certificate in PEM.

    It names the key, so that a renewed certificate keeps it.

    Raises:
      ValueError: `certificate` is not a certificate.
    """
    public = x509.load_pem_x509_certificate(certificate).public_key()
    return hashlib.sha256(spki(public)).hexdigest()


def admitted_in(path: Path, nodes: Nodes) -> Admitted:
    """Return a function that returns the currently admitted nodes.

    A missing or damaged list admits no node until it is repaired.

    Args:
      path: the admission list, a JSON mapping of fingerprints to nodes.
      nodes: returns the nodes of the roster; others on the list are not admitted.
    """
    listed = Followed[dict[str, int]]((path,), lambda _: read_admitted(path), {}, fallback={})

    def admitted() -> Mapping[str, int]:
        members = set(nodes())
        return {key: node for key, node in listed().items() if node in members}

    return admitted
