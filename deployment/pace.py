"""Pace of a server's rounds: each begins when enough clients are connected to make its charge worthwhile."""

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from ..base.refusal import Refusal
from ..configs.bundle_files import CERTIFICATE, certificate_ends
from ..links.roster_watch import SignedRoster, followed_credentials
from ..links.server_bundle import ServerBundle
from ..modes.federation import Federation
from ..server.rounds import Pace
from .open_link import Link
from .settings import LinkSettings

POLL_SECONDS = 0.1
HEADS_SECONDS = 10.0  # for devices to report a later head of the server's log
SERVER_CERTIFICATE = "the server's own certificate"
Rosters = Callable[[], SignedRoster]

logger = logging.getLogger("fedveil.server")


def required_clients(federation: Federation, clients: int, valid: int) -> int:
    """Return the number of clients that an encrypted sum of all of them needs; with fewer it is always abandoned.

    It is 0 where sums are not encrypted, or a round does not draw all clients.

    Args:
      federation: says how sums are encrypted, and who is drawn.
      clients: number of clients in the newest roster.
      valid: number of those whose certificates have not ended, of whom a sum consists. If they are too few for any
        sum, the number is that for `clients`: the round waits until certificates are renewed.
    """
    masking, includes_all = federation.masking, federation.cohort.expected_size(clients) >= clients
    if masking is None or not includes_all:
        return 0
    for count in (valid, clients):
        with suppress(Refusal):  # a roster of too few ends the run in a sentence of its own
            return masking.attendance(count).least
    return 0


def certificate_end_of(bundle: ServerBundle) -> Callable[[], int]:
    """Return a function that returns the Unix second at which the server's newest certificate ends."""
    credentials, path = followed_credentials(bundle), bundle.folder / CERTIFICATE
    return lambda: certificate_ends(path, credentials().certificate)


def pace_of(
    bundle: ServerBundle,
    federation: Federation,
    rosters: Rosters,
    settings: LinkSettings,
    link: Link,
    wait_for: Callable[[int], None],
) -> Pace:
    """Return the pace of rounds: each begins when enough clients with valid certificates are connected.

    Args:
      bundle: of the server, whose certificate must be valid: no device trusts it afterwards.
      federation: of the run or question.
      rosters: returns the newest roster.
      settings: of the link.
      link: says who is connected.
      wait_for: notes how many clients must be connected; 0 once they are.
    """
    certificate_end, announced, heads_end = certificate_end_of(bundle), set[str](), 0.0

    def shortage() -> str | None:
        """Return what a round lacks, in words, None if nothing; call `wait_for`, and log each expiry once."""
        (roster, _), now = rosters(), int(time.time())
        ended, clients = roster.ended(now), len(roster.members)
        expired = [f"the certificate of {roster.name_of(node)}" for node in sorted(ended)]
        is_valid = certificate_end() >= now
        if not is_valid:
            expired.append(SERVER_CERTIFICATE)
        for each in expired:
            if each not in announced:
                logger.warning("%s has expired; renew it with fedveil provision renew or rotate", each)
                announced.add(each)
        required = required_clients(federation, clients, clients - len(ended))
        needed = max(math.ceil(settings.clients * clients), required)
        count = len(link.presence().connected_since.keys() - ended)
        if is_valid and count >= needed:
            wait_for(0)
            return None
        wait_for(needed)
        if not is_valid:
            return f"{SERVER_CERTIFICATE} had expired and was not renewed after {settings.wait:g} s"
        return f"{count} of {needed} clients that a round needs were connected after {settings.wait:g} s"

    def ready(stop: threading.Event) -> str | None:
        """Wait until a round may begin, or for `link.wait` seconds; return why none may, or None."""
        end = time.monotonic() + settings.wait
        while (reason := shortage()) is not None:
            if stop.wait(POLL_SECONDS) or time.monotonic() > end:
                return reason
        nonlocal heads_end
        heads_end = heads_end or time.monotonic() + HEADS_SECONDS  # only before the first round
        while not link.presence().reported and time.monotonic() < heads_end:
            if stop.wait(POLL_SECONDS):
                break
        return link.log_loss()

    return Pace(settings.deadline, ready, settings.patience)
