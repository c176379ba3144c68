"""Values of a round: what protects its clients, what is summed, by how many answers it goes, and what it did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from ..privacy.adaptation import NOTHING_ADAPTS, Adaptation, Choices
from ..privacy.ledger.ledger import Ledger
from ..privacy.mechanisms.compression import CompressionPlan, Sketch, expand
from ..privacy.mechanisms.private_sum import Vector
from ..privacy.mechanisms.sizing import WEIGHT
from ..privacy.mechanisms.sum_spec import Segment, SumSpec
from ..privacy.plan import Plan
from .tuning import Tuning

if TYPE_CHECKING:
    from flwr.app import RecordDict

    from ..strategies.wire import Layout

Average = TypeVar("Average", Vector, float)


@dataclass(frozen=True)
class UnitsOfClient:
    """How many of the units that are hidden one client's vector holds; public.

    Attributes:
      most: whose norms are the range of a vector; more lose length, and no privacy.
      expected: of a client on average over the federation, by which the mean divides.
    """

    most: float = 1.0
    expected: float = 1.0


@dataclass(frozen=True)
class SumPrivacy:
    """What protects clients, or their records, in the sum: a calibrated plan, its ledger, and who pays for metrics.

    Attributes:
      plan: frozen; its sampling is the cohort's own draw or, where records are hidden, theirs.
      ledger: the population's ledger, open for writing.
      metrics_share: share of the squared clipping norm that the metrics may use, in [0, 1).
      adaptation: what rounds choose from what earlier ones released.
      noise_key: of noise that later rounds take back, on real data; the same whenever the run goes on.
      units: that one client's vector holds.
    """

    plan: Plan
    ledger: Ledger
    metrics_share: float = 0.0
    adaptation: Adaptation = NOTHING_ADAPTS
    noise_key: bytes | None = field(default=None, repr=False)
    units: UnitsOfClient = UnitsOfClient()


@dataclass(frozen=True)
class SumTerms:
    """What a run's sums hold, and of whom; public.

    Attributes:
      segments: metrics that may travel in the sum, with their bounds.
      canary_records: number of an audit's records, each of which has a coordinate beside the model's in every sum.
      compress: how updates are compressed; None sums whole ones.
      tuning: of which arm each sum is; None sums over all clients.
    """

    segments: tuple[Segment, ...] = ()
    canary_records: int = 0
    compress: CompressionPlan | None = None
    tuning: Tuning | None = None


EVERY_UPDATE = SumTerms()


@dataclass(frozen=True)
class Round:
    """What one round did, as the server may know it. Means of scalars are noised where the sum is private.

    `choices` is what the round went by; None without client-level privacy. `exchanges` counts messages there and back
    of secure aggregation; 0 without it. A round that was `abandoned` released nothing, and what was reserved for it
    stays spent; `cause` says why, where clients may have paid for it. It was `untrue` if its encrypted sum was opened and
    cannot be one of vectors that follow the protocol; `weighed` then lists its sums, and `suspected` says by name who is
    newly suspected of spoiling them. `blamed` says by name what members did that no
    client does which follows the protocol. `message_bytes` are about those of the instruction to one client and of its
    reply, which everybody may know; None where they are encrypted, and depend on the cohort.
    `arm` is the number of the arm whose clients alone were asked.
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
    cause: str = ""
    untrue: bool = False
    suspected: dict[str, str] = field(default_factory=dict[str, str])
    weighed: tuple[dict[str, object], ...] = ()
    message_bytes: tuple[int, int] | None = None
    arm: int | None = None


def sentence(name: str, fault: str, times: int) -> str:
    """Return what people are told of a member that broke the protocol."""
    again = f" ({times} rounds): revoke it with fedveil provision revoke {name}"
    return f"{name} {fault}{again if times > 1 else ''}"


@dataclass(frozen=True)
class Answers:
    """By how many answers a round goes. Both are seen, so the draw of such a cohort must not count as secret.

    Attributes:
      quorum: below it the round is abandoned; of an encrypted sum `Masking` says it.
      enough: an exchange ends when so many have answered; None waits for all, until the deadline.
    """

    quorum: int = 0
    enough: int | None = None


ALL_ANSWERS = Answers()


@dataclass(frozen=True)
class Sum:
    """What is summed: its name on the ledger, what the clients start from, and what their vectors are.

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

    def asks_as(self, other: Sum) -> bool:
        """Return whether only what the clients start from may differ: that is no part of an attempt's terms."""
        return replace(self, content=other.content) == other


@dataclass(frozen=True)
class Mean:
    """What a sum is handed on as.

    Attributes:
      arrays: the mean update by name.
      scalars: the mean of every scalar.
      counts: the sum of every segment with a shape, in its own units.
      seen: the mean as an audit sees it, before its canaries are taken out.
      denominator: what divided the sum.
      clients: whose vectors are in it, where that is known.
      weight: of it beside the mean of another part of the cohort.
      part: whether it is of a part of the cohort, or of several, each with its own noise.
      sketch: compressed the updates, and `seen`; None left them whole.
      noise: standard deviation of the sum's noise over the clipping norm, of all that was added.
      step: of the sum's lattice, in the unit of the update; 0 where it is of several sums.
    """

    arrays: dict[str, Vector]
    scalars: dict[str, float]
    seen: dict[str, Vector]
    denominator: float
    counts: dict[str, Vector] = field(default_factory=dict[str, Vector])
    clients: int = 0
    weight: float = 1.0
    part: bool = False
    sketch: Sketch | None = None
    noise: float = 0.0
    step: float = 0.0


def expanded(mean: Mean, layout: Layout, sketch: Sketch) -> Mean:
    """Return a mean of compressed updates as one of whole updates; what an audit sees stays compressed.

    Args:
      mean: as it was decoded.
      layout: shapes of the update's arrays by name, in its order.
      sketch: of the round.
    """
    scale = 1 / sketch.compression.clip_factor  # in the units of the whole norm
    seen = {name: value * scale for name, value in mean.seen.items()}
    return replace(mean, arrays=expand(mean.arrays, layout, sketch), seen=seen, sketch=sketch)


def joined(parts: Sequence[Mean]) -> Mean:
    """Return the mean over several parts of a cohort.

    Args:
      parts: their means, at least one, with the same names.
    """
    if len(parts) == 1:
        return parts[0]
    weight, clients = (sum(getattr(each, name) for each in parts) for name in ("weight", "clients"))
    shares = [each.weight / weight if weight else 1 / len(parts) for each in parts]
    arrays = {name: _average([each.arrays[name] for each in parts], shares) for name in parts[0].arrays}
    scalars = {name: _average([each.scalars[name] for each in parts], shares) for name in parts[0].scalars}
    if WEIGHT in scalars:  # a mean over clients, where the others go by it
        by_clients = [each.clients / clients for each in parts]
        scalars[WEIGHT] = _average([each.scalars[WEIGHT] for each in parts], by_clients)
    counts = {
        name: _average([each.counts[name] for each in parts], [1.0] * len(parts)) for name in parts[0].counts
    }
    noise = math.hypot(*(each.noise for each in parts))
    denominator = sum(each.denominator for each in parts)
    return Mean(arrays, scalars, arrays, denominator, counts, clients, weight, noise=noise)


def _average(values: Sequence[Average], shares: Sequence[float]) -> Average:
    first, *others = (value * share for value, share in zip(values, shares, strict=True))
    return sum(others, start=first)
