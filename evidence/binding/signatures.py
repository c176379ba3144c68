"""Signatures of a bundle: Ed25519 and optionally ML-DSA-65, each by a named role over the bundle and all earlier ones."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from ...base.durable_files import PUBLIC, replace_files
from ...base.refusal import Refusal, refusing
from ...configs.bundle_files import read_file, read_secret
from ...configs.passphrase import encrypted
from ...privacy.ledger.hash_chain import canonical
from ...privacy.secagg.double_signature import BOTH_BYTES
from ...privacy.secagg.refusal import Refused
from ...privacy.secagg.rollover import Rollover, read_chain
from ...privacy.secagg.suite import KEY_BYTES

FILE, FORMAT = "signatures.json", "fedveil signatures 1"
TAG = b"fedveil report 1\0"  # separates these signatures from those of any other document
ED25519, ML_DSA = "ed25519", "ml-dsa-65"
ML_DSA_BYTES = 1952  # of a public key (FIPS 204, table 2)
PASSPHRASE = "FEDVEIL_PASSPHRASE"  # environment variable: that of a private key
FEDERATION = "federation"  # role of the bundle's maker
SHORT = 16  # hexadecimal digits of a key or a hash, for people
MAX_ROLE = 100  # characters of a role
# What a reader raises on a file that somebody damaged.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
PublicKey = Ed25519PublicKey | MLDSA65PublicKey


@dataclass(frozen=True)
class SigningKey:
    """Private key of a signer, with the name of its algorithm."""

    name: str
    key: Ed25519PrivateKey | MLDSA65PrivateKey = field(repr=False)

    @property
    def public(self) -> str:
        """The public key in hexadecimal."""
        return self.key.public_key().public_bytes_raw().hex()


@dataclass(frozen=True)
class Signature:
    """Signature of one role.

    Attributes:
      role: of the signer, in words.
      date: of the signature, as claimed by the signer, YYYY-MM-DD.
      keys: public keys in hexadecimal, by algorithm.
      signatures: in hexadecimal, by algorithm; one for each key.
    """

    role: str
    date: str
    keys: Mapping[str, str]
    signatures: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return {**self.signed_fields(), "signatures": dict(self.signatures)}

    def signed_fields(self) -> dict[str, Any]:
        """Return the signed part: all fields except the signatures."""
        return {"role": self.role, "date": self.date, "keys": dict(self.keys)}


def message(bundle: bytes, before: Sequence[Signature], fields: Mapping[str, Any]) -> bytes:
    """Return the bytes that a role signs: the hash of the bundle's list, all earlier signatures, and its own `fields`."""
    digest = hashlib.sha256(bundle).hexdigest()
    content = {"bundle": digest, "before": [each.to_json() for each in before], **fields}
    return TAG + canonical(content).encode()


def make_signature(
    bundle: bytes, before: Sequence[Signature], role: str, date: str, keys: Sequence[SigningKey]
) -> Signature:
    """Return the signature of a role.

    Args:
      bundle: bytes of the bundle's list of files.
      before: the earlier signatures.
      role: of the signer.
      date: YYYY-MM-DD.
      keys: one of each algorithm at most.

    Raises:
      Refusal: the role is empty or too long, or two keys are of one algorithm.
    """
    if not role.strip() or len(role) > MAX_ROLE or not role.isprintable():
        raise Refusal("role", role, f"name the signer's role in 1 to {MAX_ROLE} characters")
    public = {key.name: key.public for key in keys}
    if len(public) != len(keys):
        raise Refusal("key", len(keys), "give at most one of each algorithm")
    fields = {"role": role, "date": date, "keys": public}
    text = message(bundle, before, fields)
    return Signature(role, date, public, {key.name: key.key.sign(text).hex() for key in keys})


def check(bundle: bytes, signatures: Sequence[Signature]) -> None:
    """Require that each signature has an Ed25519 key, and is valid over the bundle and the signatures before it."""
    for number, signature in enumerate(signatures):
        text = message(bundle, signatures[:number], signature.signed_fields())
        signer = f"signature {number + 1}, {signature.role!r},"
        if ED25519 not in signature.keys or set(signature.keys) != set(signature.signatures):
            raise Refusal(FILE, signer, "lacks a key or a signature; ask for the bundle that was signed")
        for name, public in signature.keys.items():
            try:
                key = _public(name, bytes.fromhex(public))
                key.verify(bytes.fromhex(signature.signatures[name]), text)
            except (InvalidSignature, ValueError) as problem:
                remedy = f"is not valid under {name}: bundle.json or this signature was changed"
                raise Refusal(FILE, signer, f"{remedy}; ask for the bundle that was signed") from problem


def _public(name: str, raw: bytes) -> PublicKey:
    """Return the public key of an algorithm from its bytes."""
    if name == ED25519:
        return Ed25519PublicKey.from_public_bytes(raw)
    if name == ML_DSA:
        return MLDSA65PublicKey.from_public_bytes(raw)
    raise ValueError(f"algorithm {name!r}")


def signatures_text(signatures: Sequence[Signature]) -> bytes:
    """Return signatures as the bytes of their file."""
    content = {"format": FORMAT, "signatures": [each.to_json() for each in signatures]}
    return (json.dumps(content, indent=1) + "\n").encode()


