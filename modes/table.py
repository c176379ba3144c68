"""Table of the modes by the name that `privacy=` gives them."""

from __future__ import annotations

from collections.abc import Mapping

from ..messages.training_order import ModeName
from .client_central import ClientCentralMode
from .client_distributed import ClientDistributedMode
from .mode import Mode
from .record import RecordMode
from .record_and_client import RecordAndClientMode
from .record_distributed import RecordDistributedMode

MODES: Mapping[str, type[Mode]] = {
    ModeName.NONE: Mode,
    ModeName.RECORD: RecordMode,
    ModeName.CLIENT_CENTRAL: ClientCentralMode,
    ModeName.CLIENT_DISTRIBUTED: ClientDistributedMode,
    ModeName.RECORD_AND_CLIENT: RecordAndClientMode,
    ModeName.RECORD_DISTRIBUTED: RecordDistributedMode,
}
