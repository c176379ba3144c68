"""Conflicts of canaries with real clients, which a server refuses."""

from collections.abc import Iterator

from ..configs.privacy_settings import ClientDistributed, RecordDistributed, SumLevel


def conflicts_with_real_clients(level: SumLevel | None) -> Iterator[tuple[str, str]]:
    """Refuse canaries among real clients, unless they test a claim about clients whose single vectors the server sees."""
    if level is None:
        yield "audit.name", "its canary clients test a client-level claim, and there is none; use light"
    elif isinstance(level, RecordDistributed):
        text = "the server opens the sum in which canary records are scored, but only their owners may know which took part; use "
        yield "audit.name", text + "light, and full in a simulation"
    elif isinstance(level, ClientDistributed):
        text = "a canary client needs keys in the roster, and the operator would know its share of the noise; use "
        yield "audit.name", text + "light"
