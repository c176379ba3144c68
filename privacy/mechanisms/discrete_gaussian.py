"""Exact discrete Gaussian noise on the integers, a million coordinates in a few thousandths of a second.

The distribution is that of Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy"
(arXiv:2004.00010), Definition 1: P[X = x] proportional to exp(-x^2 / (2 sigma^2)) for every integer x. The integers are
cut into blocks of `stride` neighbours. Each draw looks its first 16 bits up in a table (Marsaglia, Tsang and Wang 2004,
"Fast generation of discrete random variables"):

1. A block whose least likely integer has probability p owns floor(2^16 stride p) of the table's 2^16 entries. If a draw
   hits one of them, it falls into that block, and further bits of the same word select an integer of the block
   uniformly.
2. The remaining two or three per cent of the entries are for the residual distribution. It is sampled by rejection:
   choose a block by inversion, in proportion to stride times the probability of its likeliest integer, minus its mass
   in the table; choose an integer of it uniformly; accept with the probability that yields the residual, otherwise
   repeat step 2.

Every comparison of a uniform real number with a threshold is first made on its leading 64 (block) or 53 (keep) bits. If
these cannot decide, which happens less often than once in 2^45, more bits are drawn and the comparison is finished in
`PRECISION` decimal digits. So float rounding does not affect the distribution, and attacks on floating-point noise
(Mironov 2012) do not apply. The only error is the truncation of the residual at `TAIL` standard deviations, a
statistical distance below 2^-128 for each coordinate. For 2^40 coordinates that is below 2^-87, or 1e-26, of delta; no
budget counts it.

The package `fedveil_compiled`, which `compiled/` builds, computes the same numbers faster. Neither implementation is
constant-time: addresses in the table depend on the draws, and so does the number of draws left to the residual.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from functools import cache, lru_cache, reduce
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .randomness import Stream, Streams

try:
    import fedveil_compiled as _installed  # pyright: ignore[reportMissingModuleSource]
except ImportError:  # not installed, or not for this processor
    _installed = None

PRECISION = 80  # decimal digits: 2^-265
TAIL = 14  # standard deviations: exp(-14^2 / 2) < 2^-141, below 2^-128 also after the sum over the tail
STRIDES_PER_SIGMA = 32  # up to 64 of them: 900 to 1800 blocks
MAX_SIGMA = 2**40  # whatever is computed of draws stays below 2^53, so float64 holds it exactly
TWO_PI = Decimal(
    "6.283185307179586476925286766559005768394338798750211641949889184615632812572417997256069650684"
)
_WORD = 2**64
_ENTRIES = 2**16
# Largest stride for which a word of 32 bits has enough bits for an entry and for a place in its block.
_NARROW = 2**16
_CHUNK = 1 << 14  # draws looked up at a time: all that this touches stays in a core's cache
_MANTISSA = 2.0**-53  # of a word's leading 53 bits, a number in [0, 1)
_FLOAT_ERROR = 2.0**-46  # of numbers in [0, 1]; exp, products, sums and bits left out err by under 2^-50
_SPARE = 1.1  # proposals made for each number that is expected to be accepted
_SPENT = 16  # further digits, which `_weights` may lose to rounding in a table
_digits = Context(prec=PRECISION + _SPENT)

Whole = NDArray[np.int32 | np.int64]
Words = NDArray[np.uint32] | NDArray[np.uint64]


def sample(sigma: int, count: int, stream: Stream) -> Whole:
    """Return `count` independent draws of the discrete Gaussian of parameter `sigma`.

    Args:
      sigma: scale in grid units, a whole number from 1 to 2**40.
      count: how many numbers, at least 0.
      stream: a cryptographic stream without any other use.

    Returns:
      shape (count,); int32 where `sigma` is below 2**22, else int64.
    """
    if not 1 <= sigma <= MAX_SIGMA:
        raise ValueError(f"sigma={sigma} must lie in [1, 2**40]")
    table = _table(sigma)
    out = np.empty(count, table.starts.dtype)
    missing = [np.empty(0, np.intp)]  # indices that the table leaves to the residual
    for start in range(0, count, _CHUNK):
        missing.append(np.add(_look_up(table, out[start : start + _CHUNK], stream), start, dtype=np.intp))
    indices = np.concatenate(missing)
    out[indices] = _draw_residual(table, indices.size, stream)
    return out


def sample_rows(sigma: int, count: int, streams: Sequence[Stream]) -> Whole:
    """Return a row of `count` draws from each stream, those of `sample`, all at once; arguments as of `sample`."""
    if len(streams) == 1:
        return sample(sigma, count, streams[0])[None]
    table = _table(sigma)
    out = np.empty(len(streams) * count, table.starts.dtype)
    indices = _look_up(table, out, Streams(streams, [count] * len(streams)))
    counts = np.bincount(indices // count, minlength=len(streams)).tolist()
    out[indices] = _draw_residuals(table, counts, streams)
    return out.reshape(len(streams), count)


def add_on_lattice(values: NDArray[np.floating], sigma: int, step: float, stream: Stream) -> None:
    """Round values to whole steps and add discrete Gaussian noise, in place.

    Args:
      values: shape (n,).
      sigma: standard deviation of the noise, in steps.
      step: of the lattice.
      stream: from which the bits are drawn.
    """
    _add(values, sample(sigma, values.size, stream), step)


def add_rows_on_lattice(
    values: NDArray[np.floating], sigma: int, step: float, streams: Sequence[Stream]
) -> None:
    """Do in each row of values, shape (len(streams), n), what `add_on_lattice` does with its stream."""
    count = values.shape[1]
    at_once = max(1, _CHUNK // max(1, count))
    for first in range(0, len(streams), at_once):
        rows = slice(first, first + at_once)
        _add(values[rows], sample_rows(sigma, count, streams[rows]), step)


def _add(values: NDArray[np.floating], noise: Whole, step: float) -> None:
    """Round values to whole steps and add noise, of the same shape, in place."""
    narrow = (values.dtype, noise.dtype) == (np.float32, np.int32) and values.flags.c_contiguous
    add = compiled().add_on_lattice if narrow and compiled() else _add_to_rounded
    add(values, noise, step)


def _add_to_rounded(values: NDArray[np.floating], noise: Whole, step: float) -> None:
    whole = np.divide(values, step, dtype=np.float64)
    np.rint(whole, out=whole)  # in place: a second block would not fit into the cache
    whole += noise
    whole *= step
    values[:] = whole


def largest(sigma: int) -> int:
    """Return a bound that no draw of parameter `sigma` exceeds in absolute value, little above `TAIL` sigma."""
    return _blocks(sigma) * _stride(sigma)


def _stride(sigma: int) -> int:
    """Return the number of integers in a block, a power of two."""
    return 1 << max(0, (sigma // STRIDES_PER_SIGMA).bit_length() - 1)


def _blocks(sigma: int) -> int:
    """Return the number of blocks on each side of zero."""
    return TAIL * sigma // _stride(sigma) + 2


@dataclass(frozen=True)
class _Table:
    """Distribution, split into a table and a residual.

    Attributes:
      starts: shape (2**16,), the least integer of the block that owns an entry; no block owns entries from `owned` on.
      words: leading 64 bits of the residual's cumulative probability of each block.
      guide: shape (2**16,), the block of all words that begin with these 16 bits, -1 if there are several.
      exact: `words` to PRECISION digits.
      peak: of each block, the likeliest integer.
      acceptance: mass of each block in the table, over stride times the probability of its likeliest integer.
      acceptance_exact: the same to PRECISION digits.
      residual_acceptance: approximate acceptance rate of the residual's proposals.
    """

    sigma: int
    stride: int
    starts: Whole
    owned: int
    words: NDArray[np.uint64]
    guide: NDArray[np.int16]
    exact: tuple[Decimal, ...]
    peak: NDArray[np.int64]
    acceptance: NDArray[np.float64]
    acceptance_exact: tuple[Decimal, ...]
    residual_acceptance: float


@lru_cache(maxsize=16)
def _table(sigma: int) -> _Table:
    """Return the table of a parameter: `highs` and `lows` are weights of each block's likeliest and least likely integer."""
    stride, side = _stride(sigma), _blocks(sigma)
    starts = [stride * block for block in range(-side, side)]
    # The likeliest integer of a block below zero is its last one, that of any other block its first.
    peaks = [start if start >= 0 else start + stride - 1 for start in starts]
    highs = _weights(1, stride, side, sigma)[::-1] + _weights(0, stride, side, sigma)
    lows = _weights(stride, stride, side, sigma)[::-1] + _weights(stride - 1, stride, side, sigma)
    # A wide law's sum over the integers is its integral, up to a factor of 1 + 2 exp(-2 pi^2 sigma^2).
    total = _digits.multiply(_digits.sqrt(TWO_PI), sigma) if stride > 1 else reduce(_digits.add, highs)
    unit = _digits.divide(Decimal(stride * _ENTRIES), total)
    boxes = [_digits.multiply(unit, weight) for weight in highs]  # in entries
    owned = [int(_digits.multiply(unit, weight)) for weight in lows]
    # The residual proposes a block in proportion to what its box exceeds its own entries by.
    chances = [_digits.subtract(box, count) for box, count in zip(boxes, owned, strict=True)]
    cumulative = list(accumulate(chances, _digits.add))
    exact = tuple(_digits.divide(value, cumulative[-1]) for value in cumulative)
    words = np.array([min(int(_digits.multiply(value, _WORD)), _WORD - 1) for value in exact], np.uint64)
    bounds = np.bincount((words >> 48).astype(np.intp), minlength=_ENTRIES)
    acceptance = tuple(_digits.divide(count, box) for box, count in zip(boxes, owned, strict=True))
    entries = np.zeros(_ENTRIES, np.int32 if stride <= _NARROW else np.int64)
    entries[: sum(owned)] = np.repeat(np.array(starts, entries.dtype), owned)
    return _Table(
        sigma,
        stride,
        entries,
        sum(owned),
        words,
        np.where(bounds, -1, bounds.cumsum()).astype(np.int16),
        exact,
        np.array(peaks),
        np.array([float(share) for share in acceptance]),
        acceptance,
        float((_ENTRIES - sum(owned)) / cumulative[-1]),
    )


