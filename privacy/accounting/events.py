"""Privacy events: strict parsing, conversion to and from JSON, and decomposition into the leaves that are composed.

Every parameter is converted here, once: dp_accounting 0.6 silently drops composition inside Poisson sampling
when a noise multiplier is an int or a numpy.float32. Kinds are a closed list; nothing named in data is ever imported.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from typing import TYPE_CHECKING, Any, cast

from ...base.refusal import Refusal, real

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent, GaussianDpEvent

Leaf = Any  # an event that is no composition, with converted parameters; hashable
Counts = tuple[tuple[Leaf, int], ...]  # leaves, each with how often it happened

# Noise below MIN_NOISE counts as none (epsilon would pass 5e5), above MAX_NOISE as MAX_NOISE. Both overstate epsilon.
MIN_NOISE, MAX_NOISE = 1e-3, 1e9
MIN_RATE = 1e-12  # lower sampling rates count as this one


@dataclass(frozen=True)
class Gaussian:
    """Stand-in for dp_accounting's GaussianDpEvent where dp_accounting is not loaded.

    Attributes:
      noise_multiplier: noise std over the clipping norm; 0 for no noise.
    """

    noise_multiplier: float


def gaussian_event(noise_multiplier: float) -> "GaussianDpEvent":
    """Return the event of a Gaussian mechanism, by its noise std over the sensitivity."""
    from dp_accounting.dp_event import GaussianDpEvent  # clients, who add no noise, do without

    return GaussianDpEvent(float(noise_multiplier))


def event_to_json(event: "DpEvent | Gaussian") -> dict[str, Any]:
    """Return an event as JSON: `{"kind": "Gaussian", "noise_multiplier": 1.0}` and the like.

    Raises:
      Refusal: the event is not of a known kind.
    """
    if isinstance(event, Gaussian):
        return {"kind": "Gaussian", "noise_multiplier": _number("noise_multiplier", event.noise_multiplier)}
    kind = type(event).__name__.removesuffix("DpEvent")
    if kind not in _KINDS or type(event) is not _event_class(kind):
        raise Refusal("event", event, f"use one of {', '.join(_KINDS)}")
    return {
        "kind": kind,
        **{name: _field_to_json(name, getattr(event, name), read) for name, read in _KINDS[kind].items()},
    }


def event_from_json(data: Mapping[str, Any]) -> "DpEvent":
    """Return the event that `event_to_json` wrote.

    Raises:
      Refusal: an unknown kind, a missing or a further field, or a bad value.
    """
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise Refusal("kind", kind, f"use one of {', '.join(_KINDS)}")
    readers = _KINDS[kind]
    if set(data) != {"kind", *readers}:
        raise Refusal("event", dict(data), f"{kind} has exactly the fields {', '.join(readers) or 'kind'}")
    fields = {name: read(name, data[name]) for name, read in readers.items()}
    if kind == "MixtureOfGaussians":
        shares = fields["sampling_probs"]
        if len(shares) != len(fields["sensitivities"]) or not math.isclose(sum(shares), 1):
            remedy = "give a probability for each sensitivity; they add up to 1"
            raise Refusal("sampling_probs", shares, remedy)
    return _event_class(kind)(**fields)


def leaves(event: "DpEvent", count: int = 1) -> Iterator[tuple[Leaf, int]]:
    """Yield the leaves that accountants compose, each with how often it happens; free events are left out.

    Several Gaussian queries of one sample become one equivalent Gaussian (McMahan et al. 2018, arXiv:1812.06210,
    section 3). Sampling at rate 1 is removed, and noise of 0 becomes `NonPrivate`. A sample that is queried by a
    composition, such as a draw of clients that then draw batches several times, stays whole. Rates are multiplied only if
    the sample is queried by a single further sample.

    Args:
      event: any event of a known kind.
      count: how often it happens, at least 0.
    """
    yield from _unfolded(event_from_json(event_to_json(event)), _count("count", count))


def sample_leaves(leaf: Leaf) -> Counts | None:
    """Return the leaves that are composed on one sample; None for a leaf that dp_accounting handles itself."""
    from dp_accounting import dp_event as dp

    if not _is_sample(leaf):
        return None
    is_composed = isinstance(leaf.event, dp.SelfComposedDpEvent | dp.ComposedDpEvent)
    is_nested = is_composed or _is_sample(leaf.event)
    return tuple(_unfolded(leaf.event, 1)) if is_nested or is_openly_sampled(leaf) else None


def is_openly_sampled(leaf: Leaf) -> bool:
    """Return whether a leaf is an `OpenlySampledDpEvent`."""
    return type(leaf).__name__ == "OpenlySampledDpEvent"


def gaussian_scale(leaf: Leaf) -> tuple[float, float] | None:
    """Return sampling rate and noise multiplier of a Gaussian, sampled or not; None for another leaf."""
    from dp_accounting import dp_event as dp

    query, rate = leaf, 1.0
    if isinstance(leaf, dp.PoissonSampledDpEvent):
        query, rate = leaf.event, leaf.sampling_probability
    return (rate, query.noise_multiplier) if isinstance(query, dp.GaussianDpEvent) else None


def is_mixture(leaf: Leaf) -> bool:
    """Return whether a leaf is a `MixtureOfGaussiansDpEvent`."""
    return type(leaf).__name__ == "MixtureOfGaussiansDpEvent"


def is_exchanged(leaf: Leaf) -> bool:
    """Return whether a leaf is an `ExchangedDpEvent`."""
    return type(leaf).__name__ == "ExchangedDpEvent"


def _is_sample(event: Any) -> bool:
    """Return whether an event is a sample, drawn secretly (Poisson) or openly."""
    from dp_accounting import dp_event as dp

    return isinstance(event, dp.PoissonSampledDpEvent) or is_openly_sampled(event)


def _unfolded(event: Any, count: int) -> Iterator[tuple[Leaf, int]]:
    """Yield the leaves of an event that happens `count` times, each with how often it happens."""
    from dp_accounting import dp_event as dp

    if isinstance(event, dp.SelfComposedDpEvent):
        yield from _unfolded(event.event, count * event.count)
    elif isinstance(event, dp.ComposedDpEvent):
        for part in event.events:
            yield from _unfolded(part, count)
    elif _is_sample(event) and event.sampling_probability == 1:
        yield from _unfolded(event.event, count)
    elif count and (leaf := _simplified(event)) is not None:
        yield leaf, count


def _simplified(event: Any) -> Leaf | None:
    """Return an event that is no composition as a leaf, whose loss is the same or larger; None if the event is free."""
    from dp_accounting import dp_event as dp

    match event:
        case dp.NoOpDpEvent():
            return None
        case dp.GaussianDpEvent() | dp.LaplaceDpEvent():
            noise = event.noise_multiplier
            return dp.NonPrivateDpEvent() if noise < MIN_NOISE else type(event)(min(noise, MAX_NOISE))
        case dp.TruncatedSubsampledGaussianDpEvent() if event.noise_multiplier < MIN_NOISE:
            return dp.NonPrivateDpEvent()
        case dp.MixtureOfGaussiansDpEvent():
            return _mixed(event.standard_deviation, event.sensitivities, event.sampling_probs)
        case _ if is_exchanged(event):
            inner = _simplified(event.event)
            if inner is None:
                return None
            return type(event)(inner) if gaussian_scale(inner) else dp.NonPrivateDpEvent()
        case _ if _is_sample(event):
            parts = _together(_unfolded(event.event, 1)) if event.sampling_probability else []
            return _sampled(type(event), event.sampling_probability, parts)
        case _:
            return event


def _mixed(noise: float, shifts: Sequence[float], probabilities: Sequence[float]) -> Leaf | None:
    """Return the leaf of a mixture of Gaussians; None if none of its shifts moves the sum."""
    from dp_accounting import dp_event as dp

    max_shift = max((each for each, share in zip(shifts, probabilities, strict=True) if share), default=0.0)
    if max_shift == 0:
        return None
    if noise < MIN_NOISE * max_shift:
        return dp.NonPrivateDpEvent()
    return dp.MixtureOfGaussiansDpEvent(min(noise, MAX_NOISE), shifts, probabilities)


def _sampled(kind: Any, rate: float, parts: list[tuple[Leaf, int]]) -> Leaf | None:
    """Return the leaf of one sample, drawn by an event of this kind, that is queried by all parts; None without parts."""
    from dp_accounting import dp_event as dp

    if not parts:
        return None
    if (dp.NonPrivateDpEvent(), 1) in parts:
        return dp.NonPrivateDpEvent()
    queries: list[Any] = [leaf if n == 1 else dp.SelfComposedDpEvent(leaf, n) for leaf, n in parts]
    query = queries[0]
    if len(queries) == 1 and type(query) is kind:
        return kind(max(rate * query.sampling_probability, MIN_RATE), query.event)
    # With a tuple instead of dp_accounting's list, the leaf is hashable.
    event: Any = query if len(queries) == 1 else cast(Any, dp.ComposedDpEvent)(tuple(queries))
    return kind(max(rate, MIN_RATE), event)


def _together(parts: Iterable[tuple[Leaf, int]]) -> list[tuple[Leaf, int]]:
    """Return equal leaves counted together and Gaussians as one, in a fixed order; one `NonPrivate` replaces all."""
    from dp_accounting import dp_event as dp

    counts: Counter[Leaf] = Counter()
    for leaf, n in parts:
        counts[leaf] += n
    gaussians = {leaf: n for leaf, n in counts.items() if isinstance(leaf, dp.GaussianDpEvent)}
    if sum(gaussians.values()) > 1:
        counts -= Counter(gaussians)
        precision = sum(n / leaf.noise_multiplier**2 for leaf, n in sorted(gaussians.items(), key=repr))
        counts[_simplified(dp.GaussianDpEvent(precision**-0.5))] += 1
    not_private = dp.NonPrivateDpEvent()
    return [(not_private, 1)] if not_private in counts else sorted(counts.items(), key=repr)


# Readers of the fields in `_KINDS`: each returns a value as a plain Python type, or refuses it by the field's name.
def _number(field: str, value: Any) -> float:
    if real(field, value) < 0:
        raise Refusal(field, value, "give a number of at least 0")
    return float(value)


def _rate(field: str, value: Any) -> float:
    if _number(field, value) > 1:
        raise Refusal(field, value, "give a probability")
    return float(value)


def _numbers(field: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise Refusal(field, value, "give a list of numbers")
    return tuple(_number(field, each) for each in cast(Sequence[Any], value))


def _count(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise Refusal(field, value, "give a whole number of at least 0")
    return int(value)


def _event(field: str, value: Any) -> "DpEvent":
    if not isinstance(value, Mapping):
        raise Refusal(field, value, f"use one of {', '.join(_KINDS)}")
    return event_from_json(cast(Mapping[str, Any], value))


def _events(field: str, value: Any) -> "list[DpEvent]":
    return [_event(field, part) for part in _parts(field, value)]


def _parts(field: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise Refusal(field, value, "give a list of events")
    return cast(Sequence[Any], value)


def _field_to_json(field: str, value: Any, read: Callable[[str, Any], Any]) -> Any:
    """Return a field of an event as JSON; `read` is its reader in `_KINDS`, which checks it."""
    if read is _event:
        return event_to_json(value)
    if read is _events:
        return [event_to_json(part) for part in _parts(field, value)]
    field_value = read(field, value)
    return list(field_value) if isinstance(field_value, tuple) else field_value


@cache
def _event_class(kind: str) -> Any:
    """Return the class of events of a kind of `_KINDS`."""
    from dp_accounting import dp_event

    from . import custom_events

    return getattr(custom_events if kind in ("OpenlySampled", "Exchanged") else dp_event, f"{kind}DpEvent")


# For each kind, a class of dp_accounting or of `custom_events` without "DpEvent": its fields, with the reader of each.
_KINDS: Mapping[str, Mapping[str, Callable[[str, Any], Any]]] = {
    "NoOp": {},
    "NonPrivate": {},
    "Gaussian": {"noise_multiplier": _number},
    "Laplace": {"noise_multiplier": _number},
    "DiscreteLaplace": {"noise_parameter": _number, "sensitivity": _count},
    "RandomizedResponse": {"noise_parameter": _rate, "num_buckets": _count},
    "ZC": {"rho": _number, "xi": _number},
    "MixtureOfGaussians": {
        "standard_deviation": _number,
        "sensitivities": _numbers,
        "sampling_probs": _numbers,
    },
    "PoissonSampled": {"sampling_probability": _rate, "event": _event},
    "OpenlySampled": {"sampling_probability": _rate, "event": _event},
    "Exchanged": {"event": _event},
    "TruncatedSubsampledGaussian": {
        "dataset_size": _count,
        "sampling_probability": _rate,
        "truncated_batch_size": _count,
        "noise_multiplier": _number,
    },
    "SelfComposed": {"event": _event, "count": _count},
    "Composed": {"events": _events},
}
