"""Checkpoints: one safetensors file with the whole state of a run, replaced atomically.

The file is written beside the old one, flushed to disk and renamed over it; the one before is kept. It contains the
ledger's head, so that a truncated or rolled-back ledger is detected when the run resumes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..base.bounded_decoding import build, plain_of
from ..base.durable_files import sync_folder, write_aside
from ..base.refusal import Range, Refusal
from ..base.tensor_file import safetensors_parts
from ..messages.training_order import RUN_NAME
from ..privacy.adaptation import Choices
from ..privacy.ledger.ledger import Head
from ..strategies.shared_model import Steps

FORMAT = "fedveil checkpoint 1"
NAME = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
DAMAGED = "checkpoint.damaged.safetensors"
# Prefixes of tensors' names; an arm's index comes between "arm/" and the others.
_MODEL, _STRATEGY, _AUDIT, _AVERAGE, _ARM = "model/", "strategy/", "audit/", "average/", "arm/"
_DAMAGES = (
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
    OSError,
    Refusal,
)  # errors on reading a damaged file

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Average:
    """Mean of the models of the last rounds; of none at first, or in a run that takes no average.

    Attributes:
      total: sum of their float arrays by name, float64.
      models: number of the models.
    """

    total: Annotated[Mapping[str, NDArray[np.float64]], "tensors"]
    models: Annotated[int, Range(ge=0)]

    def plus(self, model: Arrays) -> Average:
        """Return the average with one more model."""
        floats = {name: value.astype(np.float64) for name, value in model.items() if value.dtype.kind == "f"}
        if self.models:
            floats = {name: self.total[name] + value for name, value in floats.items()}
        return Average(floats, self.models + 1)

    def mean(self, last_model: Arrays) -> Arrays:
        """Return the mean in the types of the last model, whose integer arrays stay; without models, the last model."""
        return {
            name: (self.total[name] / self.models).astype(value.dtype) if name in self.total else value
            for name, value in last_model.items()
        }


NO_AVERAGE = Average({}, 0)


@dataclass(frozen=True)
class Trial:
    """Model of one arm, trained with the arm's value.

    Attributes:
      arrays: of the arm's model.
      strategy: its state after the arm's rounds.
      average: of its last models.
      steps: by array, to which it is rounded for clients, see `shared_model`.
    """

    arrays: Annotated[Arrays, "tensors"]
    strategy: Mapping[str, Any]
    average: Average = NO_AVERAGE
    steps: Steps = field(default_factory=dict[str, int])

    @property
    def model(self) -> Arrays:
        """Model to compare with those of other arms; the winner's is trained further."""
        return self.average.mean(self.arrays)


@dataclass(frozen=True)
class State:
    """State of a run between two rounds.

    Attributes:
      round: the last finished one.
      arrays: of the global model, or of the model of the round's arm.
      strategy: its state.
      choices: for the next round.
      average: of the last models.
      trials: of the arms, until one has won.
      scores: of the arms, once one has won.
      winner: number of the arm that has won; None before.
      steps: by array, to which it is rounded for clients, see `shared_model`; empty without rounding.
    """

    round: Annotated[int, Range(ge=0)]
    arrays: Annotated[Arrays, "tensors"]
    strategy: Mapping[str, Any]
    choices: Choices | None = None
    average: Average = NO_AVERAGE
    trials: tuple[Trial, ...] = ()
    scores: tuple[Annotated[float, "or -inf"], ...] = ()
    winner: int | None = None
    steps: Steps = field(default_factory=dict[str, int])

    @property
    def model(self) -> Arrays:
        """Final model of a run that ends here: the mean of the last models, if one is taken."""
        return self.average.mean(self.arrays)


Part = TypeVar("Part", State, Trial)


@dataclass(frozen=True)
class Checkpoint:
    """State from which a run resumes.

    Attributes:
      run: the run's name on the ledger.
      state: after a finished round.
      head: the ledger's head when the round was finished; None without client-level privacy.
      client_heads: the heads of the clients' own ledgers on this machine, by name.
      audit: memory of the audit for the next round, by name.
    """

    run: Annotated[str, RUN_NAME]
    state: State
    head: Head | None = None
    client_heads: Mapping[str, Head] = field(default_factory=dict[str, Head])
    audit: Annotated[Mapping[str, NDArray[np.float64]], "tensors"] = field(
        default_factory=dict[str, NDArray[np.float64]]
    )


