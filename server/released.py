"""A private sum as an audit reads it: in clipping norms, beside what was claimed of its noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..privacy.accounting.events import gaussian_scale
from ..privacy.audit.watching import Released
from ..privacy.plan import Plan


def released_sum(
    number: int,
    mean: Mapping[str, NDArray[np.float64]],
    denominator: float,
    planned: tuple[Plan, int],
    more_noise: float,
    drawn: tuple[int, Sequence[int], int],
) -> Released:
    """Return what left in round `number`.

    Args:
      number: of the round.
      mean: what was handed to the strategy, by name.
      denominator: what divided the sum.
      planned: the plan that the round went by, and its row.
      more_noise: noise over what was planned and charged.
      drawn: how many real clients, which canaries, and how many real clients there are.
    """
    plan, row = planned
    to_clips = denominator / plan.clipping_norm
    layers = [value * to_clips for value in mean.values()]
    noise = plan.noise_std / plan.clipping_norm * more_noise
    rate, charged = gaussian_scale(plan.event_of(row)) or (1.0, 0.0)
    return Released(number, layers, noise, rate, charged, *drawn)
