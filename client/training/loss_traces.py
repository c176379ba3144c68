"""What a model remembers of each record, as its owner alone may see it: the loss of every record, round after round.

A record that the model learns by heart has a loss that first stays high and then falls; one that it understands falls at
once, and one that it never learns does not fall. Scores from such traces find the records that attacks find, without a
reference model (arXiv:2411.05743). The trace is a function of the owner's records: it stays in the owner's folder, and
nothing of it is ever sent.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from ...privacy.audit.kept_rows import append, rows_of
from ...privacy.audit.one_run import Scores
from ...tasks.mislabelled import losses_of
from ...tasks.protocol import Examples, Task

SUFFIX = ".losses"


def note(path: Path, number: int, task: Task, model: nn.Module, examples: Examples) -> None:
    """Add the loss of each record under the model that round `number` brought, before the client trains it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append(path, number, losses_of(task, model, examples).astype(np.float32))


def trace(path: Path) -> Scores:
    """The losses so far, (rounds, records); of the rounds since the records last changed in number."""
    rows = list(rows_of(path).values())
    same = [row for row in rows if len(row) == len(rows[-1])]
    return np.stack(same) if same else np.empty((0, 0))
