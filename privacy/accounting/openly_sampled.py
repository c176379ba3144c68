"""Event of a sample whose draw is public; dp_accounting knows secret draws alone."""

import attr
from dp_accounting.dp_event import DpEvent


@attr.frozen
class OpenlySampledDpEvent(DpEvent):
    """Event that happens with a probability, where whoever looks sees whether it happened.

    It is accounted by joint convexity of the divergence, under any adjacency; nothing counts on a secret
    draw.

    Attributes:
      sampling_probability: in [0, 1].
      event: what happens then.
    """

    sampling_probability: float
    event: DpEvent
