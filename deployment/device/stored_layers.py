"""Layers of a run's model that stay on this device, as it stored them last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .client_bundle import OWN_FILES, TaskChoice
from .run_end import PERSONAL


def layers_of_run(state: Path, choice: TaskChoice, run: str) -> Mapping[str, NDArray[np.generic]]:
    """Return the layers by name; none if all layers of the run's model travelled.

    Args:
      state: folder of the device's state.
      choice: the owner's task.
      run: name of the run on ledgers.

    Raises:
      Refusal: their file is damaged.
    """
    if not (state / PERSONAL).is_dir():  # then the extension need not be here
        return {}
    from ...personal.own_layers import layers_folder, stored_layers

    client = 0 if choice.name in OWN_FILES else choice.client
    return stored_layers(layers_folder(state / PERSONAL, client, run))