def _weights(first: int, stride: int, count: int, sigma: int) -> list[Decimal]:
    """Return exp(-x^2 / (2 sigma^2)) of `count` values x = first, first + stride, ...; each from the one before."""
    weight, ratio, change = (
        _digits.exp(_digits.divide(Decimal(-power), Decimal(2 * sigma * sigma)))
        for power in (first * first, stride * (2 * first + stride), 2 * stride * stride)
    )
    weights: list[Decimal] = []
    for _ in range(count):
        weights.append(weight)
        weight, ratio = _digits.multiply(weight, ratio), _digits.multiply(ratio, change)
    return weights


def _look_up(table: _Table, out: Whole, stream: Stream | Streams) -> NDArray[np.int32]:
    """Draw numbers into `out`, and return the indices of those that the residual must replace."""
    narrow = table.stride <= _NARROW
    words = stream.uint32(out.size) if narrow else stream.uint64(out.size)
    look_up = compiled().look_up if narrow and compiled() else _look_words_up
    missing = np.empty(out.size, np.int32)
    return missing[: look_up(words, table.starts, table.stride - 1, table.owned, out, missing)]


def _look_words_up(words: Words, starts: Whole, mask: int, owned: int, out: Whole, missing: Whole) -> int:
    """Write numbers from random words to `out`; write to `missing`, and count, the indices of entries from `owned` on."""
    entry = words >> (8 * words.itemsize - 16)
    # An entry is below 2^16, so that nothing is clipped; this mode spares numpy its check.
    starts.take(entry.astype(np.intp), mode="clip", out=out)
    out += (words & mask).view(out.dtype)
    indices = np.flatnonzero(entry >= owned)
    missing[: indices.size] = indices
    return indices.size