def read_signatures(folder: Path) -> list[Signature]:
    """Return the signatures of a bundle, in their order, unchecked; none without a file. Refuse an unreadable one."""
    path = folder / FILE
    if not path.exists():
        return []
    try:
        text = path.read_bytes()
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        signatures = [_signature(each) for each in content["signatures"]]
        if signatures_text(signatures) != text:
            raise ValueError("it is not in canonical form")
    except UNREADABLE as problem:
        remedy = f"cannot be read ({problem}); ask for the bundle that was signed"
        raise Refusal("signatures", str(path), remedy) from problem
    return signatures


def _signature(fields: Any) -> Signature:
    """Return a signature from its JSON."""
    if not DATE.fullmatch(fields["date"]):
        raise ValueError(f"date {fields['date']!r}")
    keys = {str(name): str(text) for name, text in fields["keys"].items()}
    signatures = {str(name): str(text) for name, text in fields["signatures"].items()}
    return Signature(str(fields["role"]), str(fields["date"]), keys, signatures)


def make_key(path: Path, ml_dsa: bool, passphrase: bytes | None) -> str:
    """Generate a key pair in two files; return the public key in hexadecimal.

    Args:
      path: of the private key, in PEM; `.pub` is added for the public one.
      ml_dsa: whether the key is for ML-DSA-65 instead of Ed25519.
      passphrase: for encryption of the file; None writes it unencrypted.

    Raises:
      Refusal: the file exists, or cannot be written.
    """
    if path.exists():
        raise Refusal("key", str(path), "exists; name another file")
    key = MLDSA65PrivateKey.generate() if ml_dsa else Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw().hex()
    if passphrase is None:
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    else:
        pem = encrypted(key, passphrase)
    with refusing("key", path, "cannot be written"):
        replace_files(path.parent, {path.name: pem})
        replace_files(path.parent, {f"{path.name}.pub": f"{public}\n".encode()}, PUBLIC)
    return public


def passphrase_for(path: Path, again: bool = False) -> bytes:
    """Return the passphrase of a key, from the environment or the terminal.

    Args:
      path: of the key, for the prompt.
      again: whether to ask twice, as for a new key.

    Raises:
      Refusal: there is no terminal, or the two entries differ.
    """
    configured = os.environ.get(PASSPHRASE)
    if configured is not None:
        return configured.encode()
    if not sys.stdin.isatty():
        raise Refusal("key", str(path), f"is locked and there is no terminal; set {PASSPHRASE}")
    try:
        typed = getpass.getpass(f"passphrase of {path}: ")
        is_same = not again or getpass.getpass("again: ") == typed
    except (EOFError, OSError) as problem:
        remedy = f"is locked and there is no terminal; set {PASSPHRASE}"
        raise Refusal("key", str(path), remedy) from problem
    if not is_same:
        raise Refusal("key", str(path), "the two passphrases differ; type it again")
    return typed.encode()


def read_key(path: Path) -> SigningKey:
    """Return the private key in a file, PEM or OpenSSH, which may be encrypted with a passphrase.

    Raises:
      Refusal: there is no signing key, other users may read it, or the passphrase is wrong.
    """
    text = read_secret(path)
    load: Any = load_ssh_private_key if b"OPENSSH" in text else load_pem_private_key
    try:
        try:
            key = load(text, None)
        except TypeError:  # it is encrypted
            key = load(text, passphrase_for(path))
    except (ValueError, UnsupportedAlgorithm) as problem:
        raise Refusal("key", str(path), f"holds no readable private key ({problem})") from problem
    if isinstance(key, Ed25519PrivateKey):
        return SigningKey(ED25519, key)
    if isinstance(key, MLDSA65PrivateKey):
        return SigningKey(ML_DSA, key)
    raise Refusal("key", str(path), "is of neither Ed25519 nor ML-DSA-65; make one with fedveil report key")


def read_public(text: str) -> str:
    """Return a public key in hexadecimal.

    Args:
      text: hexadecimal digits, of an authority as `policy.toml` has them; or a file that holds them, PEM, or OpenSSH's
        form.

    Raises:
      Refusal: the text is not a public key.
    """
    digits = text.strip().lower()
    if not re.fullmatch(r"[0-9a-f]+", digits):
        content = read_file(Path(text))
        try:
            digits = _public_in(content)
        except (ValueError, UnsupportedAlgorithm) as problem:
            raise Refusal("key", text, f"holds no public key ({problem})") from problem
    if len(digits) not in (2 * KEY_BYTES, 2 * BOTH_BYTES, 2 * ML_DSA_BYTES):
        raise Refusal("key", text, "is not a public key of Ed25519 or ML-DSA-65")
    return digits


def read_rollovers(text: str) -> tuple[Rollover, ...]:
    """Return the rollovers of an authority in the file that a text names; none if it names a key.

    Raises:
      Refusal: the rollovers are not signed.
    """
    if re.fullmatch(r"[0-9a-fA-F]+", text.strip()):
        return ()
    content = read_file(Path(text))
    if not content.lstrip().startswith(b"{"):
        return ()
    try:
        return read_chain(content)
    except Refused as refused:
        raise Refusal("key", text, f"holds no rollovers of an authority ({refused})") from None


def _public_in(content: bytes) -> str:
    """Return the public key in a file in hexadecimal."""
    if content.startswith(b"-----BEGIN"):
        key: Any = load_pem_public_key(content)
    elif content.startswith(b"ssh-"):
        key = load_ssh_public_key(content)
    else:
        return bytes.fromhex(content.decode()).hex()
    if not isinstance(key, Ed25519PublicKey | MLDSA65PublicKey):
        raise UnsupportedAlgorithm("another algorithm")
    return key.public_bytes_raw().hex()
