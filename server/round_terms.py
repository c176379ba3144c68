"""Values of a round: its privacy, its sum, the number of answers that it needs, and its result."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..privacy.adaptation import NOTHING_ADAPTS, Adaptation, Choices
from ..privacy.ledger.ledger import Ledger
from ..privacy.mechanisms.compression import CompressionPlan, Sketch, expand
from ..privacy.mechanisms.private_sum import Vector
from ..privacy.mechanisms.sum_spec import WEIGHT, Segment, SumSpec
from ..privacy.plan import Plan
from .tuning import NO_TUNING, Tuning

if TYPE_CHECKING:
    from flwr.app import RecordDict

    from ..messages.wire import Layout

NEWEST = 64  # results of rounds that are kept
Summand = TypeVar("Summand", Vector, float)


@dataclass(frozen=True)
class UnitsPerClient:
    """Number of hidden units in one client's vector; public.

    Attributes:
      maximum: number that fits a vector's range without clipping; a sum of more is shortened, which costs no privacy.
      expected: per client, averaged over the federation, for the divisor of the mean.
    """

    maximum: float = 1.0
    expected: float = 1.0


@dataclass(frozen=True)
class SumPrivacy:
    """Protection of clients, or of their records, in the sum: a calibrated plan, its ledger, and the share for metrics.

    Attributes:
      plan: frozen; its sampling is the cohort's draw or, at the record level, that of the records.
      ledger: the population's ledger, open for writing.
      metrics_share: share of the squared clipping norm that the metrics may use, in [0, 1).
      adaptation: choices from earlier releases.
      noise_key: of correlated noise, on real data; the same after a resume.
      units: in one client's vector.
      source: of the releases, as `Release` has it.
    """

    plan: Plan
    ledger: Ledger
    metrics_share: float = 0.0
    adaptation: Adaptation = NOTHING_ADAPTS
    noise_key: bytes | None = field(default=None, repr=False)
    units: UnitsPerClient = UnitsPerClient()
    source: str | None = None


@dataclass(frozen=True)
class SumTerms:
    """Content and participants of a run's sums; public.

    Attributes:
      segments: metrics that may be part of the sum, with their bounds.
      canary_records: number of an audit's records, each of which has a further coordinate in every sum.
      compress: compression of updates; None sums whole ones.
      tuning: assigns an arm to each sum.
    """

    segments: tuple[Segment, ...] = ()
    canary_records: int = 0
    compress: CompressionPlan | None = None
    tuning: Tuning = NO_TUNING


DEFAULT_TERMS = SumTerms()


@dataclass(frozen=True)
class Round:
    """Result of one round, as the server may know it.

    Attributes:
      invited, replies: numbers of clients that were drawn, and that are in the sum.
      dropped: counts of the others, by reason.
      clipped_again: number of vectors that the server clipped.
      scalars: means of the metrics over the sum, noised if it is private.
      choices: those of the round; None without client-level privacy.
      exchanges: of secure aggregation; 0 without it.
      abandoned: whether nothing was released; the reservation stays spent.
      blamed: by name, the fault of each member that provably broke the protocol.
      evidence: JSON objects that prove these faults.
      cause: why nothing was released, if clients may have been charged.
      untrue: whether an opened sum violates the norm bound.
      suspected: by name, the reason for each new suspect.
      weighed: JSON objects of the sums that the search for culprits compared.
      message_bytes: approximate sizes of one instruction and of one reply; None if they are encrypted, because their
        size then depends on the cohort.
      arm: number of the arm; None for all clients.
      virtual_time: that the round took, if the speeds of clients are simulated, else 0.
    """

    number: int
    invited: int
    replies: int
    dropped: dict[str, int]
    clipped_again: int = 0
    scalars: dict[str, float] = field(default_factory=dict[str, float])
    choices: Choices | None = None
    exchanges: int = 0
    abandoned: bool = False
    blamed: dict[str, str] = field(default_factory=dict[str, str])
    evidence: tuple[dict[str, Any], ...] = ()
    cause: str = ""
    untrue: bool = False
    suspected: dict[str, str] = field(default_factory=dict[str, str])
    weighed: tuple[dict[str, object], ...] = ()
    message_bytes: tuple[int, int] | None = None
    arm: int | None = None
    virtual_time: float = 0.0


@dataclass
class Streak:
    """Rounds in a row with one outcome: how many, the first one's number, and why clients dropped out in them."""

    count: int = 0
    first: int = 0
    reasons: set[str] = field(default_factory=set[str])

    def add(self, result: Round, continues: bool) -> None:
        """Count a round that has the outcome; end the streak at one that has not."""
        if not continues:
            self.count, self.reasons = 0, set()
            return
        self.first = self.first if self.count else result.number
        self.count += 1
        self.reasons |= result.dropped.keys()


@dataclass
class Results:
    """Results of a process's rounds: the newest, and what all of them say; its size does not grow with a run.

    Attributes:
      count: number of all rounds.
      newest: the last `NEWEST` rounds, the last one at the end.
      answered: whether a sum of any round had a reply in it.
      untrue: whether the sum of any round was untrue.
      reasons: for which a client dropped out of any round.
      abandoned: the last rounds, all of which were abandoned.
      silent: the last rounds, all of which were without a reply.
    """

    count: int = 0
    newest: deque[Round] = field(default_factory=lambda: deque[Round](maxlen=NEWEST))
    answered: bool = False
    untrue: bool = False
    reasons: set[str] = field(default_factory=set[str])
    abandoned: Streak = field(default_factory=Streak)
    silent: Streak = field(default_factory=Streak)

    def add(self, result: Round) -> None:
        """Add the next round."""
        self.count += 1
        self.newest.append(result)
        self.answered |= result.replies > 0
        self.untrue |= result.untrue
        self.reasons |= result.dropped.keys()
        self.abandoned.add(result, result.abandoned)
        self.silent.add(result, not result.replies)


