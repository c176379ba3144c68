"""Estimators of scikit-learn train by their own `partial_fit`, from the model's coefficients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedProx
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression, Perceptron, SGDClassifier, SGDRegressor
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler

import fedveil as fv
from fedveil.messages.local_training import LocalTraining
from fedveil.tasks.adapters.sklearn import SklearnTask

pytestmark = pytest.mark.usefixtures("fast_runs")


def shop(number: int, classes: int = 2) -> tuple[Any, Any]:
    inputs = np.random.default_rng(number).normal(size=(30, 4)).astype(np.float32)
    return inputs, np.digitize(inputs.sum(1), [0.0, 2.0][: classes - 1]) + 5  # classes 5, 6 and 7


def task_of(estimator: Any, make: Any = shop) -> SklearnTask:
    return SklearnTask(estimator, [make(n) for n in range(40)], make(999), simulated=True)


def numbers(number: int) -> tuple[Any, Any]:
    inputs, _ = shop(number)
    return inputs, inputs @ np.array([1.0, -1.0, 0.5, 0.0]) + 0.3


def slow(kind: type, **options: Any) -> Any:
    return kind(learning_rate="constant", eta0=0.05, random_state=0, **options)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_round_is_the_partial_fit_of_the_estimator(classes: int) -> None:
    task = task_of(slow(SGDClassifier, loss="log_loss"), lambda n: shop(n, classes))
    inputs, targets = shop(0, classes)
    theirs = slow(SGDClassifier, loss="log_loss")
    arrays = task.arrays()
    for _ in range(2):  # rounds of two epochs; constant rates remember nothing between them
        arrays = task.fit(arrays, inputs, targets, LocalTraining(local_epochs=2))
        for _ in range(2):
            theirs.partial_fit(inputs, targets, classes=np.arange(5, 5 + classes))
    np.testing.assert_allclose(arrays["coef_"], theirs.coef_, rtol=1e-5)
    np.testing.assert_allclose(arrays["intercept_"], theirs.intercept_, rtol=1e-5)
    predicted = task.predict(arrays, inputs)
    assert (predicted.argmax(1) + 5 == theirs.predict(inputs)).all()
    if classes == 2:
        right = theirs.predict_proba(inputs)[np.arange(30), targets - 5]
        assert task.loss(predicted, targets) == pytest.approx(-np.log(right).mean(), rel=1e-4)


@pytest.mark.parametrize("estimator", [slow(SGDClassifier), Perceptron()])
def test_a_classifier_learns_at_client_level(estimator: Any) -> None:
    task = task_of(estimator, lambda n: shop(n, 3))
    run = fv.simulate(task, privacy=fv.NoPrivacy(), cohort="all", num_rounds=3, quiet=True)
    assert run.metrics["accuracy"] > 0.65 and run.result["task"] == type(estimator).__name__
    run = fv.simulate(task, privacy=fv.ClientCentral(target_delta=1e-2), num_rounds=3, quiet=True)
    assert run.status == "completed" and run.epsilon <= 3


def test_a_regressor_learns() -> None:
    task = task_of(slow(SGDRegressor), numbers)
    run = fv.simulate(task, privacy=fv.NoPrivacy(), cohort="all", num_rounds=5, quiet=True)
    assert run.metrics["mae"] < 0.2


def test_unseeded_estimator_shuffles_by_the_runs_seed() -> None:
    task, (inputs, targets) = task_of(SGDClassifier(loss="log_loss")), shop(0)

    def fitted(seed: int) -> Any:
        torch.manual_seed(seed)
        return task.fit(task.arrays(), inputs, targets, LocalTraining())["coef_"]

    assert (fitted(1) == fitted(1)).all() and (fitted(1) != fitted(2)).any()


@pytest.mark.parametrize(
    ("estimator", "said"),
    [
        (LogisticRegression(), "LogisticRegression.*no partial_fit"),
        (GaussianNB(), "GaussianNB.*no coef_"),
        (MiniBatchKMeans(n_clusters=1), "MiniBatchKMeans.*no coef_"),
        (SGDClassifier(average=True), "SGDClassifier.average=True"),
        (SGDClassifier(early_stopping=True), "SGDClassifier.*early_stopping"),
        (SGDClassifier(class_weight="balanced"), "SGDClassifier.*balanced"),
    ],
)
def test_estimator_without_averages_is_refused_by_name(estimator: Any, said: str) -> None:
    with pytest.raises(fv.Refusal, match=said):
        task_of(estimator)


def test_single_records_of_an_estimator_cannot_be_hidden() -> None:
    with pytest.raises(fv.Refusal, match=r"SklearnTask\.fit supports only client-level privacy"):
        fv.simulate(task_of(SGDClassifier()), privacy=fv.Record(target_delta=1e-2), quiet=True)


@pytest.mark.parametrize("strategy", ["fedprox", FedProx(proximal_mu=0.5)])
def test_unknown_pull_is_refused_before_anything_is_spent(tmp_path: Path, strategy: Any) -> None:
    task = task_of(SGDClassifier())
    with pytest.raises(fv.Refusal, match="strategy='fedprox': SGDClassifier has its own optimizer"):
        fv.simulate(task, strategy=strategy, num_rounds=1, quiet=True, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_target_of_no_class_is_refused_before_the_run() -> None:
    task = SklearnTask(SGDClassifier(), [shop(0, 3)], shop(1), simulated=True)
    with pytest.raises(fv.Refusal, match=r"client 0: targets='[0-9]+ of no class': the classes are 5, 6"):
        fv.simulate(task, privacy=fv.NoPrivacy(), cohort="all", num_rounds=1, quiet=True)


def named(number: int) -> tuple[Any, Any]:
    inputs, targets = shop(number, 3)
    return inputs, np.array(["yes", "no", "perhaps"])[targets - 5]


NO_NOISE: dict[str, Any] = {"privacy": fv.NoPrivacy(), "cohort": "all", "num_rounds": 3, "quiet": True}


def test_a_run_gives_back_a_fitted_estimator() -> None:
    task = task_of(slow(SGDClassifier, loss="log_loss"), lambda n: shop(n, 3))
    run = fv.simulate(task, **NO_NOISE)
    inputs, targets = shop(999, 3)
    for given in (run, run.model, {name: value.numpy() for name, value in run.model.state_dict().items()}):
        fitted = task.estimator(given)
        assert fitted.classes_.tolist() == [5, 6, 7] and fitted.coef_.shape == (3, 4)
        np.testing.assert_array_equal(fitted.coef_, run.model.state_dict()["coef_"].numpy())
        assert (fitted.predict(inputs) == targets).mean() == pytest.approx(run.metrics["accuracy"])
    assert SGDClassifier().set_params(**fitted.get_params()).get_params() == fitted.get_params()
    assert (
        SklearnTask(SGDClassifier(), [shop(0)], shop(1))
        .estimator(task.arrays() | {"coef_": np.ones((1, 4)), "intercept_": np.ones(1)})
        .get_params()["random_state"]
        is None
    )
    numbers_task = task_of(slow(SGDRegressor), numbers)
    fitted = numbers_task.estimator(fv.simulate(numbers_task, **NO_NOISE))
    assert np.abs(fitted.predict(inputs) - numbers(999)[1]).mean() < 0.5


def test_classes_may_be_words_that_are_declared() -> None:
    words = ["no", "perhaps", "yes"]
    estimator = slow(SGDClassifier, loss="log_loss")
    clients = [named(n) for n in range(40)]
    task = SklearnTask(estimator, clients, named(999), classes=words[::-1], simulated=True)
    run = fv.simulate(task, **NO_NOISE)
    inputs, targets = named(999)
    fitted = task.estimator(run)
    assert fitted.classes_.tolist() == words
    assert (fitted.predict(inputs) == targets).mean() == pytest.approx(
        run.metrics["accuracy"]
    ) and run.metrics["accuracy"] > 0.65
    with pytest.raises(fv.Refusal, match=r"words in classes="):
        SklearnTask(estimator, clients, named(999), simulated=True)
    with pytest.raises(fv.Refusal, match=r"held-out data: targets=.*the classes are no, yes"):
        SklearnTask(estimator, clients, named(999), classes=["no", "yes"], simulated=True)


def test_pipeline_takes_steps_without_fitting_alone() -> None:
    public = StandardScaler().fit(shop(12345)[0])
    for first in (public, Normalizer(), FunctionTransformer(lambda each: each * 2)):
        task = task_of(make_pipeline(first, "passthrough", slow(SGDClassifier)), lambda n: shop(n, 3))
        run = fv.simulate(task, **NO_NOISE)
        inputs, targets = shop(999, 3)
        fitted = task.estimator(run)
        assert isinstance(fitted, Pipeline) and run.result["task"] == "SGDClassifier"
        assert (fitted.predict(inputs) == targets).mean() == pytest.approx(run.metrics["accuracy"])
    with pytest.raises(fv.Refusal, match=r"estimator='StandardScaler': .*public data first"):
        task_of(make_pipeline(StandardScaler(), slow(SGDClassifier)))
