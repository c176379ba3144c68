"""Two free checks of every released aggregate: is the noise as large as claimed, and is it new.

Both are valid whatever the clients sent: a sum of anything and independent Gaussian noise has, along every fixed
subspace, at least the noise's energy (a noncentral chi-square is never below a central one). They see neither a
skipped clip, nor a wrong weight, nor memorisation: canaries do.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def norm_p(layers: Sequence[NDArray[np.floating]], noise: float) -> float:
    """The probability of a layer, or the whole, as short as this if each coordinate has noise of std ``noise``.

    ``layers`` are the released arrays of one round in the unit of ``noise`` > 0; Bonferroni over layers and whole.
    """
    from scipy.special import chdtr

    energies = [float(np.vdot(layer, layer)) / noise**2 for layer in layers]
    sizes = [layer.size for layer in layers]
    tests = [*zip(sizes, energies, strict=True), (sum(sizes), sum(energies))]
    return min(1.0, len(tests) * min(float(chdtr(size, energy)) for size, energy in tests))


def run_p(norms: NDArray[np.float64], noises: NDArray[np.float64], size: int) -> float:
    """The probability of so little energy in all rounds together.

    ``norms`` (rounds,) of released sums of ``size`` coordinates, in the unit of ``noises`` (rounds,) > 0, the std that is
    claimed of what is new in a coordinate. Given all earlier rounds, each is noncentral whatever the clients sent, so
    the sum is as unlikely below a central chi-square as one round is.
    """
    from scipy.special import chdtr

    return float(chdtr(size * len(norms), float(((norms / noises) ** 2).sum())))


def reuse_p(released: NDArray[np.floating], before: NDArray[np.floating], noise: float) -> float:
    """The probability of so little energy outside what was released before, if the noise is new.

    ``noise`` > 0 is the std of what is *new* in a coordinate of ``released``: where noise is correlated over rounds, of
    the part that no earlier round holds. Where nothing but old noise came it is next to 0, whatever the clients sent.
    """
    from scipy.special import chdtr

    energy, inner = float(np.vdot(released, released)), float(np.vdot(released, before))
    old = float(np.vdot(before, before))
    outside = energy - inner**2 / old if old else energy
    return float(chdtr(released.size - 1, max(outside, 0.0) / noise**2))


def cosine(released: NDArray[np.floating], before: NDArray[np.floating]) -> float:
    """The cosine of two released vectors, to be shown: about 1/sqrt(size) for new noise, 1 for the same again."""
    lengths = float(np.linalg.norm(released)) * float(np.linalg.norm(before))
    return float(np.vdot(released, before)) / lengths if lengths else 0.0
