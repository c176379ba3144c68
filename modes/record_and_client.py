"""Mode `record_and_client`: `record` and `client_central` at once; the sum is of what records were charged for."""

from __future__ import annotations

from ..configs.privacy_settings import PrivacySettings, Record, RecordAndClient
from ..privacy.plan import Plan
from .client_central import ClientCentralMode
from .mode import Mode, Promise
from .record import RecordMode


class RecordAndClientMode(RecordMode, ClientCentralMode):
    """Hides records from everybody, and whole clients as `client_central`; each has a budget of its own."""

    group = "privacy.record"

    @property
    def both(self) -> RecordAndClient:
        """The settings of the mode."""
        privacy = self.parts.settings.privacy
        assert isinstance(privacy, RecordAndClient)
        return privacy

    @property
    def dp_sgd(self) -> Record:
        """The settings of DP-SGD at the clients."""
        return self.both.record

    def with_noise(self, noise_multiplier: float) -> PrivacySettings:
        """Return the privacy settings with this noise on the sums; the clients' own noise stays."""
        client = self.central.model_copy(update={"noise_multiplier": noise_multiplier})
        return self.both.model_copy(update={"client": client})

    def count_disclosure(self, promise: Promise) -> str:
        """Return which public value reveals the number of a promise's units, with the remedy."""
        if promise.per_client:
            return str(Mode.count_disclosure(self, promise))
        return "record-level noise depends on a client's number of records; use zero-out, or client_central"

    def evaluation(self, noise_multiplier: float) -> Plan:
        """Refuse an evaluation, which neither promise covers alone."""
        return Mode.evaluation(self, noise_multiplier)


MODE = RecordAndClientMode
