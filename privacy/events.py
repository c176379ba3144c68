"""Which events are accounted, read strictly: to JSON and back, and down to the leaves that accountants compose.

Every parameter is converted here, once: dp_accounting 0.6 silently drops composition inside Poisson sampling when
a noise multiplier is an int or a numpy.float32. Kinds are a closed list; nothing named in data is ever imported.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from .budget import real
from .refusal import Refusal

if TYPE_CHECKING:
    from dp_accounting import DpEvent

# An event that is no composition, with converted parameters; hashable.
Leaf = Any

# Noise below this is counted as none (epsilon would pass 5e5), above the other as that much: both only overstate.
MIN_NOISE, MAX_NOISE = 1e-3, 1e9
# Sampling rates below this count as this.
MIN_RATE = 1e-12


def event_to_json(event: "DpEvent") -> dict[str, Any]:
    """``{"kind": "Gaussian", "noise_multiplier": 1.0}`` and the like; Refusal for an event outside the list."""
    kind = type(event).__name__.removesuffix("DpEvent")
    if kind not in _KINDS or type(event) is not _event_class(kind):
        raise Refusal("event", event, f"use one of {', '.join(_KINDS)}")
    fields = {name: read(name, getattr(event, name)) for name, read in _KINDS[kind].items()}
    return {"kind": kind, **{name: _plain(value) for name, value in fields.items()}}


def event_from_json(data: Mapping[str, Any]) -> "DpEvent":
    """The event that `event_to_json` wrote; Refusal for an unknown kind, missing or further fields, bad values."""
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise Refusal("kind", kind, f"use one of {', '.join(_KINDS)}")
    readers = _KINDS[kind]
    if set(data) != {"kind", *readers}:
        raise Refusal("event", dict(data), f"{kind} has exactly the fields {', '.join(readers) or 'kind'}")
    return _event_class(kind)(**{name: read(name, data[name]) for name, read in readers.items()})


def leaves(event: "DpEvent", count: int = 1) -> Iterator[tuple[Leaf, int]]:
    """What accountants compose ``count`` times ``event`` from: (leaf, how often), free events left out.

    Several Gaussian queries of one Poisson sample become the one Gaussian they equal (McMahan et al. 2018,
    arXiv 1812.06210, section 3); sampling at rate 1 and noise of 0 become what they are.
    """
    yield from _unfolded(event_from_json(event_to_json(event)), _count("count", count))


def _unfolded(event: Any, count: int) -> Iterator[tuple[Leaf, int]]:
    import dp_accounting as dp

    if isinstance(event, dp.SelfComposedDpEvent):
        yield from _unfolded(event.event, count * event.count)
    elif isinstance(event, dp.ComposedDpEvent):
        for part in event.events:
            yield from _unfolded(part, count)
    elif count and (leaf := _simplified(event)) is not None:
        yield leaf, count


def _simplified(event: Any) -> Leaf | None:
    import dp_accounting as dp

    match event:
        case dp.NoOpDpEvent():
            return None
        case dp.GaussianDpEvent() | dp.LaplaceDpEvent():
            noise = event.noise_multiplier
            return dp.NonPrivateDpEvent() if noise < MIN_NOISE else type(event)(min(noise, MAX_NOISE))
        case dp.PoissonSampledDpEvent(sampling_probability=rate):
            inner = _one_query(event.event)
            if rate == 0 or inner is None or isinstance(inner, dp.NonPrivateDpEvent):
                return None if rate == 0 else inner
            return inner if rate == 1 else dp.PoissonSampledDpEvent(max(rate, MIN_RATE), inner)
        case dp.TruncatedSubsampledGaussianDpEvent() if event.noise_multiplier < MIN_NOISE:
            return dp.NonPrivateDpEvent()
        case _:
            return event


def _one_query(event: Any) -> Leaf | None:
    """The single event that equals ``event``, all of it on one sample; Refusal where there is none."""
    import dp_accounting as dp

    parts = list(_unfolded(event, 1))
    if any(isinstance(part, dp.NonPrivateDpEvent) for part, _ in parts):
        return dp.NonPrivateDpEvent()
    if len(parts) <= 1 and all(n == 1 for _, n in parts):
        return parts[0][0] if parts else None
    if not all(isinstance(part, dp.GaussianDpEvent) for part, _ in parts):
        raise Refusal("event", event, "one sample can be composed of Gaussian events only")
    noise = sum(n / part.noise_multiplier**2 for part, n in parts) ** -0.5
    return _simplified(dp.GaussianDpEvent(noise))


def _number(field: str, value: Any) -> float:
    if real(field, value) < 0:
        raise Refusal(field, value, "give a number of at least 0")
    return float(value)


def _rate(field: str, value: Any) -> float:
    if _number(field, value) > 1:
        raise Refusal(field, value, "give a probability")
    return float(value)


def _count(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise Refusal(field, value, "give a whole number of at least 0")
    return int(value)


def _event(field: str, value: Any) -> "DpEvent":
    return event_from_json(value if isinstance(value, Mapping) else event_to_json(value))


def _events(field: str, value: Any) -> "list[DpEvent]":
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise Refusal(field, value, "give a list of events")
    return [_event(field, part) for part in value]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [event_to_json(part) for part in value]
    return value if isinstance(value, int | float) else event_to_json(value)


def _event_class(kind: str) -> Any:
    from dp_accounting import dp_event

    return getattr(dp_event, f"{kind}DpEvent")


_KINDS: Mapping[str, Mapping[str, Callable[[str, Any], Any]]] = {
    "NoOp": {},
    "NonPrivate": {},
    "Gaussian": {"noise_multiplier": _number},
    "Laplace": {"noise_multiplier": _number},
    "DiscreteLaplace": {"noise_parameter": _number, "sensitivity": _count},
    "RandomizedResponse": {"noise_parameter": _rate, "num_buckets": _count},
    "ZC": {"rho": _number, "xi": _number},
    "PoissonSampled": {"sampling_probability": _rate, "event": _event},
    "TruncatedSubsampledGaussian": {
        "dataset_size": _count,
        "sampling_probability": _rate,
        "truncated_batch_size": _count,
        "noise_multiplier": _number,
    },
    "SelfComposed": {"event": _event, "count": _count},
    "Composed": {"events": _events},
}
