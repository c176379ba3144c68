"""Sizes of a masked sum: the width of a coordinate, the resolution of its grid, and the effective noise.

Every client rounds to the grid and adds its share of noise, an exact discrete Gaussian of parameter sigma; the sum is
taken modulo 2^bits. Additional layers of noise, each from a seed, cover dropouts; once the survivors are fixed, they
open the seeds of the excess layers (XNoise, Jiang et al., EuroSys 2024, arXiv:2209.12528, but only owners open their
seeds: a client that fails to do so leaves its noise in the sum, which is more noise and never less). A `ShareSpec` has
two proofs; creating it fails if either does not hold.

No overflow. Let n be the most clients, Delta^2 the limit of a rounded vector's squared norm, room = 2^(bits-1) - 1.

- Not rotated, certain: a coordinate of the sum is at most n (Delta + `largest`(sigma)), summed over the layers, and
  that is at most room.
- Rotated, but for a probability of 2^-40 a round: rounding moves a coordinate by at most n. The rest is sub-Gaussian:
  the signal with proxy n^2 Delta^2 / 2^m (module `rotation`), each draw with sigma^2, because E exp(tX) = exp(t^2
  sigma^2 / 2) rho(Z - t sigma^2) / rho(Z) and a Gaussian's sum over the integers is largest when it is centred on one.
  With V the sum of the proxies, some of d coordinates exceeds room with probability at most 2 d exp(-(room - n)^2 / (2
  V)). All of it is compared in whole numbers. An overflow would corrupt a coordinate but not affect privacy: the
  modulus is post-processing.

Noise. The sum of m shares is a Gaussian mechanism of noise multiplier sqrt(m v - s^2) / Delta (where records are
hidden: over the root of `moved_squared`, and Delta is the range of a vector), where v is sigma^2 and that of every
layer that stays closed, and s = `SMOOTHING`, up to a pure epsilon below 2^-1000 in all coordinates together, far below
what a float of epsilon resolves:

- The law of the sum of l draws is, up to factors of exp(+-tau), tau = 10 sum_{j<l} exp(-2 pi^2 r^2 j / (j+1)) with r
  the least of their sigmas, the discrete Gaussian of their variances' sum, m v (the convolution theorem of Kairouz et
  al. 2021, arXiv:2102.06387: what x^2 y^2 / (x^2 + y^2) gives for draws of x and y grows in both); r is at least
  `MIN_SIGMA`.
- That is, up to factors of (1 +- e) / (1 -+ e), e = 2 sum_{k>0} exp(-2 pi^2 s^2 k^2), a continuous Gaussian of variance
  m v - s^2, rounded to the integers by a discrete Gaussian of variance s^2 about it (Peikert 2010, theorem 3.1).
  Whole shifts pass through that rounding, so all that is known of the Gaussian mechanism holds by post-processing, its
  PLD included. For Skellam noise there is only RDP.

m counts shares that the adversary does not know: those of the survivors minus the assumed colluders. The unit's own
share is among them. That is correct if a neighbouring unit answers zeros with noise (zero-out), and if the cohort is
known: the noise of an absent client is missing, which shows over many coordinates. So secret sampling does not amplify.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np

from ...base.refusal import Refusal
from .discrete_gaussian import MAX_SIGMA, largest
from .rotation import block_of
from .rounding import limit_for, moved_squared
from .sum_spec import MAX_CELLS, SMOOTHING, WEIGHT, SumSpec

MIN_SIGMA = 16  # grid units, the least r of the proofs
OVERFLOW_BITS = 40  # the security parameter of the protocol's own tails
FURTHER_BITS = 16  # the same where a client adds noise of its own: its sum is spoilt once in 2^16 at most
MAX_EXCESS = 1.15  # of the variance over what so many survivors need, after the layers in excess are open
MAX_INFLATION = 1.05  # what the coarser grid of 16 bits may add to the noise, before 32 bits are taken
_LOG_2 = (6932, 10000)  # a little more than log(2)


@dataclass(frozen=True)
class Attendance:
    """Bounds on the survivors and colluders of a sum; public.

    Attributes:
      most: clients whose sum must not overflow.
      least: smallest number of survivors with a release.
      colluders: number of survivors whose noise the adversary is assumed to know.
    """

    most: int
    least: int
    colluders: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.colluders < self.least:
            raise Refusal("colluders", self.colluders, f"give 0 to {self.least - 1}: fewer than survive")
        if self.least > self.most:
            raise Refusal("least", self.least, f"give at most the {self.most} clients of the cohort")


@dataclass(frozen=True)
class Layer:
    """Further noise of parameter `sigma` in each vector; its seed is opened if `survivors` or more are in the sum."""

    survivors: int
    sigma: int


@dataclass(frozen=True)
class ShareSpec:
    """Parameters of every client's encoding before masking, with proof against overflow. All of it is public.

    Attributes:
      sum: clipping norm, segments and grid; an update is clipped to it before rounding.
      coordinates: of the update, without the segments beside it; 0 for a question.
      attendance: of the sum.
      sigma: of each share of noise, in grid units; 0 for encryption alone.
      bits: of a coordinate, 16 or 32.
      rotated: whether vectors are rotated under the round's public seed.
      weighted: whether each client counts by its examples, which must be a scalar; without noise only.
      layers: by falling number of survivors; with fewer than the last layer's, none is opened.

    Raises:
      Refusal: a sum may overflow, or the noise is too narrow for its proof.
    """

    sum: SumSpec
    coordinates: int
    attendance: Attendance
    sigma: int
    bits: int
    rotated: bool
    weighted: bool = False
    layers: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (16, 32):
            raise Refusal("bits", self.bits, "choose 16 or 32")
        if not self.sum.private or self.sum.cells > MAX_CELLS:
            raise Refusal("sum", self.sum, f"give a clipping norm and at most {MAX_CELLS} cells")
        if self.sigma and not MIN_SIGMA <= self.sigma <= MAX_SIGMA:
            raise Refusal("sigma", self.sigma, f"give 0 or at least {MIN_SIGMA} grid units; a finer grid")
        in_range = all(MIN_SIGMA <= each.sigma <= MAX_SIGMA for each in self.layers)
        if self.layers and not (in_range and self.sigma):
            raise Refusal("layers", self.layers, f"give each at least {MIN_SIGMA} grid units, beside a share")
        levels = [self.attendance.most + 1, *(each.survivors for each in self.layers), self.attendance.least]
        if any(after >= before for before, after in pairwise(levels)):
            raise Refusal("layers", self.layers, "open them by falling numbers above the least attendance")
        has_weight = any(each.name == WEIGHT and self.sum.clip(each) > 0 for each in self.sum.segments)
        if self.weighted and (self.sigma or not has_weight or any(each.shape for each in self.sum.segments)):
            raise Refusal("weighted", True, f"weight only without noise, by a scalar {WEIGHT} with a share")
        if not _fits(self):
            remedy = "a sum of so many vectors and so much noise may overflow; give more bits or fewer cells"
            raise Refusal("bits", self.bits, remedy)

    @property
    def size(self) -> int:
        """Coordinates of a share, the segments beside the update included."""
        return self.coordinates + self.sum.segment_size

    @property
    def dtype(self) -> type[np.uint16 | np.uint32]:
        """Word type of a coordinate."""
        return np.uint16 if self.bits == 16 else np.uint32

    @property
    def limit(self) -> int:
        """The largest squared norm of a rounded vector, or of a sum of records before it is rounded, in grid units."""
        return _limit(self.sum, self.size)

    @property
    def sensitivity_squared(self) -> float:
        """How far one unit moves a rounded vector, squared, in grid units."""
        return _sensitivity_squared(self.sum, self.size)

    @property
    def inflation(self) -> float:
        """Factor, above 1, by which rounding raises the sensitivity over the norm of one unit's part."""
        unit = self.sum.unit_norm or self.sum.clipping_norm or 1.0
        return math.sqrt(self.sensitivity_squared) * self.sum.step / unit

    def variance(self, survivors: int) -> int:
        """Return the variance of one client's noise that stays in a sum of so many survivors, in grid units."""
        closed = (each.sigma**2 for each in self.layers if each.survivors > survivors)
        return self.sigma**2 + sum(closed)

    def noise_multiplier(self, shares: int, survivors: int) -> float:
        """Return the noise of this many unknown shares over the sensitivity, for this many survivors.

        Args:
          shares: of noise that the adversary does not know.
          survivors: whose layers are opened.
        """
        variance = max(shares * self.variance(survivors) - SMOOTHING**2, 0)
        return math.sqrt(variance / self.sensitivity_squared)

    def min_noise(self, colluders: int) -> float:
        """Return the smallest noise multiplier of a sum, over all numbers of survivors, of which so many collude."""
        return min(self.noise_multiplier(level - colluders, level) for level in self._levels)

    def single_noise(self, colluders: int) -> float:
        """Return `min_noise` where even all other survivors may collude: the survivor's own share always counts."""
        return min(self.noise_multiplier(max(1, level - colluders), level) for level in self._levels)

    def missing_sigma(self, colluders: int, noise_multiplier: float) -> int:
        """Return the noise that one survivor must add itself to be sure of a noise multiplier, in grid units.

        Args:
          colluders: number of other members whose noise it does not count on; may be all.
          noise_multiplier: over the sensitivity.

        Returns:
          The parameter of its own further noise; 0 if none is needed, and -1 if the grid has no room for it.
        """
        if self.single_noise(colluders) >= noise_multiplier:
            return 0
        needed = noise_multiplier**2 * self.sensitivity_squared + SMOOTHING**2
        present = min(max(1, level - colluders) * self.variance(level) for level in self._levels)
        sigma = max(math.ceil(math.sqrt(needed - present)), MIN_SIGMA)
        return sigma if sigma <= MAX_SIGMA and _has_room(self, sigma) else -1

    @property
    def _levels(self) -> tuple[int, ...]:
        """Numbers of survivors at which the noise is smallest: the least of all, and the least for each layer."""
        return (self.attendance.least, *(layer.survivors for layer in self.layers))


