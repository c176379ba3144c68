"""Private sum without a trusted server: each client adds its share of the noise, and only the sum is revealed.

    client: clip -> rotate -> round -> share of noise, and layers -> modulo 2^bits -> (mask)
    server: (unmask) -> take layers back -> centre -> rotate back -> decode

The message is one vector of unsigned words: update, loss, count and clipping bit, with the segments and the decoding of
module `private_sum`. Module `sizing` proves that the sum does not overflow, and the effect of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ..accounting.events import gaussian_event
from .discrete_gaussian import sample_rows
from .private_sum import (
    UNCLIPPED,
    Arrays,
    NotFinite,
    Values,
    Vector,
    decode,
    decode_counts,
    segments_in_grid_units,
    squared_norm,
)
from .randomness import Stream, keyed_stream
from .rotation import rotate, unrotate
from .rounding import BLOCK, Blocks, blocks_of, round_once, round_within
from .sizing import ShareSpec
from .sum_spec import WEIGHT

if TYPE_CHECKING:
    from dp_accounting.dp_event import GaussianDpEvent

Words = NDArray[np.uint16 | np.uint32]

_LAYER = "layer of noise"  # purpose of a layer's stream, the same at the client and at the server
_NOISE_BLOCK = 1 << 16  # coordinates whose noise is drawn at a time, as in the private sum
_ROWS_AT_ONCE = 1 << 14  # numbers of several streams that are drawn at a time, which a core's cache holds

# --- at the client ---------------------------------------------------------------------------------------------


def encode_share(
    update: Arrays, values: Values, spec: ShareSpec, stream: Stream, seed: bytes, layers: Sequence[bytes] = ()
) -> tuple[Words, bool]:
    """Return the client's vector, to be masked, and whether its update was longer than the norm.

    Args:
      update: float arrays by name, in the layout's order; any shapes, all finite.
      values: a value for each of the spec's segments.
      spec: the round's public parameters.
      stream: the client's own, secret; it serves this vector and no other, not even the same vector sent again.
      seed: of the round's rotation, public, 32 bytes.
      layers: a fresh secret seed for each of the spec's layers, of 32 bytes.

    Returns:
      shape (spec.size,), of the spec's dtype.
    """
    if len(layers) != len(spec.layers):
        raise ValueError(f"{len(layers)} seeds for {len(spec.layers)} layers of noise")
    vector, clipped = _clip(update, values, spec)
    if spec.rotated:
        whole = vector.joined()
        rotate(whole, seed)
        vector = blocks_of(whole)
        del whole
    if spec.sum.unit_norm is None:
        rounded = round_within(vector, spec.limit, stream)
    else:
        rounded = round_once(vector, stream)
    del vector  # frees the rotated float64 vector
    # Two's complement: modulo 2^bits, here and wherever words are added.
    words = rounded.view(spec.dtype) if spec.bits == 32 else rounded.astype(spec.dtype)
    if spec.sigma:
        add_grid_noise(words, spec.sigma, [stream])
    for layer, layer_seed in zip(spec.layers, layers, strict=True):
        add_grid_noise(words, layer.sigma, [keyed_stream(layer_seed, _LAYER)])
    return words, clipped


def _clip(update: Arrays, values: Values, spec: ShareSpec) -> tuple[Blocks, bool]:
    """Return update and segments as one vector in grid units, of norm at most `cells`, and whether the update was longer."""
    parts = [np.ravel(value) for value in update.values()]
    if (size := sum(part.size for part in parts)) != spec.coordinates:
        raise ValueError(f"an update of {size} coordinates, not {spec.coordinates}")
    norm = math.sqrt(sum(squared_norm(part) for part in parts))
    if not math.isfinite(norm):
        raise NotFinite("the update has a value that is not finite")
    weight = _weight(values, spec)
    factor = min(1.0, spec.sum.update_norm / norm) if norm > 0 else 1.0
    tail = segments_in_grid_units({**values, UNCLIPPED: float(factor == 1.0)}, spec.sum)
    if spec.weighted:  # all segments are scalars
        tail = tail * [1.0 if each.name == WEIGHT else weight for each in spec.sum.segments]
    return Blocks(spec.size, partial(_scaled, parts, factor * weight / spec.sum.step, tail)), factor < 1.0


def _scaled(parts: Sequence[NDArray[np.generic]], factor: float, tail: Vector) -> Iterator[Vector]:
    """Yield flat arrays times a factor, then the tail as it is, in blocks of at most `BLOCK` numbers; small arrays share one."""
    room, filled = np.empty(BLOCK), 0
    for part in parts:
        for start in range(0, part.size, BLOCK):
            values = part[start : start + BLOCK]
            if filled + values.size > BLOCK:
                yield np.multiply(room[:filled], factor, out=room[:filled])
                filled = 0
            # Copied first and scaled in place: faster than both at once.
            np.copyto(room[filled : filled + values.size], values, casting="unsafe")
            filled += values.size
    yield np.multiply(room[:filled], factor, out=room[:filled])
    yield from (tail[start : start + BLOCK] for start in range(0, tail.size, BLOCK))


def _weight(values: Values, spec: ShareSpec) -> float:
    """Return the weight of the client's update, in [0, 1]: its examples over their bound; 1 if sums are not weighted."""
    if not spec.weighted:
        return 1.0
    bound = next(each.bound for each in spec.sum.segments if each.name == WEIGHT)
    count = float(values[WEIGHT])
    if not count >= 0:
        raise ValueError(f"{WEIGHT}={count} must be a number of at least 0")
    return min(count / bound, 1.0)


