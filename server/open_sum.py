"""Sums in the clear: the server adds the cohort's vectors, and the noise if the account has any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Message

from ..messages.sizes import carried_bytes, update_bytes
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
        """Do nothing: the participants hold the required number of answers."""

    def sum(
        self, drawn: Sequence[int], wanted: Sum, timeout: float | None, coming: Callable[[], Sequence[int]]
    ) -> tuple[Round, Mean | None]:
        """Return the round's result, and the noisy mean; None below the quorum.

        Arguments as of `MaskedSums.sum`; nothing is sent to the next row's cohort in advance.
        """
        del coming
        spec, participants = wanted.spec, self._participants
        outgoing = instruct(wanted.content, spec, wanted.run, wanted.row)
        order = Message(outgoing, 0, wanted.message_type, group_id=str(wanted.number))
        size = wanted.coordinates + spec.segment_size
        cohort_sum, dummies = participants.sum(order, drawn, spec, size, timeout)
        total = self._account.noised(cohort_sum.total, wanted.row, spec)
        asked, replies = participants.asked(drawn), cohort_sum.replies
        done = Round(
            wanted.number,
            len(asked),
            replies,
            cohort_sum.dropped,
            message_bytes=(carried_bytes(order), update_bytes(spec, size)),
        )
        if replies < participants.due.quorum:
            return replace(done, abandoned=True), None
        expected = self._account.units(participants.expected)
        true = total if dummies is None else total - dummies  # integers: the canaries cancel exactly
        counts = decode_counts(true, wanted.coordinates, spec)
        mean, scalars = seen, _ = _decoded(total, wanted.layout, spec, expected, replies)
        if dummies is not None:
            mean, scalars = _decoded(true, wanted.layout, spec, expected, replies)
        done = replace(done, clipped_again=cohort_sum.clipped_again, scalars=scalars)
        return done, Mean(
            mean, scalars, seen, expected, counts, noise=wanted.noise_multiplier, step=spec.step
        )


def _decoded(
    total: Vector, layout: Layout, spec: SumSpec, expected: float, replies: int
) -> tuple[dict[str, Vector], dict[str, float]]:
    if not spec.private and replies == 0:
        return {name: np.zeros(shape) for name, shape in layout.items()}, {}
    return decode(total, layout, spec, expected)
