"""Ports that are free, and stay so: none that the system hands out, and none that another test was given."""

import secrets
import socket

FIRST, PORTS = 10_000, 20_000  # Linux hands out those from 32 768 on, to whoever asks for any


def free_port() -> int:
    """Return a TCP port that no other process of tests is given while this one lives: it holds that of UDP."""
    while True:
        port = FIRST + secrets.randbelow(PORTS)
        with socket.socket() as probe, socket.socket(type=socket.SOCK_DGRAM) as held:
            try:
                held.bind(("127.0.0.1", port))
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            held.detach()
            return port
