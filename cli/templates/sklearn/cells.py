"""A task with scikit-learn's data and one of its models: is a tumour malignant, by the cells that five clinics saw?"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from fedveil.tasks import Examples

CLINICS, HELD_OUT, CLASSES, FEATURES = 5, 119, 2, 30
# Public ranges of the columns, such as a laboratory would give. Those of the patients would tell about them.
LARGEST = np.array([30, 40, 200, 2600, 0.2, 0.4, 0.5, 0.25, 0.35, 0.1], np.float32)
RANGES = np.concatenate([LARGEST, LARGEST / 5, LARGEST * 1.6])


class Cells:
    """Logistic regression over the records of five clinics."""

    simulated = True  # the data are public; say False once they are real
    num_clients = CLINICS

    @cached_property
    def table(self) -> Examples:
        inputs, targets = load_breast_cancer(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(targets))
        scaled = (inputs[order] / RANGES).astype(np.float32)
        return Examples(torch.from_numpy(scaled), torch.from_numpy(targets[order].astype(np.int64)))

    def model(self) -> nn.Module:
        """Return a new model; the same values on every call."""
        net = nn.Linear(FEATURES, CLASSES)
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
        """Return the records of one clinic."""
        return Examples(
            self.table.inputs[HELD_OUT + client :: CLINICS], self.table.targets[HELD_OUT + client :: CLINICS]
        )

    def held_out(self) -> Examples:
        """Return what the model is never trained on."""
        return Examples(self.table.inputs[:HELD_OUT], self.table.targets[:HELD_OUT])


def as_sklearn(run: Path) -> LogisticRegression:
    """Return the model of a run folder as scikit-learn's own, which predicts from inputs divided by RANGES."""
    arrays = load_file(run / "model.safetensors")
    model = LogisticRegression()
    model.classes_ = np.arange(CLASSES)
    model.coef_ = np.diff(arrays["weight"], axis=0)
    model.intercept_ = np.diff(arrays["bias"])
    return model
