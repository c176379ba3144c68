"""NumPy task: arrays in, arrays out, for models of other libraries than torch, such as scikit-learn or JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..base.refusal import Refusal
from ..messages.local_training import LocalTraining

if TYPE_CHECKING:
    from torch import Tensor, nn

Arrays = Mapping[str, NDArray[Any]]


@runtime_checkable
class NumpyTask(Protocol):
    """Task whose model is a dictionary of arrays. It supports client-level but not record-level privacy."""

    simulated: bool
    num_clients: int

    def arrays(self) -> Arrays:
        """Return the model's arrays by name, the same at every call; names have no dots."""
        ...

    def fit(
        self, arrays: Arrays, inputs: NDArray[Any], targets: NDArray[Any], training: LocalTraining
    ) -> Arrays:
        """Return the arrays after training on one client's data; store no state for the next client.

        Args:
          arrays: copies of the arrays that the server sent.
          inputs: shape (n, ...).
          targets: shape (n, ...).
          training: epochs, batch size and learning rate of this round, which the function may ignore.
        """
        ...

    def predict(self, arrays: Arrays, inputs: NDArray[Any]) -> NDArray[Any]:
        """Return the outputs of a model for inputs of shape (n, ...)."""
        ...

    def loss(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        """Return the mean loss over some examples, of which `predict` returned the outputs."""
        ...

    def metrics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
        """Return means over some examples by name; arguments as of `loss`."""
        ...

    def client_data(self, client: int) -> Any:
        """Return a client's inputs and targets, a pair of arrays."""
        ...

    def held_out(self) -> Any:
        """Return the inputs and targets on which models are evaluated, a pair of arrays."""
        ...


def as_task(value: object) -> object:
    """Return a `NumpyTask` wrapped as a `Task`; anything else unchanged."""
    return value if hasattr(value, "model") or not isinstance(value, NumpyTask) else FromArrays(value)


@dataclass(frozen=True)
class FromArrays:
    """`Task` made of the user's `NumpyTask`, `own`: its model holds the arrays, and `own.fit` trains them."""

    own: NumpyTask

    @property
    def name(self) -> str:
        return getattr(self.own, "name", "")

    @property
    def simulated(self) -> bool:
        return self.own.simulated

    @property
    def held_out_public(self) -> bool:
        return getattr(self.own, "held_out_public", self.own.simulated)

    @property
    def data_id(self) -> str | None:
        return getattr(self.own, "data_id", None)

    @property
    def num_clients(self) -> int:
        return self.own.num_clients

    def model(self) -> nn.Module:
        from torch import nn, tensor

        predict = self.own.predict

        class OfArrays(nn.Module):
            def forward(self, inputs: Tensor) -> Tensor:
                return tensor(predict(_arrays_of(self), inputs.numpy()))

        model = OfArrays()
        for name, value in self.own.arrays().items():
            if "." in name or hasattr(model, name):
                raise Refusal("arrays", name, "use a name without dots")
            array = tensor(np.asarray(value))
            if array.is_floating_point():
                model.register_parameter(name, nn.Parameter(array))
            else:  # which cannot be a parameter
                model.register_buffer(name, array)
        return model

    def train(self, model: nn.Module, data: Any, training: LocalTraining) -> None:
        import torch

        inputs, targets = data.batch(torch.arange(len(data)))
        before = _arrays_of(model)
        after = self.own.fit(before, inputs.numpy(), targets.numpy(), training)
        if after.keys() != before.keys():
            raise ValueError(f"fit returned {sorted(after)} for {sorted(before)}")
        from .arrays import load_arrays

        load_arrays(model, {name: np.asarray(value) for name, value in after.items()})

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        from torch import tensor

        return tensor(float(self.own.loss(outputs.numpy(), targets.numpy())))

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {name: float(v) for name, v in self.own.metrics(outputs.numpy(), targets.numpy()).items()}

    def client_data(self, client: int) -> Any:
        return self.own.client_data(client)

    def held_out(self) -> Any:
        return self.own.held_out()


def _arrays_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    """Return copies of the arrays in a model of `FromArrays`."""
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
