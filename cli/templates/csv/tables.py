"""A task that reads a folder of CSV files: each file is one client, its last column the label (0 or 1)."""

import csv
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from fedveil.tasks import Examples, check_examples

FOLDER = Path(__file__).parent / "data"
HELD_OUT = "held_out.csv"  # nobody's: the model is evaluated on it
CLASSES = 2


class Tables:
    """Binary classification of the rows of several owners' tables."""

    simulated = True  # the rows of the template are made up; say False once they are real

    def __init__(self, folder: str = str(FOLDER)) -> None:
        self.files = sorted(path for path in Path(folder).glob("*.csv") if path.name != HELD_OUT)
        self.folder = Path(folder)

    @property
    def num_clients(self) -> int:
        return len(self.files)

    @cached_property
    def columns(self) -> int:
        return self.held_out().inputs.shape[1]

    def model(self) -> nn.Module:
        """Return a new model; the same values on every call."""
        net = nn.Linear(self.columns, CLASSES)
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        return net

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the batch."""
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return means over the examples given."""
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client: int) -> Examples:
        """Return the rows of one owner's file."""
        return read(self.files[client])

    def held_out(self) -> Examples:
        """Return what the model is never trained on."""
        return read(self.folder / HELD_OUT)


def read(path: Path) -> Examples:
    """Return a table: inputs (rows, columns - 1) float32, targets (rows,) int64. The first line names the columns.

    Scale columns by ranges that are public. A mean or a deviation that is computed from the rows tells about them.
    """
    with open(path, newline="") as file:
        rows = torch.tensor([[float(cell) for cell in row] for row in list(csv.reader(file))[1:]])
    return check_examples(Examples(rows[:, :-1], rows[:, -1].long()), CLASSES, path.name)
