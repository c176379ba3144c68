"""Compression of an update before it is clipped: a public random mask or projection, and its inverse at the server.

    client: compress -> clip -> lattice -> (mask, noise)        server: (noise) -> decode -> expand

In round t all clients use one k x d matrix P_t with orthonormal rows: k rows of the identity (`mask`) or k rows of a
random rotation, signs and Walsh-Hadamard transforms (`project`, module `rotation`). It depends only on the run's public
seed and the round. A client sends P_t u clipped to C_k = C sqrt(k / d). The server takes (d / k) P_t^T of the noisy
mean.

The event is that of the sum without compression. For every fixed matrix the summed vectors have a norm of at most C_k,
because they are clipped after compression. So one client moves the sum by at most C_k, and noise of standard deviation
z C_k makes it the Gaussian mechanism of noise multiplier z, with the same sampling. The expansion is post-processing.
P_t is fixed before the round and independent of cohort and data. By adaptive composition the event would hold even for
a matrix that an adversary chose from all earlier releases. At the record level the same holds for a record: its
gradient is compressed before it is clipped (`client/dp_sgd/sketched.py`).

Accuracy. Rows are drawn uniformly, so (d / k) P_t^T P_t is the identity on average, and |P_t u|^2 is k / d of |u|^2. On
the k coordinates that are sent, the noise is smaller by sqrt(k / d); each direction is observed in k / d of the rounds
with a gain of d / k. Over many rounds the ratio of signal to noise is therefore that of the whole update.

Methods that would break privacy or accuracy are refused by name (`configs/overrides.py`): the largest coordinates
(their choice depends on data, and is a release), a mask for each client (the coordinates do not add up), a mask after
the clip (the sensitivity stays C, because all of a vector may lie in the kept part, while the signal falls), and one
matrix for all rounds (the omitted directions are never learned).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from .randomness import keyed_stream
from .rotation import rotate, unrotate

CompressionKind = Literal["mask", "project"]
COMPRESSED = "compressed"  # name of the one array that replaces the compressed ones

Arrays = Mapping[str, NDArray[np.floating]]
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Compression:
    """How a sum's updates are compressed; public, and a part of its spec.

    Attributes:
      kind: mask or project.
      coordinates: d of the module's text, at least 1; arrays after these are sent as they are.
      kept: k, from 1 to `coordinates`.
      seed: of the run.
    """

    kind: str
    coordinates: int
    kept: int
    seed: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(CompressionKind):
            raise ValueError(f"compression kind={self.kind} must be mask or project")
        if not 1 <= self.kept <= self.coordinates:
            raise ValueError(f"kept={self.kept} must lie in [1, {self.coordinates}]")

    @property
    def clip_factor(self) -> float:
        """Factor of the clipping norm of compressed updates, C_k / C of the module's text."""
        return math.sqrt(self.kept / self.coordinates)

    @property
    def gain(self) -> float:
        """Factor of the mean on expansion, d / k: with it the expanded mean is right on average."""
        return self.coordinates / self.kept


@dataclass(frozen=True)
class CompressionPlan:
    """Compression of a run; public.

    Attributes:
      kind: mask or project.
      ratio: share of the coordinates that is sent, in (0, 1].
      cells: grid units per clipping norm; None takes enough that rounding costs nothing.
    """

    kind: CompressionKind
    ratio: float
    cells: int | None = None

    def of(self, coordinates: int, seed: str = "") -> Compression:
        """Return how updates of so many coordinates, at least 1, are compressed in a run of this public seed.

        Raises:
          Refusal: a rotated vector of the clipping norm would have less than a grid unit a coordinate, and be rounded away.
        """
        rows = max(1, round(self.ratio * coordinates))
        if self.cells is not None and rows > self.cells**2:
            min_cells = math.isqrt(rows - 1) + 1
            remedy = f"rounds most of {rows} coordinates to nothing; give {min_cells} or more, or null"
            raise Refusal("compress.cells", self.cells, remedy)
        return Compression(self.kind, coordinates, rows, seed)