def size_shares(
    spec: SumSpec,
    coordinates: int,
    attendance: Attendance,
    noise_multiplier: float,
    bits: int | None = None,
    layered: bool = False,
) -> ShareSpec:
    """Return the finest grid that fits, with the noise that the smallest attendance needs.

    Args:
      spec: clipping norm and segments; its cells are replaced.
      coordinates: of the update; 0 for a question.
      attendance: of the sum.
      noise_multiplier: of the whole sum over its sensitivity, for the fewest survivors without colluders; 0 for none.
      bits: 16, rotated, or 32; None takes 16 where it adds at most 5 % to the noise, and 32 without noise.
      layered: whether noise beyond the need of more survivors is in layers; otherwise more survivors mean more noise.

    Raises:
      Refusal: no grid fits into these bits.
    """
    levels = _levels(attendance) if layered and noise_multiplier else (attendance.least,)
    finest = partial(_finest, spec, coordinates, attendance, levels, noise_multiplier)
    if bits is None and noise_multiplier:
        share_spec = finest(16)
        if share_spec is not None and share_spec.inflation <= MAX_INFLATION:
            return share_spec
    share_spec = finest(bits or 32)
    if share_spec is None:
        raise Refusal("bits", bits or 32, "no grid holds such a sum; give more bits, or less noise")
    return share_spec


