"""Checkpoints: one safetensors file that holds all a run needs to go on, replaced atomically.

The file is written beside the old one, flushed to disk and renamed over it; the one before is kept. It carries the
ledger's head, so that a ledger that was cut or rolled back is found when the run resumes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..privacy.adaptation import Choices
from ..privacy.ledger.durable_files import sync_folder, write_beside
from ..privacy.ledger.ledger import Head
from ..privacy.refusal import Refusal
from ..privacy.tensor_file import safetensors_parts

FORMAT = "fedveil checkpoint 1"
NAME = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
DAMAGED = "checkpoint.damaged.safetensors"
_MODEL = "model/"
_STRATEGY = "strategy/"
_AUDIT = "audit/"
_AVERAGE = "average/"
_ARM = "arm/"

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class KeptTrial:
    """Model of one arm, what its strategy remembers, flattened, the sum of the models that are averaged, their number, steps."""

    model: Arrays
    strategy: Mapping[str, Any]
    average: Mapping[str, NDArray[np.float64]]
    models: int
    steps: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Checkpoint:
    """The state after a round.

    Attributes:
      run: the run's name on the ledger.
      round: the last finished round.
      model: the global arrays by name.
      strategy: the strategy's own arrays and numbers, flattened.
      head: the ledger's head when the round was finished; None without client-level privacy.
      choices: what the next round goes by; None without client-level privacy.
      client_heads: the heads of the clients' own ledgers by name, as far as this machine has them.
      audit: what the audit of the next round needs of this one, by name.
      average: sum of the models that are averaged, by name; empty where none are.
      models: how many those are.
      trials: of the arms, until one has won.
      scores: of the arms, once one has won.
      winner: number of the arm that has won; None before.
      steps: exponents of two that the arrays are rounded to for clients, by name; empty where they are not.
    """

    run: str
    round: int
    model: Arrays
    strategy: Mapping[str, Any]
    head: Head | None = None
    choices: Choices | None = None
    client_heads: Mapping[str, Head] = field(default_factory=dict[str, Head])
    audit: Mapping[str, NDArray[np.float64]] = field(default_factory=dict[str, NDArray[np.float64]])
    average: Mapping[str, NDArray[np.float64]] = field(default_factory=dict[str, NDArray[np.float64]])
    models: int = 0
    trials: Sequence[KeptTrial] = ()
    scores: tuple[float, ...] = ()
    winner: int | None = None
    steps: Mapping[str, int] = field(default_factory=dict[str, int])


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint durably; a crash at any moment leaves this one or the one before."""
    tensors = {_MODEL + name: np.ascontiguousarray(value) for name, value in checkpoint.model.items()}
    tensors |= {_AUDIT + name: value for name, value in checkpoint.audit.items()}
    tensors |= {_AVERAGE + name: np.ascontiguousarray(each) for name, each in checkpoint.average.items()}
    arrays, numbers = _parted(checkpoint.strategy)
    tensors |= {_STRATEGY + name: value for name, value in arrays.items()}
    trials: list[dict[str, Any]] = []
    for place, trial in enumerate(checkpoint.trials):
        start, (arrays, others) = f"{_ARM}{place}/", _parted(trial.strategy)
        tensors |= {start + _MODEL + k: np.ascontiguousarray(value) for k, value in trial.model.items()}
        tensors |= {start + _STRATEGY + name: value for name, value in arrays.items()}
        tensors |= {start + _AVERAGE + k: np.ascontiguousarray(value) for k, value in trial.average.items()}
        trials.append({"strategy": others, "averaged": trial.models, "steps": dict(trial.steps)})
    head = None if checkpoint.head is None else [checkpoint.head.seq, checkpoint.head.hash]
    choices = None if checkpoint.choices is None else asdict(checkpoint.choices)
    state = {
        "run": checkpoint.run,
        "round": checkpoint.round,
        "head": head,
        "strategy": numbers,
        "choices": choices,
        "client_heads": dict(checkpoint.client_heads),
        "averaged": checkpoint.models,
        "trials": trials,
        "scores": checkpoint.scores,
        "winner": checkpoint.winner,
        "steps": dict(checkpoint.steps),
    }
    parts = safetensors_parts(tensors, {"format": FORMAT, "state": json.dumps(state)})
    target = folder / NAME
    # Its owner's alone: heads of clients' ledgers tell who took part.
    temporary = write_beside(target, parts)
    if target.exists():
        os.replace(target, folder / PREVIOUS)
    os.replace(temporary, target)
    sync_folder(folder)


