"""Link to a federation's clients: a grid, and the connected clients. A link is found by its name."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from ..base.extensions import extension
from ..base.refusal import Refusal
from ..links.roster_watch import Nodes
from ..links.server_bundle import ServerBundle
from ..messages.notices import DeviceFacts
from ..messages.traffic import NOTHING, Carried, Tally
from .settings import LinkSettings


@dataclass(frozen=True)
class Presence:
    """State of a link's connections, without message contents; only byte counts.

    Attributes:
      connected_since: Unix second since which each connected node is here, by node.
      traffic: bytes by direction and purpose, over all connections.
      turned_away: connections and replies that were refused, by reason.
      disconnected_at: Unix second at which a node that is no longer here was disconnected, by node.
      devices: what devices say of themselves, by node.
      restored: Unix second at which a node was noticed to be restored from a backup, or copied, by node.
      reported: whether each connected device has answered what it is asked when it connects; the first round waits
        for this, but not long.
    """

    connected_since: Mapping[int, float]
    traffic: Carried = NOTHING
    turned_away: Mapping[str, int] = field(default_factory=dict[str, int])
    disconnected_at: Mapping[int, float] = field(default_factory=dict[int, float])
    devices: Mapping[int, DeviceFacts] = field(default_factory=dict[int, DeviceFacts])
    restored: Mapping[int, float] = field(default_factory=dict[int, float])
    reported: bool = True


@dataclass(frozen=True)
class Link:
    """A grid to the clients, the function that returns the connected ones, and the tally of bytes.

    `log_loss` returns a sentence if a client has seen more of the server's log than the server holds; else None.
    """

    grid: Grid
    presence: Callable[[], Presence]
    tally: Tally = field(default_factory=Tally)
    log_loss: Callable[[], str | None] = lambda: None


@contextmanager
def open_link(settings: LinkSettings, bundle: ServerBundle, nodes: Nodes) -> Generator[Link]:
    """Open the link that the bundles were made for within the context.

    Raises:
      Refusal: it is another one, or it cannot be opened.
    """
    if settings.name != bundle.link:
        remedy = f"the bundles of this federation were made for link={bundle.link}; use that link, or provision again"
        raise Refusal("link", settings.name, remedy)
    with extension("link", settings.name, "link", settings.name).serve(bundle, nodes) as link:
        yield link