def _levels(attendance: Attendance) -> tuple[int, ...]:
    """Return the numbers of survivors for which noise is sized; honest ones fall by at most `MAX_EXCESS` at each."""
    high, low = (count - attendance.colluders for count in (attendance.most, attendance.least))
    steps = math.ceil(math.log(high / low) / math.log(MAX_EXCESS))
    between = {round(high * (low / high) ** (step / steps)) for step in range(1, steps)}
    return tuple(count + attendance.colluders for count in sorted({high, *between, low}, reverse=True))


def _finest(
    spec: SumSpec, coordinates: int, attendance: Attendance, levels: Sequence[int], noise: float, bits: int
) -> ShareSpec | None:
    """Return the spec of the finest grid that fits, by bisection of its cells; None if none fits."""
    below, above = 0, MAX_CELLS + 1
    best = None
    while above - below > 1:
        cells = (below + above) // 2
        sum_spec = replace(spec, cells=cells)
        moved = _sensitivity_squared(sum_spec, coordinates + spec.segment_size)
        variance = noise**2 * moved + SMOOTHING**2 if noise else 0.0
        sigma, *others = _sigmas(variance, [level - attendance.colluders for level in levels])
        layers = tuple(Layer(*layer) for layer in zip(levels, others, strict=False))
        try:
            best = ShareSpec(sum_spec, coordinates, attendance, sigma, bits, bits == 16, layers=layers)
            below = cells
        except Refusal:
            above = cells
    return best


