"""Encrypted sums of a run's rounds, with a norm check of each opened sum and a search for members that corrupt them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..base.refusal import Refusal
from ..messages.secure_wire import rotation_seed
from ..messages.wire import DECLINED
from ..privacy.mechanisms.distributed import decode_counts_of, decode_sum, sum_event
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sum_bound import SummedNoise, is_mean_too_long, is_too_noisy, longest_sum, norm_of
from ..privacy.mechanisms.sum_spec import WEIGHT
from ..privacy.secagg.evidence import AttemptEvidence
from ..privacy.secagg.refusal import Fault
from ..privacy.secagg.roster import write_roster
from .accounts import SumAccount
from .culprit_search import WeighedSum
from .masking import Masking, masked_spec
from .participants import Participants
from .query_rows import round_number
from .round_terms import Mean, Round, Sum, describe_fault, join_means
from .secure_sum import Opened, SecureSums, share_spec

logger = logging.getLogger("fedveil.server")

UNTRUE = "untrue_sum"  # reason for dropping all members of an untrue sum
LOST_IN_NOISE = "own_noise"  # reason for dropping members whose sum is lost in the noise of some of them


class MaskedSums:
    """Encrypted sums of one run's rounds, which the clients themselves have noised if there is to be any noise."""

    def __init__(
        self, participants: Participants, account: SumAccount, masking: Masking, randomness: Randomness
    ) -> None:
        self._participants, self._account, self._randomness = participants, account, randomness
        self._sums = SecureSums(participants.grid, masking, account.arrive)
        self._faults: Counter[str] = Counter()

    def renew(self, masking: Masking | None) -> None:
        """Go on with another roster; without masking, with the one that is there."""
        if masking is not None:
            self._sums.masking = masking
            members = frozenset(each.node for each in masking.roster.members)
            self._participants.search = self._participants.search.for_members(members)

    def sum(
        self, nodes: Sequence[int], request: Sum, timeout: float | None, upcoming: Callable[[], Sequence[int]]
    ) -> tuple[Round, Mean | None]:
        """Return the round's result, and the mean of the sums within their bounds or None; advance the search.

        Args:
          nodes: the round's cohort, canaries last.
          request: the sum to compute.
          timeout: seconds for the replies of one exchange; None waits for all.
          upcoming: draws the cohort of the next row, whose keys are exchanged a round ahead.
        """
        request = replace(request, spec=masked_spec(request.spec, self._sums.masking))
        parts, obstacle = self._parts(nodes, request)
        # Parts are drawn anew in each round, and clients by arrival only once it is known who came.
        ahead = () if len(parts) > 1 or self._participants.turns.by_arrival else upcoming()
        if len(parts) > 1:
            self._account.arrive(request.row, nodes)  # of some of the parts, and so of all
        enough = self._participants.due.enough
        result = Round(request.number, len(nodes), 0, {})
        weighed_sums: list[WeighedSum] = []
        means: list[Mean] = []
        for part in parts:
            enough_of_part = None if enough is None else math.ceil(enough * len(part) / len(nodes))
            opened = self._sums.sum(part, request, timeout, ahead, enough_of_part)
            result = _add_attempt(result, opened, self._log_faults(opened.blamed))
            evidence = _evidence_rows(opened.evidence, request.run, request.number, self._sums.masking)
            result = replace(result, evidence=(*result.evidence, *evidence))
            if opened.total is None:
                # As few as the colluders may decline in order to end the search: their word does not count.
                colluders = self._sums.masking.attendance(len(part)).colluders
                if len(parts) > 1 and opened.dropped.get(DECLINED, 0) > colluders:
                    search = self._participants.search
                    declined = max(search.declined, len(part))
                    self._participants.search = replace(search, declined=declined)
                continue
            mean, weighed_sum = self._weigh(opened, request)
            weighed_sums.append(weighed_sum)
            if weighed_sum.violation:
                result = _reject(result, weighed_sum)
            else:
                result = replace(result, replies=result.replies + opened.survivors)
                means.append(mean)
        result = self._advance_search(result, request.row, weighed_sums, len(parts) > 1, obstacle)
        if not means:
            return replace(result, abandoned=True), None
        mean = replace(join_means(means), part=len(parts) > 1)
        return replace(result, scalars=mean.scalars), mean

    def _parts(self, cohort: Sequence[int], request: Sum) -> tuple[list[list[int]], str]:
        """Return the parts in which the cohort is summed, and an obstacle to parts, as `Search.parts` does."""
        sizes = (size for size in range(2, len(cohort)) if self._can_sum(request, size))
        draw = self._randomness.stream("parts", request.row).generator()
        return self._participants.search.parts(cohort, sizes, draw)

    def _can_sum(self, request: Sum, clients: int) -> bool:
        """Return whether an encrypted sum of this many clients is possible."""
        try:
            share_spec(request, self._sums.masking, clients)
        except Refusal:
            return False
        return True

    def _advance_search(
        self, result: Round, row: int, weighed_sums: Sequence[WeighedSum], in_parts: bool, obstacle: str
    ) -> Round:
        """Advance the search for culprits by a round's sums; return the round with the new suspects, and log them."""
        search, readable = self._participants.search, [each for each in weighed_sums if not each.is_lost]
        self._participants.search = next_search = search.next_state(row, readable, in_parts)
        old_suspects, suspects = search.suspected, next_search.suspected
        new_suspects = suspects.keys() - old_suspects.keys()
        suspected = {self._name(node): suspects[node] for node in suspects if node in new_suspects}
        for name, reason in suspected.items():
            logger.warning("%s %s", name, reason)
        for node in old_suspects.keys() - suspects.keys():
            logger.warning("%s is suspected no more: sums with it can be true", self._name(node))
        if obstacle and result.untrue:
            result = replace(result, cause=f"{result.cause}; {obstacle}")
        if any(each.violation for each in weighed_sums):
            logger.warning("round %d: %s", round_number(result.number), result.cause)
        rows = tuple(self._row_of(each) for each in weighed_sums) if in_parts or result.untrue else ()
        return replace(result, suspected=suspected, weighed=rows)

    def _row_of(self, weighed: WeighedSum) -> dict[str, object]:
        """Return a sum's row of `Round.weighed`."""
        return {
            "members": [self._name(node) for node in weighed.nodes],
            "norm": round(weighed.norm, 4),
            "most": round(weighed.bound, 4),
            "untrue": bool(weighed.violation) and not weighed.is_lost,
        }

    def _weigh(self, opened: Opened, request: Sum) -> tuple[Mean, WeighedSum]:
        """Return an opened sum's mean, and its comparison with the bounds of a true one; fail if noise is missing."""
        assert opened.total is not None and opened.spec is not None
        spec, survivors, cells = opened.spec, opened.survivors, opened.spec.sum.cells
        self._account.check(sum_event(spec, survivors))
        seed = rotation_seed(opened.model, request.row)
        real = self._participants.real(opened.nodes)
        units = self._account.units(max(1.0, float(len(real))))
        arrays, scalars = decode_sum(opened.total, request.layout, spec, survivors, units, seed)
        norm = norm_of(opened.total, spec) / cells
        further = tuple(opened.further.values())
        noise = SummedNoise(survivors, opened.unopened, further, request.noise_multiplier)
        bound = longest_sum(spec, noise) / cells
        violation, noisy = "", is_too_noisy(spec, noise)
        if noisy:
            members = ", ".join(self._name(node) for node in sorted(opened.further))
            violation = f"is lost in the noise that {members} added of their own; widen it with secagg.bits=32, or pin more peers"
        elif norm > bound:
            violation = f"has a norm of {norm:.4g} clipping norms, and a true one at most {bound:.4g}"
        elif is_mean_too_long(arrays, scalars, spec, survivors):
            violation = "has a mean that is longer than any update may be"
        weight = scalars[WEIGHT] * survivors if spec.weighted else units
        counts = decode_counts_of(opened.total, spec, seed)
        std = math.sqrt(noise.variance(spec)) / cells
        mean = Mean(arrays, scalars, arrays, units, counts, survivors, weight, noise=std, step=spec.sum.step)
        return mean, WeighedSum(tuple(opened.nodes), norm, bound, violation, noisy)

    def _name(self, node: int) -> str:
        return self._sums.masking.roster.name_of(node)

    def _log_faults(self, blamed: Mapping[int, Fault]) -> dict[str, str]:
        """Return the members' faults by name, and log them."""
        faults = {self._name(node): str(fault) for node, fault in blamed.items()}
        for name, fault in faults.items():
            self._faults[name] += 1
            logger.warning("%s", describe_fault(name, fault, self._faults[name]))
        return faults


