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
from .query_rows import FIRST_ROW
from .round_terms import Mean, Round, Sum, joined, sentence
from .secure_sum import Opened, SecureSums, share_spec

logger = logging.getLogger("fedveil.server")

UNTRUE = "untrue_sum"  # why members were dropped, all of them, whose sum cannot be true
LOST = "own_noise"  # why members were dropped whose sum is lost in the noise that some of them added


class MaskedSums:
    """Encrypted sums of one run's rounds, which the clients themselves have noised if there is to be any noise."""

    def __init__(
        self, participants: Participants, account: SumAccount, masking: Masking, randomness: Randomness
    ) -> None:
        self._participants, self._account, self._randomness = participants, account, randomness
        self._sums = SecureSums(participants.grid, masking)
        self._faults: Counter[str] = Counter()

    def renew(self, masking: Masking | None) -> None:
        """Go on with another roster; without masking, with the one that is there."""
        if masking is not None:
            self._sums.masking = masking
            members = frozenset(each.node for each in masking.roster.members)
            self._participants.search = self._participants.search.of(members)

    def sum(
        self, drawn: Sequence[int], wanted: Sum, timeout: float | None, coming: Callable[[], Sequence[int]]
    ) -> tuple[Round, Mean | None]:
        """Return the round's result, and the mean of the opened sums within their bounds; None if there is none.

        Args:
          drawn: the round's cohort, canaries last.
          wanted: the sum to compute.
          timeout: seconds for the replies of one exchange; None waits for all.
          coming: draws the cohort of the next row, whose keys are exchanged a round ahead.
        """
        wanted = replace(wanted, spec=masked_spec(wanted.spec, self._sums.masking))
        parts, why_whole = self._parts(drawn, wanted)
        ahead = coming() if len(parts) == 1 else ()
        enough = self._participants.due.enough
        done = Round(wanted.number, len(drawn), 0, {})
        weighed: list[WeighedSum] = []
        means: list[Mean] = []
        for part in parts:
            of_part = None if enough is None else math.ceil(enough * len(part) / len(drawn))
            opened = self._sums.sum(part, wanted, timeout, ahead, of_part)
            done = _with(done, opened, self._named(opened.blamed))
            evidence = _evidence_rows(opened.evidence, wanted.run, wanted.number, self._sums.masking)
            done = replace(done, evidence=(*done.evidence, *evidence))
            if opened.total is None:
                # Fewer may do so in order to end the search.
                colluders = self._sums.masking.attendance(len(part)).colluders
                if len(parts) > 1 and opened.dropped.get(DECLINED, 0) > colluders:
                    search = self._participants.search
                    declined = max(search.declined, len(part))
                    self._participants.search = replace(search, declined=declined)
                continue
            mean, found = self._weigh(opened, wanted)
            weighed.append(found)
            if found.why:
                done = _turned_away(done, found)
            else:
                done = replace(done, replies=done.replies + opened.survivors)
                means.append(mean)
        done = self._searched(done, wanted.row, weighed, len(parts) > 1, why_whole)
        if not means:
            return replace(done, abandoned=True), None
        mean = replace(joined(means), part=len(parts) > 1)
        return replace(done, scalars=mean.scalars), mean

    def _parts(self, drawn: Sequence[int], wanted: Sum) -> tuple[list[list[int]], str]:
        def possible(size: int) -> bool:
            try:
                share_spec(wanted, self._sums.masking, size)
            except Refusal:
                return False
            return True

        draw = self._randomness.stream("parts", wanted.row).generator()
        return self._participants.search.parts(drawn, possible, draw)

    def _searched(
        self, done: Round, row: int, weighed: Sequence[WeighedSum], in_parts: bool, why_whole: str
    ) -> Round:
        """Return the round with the suspects that its sums imply, and log them."""
        search, told = self._participants.search, [each for each in weighed if not each.lost]
        self._participants.search = after = search.after(row, told, in_parts)
        before, now = search.suspected, after.suspected
        suspected = {self._name(node): why for node, why in now.items() if node not in before}
        for name, why in suspected.items():
            logger.warning("%s %s", name, why)
        for node in before.keys() - now.keys():
            logger.warning("%s is suspected no more: sums with it can be true", self._name(node))
        if why_whole and done.untrue:
            done = replace(done, cause=f"{done.cause}; {why_whole}")
        if any(each.why for each in weighed):
            logger.warning("round %d: %s", done.number % FIRST_ROW, done.cause)
        evidence = tuple(self._evidence(each) for each in weighed) if in_parts or done.untrue else ()
        return replace(done, suspected=suspected, weighed=evidence)

    def _evidence(self, found: WeighedSum) -> dict[str, object]:
        return {
            "members": [self._name(node) for node in found.nodes],
            "norm": round(found.norm, 4),
            "most": round(found.most, 4),
            "untrue": bool(found.why) and not found.lost,
        }

    def _weigh(self, opened: Opened, wanted: Sum) -> tuple[Mean, WeighedSum]:
        assert opened.total is not None and opened.spec is not None
        spec, survivors, cells = opened.spec, opened.survivors, opened.spec.sum.cells
        self._account.check(sum_event(spec, survivors))
        seed = rotation_seed(opened.model, wanted.row)
        real = self._participants.real(opened.nodes)
        units = self._account.units(max(1.0, float(len(real))))
        arrays, scalars = decode_sum(opened.total, wanted.layout, spec, survivors, units, seed)
        norm = norm_of(opened.total, spec) / cells
        further = tuple(opened.further.values())
        noise = SummedNoise(survivors, opened.unopened, further, wanted.noise_multiplier)
        most = longest_sum(spec, noise) / cells
        why, noisy = "", is_too_noisy(spec, noise)
        if noisy:
            told = ", ".join(self._name(node) for node in sorted(opened.further))
            why = f"is lost in the noise that {told} added of their own; widen it with secagg.bits=32, or pin more peers"
        elif norm > most:
            why = f"has a norm of {norm:.4g} clipping norms, and a true one at most {most:.4g}"
        elif is_mean_too_long(arrays, scalars, spec, survivors):
            why = "has a mean that is longer than any update may be"
        weight = scalars[WEIGHT] * survivors if spec.weighted else units
        counts = decode_counts_of(opened.total, spec, seed)
        there = math.sqrt(noise.variance(spec)) / cells
        mean = Mean(
            arrays, scalars, arrays, units, counts, survivors, weight, noise=there, step=spec.sum.step
        )
        return mean, WeighedSum(tuple(opened.nodes), norm, most, why, noisy)

    def _name(self, node: int) -> str:
        return self._sums.masking.roster.name_of(node)

    def _named(self, blamed: Mapping[int, Fault]) -> dict[str, str]:
        """Return the members' faults by name, and log them."""
        found = {self._name(node): str(fault) for node, fault in blamed.items()}
        for name, fault in found.items():
            self._faults[name] += 1
            logger.warning("%s", sentence(name, fault, self._faults[name]))
        return found


