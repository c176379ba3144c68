"""Authority of a federation: an Ed25519 key that signs rosters, and an X.509 authority (ECDSA P-256) for TLS.

There are two keys, since gRPC's TLS does not support Ed25519. Their holder can admit any client: they stay on the
operator's desk.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from getpass import getpass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..base.durable_files import replace_files
from ..base.refusal import Refusal
from ..configs.bundle_files import ROLLOVERS, load_certificate, read_file, read_rollovers, read_secret
from ..configs.passphrase import encrypted, is_scrypt
from ..privacy.secagg.double_signature import both_of
from ..privacy.secagg.rollover import Rollover
from ..privacy.secagg.suite import KEY_BYTES, public_of
from .device.enrolment import new_tls_key, pem_of
from .token_keys import TokenChoice, token_keys

CLOCK_MARGIN = timedelta(days=1)  # a device whose clock is late accepts a new certificate too
AUTHORITY_LIFE = timedelta(days=3650)
SIGNER, CA_KEY, CA = "signer.key", "ca.key", "ca.pem"  # key of rosters, key of certificates, its certificate
PASSPHRASE = "FEDVEIL_PASSPHRASE"  # environment variable: of the authority's keys
PASSPHRASE_FILE = "FEDVEIL_PASSPHRASE_FILE"  # environment variable: a file that holds it, for its owner alone
SHORTEST = 16  # characters of a passphrase; scrypt only slows a guess down
WITHOUT_KEYS = "holds no keys of an authority; restore them from a backup"
ENCRYPTED = b"BEGIN ENCRYPTED PRIVATE KEY"


@dataclass(frozen=True)
class KeyCare:
    """Storage of an authority's keys.

    Attributes:
      passphrase: whether the key files must be encrypted.
      token: the token that holds the keys; None if files hold them.
    """

    passphrase: bool = False
    token: TokenChoice | None = None


@dataclass(frozen=True)
class Authority:
    """The keys of a federation's authority, secret, and the certificate that every member trusts.

    Attributes:
      signer: signs rosters.
      ca_key: signs certificates.
      ca: certificate of `ca_key`, which the key itself signed.
      rollovers: all that led from the first keys to these, oldest first.
      former: the authority before the last rollover, whose keys sign too until the overlap ends; None afterwards.
    """

    signer: Ed25519PrivateKey = field(repr=False)
    ca_key: EllipticCurvePrivateKey = field(repr=False)
    ca: x509.Certificate
    rollovers: tuple[Rollover, ...] = ()
    former: Authority | None = field(default=None, repr=False)

    def public(self, doubly: bool) -> bytes:
        """Return the roster's signer: its Ed25519 key, followed by the hash of its ML-DSA key if both sign."""
        return both_of(self.signer) if doubly else public_of(self.signer)

    @property
    def ca_pem(self) -> bytes:
        """The certificate in PEM."""
        return self.ca.public_bytes(Encoding.PEM)


def open_authority(folder: Path, federation: str, care: KeyCare) -> Authority:
    """Return the authority in a folder, created there if there is none.

    Files with private keys of earlier authorities are removed once their overlap has ended; keys on a token stay.

    Args:
      folder: of the authority.
      federation: its name.
      care: how the keys are kept.

    Raises:
      Refusal: it is another federation's, a key is missing or wrong, or the keys are not kept as `care` says.
    """
    if not (folder / CA).exists() and not (folder / ROLLOVERS).exists():  # the certificate is written last
        make_keys(folder, federation, care, 1)
    chain = read_rollovers(folder / ROLLOVERS, federation) if _federations(folder) == [federation] else ()
    current = _keys(folder, federation, care, len(chain) + 1)
    if chain and public_of(current.signer) != bytes.fromhex(chain[-1].new)[:KEY_BYTES]:
        raise Refusal("file", str(folder), WITHOUT_KEYS)
    former_generation, former = len(chain), None  # generations count from 1
    if chain and time.time() < chain[-1].until:
        former = _keys(folder, federation, care, former_generation)
    ended = former_generation if former is None else former_generation - 1
    for generation in range(1, ended + 1):
        for name in (SIGNER, CA_KEY):
            (_keys_folder(folder, generation) / name).unlink(missing_ok=True)
    return replace(current, rollovers=chain, former=former)


