"""Sessions of the owner's page: secrets in its address, one for each sign-in, which ends by itself.

A session is a part of the address, and no cookie: a browser sends the cookies of 127.0.0.1 to every port, and another user
of the machine may serve one of them.
"""

from __future__ import annotations

import hmac
import math
import secrets
import threading
import time
from dataclasses import dataclass, field

SECRET_BYTES = 32
LIFE_SECONDS = 8 * 3600.0  # of a session, from its sign-in
MAX_SESSIONS = 32  # the oldest ends
MAX_FAILURES, LOCK_SECONDS = 5, 60.0  # wrong passphrases in a row, and the wait after so many


@dataclass(frozen=True)
class OwnerSession:
    """Session of one sign-in.

    Attributes:
      secret: part of its address.
      role: of whoever signed in.
      csrf: token of its forms, which no other site can read.
      until: end, by the monotonic clock.
      has_passphrase: whether a passphrase opened it; one without ends with the page, or once a role has a passphrase.
    """

    secret: str
    role: str
    csrf: str
    until: float
    has_passphrase: bool


@dataclass
class OwnerSessions:
    """Open sessions, and the count of wrong passphrases."""

    _sessions: list[OwnerSession] = field(default_factory=list[OwnerSession])
    _failures: int = 0
    _locked_until: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, role: str, *, has_passphrase: bool) -> OwnerSession:
        """Open a session for a role; arguments as of `OwnerSession`."""
        words = (secrets.token_urlsafe(SECRET_BYTES) for _ in range(2))
        until = time.monotonic() + LIFE_SECONDS if has_passphrase else math.inf
        session = OwnerSession(next(words), role, next(words), until, has_passphrase)
        with self._lock:
            self._sessions = [*self._sessions, session][-MAX_SESSIONS:]
            self._failures = 0
        return session

    def with_secret(self, secret: str) -> list[OwnerSession]:
        """Return the open session with a secret, alone in a list; empty if there is none."""
        with self._lock:
            now = time.monotonic()
            self._sessions = [each for each in self._sessions if each.until > now]
            return [
                each for each in self._sessions if hmac.compare_digest(each.secret.encode(), secret.encode())
            ]

    def close(self, session: OwnerSession) -> None:
        """End a session."""
        with self._lock:
            self._sessions = [each for each in self._sessions if each is not session]

    @property
    def locked(self) -> bool:
        """Whether sign-ins wait after wrong passphrases."""
        with self._lock:
            return time.monotonic() < self._locked_until

    def fail(self) -> None:
        """Count a wrong passphrase."""
        with self._lock:
            self._failures += 1
            if self._failures >= MAX_FAILURES:
                self._failures, self._locked_until = 0, time.monotonic() + LOCK_SECONDS
