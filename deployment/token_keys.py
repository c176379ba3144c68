"""Keys of an authority on a token (PKCS#11): they are created there, sign there and never leave it.

The package is `python-pkcs11`. A key stands for cryptography's own, so that whatever signs with the one signs with the other.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from getpass import getpass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn, TypeVar

from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurve,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from ..base.refusal import Refusal

T = TypeVar("T")

PIN = "FEDVEIL_PIN"  # environment variable: PIN of the token
ED25519, P256 = "1.3.101.112", "1.2.840.10045.3.1.7"  # curves, RFC 8410 and RFC 5480
POINT_BYTES = {ED25519: 32, P256: 65}  # of a public key, without PKCS#11's prefix


@dataclass(frozen=True)
class TokenChoice:
    """Token with an authority's keys.

    Attributes:
      module: path of the token's PKCS#11 library.
      label: of the token.
    """

    module: str
    label: str


def _stays(*_: object, **__: object) -> NoReturn:
    raise NotImplementedError("the key never leaves its token")


def _itself(self: T, memo: object = None) -> T:
    return self


class TokenEd25519(Ed25519PrivateKey):
    """Ed25519 key on a token, which signs there by `sign`."""

    def __init__(self, public: Ed25519PublicKey, sign: Callable[[bytes], bytes]) -> None:
        self._public, self._sign = public, sign

    def public_key(self) -> Ed25519PublicKey:
        """Return the public half."""
        return self._public

    def sign(self, data: Any) -> bytes:
        """Return the signature of the data, 64 bytes."""
        return self._sign(bytes(data))

    private_bytes_raw = private_bytes = _stays
    __copy__ = __deepcopy__ = _itself


class TokenP256(EllipticCurvePrivateKey):
    """ECDSA key on P-256 on a token, which signs digests there by `sign`."""

    def __init__(self, public: EllipticCurvePublicKey, sign: Callable[[bytes], bytes]) -> None:
        self._public, self._sign = public, sign

    def public_key(self) -> EllipticCurvePublicKey:
        """Return the public half."""
        return self._public

    def sign(self, data: Any, signature_algorithm: Any) -> bytes:
        """Return the signature of the data's SHA-256, in DER."""
        assert signature_algorithm.algorithm.name == "sha256"
        raw = self._sign(hashlib.sha256(bytes(data)).digest())
        half = len(raw) // 2
        return encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))

    @property
    def curve(self) -> EllipticCurve:
        """The curve."""
        return SECP256R1()

    @property
    def key_size(self) -> int:
        """Bits of the key."""
        return 256

    exchange = private_numbers = private_bytes = _stays
    __copy__ = __deepcopy__ = _itself


def token_keys(choice: TokenChoice, federation: str, *, make: bool) -> tuple[TokenEd25519, TokenP256]:
    """Return the keys of a federation's authority on a token: one signs rosters, the other certificates.

    Args:
      choice: of the token.
      federation: its name, which the keys' labels have.
      make: whether to make keys that the token lacks; otherwise they are refused.

    Raises:
      Refusal: python-pkcs11 is missing, or the token does not have the keys or does not let them be used.
    """
    if find_spec("pkcs11") is None:
        raise Refusal("authority.pkcs11", choice.module, "needs the package python-pkcs11; install it")
    pkcs11 = import_module("pkcs11")
    try:
        session = _session(choice)
        pairs = [
            _pair(session, f"fedveil {federation} {name}", curve, make)
            for name, curve in (("signer", ED25519), ("ca", P256))
        ]
    except pkcs11.PKCS11Error as error:
        reason = str(error) or type(error).__name__
        remedy = f"cannot be used ({reason}); check token, PIN and module"
        raise Refusal("authority.token", choice.label, remedy) from None
    except (OSError, RuntimeError) as error:
        raise Refusal("authority.pkcs11", choice.module, f"cannot be loaded ({error})") from None
    (signer, signs), (ca, certifies) = pairs
    mechanism = pkcs11.Mechanism
    return (
        TokenEd25519(
            Ed25519PublicKey.from_public_bytes(signer),
            lambda data: signs.sign(data, mechanism=mechanism.EDDSA),
        ),
        TokenP256(
            EllipticCurvePublicKey.from_encoded_point(SECP256R1(), ca),
            lambda digest: certifies.sign(digest, mechanism=mechanism.ECDSA),
        ),
    )


@cache  # a process logs in to a token once
def _session(choice: TokenChoice) -> Any:
    token = import_module("pkcs11").lib(choice.module).get_token(token_label=choice.label)
    return token.open(rw=True, user_pin=_pin(choice))


def _pair(session: Any, label: str, curve: str, make: bool) -> tuple[bytes, Any]:
    """Return the point of a public key on `curve`, ED25519 or P256, and a handle of its private key on the token."""
    pkcs11, curves = import_module("pkcs11"), import_module("pkcs11.util.ec")
    kinds = pkcs11.ObjectClass
    try:
        public = session.get_key(label=label, object_class=kinds.PUBLIC_KEY)
        private = session.get_key(label=label, object_class=kinds.PRIVATE_KEY)
    except pkcs11.exceptions.NoSuchKey:
        if not make:
            raise
        kind, mechanism = pkcs11.KeyType.EC, pkcs11.Mechanism.EC_KEY_PAIR_GEN
        if curve == ED25519:
            kind, mechanism = pkcs11.KeyType.EC_EDWARDS, pkcs11.Mechanism.EC_EDWARDS_KEY_PAIR_GEN
        parameters = {pkcs11.Attribute.EC_PARAMS: curves.encode_named_curve_parameters(curve)}
        domain = session.create_domain_parameters(kind, parameters, local=True)
        public, private = domain.generate_keypair(mechanism=mechanism, store=True, label=label)
    return bytes(public[pkcs11.Attribute.EC_POINT][-POINT_BYTES[curve] :]), private


def _pin(choice: TokenChoice) -> str:
    if pin := os.environ.get(PIN):
        return pin
    if not sys.stdin.isatty():
        raise Refusal("authority.token", choice.label, f"requires a PIN; set {PIN}, or type it at a terminal")
    return getpass(f"PIN of the token {choice.label}: ")
