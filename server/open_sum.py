"""Sums in the clear: the server adds the cohort's vectors, and the noise if the account has any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Message

from ..messages.traffic import carried_bytes, update_bytes
from ..messages.wire import Layout, instruct
from ..privacy.mechanisms.private_sum import Vector, decode, decode_counts
from ..privacy.mechanisms.sum_spec import SumSpec
from .accounts import SumAccount
from .participants import Participants
from .round_terms import Mean, Round, Sum

if TYPE_CHECKING:
    from .masking import Masking


class OpenSums:
    """Sums of one run's rounds in the clear."""

    def __init__(self, participants: Participants, account: SumAccount) -> None:
        self._participants, self._account = participants, account

    def renew(self, masking: Masking | None) -> None:
        """Do nothing: the sums depend on no roster."""

    def sum(
        self, nodes: Sequence[int], request: Sum, timeout: float | None, upcoming: Callable[[], Sequence[int]]
    ) -> tuple[Round, Mean | None]:
        """Return the round's result, and the noisy mean; None below the quorum.

        Arguments as of `MaskedSums.sum`; nothing is sent to the next row's cohort in advance.
        """
        spec, participants = request.spec, self._participants
        outgoing = instruct(request.content, spec, request.run, request.row, participants.turns.staleness)
        order = Message(outgoing, 0, request.message_type, group_id=str(request.number))
        size = request.coordinates + spec.segment_size
        cohort_sum, dummies = participants.sum(order, nodes, spec, size, timeout)
        self._account.arrive(request.row, cohort_sum.nodes)
        total = self._account.noised(cohort_sum.total, request.row, spec)
        grid_nodes, replies = participants.over_grid(nodes), cohort_sum.replies
        result = Round(
            request.number,
            len(grid_nodes),
            replies,
            cohort_sum.dropped,
            message_bytes=(carried_bytes(order), update_bytes(spec, size)),
            virtual_time=cohort_sum.virtual_time,
        )
        if replies < participants.due.quorum:
            return replace(result, abandoned=True), None
        expected = self._account.units(participants.expected)
        true_total = total if dummies is None else total - dummies  # integers: the canaries cancel exactly
        counts = decode_counts(true_total, request.coordinates, spec)
        audited, scalars = _decode(total, request.layout, spec, expected, replies)  # overwrites `total`
        mean = audited
        if dummies is not None:
            mean, scalars = _decode(true_total, request.layout, spec, expected, replies)
        result = replace(result, clipped_again=cohort_sum.clipped_again, scalars=scalars)
        return result, Mean(
            mean, scalars, audited, expected, counts, noise=request.noise_multiplier, step=spec.step
        )


def _decode(
    total: Vector, layout: Layout, spec: SumSpec, expected: float, replies: int
) -> tuple[dict[str, Vector], dict[str, float]]:
    """Return `private_sum.decode`; zeros if the sum is weighted by examples and nobody replied."""
    if not spec.private and replies == 0:
        return {name: np.zeros(shape) for name, shape in layout.items()}, {}
    return decode(total, layout, spec, expected)
