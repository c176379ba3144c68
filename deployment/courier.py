"""Delivery of later certificates and of the authority's rollovers over the open stream of each connected device.

The device reports its facts in its reply.
"""

import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from flwr.serverapp import Grid

from ..base.bounded_decoding import Undecodable, read_json
from ..base.refusal import Refusal
from ..configs.bundle_files import read_file
from ..links.roster_watch import Followed, followed_rollovers
from ..links.server_bundle import ServerBundle
from ..messages.renewal import DeviceFacts, read_facts, renewal_to
from ..privacy.secagg.rollover import Rollover, write_chain

logger = logging.getLogger("fedveil.server")

CERTIFICATES = "certificates.json"
LOOK_SECONDS = 1.0  # between two looks at who has come, and at what the authority has issued
ANSWER_SECONDS = 60.0  # a device that trains answers when it is done; it is asked again

Certificates = Callable[[], Mapping[str, str]]


class Courier:
    """Courier to the devices of a grid.

    Args:
      grid: reaches them.
      since: returns the connected nodes, and the Unix second since which each is.
      certificates: returns the newest certificates in PEM, by node.
      rollovers: returns those of the authority.
    """

    def __init__(
        self,
        grid: Grid,
        since: Callable[[], Mapping[int, float]],
        certificates: Certificates,
        rollovers: Callable[[], Sequence[Rollover]] = tuple,
    ) -> None:
        self._grid, self._since, self._certificates = grid, since, certificates
        self._rollovers = rollovers
        self._announced: dict[int, tuple[float, str, str]] = {}
        self.facts: dict[int, DeviceFacts] = {}

    @property
    def settled(self) -> bool:
        """Whether each connected device has answered since it connected."""
        before = {node: since for node, (since, *_) in self._announced.copy().items()}
        return all(before.get(node) == since for node, since in self._since().items())

    def carry(self) -> int:
        """Deliver pending certificates to connected devices, and return how many have answered."""
        here, certificates, chain = self._since(), self._certificates(), self._rollovers()
        rollovers = write_chain(chain) if chain else ""
        wanted = {node: (since, certificates.get(str(node), ""), rollovers) for node, since in here.items()}
        asked = {node: each for node, each in wanted.items() if self._announced.get(node) != each}
        messages = [renewal_to(node, *told) for node, (_, *told) in asked.items()]
        answered = 0
        for reply in self._grid.send_and_receive(messages, timeout=ANSWER_SECONDS) if messages else ():
            node, answered = reply.metadata.src_node_id, answered + 1
            if (facts := read_facts(reply)) is not None:
                self.facts[node] = facts
            # An older release answers with an error, and is asked when it comes again.
            self._announced[node] = asked[node]
        return answered

    def follow(self, stop: threading.Event) -> None:
        """Deliver certificates until `stop` is set."""
        while not stop.wait(LOOK_SECONDS):
            try:
                self.carry()
            except Exception:  # no round waits for a courier
                logger.exception("certificates could not be delivered")


@contextmanager
def carrying(
    bundle: ServerBundle, grid: Grid, since: Callable[[], Mapping[int, float]]
) -> Generator[Courier]:
    """Deliver certificates, and rollovers of the authority, within the context."""
    stop = threading.Event()
    courier = Courier(grid, since, followed_certificates(bundle), followed_rollovers(bundle))
    threading.Thread(target=courier.follow, args=(stop,), name="courier", daemon=True).start()
    try:
        yield courier
    finally:
        stop.set()  # an exchange that it waits in ends with the link


def followed_certificates(bundle: ServerBundle) -> Certificates:
    """Return a function that returns the newest certificates of the bundle, none for a bundle by an older desk."""
    path = bundle.folder / CERTIFICATES
    followed = Followed[dict[str, str]]((path,), lambda _: _read(path), {})
    return lambda: followed() if path.exists() else {}


def _read(path: Path) -> dict[str, str]:
    try:
        found = read_json(read_file(path))
    except Undecodable:
        found = None
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise Refusal("file", str(path), "does not map nodes to certificates; copy it from the desk")
    return cast(dict[str, str], found)
