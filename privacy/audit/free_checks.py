"""Two free checks of every released aggregate: is the noise as large as claimed, and is it new.

Both are valid whatever the clients sent: a sum of anything and independent Gaussian noise has, along every fixed
subspace, at least the noise's energy (a noncentral chi-square is never below a central one). They see neither a
skipped clip, nor a wrong weight, nor memorisation: canaries do.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# A round by itself; all of them together, whole, by layer, and by the layers' means: so many tests share one level.
NORM_TESTS = 4
LEAST_VARIANCE = 9.0  # of a count, from which on a chi-square is near enough


def norm_p(layers: Sequence[NDArray[np.floating]], noise: float) -> float:
    """The probability of a layer, or the whole, as short as this if each coordinate has noise of std ``noise``.

    ``layers`` are the released arrays of one round in the unit of ``noise`` > 0; Bonferroni over layers and whole.
    """
    from scipy.special import chdtr

    energies = [float(np.vdot(layer, layer)) / noise**2 for layer in layers]
    sizes = [layer.size for layer in layers]
    tests = [*zip(sizes, energies, strict=True), (sum(sizes), sum(energies))]
    return min(1.0, len(tests) * min(float(chdtr(size, energy)) for size, energy in tests))


def outside(released: NDArray[np.floating], before: NDArray[np.floating]) -> tuple[float, int]:
    """The energy of ``released`` across the direction of ``before``, and in how many dimensions that is.

    ``before`` may be any function of earlier rounds, here their sum: updates persist and noise does not, so most of what
    clients sent lies along it, and what is left is nearly noise alone. Without any, shape (0,), all of it counts, and so
    does a single number.
    """
    energy, old = float(np.vdot(released, released)), float(np.vdot(before, before))
    if not old or released.size == 1:
        return energy, released.size
    return max(0.0, energy - float(np.vdot(released, before)) ** 2 / old), released.size - 1


def run_p(energies: NDArray[np.float64], dimensions: NDArray[np.int64]) -> float:
    """The probability of so little energy in all rounds together; of layers, of the one with the least, by Bonferroni.

    ``energies`` (rounds,) or (rounds, layers) as `outside` has them, over the variance that is claimed of what is new in
    a coordinate; in so many ``dimensions``, the same shape; layers without any do not count. Given all earlier rounds
    each is noncentral whatever the clients sent, so the sum is as unlikely below a central chi-square as one round is.
    """
    from scipy.special import chdtr

    sizes, sums = np.atleast_1d(dimensions.sum(axis=0)), np.atleast_1d(energies.sum(axis=0))
    p_values = chdtr(sizes[sizes > 0], sums[sizes > 0])
    return min(1.0, p_values.size * float(p_values.min(initial=1.0))) if p_values.size else 1.0


def visible_shortfall(energies: NDArray[np.float64], dimensions: NDArray[np.int64], level: float) -> float:
    """How much smaller than claimed the noise's std would have to be for `run_p` to fall below ``level``: from 0 to 1.

    With the same updates, and as expected: half of such runs fall below it. 1 where they hide even that there is none.
    """
    from scipy.special import gammaincinv

    size = int(dimensions.sum())
    if not size:
        return 1.0
    least = 2 * float(gammaincinv(size / 2, level))
    return 1 - math.sqrt(min(1.0, max(0.0, 1 - (float(energies.sum()) - least) / size)))


def reuse_p(released: NDArray[np.floating], before: NDArray[np.floating], noise: float) -> float:
    """The probability of so little energy outside what was released before, if the noise is new.

    ``noise`` > 0 is the std of what is *new* in a coordinate of ``released``: where noise is correlated over rounds, of
    the part that no earlier round holds. Where nothing but old noise came it is next to 0, whatever the clients sent.
    """
    from scipy.special import chdtr

    energy, _ = outside(released, before)
    return float(chdtr(released.size - 1, energy / noise**2))


def cosine(released: NDArray[np.floating], before: NDArray[np.floating]) -> float:
    """The cosine of two released vectors, to be shown: about 1/sqrt(size) for new noise, 1 for the same again."""
    lengths = float(np.linalg.norm(released)) * float(np.linalg.norm(before))
    return float(np.vdot(released, before)) / lengths if lengths else 0.0


def draw_p(counts: NDArray[np.int64], population: int | NDArray[np.int64], rate: float) -> float:
    """The probability of counts so large, or so even, where each of ``population`` is drawn with ``rate`` in (0, 1).

    ``counts`` (rounds,), of real clients; ``population``, of all rounds, or of each, (rounds,). Twice the smaller of the
    two.
    """
    from scipy.special import bdtrc, chdtr

    everybody = np.broadcast_to(population, counts.shape)
    total = int(counts.sum())
    large = float(bdtrc(total - 1, int(everybody.sum()), rate)) if total else 1.0
    mean, variance = everybody * rate, everybody * rate * (1 - rate)
    if variance.min() < LEAST_VARIANCE:
        return min(1.0, 2 * large)
    # Counts are whole: one that meets the mean exactly may stand for all within half of it.
    even = float(chdtr(len(counts), float(((np.abs(counts - mean) + 0.5) ** 2 / variance).sum())))
    return min(1.0, 2 * min(large, even))