@dataclass(frozen=True)
class Sketch:
    """The matrix P_t of one round; public.

    Attributes:
      compression: its size and kind.
      seed: 32 bytes, from which the rows and the rotation are drawn.
    """

    compression: Compression
    seed: bytes

    def of(self, vectors: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return P v of each vector: shape (..., coordinates) becomes (..., kept)."""
        rows = self._rows
        if self.compression.kind == "mask":
            return vectors[..., rows]
        rotated = vectors.astype(np.float64)
        for vector in rotated.reshape(-1, self.compression.coordinates):
            rotate(vector, self.seed)
        return rotated[..., rows]

    def back(self, values: NDArray[np.floating]) -> Vector:
        """Return P^T y: shape (kept,) becomes (coordinates,)."""
        whole = np.zeros(self.compression.coordinates)
        whole[self._rows] = values
        if self.compression.kind == "project":
            unrotate(whole, self.seed)
        return whole

    @property
    def _rows(self) -> NDArray[np.intp]:
        """Coordinates that are sent, of the update or of its rotation, ascending."""
        return _draw_rows(self.seed, self.compression.coordinates, self.compression.kept)


def sketch_of(compression: Compression, row: int) -> Sketch:
    """Return the matrix of one round: different in every round of every run, and the same for all clients.

    Args:
      compression: of the sum.
      row: of the release; each release of a run has another.
    """
    seed = b"fedveil compression" + row.to_bytes(8, "big") + compression.seed.encode()
    return Sketch(compression, hashlib.sha256(seed).digest())


@lru_cache(maxsize=2)  # all clients of a round use the same
def _draw_rows(seed: bytes, coordinates: int, count: int) -> NDArray[np.intp]:
    """Return `count` random coordinates, ascending: each draws a word, and the smallest words win."""
    words = keyed_stream(seed, "rows").uint64(coordinates)
    largest_kept = np.partition(words, count - 1)[count - 1]
    rows = np.flatnonzero(words <= largest_kept)[:count]
    rows.flags.writeable = False
    return rows


# --- at the client ---------------------------------------------------------------------------------------------


def compress(update: Arrays, sketch: Sketch) -> dict[str, NDArray[np.floating]]:
    """Return the compressed update, which is then clipped and sent.

    Args:
      update: float arrays by name, in the layout's order; the first ones have the sketch's coordinates together.
      sketch: of the round.

    Returns:
      one array of shape (kept,), and the arrays after the sketch's coordinates unchanged.

    Raises:
      ValueError: no leading arrays have exactly the sketch's coordinates.
    """
    inside, rest = _parts({name: value.shape for name, value in update.items()}, sketch.compression)
    whole = np.concatenate([np.ravel(update[name]) for name in inside])
    return {COMPRESSED: sketch.of(whole), **{name: update[name] for name in rest}}


# --- at the server ---------------------------------------------------------------------------------------------


def compressed_layout(
    layout: Mapping[str, tuple[int, ...]], compression: Compression
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the compressed update for an update of these shapes."""
    _, rest = _parts(layout, compression)
    return {COMPRESSED: (compression.kept,), **{name: layout[name] for name in rest}}


def expand(mean: Arrays, layout: Mapping[str, tuple[int, ...]], sketch: Sketch) -> dict[str, Vector]:
    """Return the mean update by name, shaped by `layout`, from a decoded mean.

    Args:
      mean: of the compressed updates.
      layout: shapes of the update's arrays by name, in its order.
      sketch: of the round.
    """
    inside, rest = _parts(layout, sketch.compression)
    whole = sketch.back(mean[COMPRESSED])
    whole *= sketch.compression.gain
    bounds = np.cumsum([math.prod(layout[name]) for name in inside])[:-1]
    arrays = {
        name: part.reshape(layout[name]) for name, part in zip(inside, np.split(whole, bounds), strict=True)
    }
    return arrays | {name: mean[name].astype(np.float64) for name in rest}


def _parts(layout: Mapping[str, Sequence[int]], compression: Compression) -> tuple[list[str], list[str]]:
    """Return the names of the arrays that are compressed, and of those after them."""
    names, count = list(layout), 0
    for end, name in enumerate(names, 1):
        count += math.prod(layout[name])
        if count == compression.coordinates:
            return names[:end], names[end:]
    raise ValueError(f"no arrays have {compression.coordinates} coordinates together, these have {count}")
