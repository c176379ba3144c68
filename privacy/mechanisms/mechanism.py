"""Mechanisms: the distributions of the noise on a run's sums, and the event of a release under each of them.

A mechanism is public and frozen, and a part of the plan, which takes the event from it. Its noise is secret. Exactly
four places add noise:

    central       the server, fresh in every round             `private_sum.add_noise`
    correlated    the server, which later takes a part back    `correlated_noise.NoiseRows`
    distributed   every client a share of it, before its       `distributed.encode_share`, and `distributed.take_back`
                  vector is masked                             of what is too much
    DP-SGD        a client, on its clipped gradients           `client/dp_sgd/train.py`

The client's encoding and the server's decoding are in one module: `encode` and `decode` in `private_sum` for the first
two, `encode_share` and `decode_sum` in `distributed`. The sum of shares is accounted as one Gaussian, as are all steps
of DP-SGD, so their plans use `CENTRAL`.

A new mechanism at the server needs one file beside this one, its word in `NoiseWord` and a line of `mechanism_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from ..accounting.events import gaussian_event

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from ..budget import Adjacency
    from ..sampling import Sampling, Turns
    from .private_sum import Vector
    from .randomness import Stream
    from .sum_spec import SumSpec

NoiseWord = Literal["independent", "correlated"]
"""What `privacy.noise` may say of a server's noise."""


class Noise(Protocol):
    """The noise of one run; secret."""

    def add(self, total: Vector, row: int, noise_multiplier: float, spec: SumSpec) -> tuple[Vector, DpEvent]:
        """Return the sum with the noise of one row, and the event that accounts for it.

        Args:
          total: the cohort's sum on the lattice, whole numbers, shape (coordinates + segments',).
          row: of the release, from 1. No row may noise two different released sums: they would differ without noise.
          noise_multiplier: noise standard deviation over the clipping norm; the noise is never below it.
          spec: public parameters, with a clipping norm.
        """
        ...


class Mechanism(Protocol):
    """The law of the noise; public."""

    @property
    def rounds(self) -> int | None:
        """Number of rounds that form one release; None if each round is one."""
        ...

    @property
    def rows(self) -> int | None:
        """Number of rounds with correlated noise; None if rounds are independent."""
        ...

    @property
    def sensitivity(self) -> float:
        """Distance by which one client moves the noised vector, in clipping norms."""
        ...

    @property
    def described(self) -> str:
        """A sentence for the output of `plan`; may be empty."""
        ...

    def require(self, sampling: Sampling, adjacency: Adjacency) -> None:
        """Refuse a sampling, or an adjacency, that violates the assumptions of the event."""
        ...

    def event(self, noise_multiplier: float) -> DpEvent:
        """Return the event of one release for a participating unit, at this noise over the clipping norm."""
        ...

    def noise(self, stream_of: Callable[[int], Stream]) -> Noise:
        """Return the noise of a run, given a separate stream for each row."""
        ...


@dataclass(frozen=True)
class Central:
    """Exact discrete Gaussian noise, fresh in every round."""

    rounds: None = field(default=None, init=False)
    rows: None = field(default=None, init=False)
    sensitivity: float = field(default=1.0, init=False)
    described: str = field(default="", init=False)

    def require(self, sampling: Sampling, adjacency: Adjacency) -> None:
        """Accept any sampling and any adjacency."""

    def event(self, noise_multiplier: float) -> DpEvent:
        """Return a Gaussian event."""
        return gaussian_event(noise_multiplier)

    def noise(self, stream_of: Callable[[int], Stream]) -> Noise:
        """Return noise that draws each row from the row's own stream."""
        return _FreshNoise(stream_of)


CENTRAL = Central()


@dataclass(frozen=True)
class _FreshNoise:
    """Independent noise for each row; see `Central`."""

    stream_of: Callable[[int], Stream]

    def add(self, total: Vector, row: int, noise_multiplier: float, spec: SumSpec) -> tuple[Vector, DpEvent]:
        """Return the sum with exact discrete Gaussian noise, and its event; see `Noise`."""
        from .private_sum import add_noise  # a device loads plans, and no sum

        return add_noise(total, noise_multiplier, spec, self.stream_of(row))


def mechanism_of(noise: NoiseWord, turns: Turns | None, num_rounds: int, bands: int | None) -> Mechanism:
    """Return the mechanism of a run.

    Args:
      noise: independent or correlated, from round to round.
      turns: of the cohort; with turns, several rounds form one release. None gives `CENTRAL`.
      num_rounds: of the run, at least 1.
      bands: number of rounds over which noise is correlated; None takes the number with the smallest error.
    """
    if turns is None:
        return CENTRAL
    from .correlated_noise import Correlation

    bands = 1 if noise == "independent" else bands
    cycle = turns.separation if turns.max_participations is None else None
    max_participations = turns.max_participations or 1
    correlation = Correlation(num_rounds, turns.separation, max_participations, bands or 1, cycle)
    return correlation if bands else correlation.with_best_bands()
