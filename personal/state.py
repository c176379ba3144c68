"""File of a client's own model, for its owner alone; no checkpoint, bundle, message or report contains it.

One safetensors file, replaced atomically: the arrays, and in its metadata the run, the released model and the choice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..base.bounded_decoding import read_json
from ..base.durable_files import replace_file
from ..base.refusal import Refusal, unreadable
from ..base.tensor_file import safetensors_parts
from .choice import Choice

Arrays = Mapping[str, NDArray[np.generic]]

FORMAT = "fedveil personal model 1"
FILE = "personal.safetensors"  # of a device; a simulation has one file for each client
OWNER = 0o600


@dataclass(frozen=True)
class OwnModel:
    """A client's own model.

    Attributes:
      run: name of the run whose released model it began from.
      shared: SHA-256 of that model's file, in hexadecimal.
      choice: the client's choice, with the figures of its held-out rows.
      keys: parameters of its training, as numbers, words and lists.
      arrays: of the model, by name: those that travel in a run.
    """

    run: str
    shared: str
    choice: Choice
    keys: Mapping[str, Any]
    arrays: Arrays


def write_own(path: Path, own: OwnModel) -> None:
    """Write a client's own model to a file in an existing folder; on return it is on disk.

    Raises:
      OSError: it cannot be written; an earlier model is intact.
    """
    arrays = {name: np.asarray(value, order="C") for name, value in own.arrays.items()}
    fields = {"run": own.run, "shared": own.shared, "choice": asdict(own.choice), "keys": dict(own.keys)}
    replace_file(path, safetensors_parts(arrays, {FORMAT: json.dumps(fields, default=list)}), OWNER)


def read_own(path: Path) -> OwnModel | None:
    """Return a client's own model; None if there is no file.

    Raises:
      Refusal: the file cannot be read, or is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            fields = read_json(file.metadata()[FORMAT])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return OwnModel(fields["run"], fields["shared"], Choice(**fields["choice"]), fields["keys"], arrays)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as problem:
        remedy = "delete it, and train the client's own model again"
        raise Refusal("personal", str(path), unreadable(problem, remedy)) from problem
