"""Files of a bundle, read strictly: TOML, public files, secrets that only their owner may read, certificates.

A bundle is what `fedveil provision` makes for one server or one client. Both ends read theirs with these.
"""

from __future__ import annotations

import os
import re
import stat
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from ..base.extensions import names
from ..base.refusal import Form, OneOf, Refusal, unreadable
from ..privacy.secagg.double_signature import BOTH_BYTES
from ..privacy.secagg.refusal import Refused
from ..privacy.secagg.rollover import Rollover, read_chain
from ..privacy.secagg.roster import MEMBER_NAME, Roster, read_roster
from ..privacy.secagg.suite import KEY_BYTES
from .strict import read_group

LARGEST_FILE = 16 * 2**20  # a roster of 100 000 members takes 5 MiB
LINKS = names("link")
CERTIFICATE = "tls.pem"
ROSTER = "roster.bin"  # in a bundle as it was shipped, in a device's state folder the newest that has come
ROLLOVERS = "rollovers.json"  # of the authority; in a device's state folder those that are in force there
SCHEMA = "schema.yaml"  # of tables, the same at the server and at every device
OTHERS = stat.S_IRWXG | stat.S_IRWXO

NAME = MEMBER_NAME
NAME_FORM = "at most 48 of a-z, 0-9, - and _, the first a letter or a digit"
_DNS = "[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"  # IPv4 addresses have that form too
_IPV6 = "[0-9A-Fa-f:]{2,39}"
HOST = re.compile(f"{_DNS}|{_IPV6}")
_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
ADDRESS = re.compile(rf"({_DNS}|\[{_IPV6}\]):{_PORT}")
ADDRESS_FORM = "host:port, for instance fl.example.org:8443"
# Of keys of the files.
Name = Annotated[str, Form(NAME.pattern, f"must be {NAME_FORM}")]
Address = Annotated[str, Form(ADDRESS.pattern, f"must be {ADDRESS_FORM}")]
Link = Annotated[str, OneOf(LINKS)]
Lines = tuple[Annotated[str, Form(".*", "must be a list of lines of text")], ...]

T = TypeVar("T")


@dataclass(frozen=True)
class Credentials:
    """Credentials of one end of a mutually authenticated TLS connection, each in PEM.

    Attributes:
      ca: the certificate of the federation's authority, the only one that is trusted; during an overlap a second
        behind it.
      certificate: its own, signed by `ca`.
      key: the private key of it, secret.
      earlier: certificates of authorities that `ca` has replaced, by which a server still knows its clients: it admits
        them by their keys.
    """

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    earlier: bytes = b""


def hexadecimal(length: int) -> Form:
    """Return the form of `length` bytes in hexadecimal."""
    return Form(f"[0-9a-f]{{{2 * length}}}", f"must be {length} bytes in hexadecimal")


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file. Refusal when there is none, or it is larger than any of a bundle's."""
    return _read(path, forbidden=0)


def read_secret(path: Path) -> bytes:
    """Return the bytes of a file that only its owner may access. Refusal also if other users may."""
    return _read(path, forbidden=OTHERS)


def _read(path: Path, forbidden: int) -> bytes:
    try:
        # Nonblocking: a FIFO in the place of the file must not stop its reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Refusal("file", str(path), "is not a regular file")
            if status.st_mode & forbidden:
                raise Refusal("file", str(path), f"may be read by others; run: chmod 600 {path}")
            if status.st_size > LARGEST_FILE:
                remedy = f"is larger than {LARGEST_FILE} bytes; no file of a bundle is"
                raise Refusal("file", str(path), remedy)
            return file.read()
    except OSError as error:
        remedy = unreadable(error, "see whether it is there and whose it is")
        raise Refusal("file", str(path), remedy) from None


def refuse_writable(folder: Path, *names: str) -> None:
    """Refuse a folder, or files in it, that users other than the owner may change, because they cannot be trusted.

    Args:
      folder: of the bundle.
      names: of the files; one that is missing is left to its reader.

    Raises:
      Refusal: the first that others may write.
    """
    for path in (folder, *(folder / name for name in names)):
        with suppress(OSError):
            if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise Refusal("file", str(path), f"may be written by others; run: chmod go-w {path}")


def read_toml(kind: type[T], path: Path) -> T:
    """Return the dataclass that describes a TOML file; see `read_group`.

    Raises:
      Refusal: the file cannot be read, is no TOML, or holds mistakes, all of which are named.
    """
    return read_toml_text(kind, read_file(path), str(path))


