"""Cases of secure aggregation that are measured: how many clients, how they are joined, how many of them vanish."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

_MILLI = 1000.0


@dataclass(frozen=True)
class Case:
    """One round: cohort, neighbours and threshold of the masks, coordinates, and the share that drops after the shares.

    `bits` of a coordinate are ours: Flower has 32 in words of 64. `noise` is the multiplier of the clients' noise in the
    sum, with the layers of `privacy=client_distributed`.
    """

    clients: int
    neighbours: int
    threshold: int
    coordinates: int
    dropout: float
    flower: bool = True
    bits: int = 32
    noise: float = 0.0

    def survivors(self) -> list[int]:
        """Return the places of those whose vectors are summed; who drops is spread evenly."""
        gone = round(self.clients * self.dropout)
        dropped = {place * self.clients // gone for place in range(gone)} if gone else set[int]()
        return [place for place in range(self.clients) if place not in dropped]

    def ring(self, place: int) -> set[int]:
        """Return a place's neighbours on a ring, as Flower joins its nodes."""
        if self.neighbours == self.clients - 1:
            return set(range(self.clients)) - {place}
        half = self.neighbours // 2
        return {(place + step) % self.clients for step in range(-half, half + 1)} - {place}

    def update(self) -> np.ndarray:
        """Return a client's update, float32."""
        return np.random.default_rng(1).normal(0, 1e-4, self.coordinates).astype(np.float32)


@dataclass(frozen=True)
class Costs:
    """CPU milliseconds of each measured client and of the server, a client's bytes, and who survived."""

    clients: list[float]
    server: float
    upload: int
    survivors: int


@dataclass
class Clock:
    """CPU time of this process while it is entered, in all."""

    milliseconds: float = 0.0
    _begun: float = field(default=0.0, repr=False)

    def __enter__(self) -> None:
        self._begun = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.milliseconds += (time.process_time() - self._begun) * _MILLI
