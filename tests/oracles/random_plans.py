"""Table of `random_plans.json`: epsilon of 60 random plans, recomputed without fedveil's accounting.

    python tests/oracles/random_plans.py > tests/oracles/random_plans.json

Ten plans of each kind: Poisson, fixed, nested, mixed, correlated and distributed; the last two as what they are charged,
one Gaussian of a whole run, and Gaussians that differ from sum to sum. Each has a lower and an upper bound: an optimistic
and a pessimistic privacy loss distribution of dp_accounting 0.6 on a grid of 5e-5. Nested samples, which dp_accounting does
not cover, are tabulated here from the normal law, rounded down and up. 45 seconds of a processor; nothing here is computed
by fedveil.
"""

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from numpy.typing import NDArray

SEED, EACH, STEP = 20261126, 10, 5e-5
KINDS = ("poisson", "fixed", "nested", "mixed", "correlated", "distributed")
DELTAS = (1e-4, 1e-5, 1e-6)
Floats = NDArray[np.float64]


def plans() -> Iterator[dict[str, Any]]:
    """Yield each plan: its events as a ledger writes them, with how often each happened, and delta."""
    draw = np.random.default_rng(SEED)
    for kind in KINDS:
        for _ in range(EACH):
            delta = DELTAS[int(draw.integers(len(DELTAS)))]
            yield {"kind": kind, "delta": delta, "events": _events(kind, draw)}


def _events(kind: str, draw: np.random.Generator) -> list[list[Any]]:
    rounds = round(float(np.exp(draw.uniform(np.log(5), np.log(300)))))
    rate, noise = float(np.exp(draw.uniform(np.log(0.01), np.log(0.6)))), float(draw.uniform(0.9, 6.0))
    match kind:
        case "poisson":
            return [[_sampled(rate, _gaussian(noise)), rounds]]
        case "fixed":
            return [[_gaussian(noise * math.sqrt(rounds)), rounds]]
        case "nested":
            steps, inner = int(draw.integers(2, 8)), float(draw.uniform(1.5, 5.0))
            asked = {"kind": "SelfComposed", "event": _gaussian(inner * math.sqrt(steps)), "count": steps}
            return [[_sampled(rate, asked), 1 + rounds // 10]]
        case "mixed":
            other = float(np.exp(draw.uniform(np.log(0.01), np.log(0.3))))
            parts = [_sampled(rate, _gaussian(noise)), _sampled(other, _gaussian(noise / 1.3))]
            return [[parts[0], rounds], [parts[1], 1 + rounds // 2], [_gaussian(noise * 3), 4]]
        case "correlated":  # the whole run is one Gaussian, of a sensitivity beyond one clip
            return [[_gaussian(float(draw.uniform(0.4, 6.0))), 1]]
        case _:  # a sum's noise differs with how many clients survive
            return [
                [_gaussian(noise * math.sqrt(rounds) * float(draw.uniform(1.0, 1.2))), 1]
                for _ in range(min(rounds, 20))
            ]


def _gaussian(noise: float) -> dict[str, Any]:
    return {"kind": "Gaussian", "noise_multiplier": noise}


def _sampled(rate: float, event: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "PoissonSampled", "sampling_probability": rate, "event": event}


def bracket(plan: dict[str, Any]) -> tuple[float, float]:
    """Return a lower and an upper bound on the plan's epsilon."""
    if plan["kind"] == "nested":
        ((event, rounds),) = plan["events"]
        asked = event["event"]
        mu = math.sqrt(asked["count"]) / asked["event"]["noise_multiplier"]
        return nested(event["sampling_probability"], mu, rounds, plan["delta"])
    low, high = (_composed(plan["events"], pessimistic) for pessimistic in (False, True))
    return float(low.get_epsilon_for_delta(plan["delta"])), float(high.get_epsilon_for_delta(plan["delta"]))


def _composed(events: list[list[Any]], pessimistic: bool) -> Any:
    total: Any = None
    for event, count in events:
        sampled = event["kind"] == "PoissonSampled"
        one = pld.from_gaussian_mechanism(
            (event["event"] if sampled else event)["noise_multiplier"],
            pessimistic_estimate=pessimistic,
            value_discretization_interval=STEP,
            sampling_prob=event["sampling_probability"] if sampled else 1.0,
            use_connect_dots=pessimistic,
        )
        one = one.self_compose(count) if count > 1 else one
        total = one if total is None else total.compose(one)
    return total


def nested(rate: float, mu: float, rounds: int, delta: float) -> tuple[float, float]:
    """Return bounds on epsilon where a unit drawn at a rate is asked what is worth mu-GDP, so many rounds.

    The composition inside is one Gaussian, so the sampled pair is the mixture (1 - rate) N(0, 1) + rate N(mu, 1) against
    N(0, 1), and the other way about. Both losses are tabulated from the normal law on a fine grid of outputs, rounded
    down for the lower bound and up for the upper, each by a step more for the width of a cell. The lower one is also read one
    step further down, as epsilon lies between two points of the grid.
    """
    outputs = np.linspace(-12.0, 12.0 + mu, 4_000_001)
    cells = 0.5 * (outputs[1:] + outputs[:-1])
    base, moved = _masses(outputs), _masses(outputs - mu)
    mixed = (1 - rate) * base + rate * moved
    loss = np.logaddexp(math.log1p(-rate), math.log(rate) + mu * cells - mu * mu / 2)
    lows, highs = [], []
    for masses, losses in ((mixed, loss), (base, -loss)):
        lows.append(_epsilon(masses, np.floor(losses / STEP).astype(np.int64) - 1, rounds, delta) - STEP)
        highs.append(_epsilon(masses, np.ceil(losses / STEP).astype(np.int64) + 1, rounds, delta))
    return max(lows), max(highs)


def _masses(edges: Floats) -> Floats:
    from scipy.special import ndtr

    return np.diff(ndtr(edges))


def _epsilon(masses: Floats, steps: NDArray[np.int64], rounds: int, delta: float) -> float:
    first = int(steps.min())
    once = np.bincount(steps - first, masses)
    size = 1 << ((once.size - 1) * rounds + 1).bit_length()
    if size > 1 << 25:
        sys.exit("the grid is too large for this plan")
    total = np.maximum(np.fft.irfft(np.fft.rfft(once, size) ** rounds, size), 0.0)
    losses = (np.arange(size) + first * rounds) * STEP
    keep = losses > 0
    upper = np.cumsum(total[keep][::-1])[::-1]
    lower = np.cumsum((total[keep] * np.exp(-losses[keep]))[::-1])[::-1]
    sizes = losses[keep]
    deltas = upper - np.exp(sizes) * lower
    at = int((deltas <= delta).argmax())
    return float(sizes[at])


if __name__ == "__main__":
    rows = [{**plan, "bounds": [round(each, 6) for each in bracket(plan)]} for plan in plans()]
    print("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]")
