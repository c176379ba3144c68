"""Gains of a simulated client's own model, made from the model of an evaluation, as the client's device would report them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import RecordDict

from ..base.bounded_decoding import build, read_json
from ..messages import wire
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.statistics.evaluation import Evaluation
from ..tasks.data import data_of
from ..tasks.held_back import held_back_of
from .gains import gains_of
from .own_model import Evaluation as Arithmetic
from .own_model import Rows, own_model
from .simulation import STREAM
from .training import OwnTraining

if TYPE_CHECKING:
    from ..client.workbench import Workbench


def gains_at(bench: Workbench, client: int, content: RecordDict, evaluation: Evaluation) -> dict[str, float]:
    """Return what the client's own model gains over two others, as of `gains_of`.

    Args:
      bench: task and model; the model's arrays are replaced.
      client: number of the client, from 0.
      content: of the instruction, with the model.
      evaluation: of the instruction, with the parameters of own training.
    """
    own, settings = build(OwnTraining, read_json(evaluation.own)), bench.settings
    held_out = held_back_of(bench.task, client)
    assert held_out is not None  # or the evaluation was refused before
    rows = Rows(data_of(bench.task, client), held_out)
    key = int(Randomness(settings.seed).stream(STREAM, client).uint64(1)[0])
    shared, arithmetic = (
        wire.views(wire.only_arrays(content)),
        Arithmetic(bench.precision, settings.examples_at_once),
    )
    bench.forget()
    _, choice = own_model(bench.task, bench.model, rows, shared, own, key, arithmetic)
    return gains_of(choice.columns, evaluation.metric)
