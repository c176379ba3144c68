"""A client's own model: training, measurement and choice, and the file that holds it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.personal.choice import (
    TEMPERATURES,
    Decision,
    Evidence,
    FoldMeans,
    choice_of,
    folds_of,
)
from fedveil.personal.own_model import Rows, own_model
from fedveil.personal.state import OwnModel, read_own, write_own
from fedveil.personal.training import OwnTraining, train_own
from fedveil.tasks.arrays import read_arrays

OWN = OwnTraining(steps=20, learning_rate=0.5, batch_size=10)


@dataclass
class Lines:
    """Two classes on either side of a line through the origin; a client's line may be the opposite one."""

    flipped: bool = False
    simulated: bool = True
    num_clients: int = 1

    def model(self) -> nn.Module:
        net = nn.Linear(2, 2)
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        return net

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(1) == targets).float().mean())}

    def client_data(self, client: int) -> fv.Examples:
        inputs = torch.randn(50, 2, generator=torch.Generator().manual_seed(client))
        return fv.Examples(inputs, ((inputs[:, 0] > 0) ^ self.flipped).long())

    def held_out(self) -> fv.Examples:
        return self.client_data(1000)


def rows_of(task: Lines, train: int = 30) -> Rows:
    data = task.client_data(0)
    return Rows(
        fv.Examples(data.inputs[:train], data.targets[:train]),
        fv.Examples(data.inputs[30:], data.targets[30:]),
    )


def shared_of(task: Lines, size: float = 5.0) -> dict[str, np.ndarray]:
    """Return the arrays of a model that classifies the plain lines."""
    arrays = read_arrays(task.model())
    return {**arrays, "weight": np.array([[-size, 0], [size, 0]], np.float32)}


def test_a_client_unlike_the_others_leaves_the_shared_model() -> None:
    task = Lines(flipped=True)
    _, choice = own_model(task, task.model(), rows_of(task), shared_of(task), OWN, 0)
    assert choice.name != "shared"
    assert choice.columns["shared"]["accuracy"] < 0.2
    assert choice.columns["personal"]["accuracy"] > 0.8


def test_a_client_that_own_steps_ruin_keeps_the_shared_model() -> None:
    task = Lines()
    rows = rows_of(task)
    wrong = dataclasses.replace(rows, training=fv.Examples(rows.training.inputs, 1 - rows.training.targets))
    shared = shared_of(task)
    _, choice = own_model(task, task.model(), wrong, shared, dataclasses.replace(OWN, learning_rate=5.0), 0)
    assert choice.name == "shared"
    assert choice.columns["personal"] == choice.columns["shared"]
    assert choice.columns["local_only"]["accuracy"] < 0.2


def test_a_client_whose_own_rows_say_more_has_a_model_of_them() -> None:
    task = Lines(flipped=True)
    arrays, choice = own_model(task, task.model(), rows_of(task), shared_of(task, 500.0), OWN, 0)
    assert (choice.name, choice.share) == ("local_only", 0.0)
    assert np.abs(arrays["weight"]).max() < 100


def test_the_same_key_gives_the_same_bits() -> None:
    task = Lines(flipped=True)
    runs = [own_model(task, task.model(), rows_of(task), shared_of(task), OWN, key) for key in (3, 3, 4)]
    same, again, other = (arrays["weight"].tobytes() for arrays, _ in runs)
    assert same == again
    assert same != other


@pytest.mark.parametrize("train", [0, 30])
def test_a_client_without_rows_to_train_or_choose_on_has_the_shared(train: int) -> None:
    task = Lines(flipped=True)
    rows = rows_of(task, train)
    if train:
        rows = Rows(rows.training, fv.Examples(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)))
    arrays, choice = own_model(task, task.model(), rows, shared_of(task), OWN, 0)
    assert (choice.name, choice.columns) == ("shared", {})
    np.testing.assert_array_equal(arrays["weight"], shared_of(task)["weight"])


def test_only_layers_that_match_train() -> None:
    task = Lines(flipped=True)
    model, shared = task.model(), shared_of(task)
    train_own(task, model, rows_of(task).training, shared, dataclasses.replace(OWN, layers=("b*",)), 0)
    trained = read_arrays(model)
    np.testing.assert_array_equal(trained["weight"], shared["weight"])
    assert np.abs(trained["bias"]).max() > 0


def test_layers_that_match_nothing_are_refused_by_names() -> None:
    task, own = Lines(), dataclasses.replace(OWN, layers=("head.*",))
    with pytest.raises(Refusal, match="matches no parameter; the model has bias, weight"):
        train_own(task, task.model(), rows_of(task).training, shared_of(task), own, 0)


@pytest.mark.parametrize("pull", [0.1, 10.0, 1000.0])
def test_a_stronger_pull_stays_nearer_to_the_shared_model(pull: float) -> None:
    task = Lines(flipped=True)
    distances: list[float] = []
    for each in (pull / 10, pull):
        model = task.model()
        own = dataclasses.replace(OWN, pull=each)
        train_own(task, model, rows_of(task).training, shared_of(task), own, 0)
        distances.append(float(np.abs(read_arrays(model)["weight"] - shared_of(task)["weight"]).max()))
    assert distances[1] < distances[0]


