"""Cost of an audit: what a thousand canaries add to a round, in CPU time of one core, beside what privacy alone costs."""

from __future__ import annotations

import numpy as np

from ..audit.canary_updates import add_canary, canaries_for
from ..audit.participants import MAX_CANARIES, SUPPORT, TOO_LONG
from ..messages.client_settings import CanaryClients
from ..privacy.audit.canary_clients import Canaries
from ..privacy.audit.sum_audit import NO_MEMORY, Memory, watch
from ..privacy.mechanisms.private_sum import CohortSum, add_noise, add_update, decode
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.released_sum import ReleasedSum, RoundCohort
from ..privacy.mechanisms.sum_spec import SumSpec, cells_for
from .engines import Options
from .privacy_share import milliseconds
from .tables import Row, conditions, result_of
from .workload import CLIPPING_NORM, NOISE_MULTIPLIER

_SIZES = (100_000, 10_000_000)
_RATES = (0.1, 0.25)
_SEED = bytes(32)


def run_audit(options: Options) -> Row:
    """Measure what watching a released sum and adding a canary take, for models of two sizes."""
    before = conditions()
    rows = [_of_size(dimension, options.size.cohort) for dimension in _SIZES]
    kept = f"{MAX_CANARIES} canaries, each within {SUPPORT} coordinates"
    notes = [
        f"{kept}; a round adds those that are drawn, and watches once",
        f"share: of clip, lattice and sum of {options.size.cohort} clients, noise and decoding, without any training",
    ]
    return result_of("audit", before, {"Milliseconds of CPU a round": rows}, notes)


def _of_size(dimension: int, cohort: int) -> Row:
    told = CanaryClients(0, MAX_CANARIES, _SEED.hex(), SUPPORT, TOO_LONG * CLIPPING_NORM, True, {})
    canaries = canaries_for(told, dimension)
    spec = SumSpec(CLIPPING_NORM, cells=cells_for(dimension))
    total, start = CohortSum(np.zeros(dimension)), np.zeros(dimension, np.float32)
    update = np.random.default_rng(1).standard_normal(dimension, np.float32)
    noise, layout = Randomness(1).stream("noise"), {"all": (dimension,)}
    added = milliseconds(lambda: add_canary(total, start, spec, told, 0))
    watched = _watched(canaries, dimension)
    client = milliseconds(lambda: add_update(total, update, {}, spec))
    server = milliseconds(
        lambda: decode(add_noise(total.total, NOISE_MULTIPLIER, spec, noise)[0], layout, spec, 1.0)
    )
    privacy = cohort * client + server
    rounds = {rate: watched + rate * MAX_CANARIES * added for rate in _RATES}
    return {
        "parameters": dimension,
        "watch": watched,
        "a canary": added,
        **{f"round at rate {rate:g}": round(whole, 1) for rate, whole in rounds.items()},
        "privacy alone": round(privacy, 1),
        "share at rate 0.1": round(rounds[0.1] / privacy, 3),
    }


def _watched(canaries: Canaries, dimension: int) -> float:
    rng = np.random.default_rng(2)
    released = ReleasedSum(
        1, [rng.standard_normal(dimension)], 1.0, 0.1, 1.0, RoundCohort(100, range(0, MAX_CANARIES, 10))
    )
    memory: list[Memory] = [NO_MEMORY]

    def once() -> None:
        memory[0] = watch(released, memory[0], canaries.directions, MAX_CANARIES, 0)[1]

    return milliseconds(once)
