"""Readers of a bundle's files: TOML, public files, secrets that only their owner may read, and certificates.

A bundle is a folder of settings, keys and certificates that `fedveil provision` creates for the server or one client.
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

LARGEST_FILE = 16 * 2**20  # bytes; a roster of 100 000 members takes 5 MiB
LINKS = names("link")
CERTIFICATE = "tls.pem"
ROSTER = "roster.bin"  # in a bundle the issued roster, in a device's state folder the latest one
ROLLOVERS = "rollovers.json"  # of the authority's key; in a device's state folder those in force there
SCHEMA = "schema.yaml"  # of tables, the same at the server and at every device
OTHERS = stat.S_IRWXG | stat.S_IRWXO  # permissions of users other than the owner

NAME = MEMBER_NAME
NAME_FORM = "at most 48 of a-z, 0-9, - and _, the first a letter or a digit"
_DNS = "[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"  # matches IPv4 addresses too
_IPV6 = "[0-9A-Fa-f:]{2,39}"
HOST = re.compile(f"{_DNS}|{_IPV6}")
_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
ADDRESS = re.compile(rf"({_DNS}|\[{_IPV6}\]):{_PORT}")
ADDRESS_FORM = "host:port, for instance fl.example.org:8443"
# Types of the files' keys.
Name = Annotated[str, Form(NAME.pattern, f"must be {NAME_FORM}")]
Address = Annotated[str, Form(ADDRESS.pattern, f"must be {ADDRESS_FORM}")]
Link = Annotated[str, OneOf(LINKS)]
Lines = tuple[Annotated[str, Form(".*", "must be a list of lines of text")], ...]

T = TypeVar("T")


@dataclass(frozen=True)
class Credentials:
    """Credentials of one end of a mutually authenticated TLS connection, each in PEM.

    Attributes:
      ca: certificate of the federation's authority, the only trusted one; during a rollover of its keys also the second.
      certificate: certificate of this end, signed by the authority.
      key: private key of the certificate, secret.
      earlier: certificates of authorities that `ca` has replaced; a server still accepts clients' certificates signed by
        them, and admits the clients by their keys.
    """

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    earlier: bytes = b""


def hexadecimal(length: int) -> Form:
    """Return the form of `length` bytes as text in lowercase hexadecimal, two digits a byte."""
    return Form(f"[0-9a-f]{{{2 * length}}}", f"must be {length} bytes in hexadecimal")


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file; raise Refusal if it is missing, or larger than `LARGEST_FILE`."""
    return _read(path, forbidden=0)


def read_secret(path: Path) -> bytes:
    """Return the bytes of a secret file; raise Refusal as `read_file`, and if users other than its owner have access."""
    return _read(path, forbidden=OTHERS)


def _read(path: Path, forbidden: int) -> bytes:
    """Return the bytes of a file; raise Refusal as `read_file`, and if it has one of the forbidden permissions."""
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for its writer.
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
    """Refuse a bundle's folder, or files in it, that users other than the owner may write; a missing file is skipped."""
    for path in (folder, *(folder / name for name in names)):
        with suppress(OSError):
            if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise Refusal("file", str(path), f"may be written by others; run: chmod go-w {path}")


def read_toml(kind: type[T], path: Path) -> T:
    """Read a TOML file as a dataclass (`read_group`).

    Raises:
      Refusal: the file cannot be read, is not TOML, or has invalid keys, all of which are named.
    """
    return read_toml_text(kind, read_file(path), str(path))


