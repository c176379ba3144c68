"""Event of a sample that is drawn at random, for all to see: dp_accounting knows secret draws alone."""

import attr
from dp_accounting import DpEvent


@attr.frozen
class OpenlySampledDpEvent(DpEvent):
    """``event`` happens with ``sampling_probability``, and whether it happened shows.

    So with any adjacency: the divergence is jointly convex, and no use is made of the draw being secret.
    """

    sampling_probability: float
    event: DpEvent
