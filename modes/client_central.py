"""Mode `client_central`: whole clients are hidden by exact noise on the sum, which a trusted server adds."""

from __future__ import annotations

from dp_accounting.dp_event import DpEvent

from ..configs.privacy_settings import ClientCentral
from ..messages.client_settings import TRAIN_LOSS
from ..privacy.adaptation import Adaptation, AdaptiveNoise
from ..privacy.budget import Adversary
from ..privacy.mechanisms.adaptive_clipping import AdaptiveClipping
from ..privacy.plan import Plan
from .sums import ClientMode


class ClientCentralMode(ClientMode):
    """Hides whole clients from each other and in the model; the server sees single updates."""

    hides_counts = True

    @property
    def adversaries(self) -> tuple[Adversary, ...]:
        """From whom the sums hide a client."""
        return (Adversary.CLIENTS, Adversary.MODEL)

    @property
    def central(self) -> ClientCentral:
        """The settings of the sums."""
        assert isinstance(self.level, ClientCentral)
        return self.level

    @property
    def adapts_noise(self) -> bool:
        """Whether the noise is chosen as the run goes."""
        return self.central.noise_schedule == "adaptive"

    @property
    def adapts_clip(self) -> bool:
        """Whether the clipping norm is chosen as the run goes."""
        return self.central.clipping == "adaptive"

    def adaptation(self, plan: Plan, prior: tuple[DpEvent, ...], start_round: int) -> Adaptation:
        """Return the rules of clip and noise for the rounds after `start_round`; the ledger holds the events `prior`."""
        level = self.central
        clip = AdaptiveClipping(level.clipping_quantile, level.clipping_learning_rate)
        noise = AdaptiveNoise(plan, self.budget, TRAIN_LOSS, prior, start_round)
        return Adaptation(clip if self.adapts_clip else None, noise if self.adapts_noise else None)


MODE = ClientCentralMode
