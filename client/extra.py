"""Extra clients and records at a simulated client: an extension answers for them, as an audit does for its canaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..base.extensions import extension

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from torch import nn

    from ..messages.client_settings import CanaryClients
    from ..messages.record_settings import CanaryRecords
    from ..privacy.mechanisms.compression import Sketch
    from ..privacy.mechanisms.private_sum import CohortSum
    from ..privacy.mechanisms.randomness import Randomness
    from ..privacy.mechanisms.sum_spec import SumSpec
    from ..privacy.plan import Plan
    from ..tasks.data import Data
    from ..tasks.protocol import Objective, Task

ADDS = "full"  # option of the group `audit` that adds clients and records
# Names in a model with the block of extra records: prefix of the client's own parameters, and that of the block.
MODEL_PREFIX, BLOCK = "model.", "block.weight"


class ExtraClients(Protocol):
    """Functions of an extension for extra clients, which `audit.canary_updates` documents."""

    canary_answer: Callable[[Message, CanaryClients, int], Message]
    canary_updates: Callable[[CanaryClients, Sequence[int], int], NDArray[np.float32]]
    add_canary: Callable[[CohortSum, NDArray[np.floating], SumSpec, CanaryClients, int, Sketch | None], None]
    add_canaries: Callable[[CanaryClients, RecordDict, Sequence[int], SumSpec, CohortSum], None]


class ExtraRound(Protocol):
    """Round of a client's own DP-SGD: `after_step` is called after each step, and `keep` with the round's number at the end."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def loss(self) -> Objective: ...
    @property
    def examples(self) -> Data: ...
    def after_step(self) -> None: ...
    def keep(self, number: int, /) -> None: ...


@dataclass(frozen=True)
class OwnRound:
    """Round of a client on its own records alone, as an `ExtraRound`."""

    model: nn.Module
    loss: Objective
    examples: Data
    after_step: Callable[[], None] = lambda: None
    keep: Callable[[int], None] = lambda _: None


class ExtraRecords(Protocol):
    """Functions of an extension for extra records, in own DP-SGD or in a step, which `audit.record_canaries` documents."""

    begin_round: Callable[[nn.Module, Task, Data, Plan, int, Randomness, Path], ExtraRound]
    with_canaries: Callable[[Data, CanaryRecords, int], Data]
    watch: Callable[[nn.Module, Task, Data, int, bool, float], tuple[nn.Module, Objective]]


def extra_clients() -> ExtraClients:
    """Return the functions for extra clients, of the extension that has them."""
    return extension("audit", "ExtraClients", "audit", ADDS)


def extra_records() -> ExtraRecords:
    """Return the functions for extra records, of the extension that has them."""
    return extension("audit", "ExtraRecords", "audit", ADDS)
