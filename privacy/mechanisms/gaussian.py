"""Continuous Gaussian noise from a cryptographic stream, for the steps of DP-SGD.

Box and Muller (1958) on 53-bit uniforms in float64. The float attacks of Mironov (2012) remain a residual risk of
every floating-point DP-SGD, this one included; the noise on sums of clients is discrete and has none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .randomness import Stream


def standard_normal(count: int, stream: Stream) -> NDArray[np.float64]:
    """Return `count` independent standard normal numbers, shape (count,)."""
    half = (count + 1) // 2
    words = stream.uint64(2 * half) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1): the logarithm is finite
    radius = np.sqrt(-2 * np.log(uniform[:half]))
    angle = 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