def _add_attempt(result: Round, opened: Opened, blamed: Mapping[str, str]) -> Round:
    """Return the round with what one more sum cost: its dropped clients, exchanges, faults and cause."""
    return replace(
        result,
        dropped=dict(Counter(result.dropped) + Counter(opened.dropped)),
        exchanges=result.exchanges + opened.exchanges,
        blamed={**result.blamed, **blamed},
        cause="; ".join(each for each in (result.cause, opened.cause) if each),
    )


def _reject(result: Round, weighed: WeighedSum) -> Round:
    """Return the round with all members of an untrue or lost sum dropped."""
    reason = LOST_IN_NOISE if weighed.is_lost else UNTRUE
    members = f"the sum of {len(weighed.nodes)} members"
    cause = f"{reason}: {members} {weighed.violation}; nothing of it is released"
    return replace(
        result,
        dropped=dict(Counter(result.dropped) + Counter({reason: len(weighed.nodes)})),
        untrue=result.untrue or not weighed.is_lost,
        cause="; ".join(each for each in (result.cause, cause) if each),
    )


def _evidence_rows(
    evidence: Iterable[AttemptEvidence], run: str, number: int, masking: Masking
) -> Iterator[dict[str, Any]]:
    """Yield a JSON object for each attempt at a round that has evidence.

    Where nobody has signed the roster, as in a simulation, it is signed by a key that is thrown away.
    """
    for each in evidence:
        roster = masking.signed_roster or write_roster(masking.roster, Ed25519PrivateKey.generate())
        yield {"run": run, "round": round_number(number), "roster": roster.hex(), **each.to_json()}
