"""Scikit-learn task: an estimator that trains by `partial_fit` and whose coefficients are arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ...messages.local_training import LocalTraining
from ..numpy_task import Arrays

COEFFICIENTS = ("coef_", "intercept_")


class SklearnTask:
    """NumPy task from a linear estimator of scikit-learn, such as SGDClassifier, SGDRegressor or Perceptron.

    A client's estimator is new in every round and starts from the model's coefficients. It uses its own learning rates.

    Args:
      estimator: an estimator that is not fitted, which is copied; or a pipeline that ends with one, after transformers
        without a state or fitted on public data.
      clients: inputs and targets of each client, a pair of arrays; classes are whole numbers or words.
      held_out: inputs and targets on which the model is evaluated; their classes are all classes by default.
      classes: all classes, public; needed if they are words.
      simulated: whether the data are public or synthetic.

    Raises:
      Refusal: the estimator has no `partial_fit` or no such coefficients, or averages them over steps; or a transformer
        of its pipeline would have to be fitted.
    """

    def __init__(
        self,
        estimator: Any,
        clients: Sequence[Any],
        held_out: Any,
        *,
        classes: Sequence[int] | Sequence[str] | None = None,
        simulated: bool = False,
    ) -> None:
        from sklearn.base import is_classifier

        self.simulated, self.num_clients = simulated, len(clients)
        self._transformers, estimator = _split_pipeline(estimator)
        self.name = type(estimator).__name__
        self._estimator, self._clients, self._held_out = estimator, clients, held_out
        if not hasattr(estimator, "partial_fit"):
            remedy = "it has no partial_fit; use one that has, such as SGDClassifier or SGDRegressor"
            raise Refusal("estimator", self.name, remedy)
        if getattr(estimator, "average", False):
            remedy = "its average over steps cannot be averaged over clients; leave it out"
            raise Refusal(f"{self.name}.average", estimator.average, remedy)
        self._classes: NDArray[Any] | None = None  # numbers of the classes; None for a regressor
        self._words: NDArray[Any] | None = None  # words of the classes; None if they are numbers
        if is_classifier(estimator):
            self._classes = np.unique(np.asarray(held_out[1] if classes is None else classes))
            if self._classes.dtype.kind == "U" and classes is not None:
                self._words, self._classes = self._classes, np.arange(len(self._classes))
            if self._classes.dtype.kind not in "iu" or len(self._classes) < 2:
                remedy = "give at least two whole numbers, in classes= or in the held-out targets, or words in classes="
                raise Refusal("classes", self._classes.tolist(), remedy)
        inputs, targets = self.held_out()
        self._row_of_zeros = inputs[:1] * 0  # gives `estimator` the width of the inputs
        self._zero_coefficients = self._check_coefficients(inputs)
        estimator = self._with(self._zero_coefficients, inputs)
        self._partial_fit(estimator, inputs[:2], targets[:2])  # shows errors early

    def _check_coefficients(self, inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return coefficients of zero; refuse an estimator that has none, or cannot be fitted step by step."""
        try:
            estimator = self._new_estimator(inputs)
        except ValueError as error:  # early stopping, balanced weights
            raise Refusal("estimator", self.name, " ".join(str(error).split())) from error
        arrays = {name: getattr(estimator, name, None) for name in COEFFICIENTS}
        if not all(isinstance(value, np.ndarray) for value in arrays.values()):
            remedy = "it has no coef_ and intercept_ to average; use a linear one"
            raise Refusal("estimator", self.name, remedy)
        return {name: np.zeros_like(value) for name, value in arrays.items()}

    def _new_estimator(self, inputs: NDArray[Any], seed: int = 0) -> Any:
        """Return a copy fitted to a row of zeros, for its coefficients and classes; `seed` if the user set none."""
        from sklearn.base import clone

        estimator: Any = clone(self._estimator)
        if "random_state" in (options := estimator.get_params()) and options["random_state"] is None:
            estimator.set_params(random_state=seed)
        targets = np.zeros(1) if self._classes is None else self._classes[:1]
        self._partial_fit(estimator, np.zeros((1, inputs.shape[1]), inputs.dtype), targets)
        return estimator

    def _partial_fit(self, estimator: Any, inputs: NDArray[Any], targets: NDArray[Any]) -> None:
        options = {"classes": self._classes} if self._classes is not None else {}
        estimator.partial_fit(inputs, targets, **options)

    def _with(self, arrays: Arrays, inputs: NDArray[Any], seed: int = 0) -> Any:
        """Return a new estimator for inputs of this width, with these coefficients and its count of steps reset."""
        estimator = self._new_estimator(inputs, seed)
        for name in COEFFICIENTS:
            setattr(estimator, name, np.array(arrays[name], getattr(estimator, name).dtype))
        if hasattr(estimator, "t_"):
            estimator.t_ = 1.0
        return estimator

    def arrays(self) -> Arrays:
        """Return coefficients of zero."""
        return {name: value.copy() for name, value in self._zero_coefficients.items()}

    def check_training(self, training: LocalTraining) -> None:
        """Refuse FedProx, before anything is spent: its pull cannot enter an estimator's own steps."""
        if training.proximal_mu:
            raise Refusal("strategy", "fedprox", f"{self.name} has its own optimizer; use another strategy")

    def fit(
        self, arrays: Arrays, inputs: NDArray[Any], targets: NDArray[Any], training: LocalTraining
    ) -> Arrays:
        """Return the coefficients after a pass over the data for each local epoch.

        Args:
          arrays: the coefficients.
          inputs: shape (n, features).
          targets: shape (n,).
          training: epochs of this round.
        """
        import torch

        self.check_training(training)
        # The caller has seeded torch's generator for the client; the estimator's seed is drawn from it.
        estimator = self._with(arrays, inputs, int(torch.randint(2**31 - 1, ())))
        for _ in range(training.local_epochs):
            self._partial_fit(estimator, inputs, targets)
        return {name: getattr(estimator, name) for name in COEFFICIENTS}

    def predict(self, arrays: Arrays, inputs: NDArray[Any]) -> NDArray[Any]:
        """Return a regressor's predictions, shape (n,), or a classifier's score for each class, shape (n, classes).

        Args:
          arrays: the coefficients.
          inputs: shape (n, features).
        """
        estimator = self._with(arrays, inputs)
        if self._classes is None:
            return estimator.predict(inputs)
        scores = estimator.decision_function(inputs)
        # Two classes have one score, in favour of the second: the two scores made of it differ by it.
        return scores if scores.ndim == 2 else np.stack([-scores / 2, scores / 2], 1)

    def loss(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        """Return the mean cross-entropy of a classifier's scores, or half of a regressor's mean squared error.

        Args:
          outputs: of `predict`.
          targets: shape (n,).
        """
        if self._classes is None:
            return float(np.mean((outputs - targets) ** 2) / 2)
        score_of_target = outputs[np.arange(len(outputs)), np.searchsorted(self._classes, targets)]
        highest = outputs.max(1)
        log_sum_exp = highest + np.log(np.exp(outputs - highest[:, None]).sum(1))
        return float(np.mean(log_sum_exp - score_of_target))

    def metrics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
        """Return a classifier's accuracy, or a regressor's mean absolute error.

        Args:
          outputs: of `predict`.
          targets: shape (n,).
        """
        if self._classes is None:
            return {"mae": float(np.abs(outputs - targets).mean())}
        return {"accuracy": float((self._classes[outputs.argmax(1)] == targets).mean())}

    def estimator(self, model: Any) -> Any:
        """Return a fitted copy of the estimator, or of its pipeline, with a model's `coef_` and `intercept_`.

        Args:
          model: a finished run, its model, or arrays by name.
        """
        state: Any = getattr(model, "model", model)
        state = state.state_dict() if hasattr(state, "state_dict") else state
        fitted = self._with({name: np.asarray(state[name]) for name in COEFFICIENTS}, self._row_of_zeros)
        fitted.set_params(**self._estimator.get_params())
        if self._words is not None:
            fitted.classes_ = self._words
        if not self._transformers:
            return fitted
        from sklearn.pipeline import make_pipeline

        return make_pipeline(*self._transformers, fitted)

    def client_data(self, client: int) -> Any:
        """Return a client's arrays; refuse an unknown class."""
        return self._arrays(self._clients[client], f"client {client}")

    def held_out(self) -> Any:
        """Return the held-out arrays."""
        return self._arrays(self._held_out, "held-out data")

    def _arrays(self, pair: Any, owner: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return transformed inputs in float32 and targets as numbers; refuse an unknown class of `owner`."""
        inputs, targets = pair[0], np.asarray(pair[1])
        for transformer in self._transformers:
            inputs = transformer.transform(inputs)
        inputs = inputs.toarray() if hasattr(inputs, "toarray") else inputs
        names = self._classes if self._words is None else self._words
        if names is not None and not (valid := np.isin(targets, names)).all():
            remedy = f"the classes are {', '.join(map(str, names))}; name all of them in classes="
            raise Refusal(f"{owner}: targets", f"{int((~valid).sum())} of no class", remedy)
        if self._words is not None:
            targets = np.searchsorted(self._words, targets)
        return np.asarray(inputs, np.float32), targets


def _split_pipeline(estimator: Any) -> tuple[tuple[Any, ...], Any]:
    """Return the transformers of a pipeline and its last step; refuse a transformer that is not fitted but must be."""
    from sklearn.exceptions import NotFittedError
    from sklearn.pipeline import Pipeline
    from sklearn.utils.validation import check_is_fitted

    if not isinstance(estimator, Pipeline):
        return (), estimator
    steps: list[Any] = [each for _, each in estimator.steps]
    transformers = tuple(each for each in steps[:-1] if each not in (None, "passthrough"))
    for each in transformers:
        try:
            check_is_fitted(each)
        except NotFittedError as error:
            remedy = "it would be fitted on clients' data: fit it on public data first, or use one without a state, such as Normalizer"
            raise Refusal("estimator", type(each).__name__, remedy) from error
    return transformers, steps[-1]
