"""End of a run on a device: its status and the final model, in files of the state folder."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from ...base.bounded_decoding import read_json_file
from ...base.durable_files import replace_file
from ...base.tensor_file import safetensors_parts
from ...messages.notices import RunOver

MODEL, ENDED = "model.safetensors", "ended.json"
PERSONAL = "personal"  # folder of the layers that stay here, by run
OWN_MODEL = "personal.safetensors"  # as of `personal.state`, an extension that a device may lack


@dataclass(frozen=True)
class LastRun:
    """Last finished run, as reported by the server.

    Attributes:
      run: its name.
      status: of its ending.
      rounds: number of completed rounds.
      at: time of the message (UTC).
      model: path of the final model, relative to the state folder; empty if there is none.
    """

    run: str
    status: str
    rounds: int
    at: str
    model: str

    def __str__(self) -> str:
        return f"run {self.run} is over ({self.status} after {self.rounds} rounds)"


@dataclass(frozen=True)
class FinalModel:
    """Final model of a run, as the device stored it.

    Attributes:
      run: name of the run.
      sha256: hash of the file, in hexadecimal.
      arrays: by name.
      moments: by which the run scaled inputs, as JSON; empty without scaling.
    """

    run: str
    sha256: str
    arrays: Mapping[str, NDArray[np.generic]]
    moments: str


def record_end(state: Path, over: RunOver) -> LastRun:
    """Record in the state folder that a run is over, its model first; the model of an earlier run is replaced.

    Raises:
      OSError: the folder cannot be written.
    """
    if over.model:
        model = {name: np.asarray(value, order="C") for name, value in over.model.items()}
        scaled = {"moments": over.moments} if over.moments else {}
        metadata = {"run": over.run, "agreement": over.agreement, **scaled}
        replace_file(state / MODEL, safetensors_parts(model, metadata))
    at = datetime.now(UTC).isoformat(timespec="seconds")
    ended = LastRun(over.run, over.status, over.rounds, at, MODEL if over.model else "")
    replace_file(state / ENDED, (json.dumps(asdict(ended), indent=1) + "\n").encode())
    return ended


def read_ended(state: Path) -> LastRun | None:
    """Return the last finished run; None during a run, or if nothing can be read."""
    return read_json_file(LastRun, state / ENDED)


def forget_end(state: Path) -> None:
    """Delete the record of the last run's end, since another has begun; its model stays."""
    (state / ENDED).unlink(missing_ok=True)


def sha256_of_final(state: Path) -> str:
    """Return the hash of the final model's file in the state folder, in hexadecimal; empty if there is none."""
    path = state / MODEL
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def final_model(state: Path) -> FinalModel | None:
    """Return the final model in the state folder; None if there is none.

    Raises:
      OSError: the file cannot be read.
      SafetensorError: it is damaged.
    """
    path = state / MODEL
    if not path.is_file():
        return None
    sha256 = sha256_of_final(state)
    with safe_open(path, framework="numpy") as file:
        about: dict[str, str] = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return FinalModel(about.get("run", ""), sha256, arrays, about.get("moments", ""))