def test_ditto_reaches_the_minimum_of_its_objective() -> None:
    # One row at 1 with squared error / 2 has its minimum between 1 and the shared 0: at 1 / (1 + pull).
    class Mean(Lines):
        def model(self) -> nn.Module:
            net = nn.Linear(1, 1, bias=False)
            nn.init.zeros_(net.weight)
            return net

        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return ((outputs[:, 0] - targets) ** 2).mean() / 2

    task, model = Mean(), Mean().model()
    data = fv.Examples(torch.ones(1, 1), torch.ones(1))
    own = OwnTraining(steps=2000, learning_rate=0.05, batch_size=1, pull=3.0)
    train_own(task, model, data, read_arrays(task.model()), own, 0)
    np.testing.assert_allclose(read_arrays(model)["weight"], [[1 / 4]], rtol=0.02)


def test_a_persons_rows_are_in_one_fold() -> None:
    persons = [f"p{row % 7}" for row in range(35)]
    folds = folds_of(35, persons)
    assert sorted(np.concatenate(folds).tolist()) == list(range(35))
    assert [len({persons[row] for row in fold}) for fold in folds] == [1] * 7
    assert [len(fold) for fold in folds_of(3)] == [1, 1, 1]
    assert len(folds_of(25)) == 10


def of_losses(*losses: float) -> FoldMeans:
    return FoldMeans(np.array([losses]), {"accuracy": -np.array(losses)})


def evidence_of(*models: FoldMeans) -> Evidence:
    losses = np.array([each.losses for each in models])
    return Evidence(losses, np.ones(losses.shape[-1]))


def test_the_figure_of_a_fold_is_of_what_the_others_choose() -> None:
    points = [of_losses(0, 100), of_losses(50.5, 50.5), of_losses(100, 0)]
    local = of_losses(1000, 1000)
    decisions = [evidence_of(*points, local).decide(fold) for fold in (-1, 0, 1)]
    assert decisions == [Decision(False, 0.375), Decision(False, 1.0), Decision(False, 0.0)]
    measured = dict(zip((0.0, 0.5, 1.0), points, strict=True)) | {0.375: points[1]}
    choice = choice_of(np.ones(2), decisions, measured, local)
    assert choice.columns["personal"]["loss"] == 100  # each fold errs, since it decided nothing
    assert choice.columns["shared"]["accuracy"] == -50
    assert (choice.name, choice.share, choice.rows) == ("own", 0.375, 2)


def test_a_model_that_diverged_is_never_chosen() -> None:
    good, bad = of_losses(1, 1), of_losses(np.nan, np.inf)
    assert evidence_of(good, bad, bad, bad).decide() == Decision(False, 0.0)
    assert evidence_of(bad, bad, good, bad).decide() == Decision(False, 1.0)
    assert evidence_of(bad, bad, bad, good).decide() == Decision(True, 0.0)
    assert evidence_of(bad, bad, bad, bad).decide() == Decision(False, 0.0)


def test_without_evidence_the_prior_decides() -> None:
    one = evidence_of(of_losses(5), of_losses(0), of_losses(0), of_losses(0))
    assert one.decide(0) == Decision(False, 0.375)


def test_sureness_alone_does_not_win() -> None:
    # Both are right on 2 of 3 rows; the released model is less sure, and the own one worse on the third.
    logits = {"shared": [0.2, 0.2, -0.1], "own": [8.0, 8.0, -12.0]}
    margins = {name: np.array(values) for name, values in logits.items()}
    losses = {
        name: np.array([np.log1p(np.exp(-factor * each)) for factor in TEMPERATURES])
        for name, each in margins.items()
    }
    models = [losses["shared"], losses["shared"], losses["own"], losses["own"]]
    decision = Evidence(np.array(models), np.ones(3)).decide()
    assert not decision.is_local
    assert decision.share < 0.5


def test_few_held_out_rows_are_helped_by_training_rows() -> None:
    task = Lines(flipped=True)
    rows, bits = rows_of(task), []
    for count in (1, 10):
        few = fv.Examples(rows.held_out.inputs[:count], rows.held_out.targets[:count])
        choice = own_model(task, task.model(), Rows(rows.training, few), shared_of(task), OWN, 0)[1]
        bits.append(choice.columns["personal"]["accuracy"])
        assert choice.name != "shared"
    assert bits[0] == 1  # the one row is of a model that the training rows chose


def test_an_own_model_is_read_as_it_was_written(tmp_path: Path) -> None:
    task, path = Lines(flipped=True), tmp_path / "personal.safetensors"
    arrays, choice = own_model(task, task.model(), rows_of(task), shared_of(task), OWN, 0)
    assert read_own(path) is None
    write_own(path, OwnModel("run", "ab" * 32, choice, {"steps": 20, "layers": ()}, arrays))
    assert path.stat().st_mode & 0o777 == 0o600
    own = read_own(path)
    assert own is not None
    assert (own.run, own.shared, own.choice, own.keys) == (
        "run",
        "ab" * 32,
        choice,
        {"steps": 20, "layers": []},
    )
    np.testing.assert_array_equal(own.arrays["weight"], arrays["weight"])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(Refusal, match="delete it, and train the client's own model again"):
        read_own(path)
