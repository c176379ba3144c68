"""False alarms of correct runs of the default job under `audit=light`, by simulation of their scores.

Clients send nothing, because updates only lengthen what is released: the worst case of both noise checks.
`python tests/oracles/false_alarms.py 20000` takes two minutes.
"""

import sys
from collections.abc import Mapping

import numpy as np
from scipy.special import chdtr

from fedveil.privacy.audit.alarms import CERTAIN, AlarmState, Check, Level, Look, look_at
from fedveil.privacy.audit.free_checks import NORM_TESTS, draw_p, draw_sums, run_p

LAYERS, CLIENTS, RATE, ROUNDS = (2560, 10), 400, 0.25, 100
DIMENSION = sum(LAYERS)
PLAN = AlarmState({Check.NORM: ROUNDS, Check.REUSE: ROUNDS, Check.DRAW: ROUNDS})


def levels(rng: np.random.Generator) -> set[Level]:
    """Return the levels of the alarms of one run."""
    means = rng.chisquare(1, (ROUNDS, len(LAYERS)))
    layers = [mean + rng.chisquare(size - 1, ROUNDS) for size, mean in zip(LAYERS, means.T, strict=True)]
    whole = np.sum(layers, axis=0)
    tests = [chdtr(size, energy) for size, energy in zip(LAYERS, layers, strict=True)]
    single = 3 * np.min([*tests, chdtr(DIMENSION, whole)], axis=0)
    reuse, counts = rng.random(ROUNDS), rng.binomial(CLIENTS, RATE, ROUNDS)
    by_layer, sizes = np.stack(layers, axis=1), np.tile(LAYERS, (ROUNDS, 1))
    since = {Check.NORM: 0, Check.DRAW: 0}
    state, found = PLAN, set[Level]()

    def pooled(rounds: slice) -> float:
        p_values = (
            run_p(whole[rounds], sizes[rounds].sum(axis=1)),
            run_p(by_layer[rounds], sizes[rounds]),
            run_p(means[rounds], np.ones_like(sizes[rounds])),
        )
        return NORM_TESTS * min(p_values)

    for now in range(ROUNDS):
        norm = [NORM_TESTS * float(single[now]), pooled(slice(since[Check.NORM], now + 1))]
        if since[Check.NORM] and (every := pooled(slice(now + 1))) < CERTAIN * PLAN.threshold(Check.NORM):
            norm.append(every)
        p_values: Mapping[Check, float] = {
            Check.NORM: min(norm),
            Check.REUSE: float(reuse[now]),
            Check.DRAW: draw_p(draw_sums(counts[since[Check.DRAW] : now + 1], CLIENTS, RATE), RATE),
        }
        state, alarms = look_at(state, Look(p_values))
        found |= {each.level for each in alarms}
        since |= {each.test: now + 1 for each in alarms if each.test in since}
    return found


def counted(runs: int, seed: int = 0) -> tuple[int, int]:
    """Return how many runs raise an alarm, and how many of those are stopped."""
    rng = np.random.default_rng(seed)
    found = [levels(rng) for _ in range(runs)]
    return sum(map(bool, found)), sum(Level.RED in each for each in found)


if __name__ == "__main__":
    asked = int(sys.argv[1])
    alarmed, stopped = counted(asked)
    print(f"{asked} correct runs: {alarmed} raise an alarm, {stopped} are stopped")