def make_keys(folder: Path, federation: str, care: KeyCare, generation: int) -> Authority:
    """Make the keys of one generation of an authority, and return it.

    A repeated call completes an interrupted one, whose keys were not in force yet: it takes those on a token, and
    replaces those in files. Arguments as of `open_authority`; `generation` is 1, and one more after each rollover.
    """
    keys_folder = _keys_folder(folder, generation)
    keys_folder.mkdir(mode=0o700, exist_ok=True)
    if care.token is not None:
        _, ca_key = token_keys(care.token, _label(federation, generation), make=True)
        _keep(keys_folder, {CA: _certificate(ca_key, federation)})
    else:
        _make(keys_folder, federation, care)
    return _keys(folder, federation, care, generation)


def _keys_folder(folder: Path, generation: int) -> Path:
    """Return the folder of a generation's keys; the first lie in the authority's own folder."""
    return folder if generation == 1 else folder / f"keys-{generation}"


def _label(federation: str, generation: int) -> str:
    """Return the label of a generation's keys on a token."""
    return federation if generation == 1 else f"{federation} {generation}"


def _federations(folder: Path) -> list[Any]:
    """Return the federation's name in a folder's certificate of an authority; X.509 allows a list of names."""
    ca = load_certificate(folder / CA, read_file(folder / CA))
    return [each.value for each in ca.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]


def _keys(folder: Path, federation: str, care: KeyCare, generation: int) -> Authority:
    """Return the keys of one generation.

    Raises:
      Refusal: they are another federation's, do not match the certificate, or are not kept as `care` says.
    """
    keys_folder = _keys_folder(folder, generation)
    if care.token is not None:
        signer, ca_key = token_keys(care.token, _label(federation, generation), make=False)
    else:
        signer, ca_key = _read_keys(keys_folder, care)
    federations = _federations(keys_folder)
    if federations != [federation]:
        remedy = f"{folder} is the authority of {federations[0]}; give another --out"
        raise Refusal("federation", federation, remedy)
    ca = load_certificate(keys_folder / CA, read_file(keys_folder / CA))
    sound = isinstance(signer, Ed25519PrivateKey) and isinstance(ca_key, EllipticCurvePrivateKey)
    if not sound or ca_key.public_key() != ca.public_key():
        raise Refusal("file", str(keys_folder), WITHOUT_KEYS)
    return Authority(signer, ca_key, ca)


def issue(
    authority: Authority, name: str, public: EllipticCurvePublicKey, *, addresses: Sequence[str], days: int
) -> bytes:
    """Return a certificate for TLS in PEM, valid from one day ago: of a server if it has addresses, else of a client.

    Args:
      authority: signs it.
      name: of a client or of the server, the common name.
      public: its key, P-256.
      addresses: DNS names and IP addresses of a server; a client has none and dials only.
      days: of validity from now on, at most 397.
    """
    usage = ExtendedKeyUsageOID.SERVER_AUTH if addresses else ExtendedKeyUsageOID.CLIENT_AUTH
    names = x509.SubjectAlternativeName([_address(each) for each in addresses or [name]])
    (federation,) = authority.ca.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    authority_key = authority.ca_key.public_key()
    builder = (
        _builder(_name(str(federation.value), name), public, timedelta(days=days))
        .issuer_name(authority.ca.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key), critical=False)
    )
    return builder.sign(authority.ca_key, SHA256()).public_bytes(Encoding.PEM)


def _make(folder: Path, federation: str, care: KeyCare) -> None:
    """Make an authority's keys in files, encrypted if there is a passphrase."""
    signer, ca_key = Ed25519PrivateKey.generate(), new_tls_key()
    secret = _passphrase_from_environment() or (_prompt_twice(folder) if care.passphrase else None)
    keys = {SIGNER: _pem_of_new_key(signer, secret), CA_KEY: _pem_of_new_key(ca_key, secret)}
    _keep(folder, keys | {CA: _certificate(ca_key, federation)})


