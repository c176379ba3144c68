"""Clipping of examples' gradients by the norms of their compressed values; see `privacy/mechanisms/compression.py`.

The matrix P of a round is linear: sum_i c_i P g_i = P sum_i c_i g_i. So an engine adds whole gradients with weights c_i
that bound each c_i P g_i by the norm, and the sum is compressed once, like any update.

The sum is float32: a long gradient that P maps to almost zero would swamp the others before the compression. So each
c_i g_i is also bounded by `LOUDEST` norms of whole gradients. P is public, and some records may have such gradients.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...messages.wire import Layout
from ...privacy.mechanisms.compression import Sketch
from .clipped import ClippedParameters

ENGINES = ("hooks", "vmap", "one_by_one")  # engines that hold an example's whole gradient
# Rounding to float32 changes such a c_i g_i by less than 64 / 2^24 of the norm; a random P seldom leaves less than a
# 64th of a gradient.
LOUDEST = 64.0
_NUMBERS = 1 << 24  # in the gradients that are compressed at a time: 64 MiB


class SketchedParameters(ClippedParameters):
    """Parameters whose examples' gradients are clipped by the norms of their compressed values.

    Args:
      parameters: the parameters.
      max_grad_norm: largest norm of an example's compressed values.
      offsets: first coordinate of each parameter in an update, in order; None for one that is not compressed.
      sketch: of the round.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        max_grad_norm: float,
        offsets: Sequence[int | None],
        sketch: Sketch,
    ) -> None:
        super().__init__(parameters, max_grad_norm)
        self.offsets, self.sketch = offsets, sketch

    def norms(self, samples: Sequence[Tensor]) -> Tensor:
        """Return the norm of each example's compressed gradient, shape (examples,), float64; NaN if it is not finite.

        It is at least a `LOUDEST`-th of the norm to which a random matrix compresses such a gradient on average. `samples`
        are the examples' gradients of each parameter, shapes (examples, ...).
        """
        coordinates, count = self.sketch.compression.coordinates, len(samples[0])
        squares, at_a_time = np.empty(count), max(1, _NUMBERS // coordinates)
        min_ratio = (self.sketch.compression.clip_factor / LOUDEST) ** 2
        for start in range(0, count, at_a_time):
            chunk = slice(start, min(start + at_a_time, count))
            whole = np.zeros((chunk.stop - start, coordinates), np.float32)  # gradients as in an update
            rest = np.zeros(len(whole))  # squared norms of the parts that are not compressed
            for offset, sample in zip(self.offsets, samples, strict=True):
                values = sample[chunk].detach().unsqueeze(-1).flatten(1).cpu().numpy()
                if offset is None:
                    rest += _squared_norms(values)
                else:
                    whole[:, offset : offset + values.shape[1]] = values
            with np.errstate(invalid="ignore", over="ignore"):
                compressed_squares = _squared_norms(self.sketch.of(whole)) + rest
                squares[chunk] = np.maximum(compressed_squares, min_ratio * (_squared_norms(whole) + rest))
        return torch.from_numpy(np.sqrt(squares)).to(samples[0].device)


def _squared_norms(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.einsum("ij,ij->i", rows, rows, dtype=np.float64)


def offsets_of(names: Sequence[str], layout: Layout, sketch: Sketch) -> list[int | None]:
    """Return the first coordinate of each parameter in an update of this layout; None for one that is not compressed."""
    starts: dict[str, int] = {}
    offset = 0
    for name, shape in layout.items():
        starts[name] = offset
        offset += math.prod(shape)
    return [starts[name] if starts[name] < sketch.compression.coordinates else None for name in names]
