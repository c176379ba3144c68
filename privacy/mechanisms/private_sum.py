"""Private sum: the operation that turns a cohort's vectors into one noised vector.

The stages of the client and of the server are:

    client: clip -> lattice -> (wire)        server: add -> exact noise -> decode

Clipping is one norm over all parameters together, in float64 (McMahan et al. 2018, arXiv:1710.06963). The lattice is
the integer multiples of clipping_norm / cells; a vector that rounding pushed over the norm is pulled back, so the sum's
sensitivity is exactly `cells` grid units and the noise on it is an exact discrete Gaussian. At `cells` >= 2^16 the
discrete law is, up to a distance far below 2^-1000, a randomised rounding of the continuous Gaussian with a variance
lower by under 1e-7 (Peikert 2010, Theorem 3.1, with smoothing width 16), so the accountant of the Gaussian mechanism
applies by post-processing. A coarser grid has noise of so much more variance, as `sizing` has it.

The vector is a list of named segments (module `sum_spec`). The update is the first. Loss, example count and metrics are
scalars, each mapped from [0, bound] to a centred interval; a question's statistics have a shape, and are clipped to
their own norm. The squares of these norms add up to the square of the vector's norm. There is no second channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..accounting.events import gaussian_event
from .discrete_gaussian import sample
from .packing import Packed
from .randomness import Stream
from .sum_spec import MIN_CELLS, SMOOTHING, WEIGHT, Segment, SumSpec

if TYPE_CHECKING:
    from dp_accounting.dp_event import GaussianDpEvent

# Coordinates per block: 64 KiB of float64 stay in a core's cache, and OpenBLAS starts threads, which then spin, for a
# dot product of more than 10 000.
_BLOCK = 1 << 13
_CONVERTED = 1 << 15  # coordinates per block of a conversion: Python is called seldom
_NOISE_BLOCK = 1 << 16  # coordinates per block of noise: the sampler's words stay in the cache too

# Scalar that is 1 for an update within the norm, and 0 for one that was scaled to it. The encoder sets it; a value of
# this name that a client reports is not used.
UNCLIPPED = "unclipped"

Arrays = Mapping[str, NDArray[np.floating]]
Values = Mapping[str, float | NDArray[np.floating]]  # of the segments after the update, in their own units
Parts = Sequence[NDArray[np.floating]]  # an update's arrays, flat, in the layout's order
Vector = NDArray[np.float64]  # whole numbers below 2^53 where the sum is private
Contribution = NDArray[np.float64] | NDArray[np.int32]  # int32 on the lattice: `cells` stays below 2^31


# --- clip and lattice, at the client ---------------------------------------------------------------------------


class NotFinite(ValueError):
    """Refusal of an update with a value that is not finite; at the client level zeros replace it."""


def encode(update: Arrays, values: Values, spec: SumSpec) -> tuple[Contribution, bool]:
    """Return the client's contribution and whether its update was longer than the norm.

    Args:
      update: float arrays by name, in the layout's order; any shapes, all finite; none for a question.
      values: a value for each of the spec's segments; `WEIGHT` is the weight if nothing is clipped.
      spec: the round's public parameters.

    Returns:
      shape (coordinates + segments',); if the sum is private, int32 with a norm of at most `cells`.

    Raises:
      NotFinite: the sum is private, and the update has a value that is not finite.
    """
    parts = [np.ravel(value) for value in update.values()]
    if not spec.private:
        return _weigh(parts, values, spec), False
    size = _size(parts)
    factor = _factor(parts, spec, size)
    tail = _segments_on_grid(values, factor, spec)
    out = np.empty(size + tail.size, np.int32)
    out[size:] = tail
    squared = float(np.dot(tail, tail))
    for start, block in _rounded(parts, factor / spec.step):
        squared += float(np.dot(block, block))
        np.copyto(out[start : start + block.size], block, casting="unsafe")
    if squared > float(spec.cells) ** 2:
        shrink(out, spec)
    return out, factor < 1.0


def _size(parts: Parts) -> int:
    return sum(part.size for part in parts)


def _factor(update: Parts, spec: SumSpec, coordinates: int) -> float:
    """Return the factor in [0, 1] that clips an update of so many coordinates, of which zeros may be left out.

    Raises:
      NotFinite: the update has a value that is not finite.
    """
    norm = math.sqrt(squared_norm(*update))
    if not math.isfinite(norm):
        raise NotFinite("the update has a value that is not finite")
    return float(_clip_factors(np.array(norm), spec.aim(coordinates)))


def _clip_factors(norms: NDArray[np.float64], aim: float) -> NDArray[np.float64]:
    """Return the factors, in [0, 1], by which vectors of these norms come to their nearest point in a ball of radius `aim`.

    At the record level `SumSpec.sensitivity` relies on it: no two vectors move further apart, so none may jump.
    """
    return aim / np.maximum(norms, aim) if aim > 0 else np.where(norms > 0, 0.0, 1.0)


def _segments_on_grid(values: Values, factor: float, spec: SumSpec) -> Vector:
    """Return the rounded segments of a client whose update was clipped by this factor, shape (spec.segment_size,)."""
    all_values = {**values, UNCLIPPED: float(factor == 1.0)}
    return np.rint(segments_in_grid_units(all_values, spec))


def segments_in_grid_units(values: Values, spec: SumSpec) -> Vector:
    """Return a client's segments after the update, clipped, in grid units and not rounded, shape (spec.segment_size,).

    A missing scalar becomes the centre, and a missing segment with a shape is zero. Arguments as of `encode`.

    Raises:
      ValueError: a segment has another shape, or a value that is not finite.
    """
    out, offset = np.empty(spec.segment_size), 0
    for each in spec.segments:
        part = out[offset : offset + each.size]
        if each.shape:
            part[:] = _clipped(values.get(each.name, np.zeros(each.shape)), each, spec) / spec.step
        else:
            part[:] = centre(np.float64(values.get(each.name, math.nan)), each, spec) / spec.step
        offset += each.size
    return out


def _clipped(values: float | NDArray[np.floating], segment: Segment, spec: SumSpec) -> Vector:
    """Return a client's contribution to a segment with a shape, clipped to its bound and scaled to its clip."""
    part = np.asarray(values, np.float64)
    norm = math.sqrt(squared_norm(np.ravel(part)))
    if part.shape != segment.shape or not math.isfinite(norm):
        raise ValueError(f"segment {segment.name} has another shape, or a value that is not finite")
    return np.ravel(part) * (spec.clip(segment) / max(norm, segment.bound))


def on_grid(update: Arrays, spec: SumSpec) -> Vector:
    """Return the contribution of several clients whose records were summed together, shape (coordinates,).

    It differs from the sum of their single contributions only by rounding, and has the same sensitivity. Arguments as of
    `encode`, with a unit norm, to which the caller has clipped the part of each record.
    """
    flat = np.concatenate([np.ravel(value) for value in update.values()])
    if spec.unit_norm is None:
        raise ValueError("only records are summed before they are on the grid")
    if not math.isfinite(squared_norm(flat)):
        raise ValueError("the update has a value that is not finite")
    return np.rint(flat.astype(np.float64) / spec.step)


def encode_rows(update: NDArray[np.floating], values: Arrays, spec: SumSpec) -> Vector:
    """Return `encode` of many clients at once, shape (clients, coordinates + segments').

    Arguments as of `encode`: the updates, shape (clients, coordinates), and values of shape (clients, *shape).
    """
    clients, coordinates = update.shape
    rows = np.empty((clients, coordinates + spec.segment_size))
    updates, tails = rows[:, :coordinates], rows[:, coordinates:]  # views
    np.copyto(updates, update)
    if not spec.private:
        weights = values[WEIGHT]
        updates *= weights[:, None]
        for column, each in enumerate(spec.segments):
            tails[:, column] = weights if each.name == WEIGHT else weights * values[each.name]
        return rows
    norms = np.sqrt(np.einsum("ij,ij->i", updates, updates))
    aim = spec.aim(coordinates)
    updates *= (_clip_factors(norms, aim) / spec.step)[:, None]
    values = {**values, UNCLIPPED: (norms <= aim).astype(np.float64)}
    if any(each.shape for each in spec.segments):
        for client, tail in enumerate(tails):
            tail[:] = segments_in_grid_units({name: each[client] for name, each in values.items()}, spec)
    else:
        for column, each in enumerate(spec.segments):
            tails[:, column] = centre(values[each.name], each, spec) / spec.step
    np.rint(rows, out=rows)
    for index in np.flatnonzero(np.einsum("ij,ij->i", rows, rows) > float(spec.cells) ** 2):
        shrink(rows[index], spec)
    return rows


def squared_norm(*parts: NDArray[np.generic]) -> float:
    """Return the squared L2 norm in float64 of flat arrays together."""
    if len(parts) == 1 and parts[0].dtype == np.float64 and parts[0].size <= _BLOCK:
        return float(np.dot(parts[0], parts[0]))
    total, room = 0.0, np.empty(min(sum(part.size for part in parts), _CONVERTED))
    for values in _blocks(parts, _CONVERTED):
        block = values if values.dtype == np.float64 else room[: values.size]
        if block is not values:
            np.copyto(block, values, casting="unsafe")
        for piece in range(0, block.size, _BLOCK):
            few = block[piece : piece + _BLOCK]
            total += float(np.dot(few, few))
    return total


def _blocks(parts: Sequence[NDArray[Any]], size: int) -> Iterator[NDArray[Any]]:
    """Yield the numbers of flat arrays in blocks of `size`, the last one shorter, without a copy of the whole."""
    pieces: list[NDArray[Any]] = []  # of an unfinished block
    missing = size  # numbers until it is full
    for part in parts:
        start = 0
        while start < part.size:
            piece = part[start : start + missing]
            start += piece.size
            if piece.size == size:
                yield piece
                continue
            pieces.append(piece)
            missing -= piece.size
            if not missing:
                yield np.concatenate(pieces)
                pieces, missing = [], size
    if pieces:
        yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _rounded(update: Parts, factor: float) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield the rounded, scaled update block by block: the block's start, and its values, which the next overwrites."""
    room, start = np.empty(min(_size(update), _BLOCK)), 0
    for values in _blocks(update, _BLOCK):
        block = room[: values.size]
        np.copyto(block, values, casting="unsafe")  # then in place: faster than casting on the way
        np.multiply(block, factor, out=block)
        yield start, np.rint(block, out=block)
        start += values.size


def centre(values: NDArray[np.floating] | np.float64, scalar: Segment, spec: SumSpec) -> NDArray[np.float64]:
    """Map values of a scalar, of any shape, from [0, bound] to [-clip, clip]; NaN becomes the centre."""
    centred = (2 * np.clip(values / scalar.bound, 0.0, 1.0) - 1) * spec.clip(scalar)
    return np.where(np.isnan(values), 0.0, centred)


def shrink(vector: Contribution, spec: SumSpec) -> None:
    """Scale a lattice vector longer than `cells` back inside the norm, in place, rounding towards zero."""
    factor = (spec.cells - 1) / math.sqrt(squared_norm(vector))
    for start in range(0, vector.size, _BLOCK):
        block = vector[start : start + _BLOCK]
        np.copyto(block, np.trunc(block * factor), casting="unsafe")


def _weigh(update: Parts, values: Values, spec: SumSpec) -> Vector:
    """Return a client's contribution to a sum that is weighted by examples, shape (coordinates + segments',)."""
    out, start = np.empty(_size(update) + spec.segment_size), 0
    for block in _weighed(update, values):
        out[start : start + block.size] = block
        start += block.size
    out[start:] = _weighed_scalars(values, spec)
    return out


def _weighed(update: Parts, values: Values) -> Iterator[NDArray[np.floating]]:
    """Yield an update times its examples, block by block, in float32 or wider: float16 holds no count above 65504."""
    for part in update:
        wide = np.result_type(part, np.float32)
        for block in _blocks([part], _CONVERTED):
            yield np.multiply(block, values[WEIGHT], dtype=wide)


def _weighed_scalars(values: Values, spec: SumSpec) -> Vector:
    """Return the scalars times the examples, and the number of examples itself, shape (segments',)."""
    weight = values[WEIGHT]
    names = [each.name for each in spec.segments]
    return np.array([weight if name == WEIGHT else weight * values.get(name, 0.0) for name in names])


# --- add, noise and decode, at the server ----------------------------------------------------------------------


@dataclass
class CohortSum:
    """The running sum of a cohort: one accumulator, however many clients there are."""

    total: Vector  # shape (coordinates + segments',)
    replies: int = 0  # clients in the total
    clipped_again: int = 0  # of these, those whose vector was too long
    dropped: dict[str, int] = field(default_factory=dict[str, int])  # other clients, by reason
    nodes: list[int] = field(default_factory=list[int])  # nodes whose vectors may be in the total
    virtual_time: float = 0.0  # that the clients took, if their speeds are simulated

    def drop(self, reason: str, clients: int = 1) -> None:
        """Count clients with unusable replies, if the number is above 0: their contribution is zero."""
        if clients > 0:
            self.dropped[reason] = self.dropped.get(reason, 0) + clients

    def merge(self, other: CohortSum) -> None:
        """Add another part of the same cohort."""
        self.total += other.total
        self.replies += other.replies
        self.clipped_again += other.clipped_again
        self.nodes += other.nodes
        for reason, count in other.dropped.items():
            self.drop(reason, count)


def add(cohort_sum: CohortSum, vector: Contribution, spec: SumSpec) -> None:
    """Add one client's contribution, never trusting that the client clipped it.

    A vector that does not fit is dropped and counted; one that is too long is clipped again and counted.

    Args:
      cohort_sum: changed in place.
      vector: one client's, as it came, shape (coordinates + segments',).
      spec: the round's public parameters.
    """
    if vector.shape != cohort_sum.total.shape:
        return cohort_sum.drop("shape")
    squared = squared_norm(vector)
    if not math.isfinite(squared):
        return cohort_sum.drop("not finite")
    if not spec.private and not _plausible_count(vector, spec):
        return cohort_sum.drop(WEIGHT)
    if spec.private and squared > float(spec.cells) ** 2:
        vector = vector.copy()
        shrink(vector, spec)
        cohort_sum.clipped_again += 1
    cohort_sum.total += vector
    cohort_sum.replies += 1


def add_packed(cohort_sum: CohortSum, packed: Packed, spec: SumSpec) -> None:
    """Do what `add` does for a packed vector, without unpacking all of it in memory.

    Arguments as of `add`.
    """
    squared = _add_blocks(cohort_sum.total, packed.blocks(), np.add)
    if squared > float(spec.cells) ** 2:
        _add_blocks(cohort_sum.total, packed.blocks(), np.subtract)  # whole numbers: this undoes it exactly
        return add(cohort_sum, packed.numbers(), spec)
    cohort_sum.replies += 1


def _add_blocks(total: Vector, blocks: Iterable[tuple[int, NDArray[Any]]], combine: np.ufunc) -> float:
    """Add (or subtract) blocks, each at its place, and return their squared norm together."""
    squared = 0.0
    for start, block in blocks:
        squared += squared_norm(block)
        where = total[start : start + block.size]
        combine(where, block, out=where)
    return squared


def add_update(
    cohort_sum: CohortSum, update: Parts | NDArray[np.floating], values: Values, spec: SumSpec, start: int = 0
) -> None:
    """Add the encoding of a client's update directly, without an intermediate vector.

    Args:
      cohort_sum: changed in place.
      update: all arrays in the layout's order, each flat; or all of them as one array, or a window of this array, if
        the update is zero elsewhere.
      values: a value for each of the spec's segments.
      spec: the round's public parameters.
      start: first coordinate of the window.

    Raises:
      NotFinite: the update has a value that is not finite; nothing was added.
    """
    coordinates, parts = cohort_sum.total.size - spec.segment_size, update
    if isinstance(parts, np.ndarray):
        parts = [parts]
    if not spec.private:
        return _add_weighed(cohort_sum, parts, values, spec, start)
    factor = _factor(parts, spec, coordinates)
    tail = _segments_on_grid(values, factor, spec)
    window = cohort_sum.total[start : start + _size(parts)]
    squared = float(np.dot(tail, tail)) + _add_blocks(window, _rounded(parts, factor / spec.step), np.add)
    if squared > float(spec.cells) ** 2:
        _add_blocks(window, _rounded(parts, factor / spec.step), np.subtract)  # whole numbers: an exact undo
        whole = {str(index): part for index, part in enumerate(_whole(parts, start, coordinates))}
        return add(cohort_sum, encode(whole, values, spec)[0], spec)
    cohort_sum.total[coordinates:] += tail
    cohort_sum.replies += 1


def _add_weighed(cohort_sum: CohortSum, update: Parts, values: Values, spec: SumSpec, start: int) -> None:
    """Do what `add` does for a weighted update block by block, because it is twice as large as the model."""
    tail = _weighed_scalars(values, spec)
    squared = squared_norm(tail) + sum(squared_norm(block) for block in _weighed(update, values))
    if not math.isfinite(squared):
        return cohort_sum.drop("not finite")
    if not _plausible_count(tail, spec):
        return cohort_sum.drop(WEIGHT)
    for block in _weighed(update, values):
        cohort_sum.total[start : start + block.size] += block
        start += block.size
    cohort_sum.total[cohort_sum.total.size - tail.size :] += tail
    cohort_sum.replies += 1


def _whole(parts: Parts, start: int, coordinates: int) -> Parts:
    """Return a whole update: the parts if they have all coordinates, otherwise their window with zeros around it."""
    if _size(parts) == coordinates:
        return parts
    (window,) = parts
    whole = np.zeros(coordinates, window.dtype)
    whole[start : start + window.size] = window
    return [whole]


def _plausible_count(vector: Contribution, spec: SumSpec) -> bool:
    """Return whether a contribution claims more than 0 examples, and at most their bound."""
    names = [each.name for each in spec.segments]
    index = names.index(WEIGHT) - len(names)  # segments are at the vector's end
    return bool(0 < vector[index] <= spec.segments[index].bound)


def add_noise(
    total: Vector, noise_multiplier: float, spec: SumSpec, stream: Stream
) -> tuple[Vector, GaussianDpEvent]:
    """Add exact discrete Gaussian noise to the sum, and return it with the event that accounts for it.

    Args:
      total: the cohort's sum on the lattice, whole numbers; changed in place.
      noise_multiplier: noise standard deviation over the sum's sensitivity; the noise is never below it.
      spec: the round's public parameters, private.
      stream: a stream that serves this release and no other.
    """
    if not spec.private:
        raise ValueError("noise needs a clipping norm: without one the sum has no sensitivity")
    std = noise_multiplier * spec.sensitivity(total.size)
    if spec.cells < MIN_CELLS:  # a coarse grid: see `sizing`
        std = math.sqrt(std**2 + SMOOTHING**2)
    sigma = math.ceil(std)
    for start in range(0, total.size, _NOISE_BLOCK):
        block = total[start : start + _NOISE_BLOCK]
        block += sample(sigma, block.size, stream)
    return total, gaussian_event(noise_multiplier)


def decode(
    total: Vector, layout: Mapping[str, Sequence[int]], spec: SumSpec, denominator: float
) -> tuple[dict[str, Vector], dict[str, float]]:
    """Return the mean update by name, shaped by `layout`, and the mean of every scalar; `decode_counts` has the rest.

    A private sum is divided by a fixed, public `denominator`: the expected cohort, independent of the replies. Without
    client-level privacy the sum is divided by the summed examples, as federated averaging does.

    Args:
      total: the sum, with its noise, shape (coordinates + segments',); its coordinates are overwritten with the mean,
        whose arrays are views of it.
      layout: shapes by name, in the order of the update.
      spec: the round's public parameters.
      denominator: the expected cohort, above 0.
    """
    sizes = [math.prod(shape) for shape in layout.values()]
    sums = {each: float(part[0]) for each, part in _parts(total, sum(sizes), spec) if not each.shape}
    if not spec.private:
        denominator = next(value for each, value in sums.items() if each.name == WEIGHT)
        scalars = {each.name: value / denominator for each, value in sums.items() if each.name != WEIGHT}
    else:
        scalars = {each.name: _uncentre(value, each, spec, denominator) for each, value in sums.items()}
    bounds = np.cumsum([0, *sizes])
    mean = total[: bounds[-1]].astype(np.float64, copy=False)
    mean *= spec.step / denominator
    arrays = {
        name: mean[start:stop].reshape(tuple(shape))
        for (name, shape), start, stop in zip(layout.items(), bounds[:-1], bounds[1:], strict=True)
    }
    return arrays, scalars


def decode_counts(total: Vector, coordinates: int, spec: SumSpec) -> dict[str, Vector]:
    """Return the sum over the clients of every segment with a shape, by name, in the segment's own units.

    Arguments as of `decode`, with the coordinates of the update, 0 for a question, instead of its layout.
    """
    return {
        each.name: (part * spec.scale(each)).reshape(each.shape)
        for each, part in _parts(total, coordinates, spec)
        if each.shape
    }


def _parts(total: Vector, coordinates: int, spec: SumSpec) -> Iterator[tuple[Segment, Vector]]:
    """Yield each segment with its part of the sum, a view."""
    if total.size != coordinates + spec.segment_size:
        raise ValueError(f"a sum of {total.size} coordinates, not {coordinates + spec.segment_size}")
    for each in spec.segments:
        yield each, total[coordinates : coordinates + each.size]
        coordinates += each.size


def _uncentre(value: float, scalar: Segment, spec: SumSpec, denominator: float) -> float:
    """Return the mean of a scalar in [0, bound] from its sum in grid units, as `centre` inverted; NaN for clip 0."""
    if spec.clip(scalar) == 0:
        return math.nan
    mean = value * spec.step / denominator / spec.clip(scalar)
    return scalar.bound * min(max((mean + 1) / 2, 0.0), 1.0)
