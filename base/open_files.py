"""Limit on the open files of a process: as many as the system grants, with a reserve that connections never use.

An unauthenticated connection is an open file until it identifies itself. A process without free files can neither write
its ledger nor read its roster.
"""

from __future__ import annotations

import resource
import socket
from typing import Any

from .refusal import Refusal

RESERVED = 256  # files for ledgers, logs, checkpoints, data and the process's own sockets; a server has some 100 open
MAX_CONNECTIONS = 1 << 14  # of the gRPC link; each takes 21 KiB before its first message, all 340 MiB
MAX_TLS = 1024  # connections of a server whose TLS is Python's; each takes 256 KiB


def raise_limit() -> None:
    """Raise the soft limit of open files to the hard one; systemd starts a service with 1024 and 524 288."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def for_connections() -> int:
    """Return the number of open files available for connections; the others are reserved for the process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft - min(RESERVED, soft // 2)


class Listener(socket.socket):
    """Listening socket that immediately closes a connection beyond the number of files for connections."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection.

        Raises:
          ConnectionAbortedError: too many files are open; asyncio and socketserver go on with the next one.
        """
        connection, address = super().accept()
        # The system gives the lowest free number, so a high one means that as many files are open.
        if connection.fileno() >= min(for_connections(), MAX_TLS):
            connection.close()
            raise ConnectionAbortedError("no file descriptor is left for it")
        return connection, address


def listener(field: str, address: str) -> Listener:
    """Return a socket that listens for devices at an address, host:port or [IPv6]:port, that the key `field` has.

    Raises:
      Refusal: the system cannot listen there; its reason is named.
    """
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return Listener(fileno=socket.create_server((host.strip("[]"), int(port)), family=family).detach())
    except OSError as error:
        raise Refusal(field, address, f"no link can be opened there: {error.strerror}") from error