NO_CHECKPOINT = Checkpoint("", State(0, {}, {}))  # of a run that has not finished a round


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint durably; after a crash at any moment this one or the previous one is complete."""
    state = checkpoint.state
    tensors, state_fields = _tensors_and_fields("", state)
    tensors |= {_AUDIT + name: value for name, value in checkpoint.audit.items()}
    trials: list[dict[str, Any]] = []
    for index, trial in enumerate(state.trials):
        arrays, trial_fields = _tensors_and_fields(f"{_ARM}{index}/", trial)
        tensors |= arrays
        trials.append(trial_fields)
    fields = {
        "run": checkpoint.run,
        "round": state.round,
        "head": checkpoint.head,
        "choices": state.choices,
        "client_heads": checkpoint.client_heads,
        "trials": trials,
        "scores": state.scores,
        "winner": state.winner,
        **state_fields,
    }
    parts = safetensors_parts(tensors, {"format": FORMAT, "state": json.dumps(plain_of(fields))})
    target = folder / NAME
    # Readable by its owner only: heads of clients' ledgers reveal the cohorts.
    temporary = write_aside(target, parts)
    if target.exists():
        os.replace(target, folder / PREVIOUS)
    os.replace(temporary, target)
    sync_folder(folder)


def _tensors_and_fields(prefix: str, part: State | Trial) -> tuple[Arrays, dict[str, Any]]:
    """Return the tensors of a model, its strategy and its average, named with a prefix, and their fields in the JSON."""
    strategy_arrays = {name: value for name, value in part.strategy.items() if isinstance(value, np.ndarray)}
    groups = {_MODEL: part.arrays, _STRATEGY: strategy_arrays, _AVERAGE: part.average.total}
    arrays = {
        prefix + kind + name: np.asarray(value, order="C")  # a scalar stays one
        for kind, group in groups.items()
        for name, value in group.items()
    }
    strategy_values = {name: value for name, value in part.strategy.items() if name not in strategy_arrays}
    return arrays, {"strategy": strategy_values, "averaged": part.average.models, "steps": part.steps}


def read(folder: Path) -> Checkpoint | None:
    """Return the newest readable checkpoint of a run folder, or None if the run never finished a round.

    A damaged checkpoint is renamed, so that the next write does not replace the good one with it.

    Raises:
      Refusal: no checkpoint in the folder can be read.
    """
    problems: list[str] = []
    for name in (NAME, PREVIOUS):
        path = folder / name
        if path.exists():
            try:
                checkpoint = _read(path)
            except _DAMAGES as problem:
                problems.append(f"{name}: {problem}")
                continue
            if problems:
                os.replace(folder / NAME, folder / DAMAGED)
            return checkpoint
    if problems:
        remedy = f"no checkpoint can be read ({'; '.join(problems)}); start a new run"
        raise Refusal("resume", str(folder), remedy)
    return None


def head_in(folder: Path) -> Head | None:
    """Return the ledger's head of the newest readable checkpoint in a folder, without its arrays; None without one."""
    for name in (NAME, PREVIOUS):
        with suppress(*_DAMAGES):
            with safe_open(folder / name, framework="numpy") as file:
                head = json.loads(file.metadata()["state"])["head"]
            return None if head is None else Head(*head)
    return None


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"not a {FORMAT} file")
        fields = json.loads(metadata["state"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    checkpoint_fields = {name: fields.pop(name) for name in ("run", "head", "client_heads") if name in fields}
    trials = [
        _build_part(Trial, tensors, f"{_ARM}{at}/", each) for at, each in enumerate(fields.pop("trials", []))
    ]
    state = _build_part(State, tensors, "", {**fields, "trials": trials})
    # An arm under trial may have diverged; its score is then minus infinity.
    for name, value in state.arrays.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all() and not trials:
            raise ValueError(f"array {name} has a value that is not finite")
    return build(Checkpoint, {**checkpoint_fields, "state": state, "audit": _under(tensors, _AUDIT)})


def _build_part(kind: type[Part], tensors: Arrays, prefix: str, fields: Mapping[str, Any]) -> Part:
    """Return what `_tensors_and_fields` wrote under this prefix, as a `State` or a `Trial`."""
    model, arrays, total = (_under(tensors, prefix + group) for group in (_MODEL, _STRATEGY, _AVERAGE))
    others = {name: value for name, value in fields.items() if name != "averaged"}
    average = build(Average, {"total": total, "models": fields.get("averaged", 0)})
    strategy = {**fields["strategy"], **arrays}
    return build(kind, {**others, "arrays": model, "strategy": strategy, "average": average})


def _under(tensors: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    """Return the tensors whose names have a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def strategy_state(strategy: Strategy) -> dict[str, Any]:
    """Return the numbers and arrays among a strategy's attributes, flattened to dotted names.

    An array of a dictionary is at `attribute.d.key`, one of a list at `attribute.l.index`. Flower's strategies keep
    momenta and the current arrays as plain attributes and offer no interface for them.
    """
    state: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        if isinstance(value, bool | int | float | str | np.ndarray) or value is None:
            state[name] = value
        elif _is_arrays(value):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            kind = "d" if isinstance(value, dict) else "l"
            state |= {f"{name}.{kind}.{key}": np.asarray(array) for key, array in items}
    return state


def _is_arrays(value: object) -> bool:
    """Return whether this is a dictionary or a list of arrays, at least one."""
    items = list(value.values()) if isinstance(value, dict) else value
    return (
        isinstance(items, list) and items != [] and all(isinstance(v, np.ndarray | np.generic) for v in items)
    )


def restore_strategy(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Set the attributes of a strategy to those that `strategy_state` returned."""
    collections: dict[tuple[str, str], dict[str, Any]] = {}  # arrays by key, by attribute and kind
    for name, value in state.items():
        attribute, *path = name.split(".", 2)
        if path:
            kind, key = path
            collections.setdefault((attribute, kind), {})[key] = value
        else:
            setattr(strategy, attribute, value)
    for (attribute, kind), arrays in collections.items():
        in_order = [arrays[index] for index in sorted(arrays, key=int)] if kind == "l" else arrays
        setattr(strategy, attribute, in_order)
