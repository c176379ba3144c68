"""SuperNode that adds a number, without torch: ``python -m fedveil.benchmarks.flower_link_client FILE``."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

from ..links.flower.device_end import SuperLinkEndpoint, follow_fleet
from ..links.flower.fleet_calls import load_node_key
from ..messages.flower_adapter import quiet_flower
from .link_clients import add_one


def main(path: Path) -> None:
    """Follow until the process is ended."""
    server, node, ca, key = json.loads(path.read_text())
    door = SuperLinkEndpoint(server, node, ca.encode(), load_node_key(key.encode()))
    quiet_flower()
    with tempfile.TemporaryDirectory() as folder:
        follow_fleet(door, add_one, Path(folder) / "journal", threading.Event())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