def openings(spec: ShareSpec, layers: Sequence[bytes]) -> tuple[tuple[int, bytes], ...]:
    """Return each layer's seed, after the number of survivors from which it is opened; arguments as of `encode_share`."""
    return tuple((layer.survivors, seed) for layer, seed in zip(spec.layers, layers, strict=True))


def add_grid_noise(words: Words, sigma: int, streams: Sequence[Stream], combine: np.ufunc = np.add) -> None:
    """Add discrete Gaussian noise of parameter `sigma` from each stream to words on the grid, in place, or remove it again.

    Args:
      words: as `encode_share` returns them, or a sum of these.
      sigma: in grid units, above 0.
      streams: that serve these words and no others.
      combine: `np.subtract` removes the noise that the same streams have added.
    """
    for start in range(0, words.size, _NOISE_BLOCK):
        block = words[start : start + _NOISE_BLOCK]
        at_once = max(1, _ROWS_AT_ONCE // block.size)
        for first in range(0, len(streams), at_once):
            for row in sample_rows(sigma, block.size, streams[first : first + at_once]):
                combine(block, row.astype(words.dtype), out=block)


# --- at the server ---------------------------------------------------------------------------------------------


def sum_event(spec: ShareSpec, survivors: int) -> GaussianDpEvent:
    """Return the event of the survivors' sum, against an adversary that knows the survivors, such as the server.

    More survivors add more noise, except for the layers that they open. Holds for zero-out and, as every Gaussian
    event, for replace-one; see `sizing`. Arguments as of `decode_sum`.

    Raises:
      Refusal: fewer survive than were planned, or more than the sum was sized for; nothing may be released.
    """
    attendance = spec.attendance
    if not attendance.least <= survivors <= attendance.most:
        remedy = f"release nothing: the sum needs {attendance.least} to {attendance.most} survivors"
        raise Refusal("survivors", survivors, remedy)
    return gaussian_event(spec.noise_multiplier(survivors - attendance.colluders, survivors))


def take_back(total: Words, survivors: int, spec: ShareSpec, opened: Iterable[Sequence[bytes]]) -> int:
    """Remove the excess layers of noise from a sum, in place, and return the number of survivors whose layers they were.

    Arguments as of `decode_sum`, and the seeds of each survivor that opened any, in the layers' order. The noise of a
    survivor with a wrong number of seeds stays.
    """
    layers = [layer for layer in spec.layers if survivors >= layer.survivors]
    usable = [seeds for seeds in opened if len(seeds) == len(layers)]
    for index, layer in enumerate(layers):
        streams = [keyed_stream(seeds[index], _LAYER) for seeds in usable]
        add_grid_noise(total, layer.sigma, streams, np.subtract)
    return len(usable)


def decode_sum(
    total: Words,
    layout: Mapping[str, Sequence[int]],
    spec: ShareSpec,
    survivors: int,
    denominator: float,
    seed: bytes,
) -> tuple[dict[str, Vector], dict[str, float]]:
    """Return the mean update by name, shaped by `layout`, and the mean of every scalar.

    Args:
      total: the sum of the survivors' vectors modulo 2^bits, unmasked.
      layout: shapes by name, in the order of the update.
      spec: the round's public parameters.
      survivors: how many vectors were added.
      denominator: of the mean: the survivors if they are public, else the expected cohort. A weighted sum is divided by
        the summed examples instead.
      seed: of the round's rotation.
    """
    vector = _as_float(total, spec, seed)
    if not spec.weighted:
        return decode(vector, layout, spec.sum, denominator)
    index, scalar = next(
        (i, each) for i, each in enumerate(spec.sum.segments, spec.coordinates) if each.name == WEIGHT
    )
    # The count in a client's vector is centred, clip (2 examples / bound - 1); the sum of examples / bound follows.
    weights = (float(vector[index]) * spec.sum.step / spec.sum.clip(scalar) + survivors) / 2
    arrays, scalars = decode(vector, layout, spec.sum, max(weights, 1 / scalar.bound))
    return arrays, {**scalars, WEIGHT: weights * scalar.bound / survivors}


def decode_counts_of(total: Words, spec: ShareSpec, seed: bytes) -> dict[str, Vector]:
    """Return the sum of every segment with a shape, by name, in the segment's own units; arguments as of `decode_sum`."""
    if not any(each.shape for each in spec.sum.segments):  # spares another vector of twice the model's size
        return {}
    return decode_counts(_as_float(total, spec, seed), spec.coordinates, spec.sum)


def _as_float(total: Words, spec: ShareSpec, seed: bytes) -> Vector:
    """Return a sum's signed numbers in float64, with the rotation undone; arguments as of `decode_sum`."""
    signed = np.int16 if spec.bits == 16 else np.int32
    vector = total.astype(spec.dtype, copy=False).view(signed).astype(np.float64)
    if spec.rotated:
        unrotate(vector, seed)
    return vector