def read_toml_text(kind: type[T], data: bytes, source: str) -> T:
    """Read TOML as a dataclass; `source` is its path or origin, for a refusal. Errors as of `read_toml`."""
    try:
        values = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise Refusal("file", source, f"is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # also an impossible date, or a huge integer
        raise Refusal("file", source, f"is not TOML: {error}") from None
    return read_group(kind, values, source)


def read_credentials(folder: Path, federation: str, name: str, earlier: bytes = b"") -> Credentials:
    """Read and check ca.pem, tls.pem and tls.key of a bundle.

    Args:
      folder: folder of the bundle.
      federation: name of the federation.
      name: name of the client or the server.
      earlier: PEM certificates of previous authorities, which may have signed the certificate instead.

    Raises:
      Refusal: a file cannot be read, or the certificate is invalid (`check_certificate`). A certificate that is not
        valid yet is accepted: a device's clock may be late.
    """
    path = folder / CERTIFICATE
    key, ca, certificate = read_secret(folder / "tls.key"), read_file(folder / "ca.pem"), read_file(path)
    credentials = Credentials(ca, certificate, key, earlier)
    check_certificate(path, certificate, credentials, federation, name)
    return credentials


def check_certificate(path: Path, pem: bytes, credentials: Credentials, federation: str, name: str) -> None:
    """Check a certificate's signature, key, federation, name and end of validity.

    Args:
      path: path of the certificate's file, for a refusal.
      pem: certificate in PEM.
      credentials: authority's certificate and private key to check against; `credentials.certificate` is ignored.
      federation: required name of the federation.
      name: required name of the client or the server.

    Raises:
      Refusal: a check fails; the first failure is named.
    """
    load_certificate(path.with_name("ca.pem"), credentials.ca)
    certificate = load_certificate(path, pem)
    if not issued_by(certificate, credentials.ca + b"\n" + credentials.earlier):
        raise Refusal("file", str(path), "was not signed by the authority in ca.pem")
    key = path.with_name("tls.key")
    if spki(_load_private_key(key, credentials.key).public_key()) != spki(certificate.public_key()):
        raise Refusal("file", str(key), "is not the key of the certificate beside it")
    for attribute, expected in ((NameOID.ORGANIZATION_NAME, federation), (NameOID.COMMON_NAME, name)):
        if [each.value for each in certificate.subject.get_attributes_for_oid(attribute)] != [expected]:
            raise Refusal("file", str(path), f"was not made for {name!r} of the federation {federation!r}")
    if certificate.not_valid_after_utc.timestamp() < time.time():
        ended = f"ended on {certificate.not_valid_after_utc:%Y-%m-%d}"
        raise Refusal("file", str(path), f"{ended}; ask for new ones (fedveil provision rotate, or a token)")


def issued_by(certificate: x509.Certificate, authorities: bytes) -> bool:
    """Return whether one of the authorities, certificates in PEM, signed a certificate; no period of validity is checked."""
    for authority in x509.load_pem_x509_certificates(authorities):
        with suppress(ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            certificate.verify_directly_issued_by(authority)
            return True
    return False


def certificate_ends(path: Path, pem: bytes) -> int:
    """Return the end of a PEM certificate's validity, in Unix seconds."""
    return int(load_certificate(path, pem).not_valid_after_utc.timestamp())


def read_authority_key(path: Path) -> bytes:
    """Return an authority's public key, which verifies rosters, from its file in hexadecimal."""
    key = b""
    with suppress(ValueError):
        key = bytes.fromhex(read_file(path).decode("ascii"))
    if len(key) not in (KEY_BYTES, BOTH_BYTES):
        raise Refusal("file", str(path), f"must hold {KEY_BYTES} or {BOTH_BYTES} bytes in hexadecimal")
    return key


def read_signed_roster(path: Path, authority: bytes, *others: bytes) -> tuple[Roster, bytes]:
    """Return a roster and its signed bytes; raise Refusal if it was signed by none of these authorities' keys."""
    signed = read_file(path)
    try:
        return read_roster(signed, authority, *others), signed
    except Refused as refused:
        raise Refusal("file", str(path), f"was not signed by the authority ({refused})") from None


def read_rollovers(
    path: Path, federation: str, remedy: str = "copy it from the desk"
) -> tuple[Rollover, ...]:
    """Return the rollovers of a federation's authority, () without a file; raise Refusal if a signature is invalid."""
    if not path.exists():
        return ()
    try:
        return read_chain(read_file(path), federation)
    except Refused as refused:
        raise Refusal("file", str(path), f"is not to be used ({refused}); {remedy}") from None


def read_private_key(path: Path) -> Any:
    """Return the private key in a PEM file; raise Refusal as `read_secret`, or if the file contains none."""
    return _load_private_key(path, read_secret(path))


def load_certificate(path: Path, pem: bytes) -> x509.Certificate:
    """Parse a certificate in PEM; `path` is its file, for a refusal."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise Refusal("file", str(path), "is not a certificate in PEM") from None


def _load_private_key(path: Path, pem: bytes) -> Any:
    """Parse a private key in PEM without a passphrase; `path` is its file, for a refusal."""
    try:
        return load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise Refusal("file", str(path), "is not a private key in PEM") from None


def spki(public: Any) -> bytes:
    """Return a public key's SubjectPublicKeyInfo in DER; its hash identifies the key."""
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
