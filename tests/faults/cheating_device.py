"""Device whose node cheats in encrypted sums: `cheating_device.py BUNDLE WAY` is `fedveil client start BUNDLE` otherwise."""

import random
import runpy
import sys
from pathlib import Path

from fedveil.__main__ import run
from fedveil.strategies.identity import Identity

CHEATS = runpy.run_path(str(Path(__file__).with_name("secagg_cheats.py")))


def cheating(identity: Identity, way: str) -> object:
    """Return the identity's node, as one that cheats alone."""
    cheat = CHEATS["Cheat"](identity.node, identity.key, identity.policy, identity.roster)
    cheat.way, cheat.hands, cheat.friends = way, random.Random(0), frozenset({identity.node})
    return cheat


if __name__ == "__main__":
    bundle, way = sys.argv[1:]
    Identity.participant = lambda identity: cheating(identity, way)  # type: ignore[method-assign]
    sys.exit(run(["client", "start", bundle]))
