"""Event of a sample whose draw is public; dp_accounting supports only secret draws."""

import attr
from dp_accounting.dp_event import DpEvent


@attr.frozen
class OpenlySampledDpEvent(DpEvent):
    """Event that happens with a known probability, and whose occurrence the adversary sees.

    It is accounted by joint convexity of the divergence, under any adjacency, without relying on a secret draw.

    Attributes:
      sampling_probability: in [0, 1].
      event: the sampled event.
    """

    sampling_probability: float
    event: DpEvent
