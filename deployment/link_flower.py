"""Flower link of a deployment: its ends at the server and at a device, each imported where it is opened."""

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
    from .open_link import Link


@contextmanager
def serve(bundle: ServerBundle, nodes: Nodes) -> Generator[Link]:
    """Open the server's end within the context; arguments as of `open_link`. Refusal if it cannot be opened."""
    from ..links.flower.superlink import open_superlink
    from .open_link import Link, Presence

    with open_superlink(bundle.folder, bundle.listen, nodes) as grid:
        yield Link(
            grid, lambda: Presence(grid.connected, grid.tally.total(), turned_away=grid.counts), grid.tally
        )


def follow(bundle: ClientBundle) -> Follow:
    """Return the function that follows the server from a device."""
    from ..links.flower.device_end import SuperLinkEndpoint, follow_fleet, read_node_key

    device = bundle.settings
    door = SuperLinkEndpoint(device.server, device.node, bundle.roots, read_node_key(bundle.supernode_key))
    return partial(follow_fleet, door)
