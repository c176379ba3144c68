"""Probe of a server or a device: whether its process runs, without the imports of a status, for platforms that ask often."""

import json
import tomllib
from contextlib import suppress
from pathlib import Path

from ..privacy.ledger.hash_chain import lock_holder
from ..server.run_status import OVER

STATUS = "status.json"
# Locks of the running processes: in a server's folder, and in a device's state.
SERVER_LOCK, AGENT_LOCK = "server", "agent"


def server_runs(folder: Path) -> bool:
    """Return whether a server runs on the folder."""
    return bool(lock_holder(folder / SERVER_LOCK))


def server_is_well(folder: Path) -> bool:
    """Return whether a server runs on the folder, or its run is over and none needs to."""
    if server_runs(folder):
        return True
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((folder / STATUS).read_bytes())["state"] in OVER
    return False


def client_is_well(folder: Path) -> bool:
    """Return whether the agent of the bundle's device runs."""
    with suppress(OSError, ValueError):
        state = str(tomllib.loads((folder / "client.toml").read_text(encoding="utf-8")).get("state", "state"))
        return bool(lock_holder(folder / state / AGENT_LOCK))
    return False
