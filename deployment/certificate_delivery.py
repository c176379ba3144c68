"""Delivery of later certificates and of the authority's rollovers over the open stream of each connected device.

The device reports its facts in its reply.
"""

import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from flwr.serverapp import Grid

from ..base.bounded_decoding import Undecodable, read_json
from ..base.refusal import Refusal
from ..configs.bundle_files import read_file
from ..links.roster_watch import Followed, followed_rollovers
from ..links.server_bundle import ServerBundle
from ..messages.notices import DeviceFacts, read_facts, renewal_to
from ..privacy.secagg.rollover import Rollover, write_chain

logger = logging.getLogger("fedveil.server")

CERTIFICATES = "certificates.json"
POLL_SECONDS = 1.0  # between two polls of the connected nodes and of the authority's certificates
ANSWER_SECONDS = 60.0  # a device that trains answers after its training, and gets the message again

Certificates = Callable[[], Mapping[str, str]]


@dataclass
class CertificateDelivery:
    """Delivery to the devices of a grid.

    Attributes:
      grid: of the link to them.
      connected_since: returns the connected nodes, and the Unix second since which each is.
      certificates: returns the newest certificates in PEM, by node.
      rollovers: returns those of the authority.
      facts: last report of each node.
    """

    grid: Grid
    connected_since: Callable[[], Mapping[int, float]]
    certificates: Certificates
    rollovers: Callable[[], Sequence[Rollover]] = tuple
    facts: dict[int, DeviceFacts] = field(default_factory=dict[int, DeviceFacts])
    # By node, what its stream was sent last: since when it is connected, its certificate, and the rollovers.
    _announced: dict[int, tuple[float, str, str]] = field(default_factory=dict[int, tuple[float, str, str]])

    @property
    def is_settled(self) -> bool:
        """Whether each connected device has answered since it connected."""
        announced = {node: since for node, (since, *_) in self._announced.copy().items()}
        return all(announced.get(node) == since for node, since in self.connected_since().items())

    def deliver(self) -> int:
        """Deliver pending certificates to connected devices, and return how many have answered."""
        certificates, chain = self.certificates(), self.rollovers()
        rollovers = write_chain(chain) if chain else ""
        pending: dict[int, tuple[float, str, str]] = {}
        for node, since in self.connected_since().items():
            news = (since, certificates.get(str(node), ""), rollovers)
            if self._announced.get(node) != news:
                pending[node] = news
        messages = [renewal_to(node, pem, text) for node, (_, pem, text) in pending.items()]
        answered = 0
        for reply in self.grid.send_and_receive(messages, timeout=ANSWER_SECONDS) if messages else ():
            node, answered = reply.metadata.src_node_id, answered + 1
            if (facts := read_facts(reply)) is not None:
                self.facts[node] = facts
            # An older release answers with an error, and gets the message again after it reconnects.
            self._announced[node] = pending[node]
        return answered

    def follow(self, stop: threading.Event) -> None:
        """Deliver certificates until `stop` is set."""
        while not stop.wait(POLL_SECONDS):
            try:
                self.deliver()
            except Exception:  # no round waits for a delivery
                logger.exception("certificates could not be delivered")


@contextmanager
def delivering(
    bundle: ServerBundle, grid: Grid, connected_since: Callable[[], Mapping[int, float]]
) -> Generator[CertificateDelivery]:
    """Deliver certificates, and rollovers of the authority, from a thread of its own within the context."""
    stop = threading.Event()
    certificates, rollovers = followed_certificates(bundle), followed_rollovers(bundle)
    delivery = CertificateDelivery(grid, connected_since, certificates, rollovers)
    threading.Thread(target=delivery.follow, args=(stop,), name="certificates", daemon=True).start()
    try:
        yield delivery
    finally:
        stop.set()  # it is not joined: its exchange ends with the link, which the caller closes after this


def followed_certificates(bundle: ServerBundle) -> Certificates:
    """Return a function that returns the newest certificates of the bundle, none for a bundle by an older desk."""
    path = bundle.folder / CERTIFICATES
    followed = Followed[dict[str, str]]((path,), lambda _: _read(path), {})
    return lambda: followed() if path.exists() else {}


def _read(path: Path) -> dict[str, str]:
    """Return the certificates in a file in PEM, by node."""
    try:
        certificates = read_json(read_file(path))
    except Undecodable:
        certificates = None
    if not isinstance(certificates, dict) or not all(isinstance(each, str) for each in certificates.values()):
        raise Refusal("file", str(path), "does not map nodes to certificates; copy it from the desk")
    return cast(dict[str, str], certificates)
