"""Cost of a client's release to one of its records: the client's vector is exchanged for another.

A vector is clipped to C whatever the client's data are, so another value of one record may turn it into any vector
within C, at a distance of 2 C. Without the client the sum moves by C only. A Gaussian therefore costs a record as much
as one with half its noise multiplier; under replace-one accountants read the distance of 2 C themselves. With a secret
draw of clients the neighbours are two mixtures that share their centre, as under replace-one.
"""

from collections.abc import Mapping
from functools import lru_cache
from json import loads
from typing import Any, cast

from ..budget import Adjacency

SAMPLED = ("PoissonSampled", "OpenlySampled")


def record_event(event: Mapping[str, Any], adjacency: Adjacency, secret: bool = True) -> dict[str, Any]:
    """Return what a client's event costs each of its records, as JSON: `NonPrivate` for an event without a known bound.

    Args:
      event: the client's event, as `events.event_to_json` writes it, for a vector clipped in the L2 norm.
      adjacency: adjacency of the ledger of records, which is charged.
      secret: whether a secret draw of clients lowers the cost; False if an RDP filter composes, which cannot count it.
    """
    kind = event["kind"]
    if kind == "Gaussian":
        return {**event, "noise_multiplier": event["noise_multiplier"] * adjacency.distance / 2}
    if kind in ("NoOp", "NonPrivate"):
        return dict(event)
    if kind == "SelfComposed":
        return {**event, "event": record_event(event["event"], adjacency, secret)}
    if kind == "Composed":
        parts = cast(list[Mapping[str, Any]], event["events"])
        return {**event, "events": [record_event(part, adjacency, secret) for part in parts]}
    if kind == "PoissonSampled" and secret and event["event"]["kind"] == "Gaussian":
        if event["sampling_probability"] == 1:
            return record_event(event["event"], adjacency)
        return {"kind": "Exchanged", "event": dict(event)}
    if kind in SAMPLED:  # the draw is the same on both sides: no divergence is larger than without it
        return record_event(event["event"], adjacency, secret)
    return {"kind": "NonPrivate"}


@lru_cache(maxsize=1 << 12)
def record_event_of(text: str, adjacency: Adjacency, secret: bool) -> dict[str, Any]:
    """Return `record_event` of an event's canonical JSON; the result is shared, and not to be changed."""
    return record_event(loads(text), adjacency, secret)