def _limit(spec: SumSpec, size: int) -> int:
    """Return `ShareSpec.limit` of a vector of this size."""
    # No coordinate of a sum of records exceeds its norm before rounding: floor(x + u) is at most ceil(x).
    return limit_for(spec.cells, size) if spec.unit_norm is None else spec.cells**2


def _sensitivity_squared(spec: SumSpec, size: int) -> float:
    """Return `ShareSpec.sensitivity_squared` of a vector of this size."""
    if spec.unit_norm is None:
        return float(_limit(spec, size))
    return moved_squared(spec.unit_norm / spec.step, size)


def _sigmas(variance: float, honest: Sequence[int]) -> list[int]:
    """Return the sigmas of a share and of its layers, such that each sum has this variance.

    With the first number of honest survivors only the share is closed, with each later, smaller one the next layer too.
    """
    sigmas: list[int] = []
    for count in honest:
        missing = max(variance / count - sum(sigma**2 for sigma in sigmas), 0)
        sigmas.append(max(math.ceil(math.sqrt(missing)), MIN_SIGMA) if variance else 0)
    return sigmas


def _has_room(spec: ShareSpec, further: int) -> bool:
    """Return whether a sum rarely overflows if one client adds noise of parameter `further` to its share.

    The proof leaves no room for it, because the finest grid is used. A sum that overflows stays private, and is
    useless.
    """
    proxy = spec.attendance.most * spec.variance(0) + further**2
    signal, room = spec.attendance.most * math.isqrt(spec.limit), 2 ** (spec.bits - 1) - 1
    doublings = spec.size.bit_length() + 1 + FURTHER_BITS
    if spec.rotated:  # the signal is sub-Gaussian as well, except for the rounding
        proxy, signal = proxy + math.ceil(signal**2 / block_of(spec.size)), spec.attendance.most
    return signal + math.sqrt(2 * math.log(2) * doublings * proxy) <= room


def _fits(spec: ShareSpec) -> bool:
    """Return whether the sum does not overflow, as the module's text proves it."""
    vectors, room = spec.attendance.most, 2 ** (spec.bits - 1) - 1
    if not spec.rotated:
        share = sum(largest(sigma) for sigma in (spec.sigma, *(each.sigma for each in spec.layers)) if sigma)
        return vectors * (math.isqrt(spec.limit) + share) <= room
    block = block_of(spec.size)
    proxy = vectors**2 * spec.limit + vectors * spec.variance(0) * block  # V times 2^m
    doublings = spec.size.bit_length() + 1 + OVERFLOW_BITS  # 2^doublings is at least 2 d 2^40
    above, below = _LOG_2
    return vectors <= room and (room - vectors) ** 2 * block * below >= 2 * above * doublings * proxy