def read_toml_text(kind: type[T], data: bytes, where: str) -> T:
    """Return the dataclass that describes TOML from `where`; see `read_toml`."""
    try:
        values = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise Refusal("file", where, f"is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        # A date that is none, or a number of thousands of digits, too.
        raise Refusal("file", where, f"is not TOML: {error}") from None
    return read_group(kind, values, where)


def read_credentials(folder: Path, federation: str, name: str, earlier: bytes = b"") -> Credentials:
    """ca.pem, tls.pem and tls.key of a bundle.

    Args:
      folder: of the bundle.
      federation: that it is of.
      name: of its client or of the server.
      earlier: certificates of further authorities, one of which may have signed its certificate instead.

    Raises:
      Refusal: one cannot be read, they do not belong together, they are another federation's or another
        name's, or their time is over. A certificate whose time has not begun is kept: a device's clock may be late.
    """
    path = folder / CERTIFICATE
    key = read_secret(folder / "tls.key")
    credentials = Credentials(read_file(folder / "ca.pem"), read_file(path), key, earlier)
    check_certificate(path, credentials.certificate, credentials, federation, name)
    return credentials


def check_certificate(path: Path, pem: bytes, credentials: Credentials, federation: str, name: str) -> None:
    """Refuse a certificate that is not the authority's, for this key and this name, or whose time is over.

    Args:
      path: of its file.
      pem: the certificate.
      credentials: the authority's certificate, and the key; its own certificate is not looked at.
      federation: for which it must be made.
      name: of the client or the server.

    Raises:
      Refusal: of the first fault.
    """
    load_certificate(path.with_name("ca.pem"), credentials.ca)
    certificate = load_certificate(path, pem)
    if not issued_by(certificate, credentials.ca + b"\n" + credentials.earlier):
        raise Refusal("file", str(path), "was not signed by the authority in ca.pem")
    key = path.with_name("tls.key")
    if spki(_private(key, credentials.key).public_key()) != spki(certificate.public_key()):
        raise Refusal("file", str(key), "is not the key of the certificate beside it")
    for attribute, expected in ((NameOID.ORGANIZATION_NAME, federation), (NameOID.COMMON_NAME, name)):
        if [each.value for each in certificate.subject.get_attributes_for_oid(attribute)] != [expected]:
            raise Refusal("file", str(path), f"was not made for {name!r} of the federation {federation!r}")
    if certificate.not_valid_after_utc.timestamp() < time.time():
        ended = f"ended on {certificate.not_valid_after_utc:%Y-%m-%d}"
        raise Refusal("file", str(path), f"{ended}; ask for new ones (fedveil provision rotate, or a token)")


def issued_by(certificate: x509.Certificate, authorities: bytes) -> bool:
    """Return whether one of these authorities, certificates in PEM, has signed a certificate."""
    for authority in x509.load_pem_x509_certificates(authorities):
        with suppress(ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            certificate.verify_directly_issued_by(authority)
            return True
    return False


def certificate_ends(path: Path, pem: bytes) -> int:
    """Return the Unix second in which a certificate ends."""
    return int(load_certificate(path, pem).not_valid_after_utc.timestamp())


def read_hexadecimal(path: Path) -> bytes:
    """Return an authority's public key, which the file holds in hexadecimal; see `privacy.secagg.roster.read_roster`."""
    try:
        key = bytes.fromhex(read_file(path).decode("ascii"))
    except ValueError:
        key = b""
    if len(key) not in (KEY_BYTES, BOTH_BYTES):
        raise Refusal("file", str(path), f"must hold {KEY_BYTES} or {BOTH_BYTES} bytes in hexadecimal")
    return key


def read_signed_roster(path: Path, authority: bytes, *others: bytes) -> tuple[Roster, bytes]:
    """Return a roster and its signed bytes. Refusal when no holder of one of these public keys signed it."""
    signed = read_file(path)
    try:
        return read_roster(signed, authority, *others), signed
    except Refused as refused:
        raise Refusal("file", str(path), f"was not signed by the authority ({refused})") from None


def read_rollovers(
    path: Path, federation: str, remedy: str = "copy it from the desk"
) -> tuple[Rollover, ...]:
    """Return the rollovers of a federation's authority, none without a file. Refusal when they are not signed."""
    if not path.exists():
        return ()
    try:
        return read_chain(read_file(path), federation)
    except Refused as refused:
        raise Refusal("file", str(path), f"is not to be used ({refused}); {remedy}") from None


def read_private_key(path: Path) -> Any:
    """Return a private key in PEM that only its owner may read."""
    return _private(path, read_secret(path))


def load_certificate(path: Path, pem: bytes) -> x509.Certificate:
    """Return the certificate in the bytes of the file."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise Refusal("file", str(path), "is not a certificate in PEM") from None


def _private(path: Path, pem: bytes) -> Any:
    try:
        return load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise Refusal("file", str(path), "is not a private key in PEM") from None


def spki(public: Any) -> bytes:
    """Return a public key's SubjectPublicKeyInfo in DER, by whose hash keys are known."""
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
