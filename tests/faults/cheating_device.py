"""Device whose node cheats in encrypted sums: `cheating_device.py BUNDLE WAY` is `fedveil client start BUNDLE` otherwise.

`WAY` is one of `secagg_cheats.py`, or `random words`: what it masks is noise over the whole modulus.
"""

import random
import runpy
import sys
from pathlib import Path

import numpy as np

from fedveil.__main__ import run
from fedveil.client import secure_update
from fedveil.strategies.identity import Identity

CHEATS = runpy.run_path(str(Path(__file__).with_name("secagg_cheats.py")))


def cheating(identity: Identity, way: str) -> object:
    """Return the identity's node, as one that cheats alone."""
    cheat = CHEATS["Cheat"](identity.node, identity.key, identity.policy, identity.roster)
    cheat.way, cheat.hands, cheat.friends = way, random.Random(0), frozenset({identity.node})
    return cheat


def random_words(*given: object, **options: object) -> tuple[np.ndarray, bool]:
    words, clipped = HONEST(*given, **options)
    most = np.iinfo(words.dtype).max
    return np.random.default_rng().integers(0, most, words.size, words.dtype, endpoint=True), clipped


HONEST = secure_update.encode_share

if __name__ == "__main__":
    bundle, way = sys.argv[1:]
    if way == "random words":
        secure_update.encode_share = random_words
        sys.exit(run(["client", "start", bundle]))
    Identity.participant = lambda identity: cheating(identity, way)  # type: ignore[method-assign]
    sys.exit(run(["client", "start", bundle]))