@cache
def compiled() -> Any:
    """Return the compiled package if it draws and adds the same numbers as Python on examples; otherwise None."""
    if _installed is None:
        return None
    words = np.arange(2**13 + 5, dtype=np.uint32) * np.uint32(2654435769)  # spread over all entries
    starts = np.arange(-_ENTRIES // 2, _ENTRIES // 2, dtype=np.int32) << 15
    results = list[object]()
    for look_up, add in ((_look_words_up, _add_to_rounded), (_installed.look_up, _installed.add_on_lattice)):
        # Steps of a power of two, which give halves to round, and of another number.
        for mask, owned, step in ((0, _ENTRIES, 2.0**9), (2**15 - 1, 64_000, 0.3)):
            noise, missing = np.zeros((2, words.size), np.int32)
            values = words.view(np.int32).astype(np.float32)
            count = look_up(words, starts, mask, owned, noise, missing)
            add(values, noise, step)
            results.append((count, noise.tobytes(), missing.tobytes(), values.tobytes()))
    return _installed if results[:2] == results[2:] else None


def _draw_residual(table: _Table, count: int, stream: Stream) -> NDArray[np.int64]:
    """Return `count` draws of the residual distribution, by rejection."""
    parts = [np.empty(0, np.int64)]
    missing = count
    while missing > 0:
        parts.append(_propose(table, _tries(table, missing), stream)[0][:missing])
        missing -= parts[-1].size
    return np.concatenate(parts)


def _draw_residuals(table: _Table, counts: Sequence[int], streams: Sequence[Stream]) -> NDArray[np.int64]:
    """Return what `_draw_residual` does for each count and stream, one after the other."""
    tries = [_tries(table, count) * (count > 0) for count in counts]
    values, places = _propose(table, sum(tries), Streams(streams, tries))
    ends = np.searchsorted(places, np.cumsum(tries)).tolist()
    parts = list[NDArray[np.int64]]()
    for count, stream, start, end in zip(counts, streams, [0, *ends], ends, strict=False):
        parts.append(values[start:end][:count])
        if end - start < count:
            parts.append(_draw_residual(table, count - (end - start), stream))
    return np.concatenate(parts)


def _tries(table: _Table, count: int) -> int:
    """Return how many proposals are made for `count` draws."""
    return int(count / table.residual_acceptance * _SPARE) + 16


def _propose(table: _Table, n: int, stream: Stream | Streams) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Return those of `n` proposals for the residual that are accepted, and their numbers."""
    blocks = _invert(table, n, stream)
    inside = (stream.uint64(n) & (table.stride - 1)).view(np.int64)
    # The last bits of a block's likeliest integer are all 1 below zero and all 0 above: xor counts away from it.
    values = table.peak.take(blocks) ^ inside
    places = np.flatnonzero(_accept(table, blocks, values, stream))
    return values.take(places), places


def _invert(table: _Table, n: int, stream: Stream | Streams) -> NDArray[np.intp]:
    """Return blocks for `n` uniform reals: the first one whose cumulative probability exceeds the real."""
    words = stream.uint64(n)
    blocks = table.guide.take((words >> 48).view(np.int64)).astype(np.intp)
    where = np.flatnonzero(blocks < 0)
    blocks[where] = np.searchsorted(table.words, words[where], side="right")
    # A word equal to a bound's leading bits does not tell on which side of that bound the real number lies.
    for index in where[table.words[np.maximum(blocks[where] - 1, 0)] == words[where]]:
        real = _lengthen(int(words[index]), _WORD, _owner(stream, int(index)))
        blocks[index] = next(block for block, bound in enumerate(table.exact) if real < bound)
    return blocks


def _accept(
    table: _Table, blocks: NDArray[np.intp], values: NDArray[np.int64], stream: Stream | Streams
) -> NDArray[np.bool_]:
    """Return which values have a weight, over their peaks', above a real that is uniform between `acceptance` and 1."""
    if table.stride == 1:
        return np.ones(values.size, bool)
    peak, acceptance = table.peak.take(blocks), table.acceptance.take(blocks)
    # The factors are exact in float64, the product errs once.
    exponent = (peak - values).astype(np.float64) * (peak + values) * (0.5 / float(table.sigma) ** 2)
    high = (stream.uint64(values.size) >> 11).view(np.int64)
    margin = np.exp(exponent) - acceptance - high * _MANTISSA * (1 - acceptance)
    for index in np.flatnonzero(np.abs(margin) <= _FLOAT_ERROR):
        own = _owner(stream, int(index))
        accepts = _accept_exactly(table, int(blocks[index]), int(values[index]), int(high[index]), own)
        margin[index] = 1 if accepts else -1
    return margin > 0


def _accept_exactly(table: _Table, block: int, value: int, high: int, stream: Stream) -> bool:
    """Decide as `_accept`, in `PRECISION` digits; `high` is the first 53 bits of the real."""
    real, acceptance = _lengthen(high, 2**53, stream), table.acceptance_exact[block]
    height = _digits.add(acceptance, _digits.multiply(real, _digits.subtract(1, acceptance)))
    peak = int(table.peak[block])
    exponent = Decimal((peak - value) * (peak + value))
    return height < _digits.exp(_digits.divide(exponent, Decimal(2 * table.sigma**2)))


def _owner(stream: Stream | Streams, index: int) -> Stream:
    """Return the stream from which the number `index` of a draw came."""
    return stream.at(index) if isinstance(stream, Streams) else stream


def _lengthen(leading: int, scale: int, stream: Stream) -> Decimal:
    """Return the uniform real in [0, 1) whose leading bits are `leading / scale`, with 256 bits more."""
    more = int.from_bytes(stream.bytes(32), "little")
    return _digits.divide(Decimal((leading << 256) + more), Decimal(scale << 256))