def _with(done: Round, opened: Opened, blamed: Mapping[str, str]) -> Round:
    """Return the round with one more requested sum."""
    return replace(
        done,
        dropped=dict(Counter(done.dropped) + Counter(opened.dropped)),
        exchanges=done.exchanges + opened.exchanges,
        blamed={**done.blamed, **blamed},
        cause="; ".join(each for each in (done.cause, opened.cause) if each),
    )


def _turned_away(done: Round, found: WeighedSum) -> Round:
    reason = LOST if found.lost else UNTRUE
    said = f"{reason}: the sum of {len(found.nodes)} members {found.why}; nothing of it is released"
    return replace(
        done,
        dropped=dict(Counter(done.dropped) + Counter({reason: len(found.nodes)})),
        untrue=done.untrue or not found.lost,
        cause="; ".join(each for each in (done.cause, said) if each),
    )


def _evidence_rows(
    evidence: Iterable[AttemptEvidence], run: str, number: int, masking: Masking
) -> Iterator[dict[str, Any]]:
    """Yield the lines of a round's attempts.

    Where nobody has signed the roster, as in a simulation, a key that is thrown away does.
    """
    for each in evidence:
        roster = masking.signed_roster or write_roster(masking.roster, Ed25519PrivateKey.generate())
        yield {"run": run, "round": number % FIRST_ROW, "roster": roster.hex(), **each.to_json()}
