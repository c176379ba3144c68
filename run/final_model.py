"""Model that a run leaves: the last one, or the mean of the last ones, with what its task declares about released models.

It is computed from released models and public declarations alone, so that it costs no epsilon. Rounds, checkpoints and a
resumed run go on from the models before it; the run's manifest, and so its ledger, has the hash of this one.
"""

from __future__ import annotations

from ..server.checkpoint import Arrays, State
from ..tasks.protocol import Task


def final_model(task: Task, state: State) -> Arrays:
    """Return the arrays of a run's model by its state; `state.arrays` itself if it is the last model as it is."""
    from ..tasks.arrays import final_arrays  # torch, which a plan does without

    return final_arrays(task, state.model if state.average.models else state.arrays)
