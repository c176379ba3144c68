"""Token by which one device enrols once: address, authority, name, expiry, and a secret.

The server learns a key that opens its port for this name. Another key, which it never sees, seals the device's request,
so that a server cannot substitute its own keys.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, field

from ...base.refusal import Refusal
from ...configs.bundle_files import ADDRESS, NAME
from ...privacy.secagg.suite import derive
from ...privacy.secagg.transcript import Purpose, frame

SCHEME = "fedveil"
SECRET_BYTES = 32
_KEY = "[A-Za-z0-9_-]{43}"
_FORM = re.compile(
    rf"{SCHEME}:(?P<address>{ADDRESS.pattern})/(?P<name>{NAME.pattern})/(?P<end>[1-9][0-9]{{9,10}})"
    rf"/(?P<fingerprint>{_KEY})/(?P<secret>{_KEY})"
)


@dataclass(frozen=True)
class Token:
    """Token of an enrolment.

    Attributes:
      address: what the device dials, host:port.
      name: of the client.
      end: Unix second of its expiry.
      fingerprint: of the authority, from `fingerprint_of`.
      secret: 32 bytes, for the enrolling device.
    """

    address: str
    name: str
    end: int
    fingerprint: bytes
    secret: bytes = field(repr=False)

    def text(self) -> str:
        """Return the token as one line, which is the text of its QR code too."""
        fingerprint, secret = _encode(self.fingerprint), _encode(self.secret)
        return f"{SCHEME}:{self.address}/{self.name}/{self.end}/{fingerprint}/{secret}"

    @property
    def port_key(self) -> bytes:
        """Key that the device shows to the server, 32 bytes."""
        return derive(self.secret, frame(Purpose.TOKEN, "door"))

    @property
    def seal_key(self) -> bytes:
        """Key that seals the request, 32 bytes, which only device and authority have."""
        return derive(self.secret, frame(Purpose.TOKEN, "seal"))


def read_token(text: str) -> Token:
    """Return the token in a line.

    Raises:
      Refusal: it is not a token. The sentence does not repeat the line.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        remedy = f"must be {SCHEME}:HOST:PORT/NAME/..., one line; copy it from the operator"
        raise Refusal("token", "what was given", remedy)
    keys = (base64.urlsafe_b64decode(f"{match[part]}=") for part in ("fingerprint", "secret"))
    return Token(match["address"], match["name"], int(match["end"]), *keys)


def fingerprint_of(ca: bytes, authority: bytes) -> bytes:
    """Return the SHA-256 of an authority's certificate in PEM and its public key for rosters, which a token contains."""
    return hashlib.sha256(frame(Purpose.TOKEN, "authority", ca, authority)).digest()


def lock_of(port_key: bytes) -> str:
    """Return the server's hash of a port's key, in hexadecimal, which does not open the port."""
    return hashlib.sha256(port_key).hexdigest()


def seal_of(key: bytes, request: bytes) -> bytes:
    """Return the seal of a request, 32 bytes."""
    return hmac.digest(key, frame(Purpose.TOKEN, "request", request), "sha256")


def _encode(key: bytes) -> str:
    return base64.urlsafe_b64encode(key).rstrip(b"=").decode()