def describe_failure(result: Round, with_counts: bool) -> str:
    """Return why a round released nothing and, if counts of a cohort may be shown, the reasons that clients sent."""
    cause = result.cause or "too few clients answered"
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(result.dropped.items()))
    return f"{cause} ({reasons})" if with_counts and reasons else cause


def describe_fault(name: str, fault: str, times: int) -> str:
    """Return the sentence about a member that broke the protocol."""
    again = f" ({times} rounds): revoke it with fedveil provision revoke {name}"
    return f"{name} {fault}{again if times > 1 else ''}"


@dataclass(frozen=True)
class Answers:
    """Numbers of answers that end a round. Both are visible, so the draw of such a cohort must not count as secret.

    Attributes:
      quorum: below it the round is abandoned; for an encrypted sum `Masking` defines it.
      enough: an exchange ends at this number of answers; None waits for all, until the deadline.
    """

    quorum: int = 0
    enough: int | None = None


ALL_ANSWERS = Answers()


@dataclass(frozen=True)
class Sum:
    """Sum to compute: its name on the ledger, the clients' initial arrays, and the format of their vectors.

    Attributes:
      run, row: of the release.
      content: the strategy's records.
      message_type: a kind of `train`.
      spec: clipping norm and segments.
      layout: shapes of the update's arrays by name, in its order; empty for a question in segments.
      noise_multiplier: of the sum over its clipping norm; 0 without noise.
      number: of the round, which is the row unless a crash lost rows.
    """

    run: str
    row: int
    content: RecordDict
    message_type: str
    spec: SumSpec
    layout: Layout
    noise_multiplier: float
    number: int = field(default=0, compare=False)

    @property
    def coordinates(self) -> int:
        """Coordinates of the update."""
        return sum(map(math.prod, self.layout.values()))

    def has_terms_of(self, other: Sum) -> bool:
        """Return whether the sums differ at most in the clients' initial arrays, which an attempt's terms do not fix."""
        return replace(self, content=other.content) == other


@dataclass(frozen=True)
class Mean:
    """Mean of a sum.

    Attributes:
      arrays: the mean update by name.
      scalars: the mean of every scalar.
      counts: the sum of every segment with a shape, in its own units.
      audited: the mean as an audit sees it, before its canaries are taken out.
      denominator: of the mean.
      clients: number of vectors in it; 0 for a sum in the clear.
      weight: of this mean against that of another part of the cohort, in `join_means`.
      part: whether it covers a part of the cohort, or several parts, each with its own noise.
      sketch: compression of the updates, and of `audited`; None without compression.
      noise: standard deviation of all noise in the sum over the clipping norm.
      step: of the sum's lattice, in the unit of the update; 0 for a mean of several sums.
    """

    arrays: dict[str, Vector]
    scalars: dict[str, float]
    audited: dict[str, Vector]
    denominator: float
    counts: dict[str, Vector] = field(default_factory=dict[str, Vector])
    clients: int = 0
    weight: float = 1.0
    part: bool = False
    sketch: Sketch | None = None
    noise: float = 0.0
    step: float = 0.0


def expand_mean(mean: Mean, layout: Layout, sketch: Sketch) -> Mean:
    """Return a mean of compressed updates as one of whole updates; the audit's view stays compressed.

    Arguments as of `compression.expand`.
    """
    scale = 1 / sketch.compression.clip_factor  # in the units of the whole norm
    audited = {name: value * scale for name, value in mean.audited.items()}
    return replace(mean, arrays=expand(mean.arrays, layout, sketch), audited=audited, sketch=sketch)


def join_means(parts: Sequence[Mean]) -> Mean:
    """Return the mean over several parts of a cohort, at least one, with the same names."""
    if len(parts) == 1:
        return parts[0]
    weight, clients = sum(each.weight for each in parts), sum(each.clients for each in parts)
    shares = [each.weight / weight if weight else 1 / len(parts) for each in parts]
    arrays = {name: _weighted_sum([each.arrays[name] for each in parts], shares) for name in parts[0].arrays}
    scalars = {
        name: _weighted_sum([each.scalars[name] for each in parts], shares) for name in parts[0].scalars
    }
    if WEIGHT in scalars:  # a mean over clients, while the others are weighted by it
        by_clients = [each.clients / clients for each in parts]
        scalars[WEIGHT] = _weighted_sum([each.scalars[WEIGHT] for each in parts], by_clients)
    ones = [1.0] * len(parts)
    counts = {name: _weighted_sum([each.counts[name] for each in parts], ones) for name in parts[0].counts}
    noise = math.hypot(*(each.noise for each in parts))
    denominator = sum(each.denominator for each in parts)
    return Mean(arrays, scalars, arrays, denominator, counts, clients, weight, noise=noise)


def _weighted_sum(values: Sequence[Summand], weights: Sequence[float]) -> Summand:
    first, *others = (value * weight for value, weight in zip(values, weights, strict=True))
    return sum(others, start=first)
