"""gRPC link of a deployment: its ends at the server and at a device, each imported where it is opened."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..links.roster_watch import Nodes
    from ..links.server_bundle import ServerBundle
    from .device.agent import Follow
    from .device.client_bundle import ClientBundle
    from .open_link import Link, Presence

ACKNOWLEDGED = "acknowledged.json"  # file of the last instruction that each device has answered


@contextmanager
def serve(bundle: ServerBundle, nodes: Nodes) -> Generator[Link]:
    """Open the server's end within the context; arguments as of `open_link`. Refusal if it cannot be opened."""
    from ..links.grpc.grid import ServerEndpoint, open_link
    from ..links.roster_watch import admitted_in, followed_credentials
    from .certificate_delivery import delivering
    from .open_link import Link, Presence

    admitted = admitted_in(bundle.admitted, nodes)
    credentials, path = followed_credentials(bundle), bundle.folder / ACKNOWLEDGED
    endpoint = ServerEndpoint(bundle.listen, credentials, nodes, admitted, path)
    with open_link(endpoint) as grid, delivering(bundle, grid, lambda: grid.connected) as delivery:

        def presence() -> Presence:
            return Presence(
                grid.connected,
                grid.tally.total(),
                grid.counts,
                {node: each.disconnected_at for node, each in grid.traffic.items() if each.disconnected_at},
                dict(delivery.facts),
                grid.restored,
                delivery.is_settled,
            )

        yield Link(grid, presence, grid.tally)


def follow(bundle: ClientBundle) -> Follow:
    """Return the function that follows the server from a device."""
    from ..links.grpc.device_end import Endpoint
    from ..links.grpc.device_end import follow as follow_stream
    from .device.agent import newest_credentials
    from .device.ledger_heads import is_charged

    device = bundle.settings
    endpoint = Endpoint(device.server, device.node, partial(newest_credentials, bundle))
    return partial(follow_stream, endpoint, is_charged=partial(is_charged, bundle.state))
