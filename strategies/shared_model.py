"""Shared model: the clients' initial model if the server sends differences, and its rounding.

A client that holds the model of an earlier round needs only the difference. Between two models of real numbers it is as
long as a model. So the server sends the global model rounded to a grid: each array to integer multiples of a power of
two, its step. The difference of any two such models consists of small integers, and adding it gives the newer model bit
for bit, after any number of rounds.

The step follows from the movement of an array in the last round: at `bits` b its root mean square is 2^(b-3) steps, so
that four of these on either side are 2^b numbers. Rounding changes a coordinate by at most half a step. The server
keeps the unrounded model, adds each round's mean to it, and rounds it again: the rounding error is part of the next
difference, and does not accumulate.

Model and step are computed from released models. All of it is post-processing, and costs no epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]
Steps = Mapping[str, int]  # by array's name, the exponent of the power of two that is its step

_SIDE = 3  # 2^(b - _SIDE) steps are one root mean square, and 2^(b - 1) four of them
_LOWEST = -126  # of float32, whose smaller numbers have fewer digits


def steps_after(before: Arrays, after: Arrays, bits: int, last: Steps) -> dict[str, int]:
    """Return the steps for the model after a round; an array that did not move keeps its step, if it has one.

    Args:
      before: the global model that the round began with.
      after: the global model after the round.
      bits: of a coordinate's difference between two rounds, 2 or more.
      last: the steps of the previous model; a step changes only if it is twice too long or too short.
    """
    steps = dict(last)
    for name, value in after.items():
        if value.dtype.kind != "f":
            continue
        with np.errstate(invalid="ignore"):
            moved = np.asarray(np.subtract(value, before[name], dtype=np.float64))
        size = math.sqrt(float(np.mean(np.square(moved, out=moved)))) if moved.size else 0.0
        if not 0 < size < math.inf:
            continue
        exponent = math.log2(size) - (bits - _SIDE)
        if name not in steps or abs(steps[name] - exponent) >= 1:
            steps[name] = max(_LOWEST, round(exponent))
    return steps


def shared(arrays: Arrays, steps: Steps) -> dict[str, NDArray[np.generic]]:
    """Return the clients' initial model: arrays with a step rounded to it, the others unchanged.

    Args:
      arrays: of the global model, by name.
      steps: as `steps_after` returns them.
    """
    return {name: _rounded(value, steps[name]) if name in steps else value for name, value in arrays.items()}


def _rounded(value: NDArray[np.generic], step: int) -> NDArray[np.generic]:
    """Return an array rounded to integer multiples of 2^step, in the same type."""
    numbers = value.astype(np.float64)  # then in place
    np.ldexp(numbers, -step, out=numbers)
    np.rint(numbers, out=numbers)
    np.ldexp(numbers, step, out=numbers)
    numbers += 0.0  # removes the sign of zeros
    return numbers.astype(value.dtype)
