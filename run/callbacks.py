"""Callbacks of a run: the three values that they receive, their names, and the handling of their errors.

A callback receives only released values: each is frozen and holds numbers, text and the released model.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..base.extensions import extension, names
from ..base.extras import MODULES, require_extra
from ..base.refusal import Refusal

Arrays = Mapping[str, NDArray[np.generic]]


class ObserverLine(Protocol):
    """Displayed state of a run's observer, such as its audit.

    It says whether a round brought anything new; the lines of a plain log; those of a terminal, each with its style; the
    alarms so far, each with its round; and the whole as plain data.
    """

    def fresh(self, number: int, /) -> bool: ...
    def words(self) -> list[str]: ...
    def rows(self) -> list[tuple[str, str]]: ...
    def alarms_in_words(self) -> list[tuple[int, str]]: ...
    def status(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class RunStart:
    """Run that is about to begin or resume its rounds.

    Attributes:
      name: display name of the run.
      title: description of the run in one line.
      folder: folder of the run's files.
      num_rounds: number of the last round.
      budgets: target epsilon by unit ("client", "record", "person", "person_everywhere"); None without a target.
      config: the keys of its configuration, as groups of keys.
      rows: the finished rounds, each a line of metrics.jsonl.
      audit: state of the audit so far; None without an audit.

    Example:
      >>> import fedveil as fv
      >>> fv.RunStart("first", "digits", "runs/first", 2, {"client": 3.0}, {"num_rounds": 2}).rows
      ()
    """

    name: str
    title: str
    folder: Path
    num_rounds: int
    budgets: Mapping[str, float | None]
    config: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...] = ()
    audit: ObserverLine | None = None


@dataclass(frozen=True)
class RoundEnd:
    """Round that has ended.

    Attributes:
      round: its number, from 1.
      metrics: the released model's, by name: on public held-out examples, and means of an evaluation at the clients.
      epsilon: spent so far by unit ("client", "record", "person", "person_everywhere"); `math.inf` without a guarantee.
      row: the line of metrics.jsonl.
      model: the released model's arrays by name; they cannot be written.
      audit: state of the audit so far; None without an audit.

    Example:
      >>> import fedveil as fv
      >>> fv.RoundEnd(1, {"accuracy": 0.9}, {"client": 0.5}, {"round": 1}, {}).epsilon["client"]
      0.5
    """

    round: int
    metrics: Mapping[str, float]
    epsilon: Mapping[str, float]
    row: Mapping[str, Any]
    model: Arrays
    audit: ObserverLine | None = None


@dataclass(frozen=True)
class RunEnd:
    """Run that has ended, with any status.

    Attributes:
      status: as in result.json.
      reason: why it ended, as a sentence.
      folder: folder of the run's files.
      result: the content of result.json.
      model: the released model's arrays by name; they cannot be written.

    Example:
      >>> import fedveil as fv
      >>> fv.RunEnd("completed", "2 rounds", "runs/first", {"seed": 0}, {}).status
      'completed'
    """

    status: str
    reason: str
    folder: Path
    result: Mapping[str, Any]
    model: Arrays


@runtime_checkable
class Callback(Protocol):
    """Observer of a run; pass it to `simulate(callbacks=[...])`, or name it in `callbacks=`.

    It is called in the process of the run. An error that it raises is shown once, and the run continues.

    Example:
      >>> import fedveil as fv
      >>> class Watch:
      ...     def start(self, run): self.curve = []
      ...     def round(self, round_end): self.curve.append(round_end.metrics["accuracy"])
      ...     def end(self, ending): self.status = ending.status
      >>> watch = Watch()
      >>> run = fv.simulate("digits", num_rounds=2, quiet=True, callbacks=[watch])
      >>> watch.status, watch.curve[-1] == run.metrics["accuracy"]
      ('completed', True)
    """

    def start(self, run: RunStart, /) -> None:
        """Handle the start of a run, or its resumption."""
        ...

    def round(self, round_end: RoundEnd, /) -> None:
        """Handle the end of a round."""
        ...

    def end(self, ending: RunEnd, /) -> None:
        """Handle the end of the run."""
        ...


def frozen(value: Any) -> Any:
    """Return an immutable copy of nested dictionaries and lists."""
    if isinstance(value, Mapping):
        return MappingProxyType({key: frozen(each) for key, each in value.items()})
    return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value


def read_only_model(arrays: Arrays) -> Arrays:
    """Return the released arrays as views that cannot be written."""
    views = {name: array.view() for name, array in arrays.items()}
    for view in views.values():
        view.flags.writeable = False
    return MappingProxyType(views)


@dataclass
class Guarded:
    """Callback of a user: the first of its errors is shown, and none ends the run."""

    callback: Callback
    name: str
    failed: bool = False

    def start(self, run: RunStart) -> None:
        """Pass it on."""
        self._call(self.callback.start, run)

    def round(self, round_end: RoundEnd) -> None:
        """Pass it on."""
        self._call(self.callback.round, round_end)

    def end(self, ending: RunEnd) -> None:
        """Pass it on."""
        self._call(self.callback.end, ending)

    def _call(self, handler: Callable[[Any], None], value: RunStart | RoundEnd | RunEnd) -> None:
        try:
            handler(value)
        except Exception as problem:  # noqa: BLE001 (an observer's error must not cost paid rounds)
            if not self.failed:
                last = traceback.extract_tb(problem.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                text = f"callback {self.name}: {type(problem).__name__}: {problem} ({where}); the run goes on"
                print(f"warning: {text}", file=sys.stderr, flush=True)
            self.failed = True


def guarded(objects: Sequence[Callback], names: Sequence[str] = ()) -> tuple[Guarded, ...]:
    """Return the callbacks of a run, each guarded so that it cannot end the run.

    Args:
      objects: given in Python.
      names: of the configuration: `csv`, `mlflow`, `tensorboard`, `wandb`, or "module:Class", whose modules the
        settings allow.

    Raises:
      Refusal: one is not a callback, cannot be imported, or lacks a package.
    """
    for each in objects:
        _require_callback(each, type(each).__name__)
    configured = [Guarded(_load_callback(name), name) for name in names]
    return (*configured, *(Guarded(each, type(each).__name__) for each in objects))


def _load_callback(name: str) -> Callback:
    """Return a new callback by its name; the settings have checked that a user's module is allowed."""
    if name in names("callback"):
        if name in MODULES:
            require_extra(name, f"callbacks=[{name}]")
        return extension("callback", name, "callbacks", name)()
    module, _, attribute = name.partition(":")
    try:
        callback = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as problem:
        raise Refusal("callbacks", name, f"creating it failed ({problem})") from problem
    return _require_callback(callback, name)


def _require_callback(candidate: object, name: str) -> Callback:
    if isinstance(candidate, type) or not isinstance(candidate, Callback):
        raise Refusal("callbacks", name, "must be an object with the functions start, round and end")
    return candidate
