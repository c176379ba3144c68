"""Origin of a run, which the first of its reservations on a ledger has: who began it, on which data, roster and model."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from ..messages.model_difference import hash_of
from ..privacy.ledger.acts import acting_user
from ..tasks.protocol import PredictingTask

if TYPE_CHECKING:
    from ..modes.federation import Federation
    from ..server.checkpoint import Arrays


def origin_of(federation: Federation, arrays: Arrays | None = None) -> dict[str, Any]:
    """Return the origin of a run or question on the population's ledger, which others may read.

    All of it is public: data are named by their task, `task.data_id` and the hash of the task's public files, such as the
    schema, and never by a hash of private records, which would let a reader test guesses of them.

    Args:
      federation: whose clients pay.
      arrays: model from which the run goes on; None for a question.
    """
    settings, task = federation.settings, federation.task
    origin: dict[str, Any] = {"who": acting_user(), "task": settings.task.own or settings.task.option}
    if settings.task.data_id:
        origin["data"] = settings.task.data_id
    origin["clients"] = round(federation.cohort.expected_size(federation.declared_clients), 1)
    if isinstance(task, PredictingTask):
        files = sorted(task.beside_the_model().items())
        origin["schema"] = hashlib.sha256(b"".join(content for _, content in files)).hexdigest()
    for roster in federation.population.rosters:
        origin["roster"] = {"version": roster.version, "hash": roster.hash.hex()}
    if arrays is not None:
        origin["model"] = hash_of(arrays)
    return origin
