"""Token by which one device enrols once: where, with whom, under which name, until when, and a secret.

The server learns a key that opens its port for this name. Another key, which it never sees, seals the device's request, so
that a server cannot put its own keys in their place.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, field

from ...configs.bundle_files import ADDRESS, NAME
from ...privacy.refusal import Refusal
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
      end: Unix second from which on it opens nothing.
      fingerprint: of the authority, as `fingerprint_of` has it.
      secret: 32 bytes, of whoever may enrol.
    """

    address: str
    name: str
    end: int
    fingerprint: bytes
    secret: bytes = field(repr=False)

    def text(self) -> str:
        """Return the token as one line, which is the text of its QR code too."""
        fingerprint, secret = _written(self.fingerprint), _written(self.secret)
        return f"{SCHEME}:{self.address}/{self.name}/{self.end}/{fingerprint}/{secret}"

    @property
    def door(self) -> bytes:
        """The key that the server is shown, 32 bytes."""
        return derive(self.secret, frame(Purpose.TOKEN, "door"))

    @property
    def sealing(self) -> bytes:
        """The key that seals the request, 32 bytes, which device and authority have."""
        return derive(self.secret, frame(Purpose.TOKEN, "seal"))


def read_token(text: str) -> Token:
    """Return the token that a line holds.

    Raises:
      Refusal: it is none. The sentence does not repeat it.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        remedy = f"must be {SCHEME}:HOST:PORT/NAME/..., one line, as the operator has it"
        raise Refusal("token", "what was given", remedy)
    keys = (base64.urlsafe_b64decode(f"{found[part]}=") for part in ("fingerprint", "secret"))
    return Token(found["address"], found["name"], int(found["end"]), *keys)


def fingerprint_of(ca: bytes, authority: bytes) -> bytes:
    """Return the SHA-256 that stands for an authority in a token.

    Args:
      ca: its certificate in PEM.
      authority: its public key, as rosters are checked by.
    """
    return hashlib.sha256(frame(Purpose.TOKEN, "authority", ca, authority)).digest()


def lock_of(door: bytes) -> str:
    """Return what the server holds of a door's key, in hexadecimal: who reads it opens nothing."""
    return hashlib.sha256(door).hexdigest()


def seal_of(key: bytes, request: bytes) -> bytes:
    """Return the seal of a request, 32 bytes."""
    return hmac.digest(key, frame(Purpose.TOKEN, "request", request), "sha256")


def _written(key: bytes) -> str:
    return base64.urlsafe_b64encode(key).rstrip(b"=").decode()