def _parted(strategy: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
    """Return what a strategy remembers as arrays, and the rest."""
    arrays = {
        k: np.ascontiguousarray(value) for k, value in strategy.items() if isinstance(value, np.ndarray)
    }
    return arrays, {name: value for name, value in strategy.items() if name not in arrays}


def read(folder: Path) -> Checkpoint | None:
    """Return the newest readable checkpoint of a run folder, or None if the run never finished a round.

    A damaged one is set aside, so that the next write does not put it in the place of the good one.

    Raises:
      Refusal: no checkpoint in the folder can be read.
    """
    problems: list[str] = []
    for name in (NAME, PREVIOUS):
        path = folder / name
        if path.exists():
            try:
                checkpoint = _read(path)
            except (SafetensorError, ValueError, KeyError, TypeError, OSError) as problem:
                problems.append(f"{name}: {problem}")
                continue
            if problems:
                os.replace(folder / NAME, folder / DAMAGED)
            return checkpoint
    if problems:
        raise Refusal(
            "resume", str(folder), f"no checkpoint can be read ({'; '.join(problems)}); start a new run"
        )
    return None


def _read(path: Path) -> Checkpoint:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"not a {FORMAT} file")
        state = json.loads(metadata["state"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = {k.removeprefix(_MODEL): v for k, v in tensors.items() if k.startswith(_MODEL)}
    for name, value in model.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all() and not state.get("trials"):
            raise ValueError(f"array {name} has a value that is not finite")
    arrays = {k.removeprefix(_STRATEGY): v for k, v in tensors.items() if k.startswith(_STRATEGY)}
    head = None if state["head"] is None else Head(*state["head"])
    if not isinstance(state["round"], int) or state["round"] < 0:
        raise ValueError(f"its round is {state['round']!r}")
    choices = _choices(state.get("choices"))
    heads = {name: Head(*known) for name, known in state.get("client_heads", {}).items()}
    strategy = {**state["strategy"], **arrays}
    audit, average = (
        {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        for start in (_AUDIT, _AVERAGE)
    )
    models = int(state.get("averaged", 0))
    trials = [_trial(tensors, place, each) for place, each in enumerate(state.get("trials", ()))]
    found = Checkpoint(
        state["run"], state["round"], model, strategy, head, choices, heads, audit, average, models
    )
    found = replace(found, trials=trials, scores=tuple(state.get("scores", ())), winner=state.get("winner"))
    return replace(found, steps=_steps(state))


def _trial(tensors: Mapping[str, NDArray[Any]], place: int, fields: Mapping[str, Any]) -> KeptTrial:
    model, arrays, average = (
        {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        for start in (f"{_ARM}{place}/{part}" for part in (_MODEL, _STRATEGY, _AVERAGE))
    )
    return KeptTrial(
        model, {**fields["strategy"], **arrays}, average, int(fields["averaged"]), _steps(fields)
    )


def _steps(fields: Mapping[str, Any]) -> dict[str, int]:
    return {str(name): int(step) for name, step in fields.get("steps", {}).items()}


def _choices(fields: dict[str, Any] | None) -> Choices | None:
    if fields is None:
        return None
    losses = tuple(float(loss) for loss in fields["losses"])
    choices = Choices(float(fields["clipping_norm"]), float(fields["noise_multiplier"]), losses)
    if not 0 < choices.clipping_norm < math.inf or not 0 < choices.noise_multiplier < math.inf:
        raise ValueError(f"its choices are {choices}")
    return choices


# --- what a strategy remembers between rounds --------------------------------------------------------------------


def strategy_state(strategy: Strategy) -> dict[str, Any]:
    """Return the numbers and arrays among a strategy's attributes, flattened to dotted names.

    Flower's strategies keep momenta and the current arrays as plain attributes and offer no interface for them.
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
    if isinstance(value, dict):
        value = list(value.values())
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(v, np.ndarray | np.generic) for v in value)
    )


def restore_strategy(strategy: Strategy, state: Mapping[str, Any]) -> None:
    """Put back what `strategy_state` returned."""
    nested: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if not rest:
            setattr(strategy, name, value)
            continue
        kind, _, key = rest.partition(".")
        nested.setdefault(f"{head}.{kind}", {})[key] = value
    for name, values in nested.items():
        head, _, kind = name.partition(".")
        listed = [values[key] for key in sorted(values, key=int)] if kind == "l" else values
        setattr(strategy, head, listed)
