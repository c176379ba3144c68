"""Events that dp_accounting lacks: a sample whose draw is public, and a secret sample of a vector that is exchanged."""

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


@attr.frozen
class ExchangedDpEvent(DpEvent):
    """Sampled Gaussian that is accounted under replace-one, whatever the adjacency of its ledger.

    Attributes:
      event: a Gaussian, sampled by Poisson; its noise multiplier is noise std / clip.
    """

    event: DpEvent