def _keep(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files to a folder that its owner alone may open."""
    folder.chmod(0o700)  # whichever process created it
    replace_files(folder, files)


def _certificate(ca_key: EllipticCurvePrivateKey, federation: str) -> bytes:
    """Return the authority's own certificate in PEM, which it signs itself."""
    subject = _name(federation, f"{federation} authority")
    builder = (
        _builder(subject, ca_key.public_key(), AUTHORITY_LIFE)
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return builder.sign(ca_key, SHA256()).public_bytes(Encoding.PEM)


def _read_keys(folder: Path, care: KeyCare) -> tuple[Any, Any]:
    """Return the keys of the roster's signer and of the authority for TLS, decrypted by one passphrase if encrypted.

    Files that an earlier release encrypted by PBKDF2 are replaced: their keys are encrypted anew by scrypt.
    """
    pems = {folder / name: read_secret(folder / name) for name in (SIGNER, CA_KEY)}
    for path, pem in pems.items():
        if care.passphrase and ENCRYPTED not in pem:
            remedy = "is not encrypted, and federation.yaml requires a passphrase; encrypt it with openssl pkcs8 -topk8 -scrypt"
            raise Refusal("authority.passphrase", str(path), remedy)
    secret = None
    if any(ENCRYPTED in pem for pem in pems.values()):
        secret = _passphrase_from_environment() or _prompt(folder, f"passphrase of {folder}: ")
    keys = {path: _load_key(path, pem, secret if ENCRYPTED in pem else None) for path, pem in pems.items()}
    if secret is not None:
        old = [path for path, pem in pems.items() if ENCRYPTED in pem and not is_scrypt(pem)]
        replace_files(folder, {path.name: encrypted(keys[path], secret) for path in old})
    return keys[folder / SIGNER], keys[folder / CA_KEY]


def _load_key(path: Path, pem: bytes, secret: bytes | None) -> Any:
    """Return the private key in the PEM of a file, decrypted by a passphrase if there is one."""
    try:
        return load_pem_private_key(pem, secret)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        fault = "is not a private key in PEM" if secret is None else "does not match this passphrase"
        raise Refusal("file", str(path), fault) from None


def _passphrase_from_environment() -> bytes | None:
    """Return the passphrase from the environment, or from the file named there; None without either."""
    if passphrase := os.environ.get(PASSPHRASE):
        return passphrase.encode()
    if path := os.environ.get(PASSPHRASE_FILE):
        return read_secret(Path(path)).rstrip(b"\r\n")
    return None


def _prompt_twice(folder: Path) -> bytes:
    first = _prompt(folder, f"new passphrase of {folder}: ")
    if _prompt(folder, "again: ") != first:
        raise Refusal("passphrase", str(folder), "the two passphrases differ; repeat the command")
    return first


def _prompt(folder: Path, prompt: str) -> bytes:
    """Return a passphrase that is typed at a terminal; refuse without one."""
    if not sys.stdin.isatty():
        remedy = f"its keys are encrypted; set {PASSPHRASE} or {PASSPHRASE_FILE}, or type the passphrase at a terminal"
        raise Refusal("folder", str(folder), remedy)
    return getpass(prompt).encode()


def _pem_of_new_key(key: Ed25519PrivateKey | EllipticCurvePrivateKey, secret: bytes | None) -> bytes:
    """Return a new key in PEM, encrypted if there is a passphrase; refuse one shorter than `SHORTEST`."""
    if secret is None:
        return pem_of(key)
    if len(secret) < SHORTEST:
        remedy = f"use at least {SHORTEST}: an attacker with the files can guess a short one"
        raise Refusal("passphrase", f"{len(secret)} characters", remedy)
    return encrypted(key, secret)


def _builder(subject: x509.Name, public: EllipticCurvePublicKey, life: timedelta) -> x509.CertificateBuilder:
    """Return a builder with the fields that the certificates of the authority and of members have in common."""
    now = datetime.now(UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_MARGIN)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _name(federation: str, name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _address(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)
