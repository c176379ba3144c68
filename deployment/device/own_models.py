"""Own models of a device: made from each final model of a run, in a thread, so that no message waits for them.

An evaluation that measures own models has one made from the evaluated model, on the path of its message; it is kept in
memory, so that the run's end finds it made.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...base.bounded_decoding import plain_of, read_json
from ...base.refusal import Refusal
from ...messages.model_difference import hash_of
from ...messages.training_order import TrainingOrder
from ...personal.choice import COLUMNS, LOCAL, LOSS, PERSONAL, SHARED, Choice
from ...personal.gains import gains_of
from ...personal.state import OwnModel, read_own, write_own
from .client_bundle import ClientBundle
from .run_end import OWN_MODEL, final_model
from .run_rows import TrainedRows, read_rows, scaling_of
from .stored_layers import layers_of_run

if TYPE_CHECKING:  # a linear model needs no torch
    from .linear import LinearTask
    from .torch_task import TorchTask

logger = logging.getLogger("fedveil.client")

Arrays = Mapping[str, NDArray[np.generic]]
Wake = Callable[[], None]  # has the own model made that is missing, if one is


@dataclass
class OwnModels:
    """Maker of a device's own models, one at a time.

    Attributes:
      bundle: of the device.
      task: of its owner.
    """

    bundle: ClientBundle
    task: TorchTask | LinearTask
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)
    _latest: tuple[str, tuple[Arrays, Choice]] = ("", ({}, Choice(SHARED, 0.0, 0, {})))

    @property
    def path(self) -> Path:
        """File of the own model."""
        return self.bundle.state / OWN_MODEL

    def make_missing(self) -> None:
        """Make and store the own model of the last final model, unless it is there and the owner's choice is the same.

        Raises:
          OSError: a file cannot be read or written.
        """
        final = final_model(self.bundle.state)
        if final is None:
            return
        if layers_of_run(self.bundle.state, self.bundle.settings.task, final.run):
            return  # with these layers that model is this device's own already
        keys = plain_of(self.bundle.settings.personal)
        own = self._stored()
        if own is not None and (own.shared, own.keys) == (final.sha256, keys):
            return
        logger.info("training an own model from that of run %s", final.run)
        rows, moments = read_rows(self.bundle.state) or self._usual_rows, final.moments or "null"
        arrays, choice = self._made(final.arrays, rows, scaling_of(read_json(moments)))
        write_own(self.path, OwnModel(final.run, final.sha256, choice, keys, arrays))
        logger.info("the own model is stored; `fedveil client status` says which it is")

    def gains(self, shared: Arrays, order: TrainingOrder, metric: str) -> dict[str, float]:
        """Return what the own model gains in a metric, as of `gains_of`; nothing if it cannot be made.

        Args:
          shared: arrays of the evaluated model.
          order: of the evaluation, which says what rows are held out.
          metric: name of the metric.
        """
        assert order.held_out is not None  # an evaluation without it is declined
        rows = read_rows(self.bundle.state) or self._usual_rows
        rows = replace(rows, share=order.held_out, alone=False, group_equal_rows=order.group_equal_rows)
        try:
            _, choice = self._made(shared, rows, scaling_of(order.moments))
        except Exception:
            logger.exception("the own model is not made; the evaluation goes on without it")
            return {}
        return gains_of(choice.columns, metric)

    @property
    def _usual_rows(self) -> TrainedRows:
        """Split of the rows of a device that took part in no round."""
        return TrainedRows(self.bundle.settings.personal.share)

    def _stored(self) -> OwnModel | None:
        """Return the stored own model; None if there is none, or it is damaged."""
        try:
            return read_own(self.path)
        except Refusal as refusal:
            logger.warning("%s", refusal)
            return None

    def _made(self, shared: Arrays, rows: TrainedRows, moments: str) -> tuple[Arrays, Choice]:
        """Return the own model from a shared one and its choice; made anew unless it was the last one."""
        shared = {name: shared[name] for name in sorted(shared)}
        with self._one_at_a_time:
            key = hashlib.sha256(f"{hash_of(shared)} {rows} {moments}".encode()).hexdigest()
            if self._latest[0] != key:
                personal = self.bundle.settings.personal
                draws = int(key[:15], 16)  # below 2^60: the same model gives the same draws
                self._latest = key, self.task.own_model(shared, rows, personal, moments, draws)
            return self._latest[1]


@contextmanager
def making_own_models(models: OwnModels) -> Generator[Wake]:
    """Make the missing own model now, and after each call of what is yielded; at the end, finish what was begun.

    A device that is killed meanwhile makes it after its next start.
    """
    calls = SimpleQueue[bool]()

    def work() -> None:
        while calls.get():
            _make(models)

    thread = threading.Thread(target=work, name="own model")
    thread.start()
    calls.put(True)
    try:
        yield lambda: calls.put(True)
    finally:
        calls.put(False)
        thread.join()


def _make(models: OwnModels) -> None:
    """Make the missing own model; a failure is logged, and the shared one serves."""
    try:
        models.make_missing()
    except OSError as error:
        logger.error("the own model is not stored in %s (%s)", models.bundle.state, error)
    except Exception:
        logger.exception("the own model is not made; the shared one serves")


def describe(choice: Choice) -> str:
    """Return which model was chosen; like the figures it is for the owner's screen, and not for a log."""
    names = {SHARED: "the shared one", LOCAL: "one of this device's rows alone"}
    return names.get(choice.name, f"the shared one trained on, {choice.share:.0%} of the way")


def describe_figures(choice: Choice) -> str:
    """Return what the held-out rows say of the three models, for the owner's screen; empty without figures."""
    metric = next((each for each in choice.columns.get(PERSONAL, {}) if each != LOSS), None)
    if metric is None:
        return ""
    values = [(each, choice.columns[each].get(metric, math.nan)) for each in COLUMNS]
    figures = ", ".join(f"{value:.4g} {name.replace('_', ' ')}" for name, value in values)
    return f"{metric} {figures}, on {choice.rows} held-out rows"
