"""Canaries among a client's records: what they show on the client's own path of DP-SGD, and that nothing else changes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting.dp_event import GaussianDpEvent
from dp_accounting.pld import PLDAccountant
from shared.runs import run_quietly
from torch import nn

from fedveil.audit.probes import measure_records
from fedveil.audit.record_canaries import begin, coins_in, with_canary_rows
from fedveil.base.refusal import Refusal
from fedveil.cli.audit import audit_run
from fedveil.client.dp_sgd import train as dp_sgd
from fedveil.client.dp_sgd.train import PrivateSteps, chosen_engine, train_privately
from fedveil.messages.local_training import LocalTraining
from fedveil.privacy.accounting.gaussian import gaussian_delta, gaussian_mu
from fedveil.privacy.audit.client_rows import append, read_scores, step_ratio
from fedveil.privacy.audit.normality import estimate, separation
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.plan import Plan
from fedveil.strategies.record_plan import PoissonBatches
from fedveil.tasks import Examples
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.classification import Classification, classification
from fedveil.tasks.data import LazyExamples
from fedveil.tasks.partition import Partition

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

DELTA, CLIP, CANARIES = 1e-5, 0.5, 400


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))


def task_of(records: int = 60) -> Classification:
    generator = torch.Generator().manual_seed(1)
    data = Examples(torch.randn(records, 1, 6, 6, generator=generator), torch.arange(records) % 3)
    return classification(data, data, 3, Partition("iid", 1), network)


def budget(epsilon: float) -> Budget:
    return Budget(Unit.RECORD, epsilon, DELTA, Adjacency.ZERO_OUT)


def plan_of(epsilon: float, rate: float = 1.0, steps: int = 10) -> Plan:
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, PoissonBatches(rate, steps), CLIP, 1)
    return plan.calibrate(budget(epsilon))


def scored(plan: Plan, gradients: str = "auto", seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    task = task_of()
    coins = np.random.default_rng(seed).random(CANARIES) < 0.5
    model, data = task.model(), task.client_data(0)
    canaried = begin(model, task, data, coins, plan)
    engine = chosen_engine(gradients, canaried.model, canaried.examples)
    streams = (Randomness(seed).stream("batches"), Randomness(seed).stream("noise"))
    sgd, watch = LocalTraining(0.5, 1, 10), canaried.after_step
    train_privately(
        canaried.model, canaried.loss, canaried.examples, sgd, PrivateSteps(plan, *streams, watch), engine
    )
    return canaried.scores[coins], canaried.scores[~coins]


def refuted(scores: tuple[np.ndarray, np.ndarray], claim: Budget) -> bool:
    """Whether both tests find the claim all but impossible."""
    found = measure_records(*scores, claim, 1)
    assert found is not None
    return max(found.p_values.values()) < 1e-6


@pytest.mark.parametrize("gradients", ["hooks", "ghost", "book_keeping"])
def test_canaries_measure_the_claim_and_no_more(gradients: str) -> None:
    members, others = scored(plan_of(4.0), gradients)
    mu = gaussian_mu(4.0, DELTA)
    assert others.mean() == pytest.approx(-(mu**2) / 2, abs=0.25)
    assert others.std() == pytest.approx(mu, rel=0.15)
    shown = estimate(separation(members, others), DELTA, 0.01)
    assert shown.low < 4.0 < shown.high
    found = measure_records(members, others, budget(4.0), 1)
    assert found is not None and min(found.p_values.values()) > 0.001 and found.ceiling > 4.0
    assert 0.3 < found.lower["Steinke et al."] < found.lower["Mahloujifar et al., Gaussian"] < 4.0
    assert refuted((members, others), budget(1.0))


def test_secret_draw_of_batches_hides_a_canary_as_accounted() -> None:
    found = measure_records(*scored(plan_of(4.0, rate=0.2, steps=25)), budget(4.0), 1)
    assert found is not None and min(found.p_values.values()) > 0.001
    assert 1.9 < found.epsilon < 4.4


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_replaced_record_is_detected_from_end_to_end(rate: float) -> None:
    claim = Budget(Unit.RECORD, 4.0, DELTA, Adjacency.REPLACE_ONE)
    plan = Plan(Unit.RECORD, Adjacency.REPLACE_ONE, PoissonBatches(rate, 10), CLIP, 1).calibrate(claim)
    found = measure_records(*scored(plan), claim, 1)
    assert found is not None and min(found.p_values.values()) > 0.001
    assert 1.5 < found.epsilon < 5.2


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("claimed", "rate", "steps"), [(8, 0.1, 300), (8, 0.08, 260), (4, 0.1, 300), (4, 0.2, 25), (1, 0.1, 300)]
)
def test_ratio_measures_beyond_the_sum_over_steps(claimed: float, rate: float, steps: int) -> None:
    noise, each = plan_of(claimed, rate, steps).noise_over_clip, 20_000
    rng, ratio, total = np.random.default_rng(0), np.zeros((2, each)), np.zeros((2, each))
    for _ in range(steps):
        for inside in (0, 1):
            moved = noise * rng.standard_normal(each) + inside * (rng.random(each) < rate)
            ratio[inside] += step_ratio(moved, noise, rate)
            total[inside] += moved
    shown, by_sum = (estimate(separation(of[1], of[0]), DELTA).epsilon for of in (ratio, total))
    print(f"\n  claimed {claimed}, rate {rate}, {steps} steps: sum {by_sum:.2f}, ratio {shown:.2f}")
    assert by_sum - 0.05 < shown < claimed * 1.03


@pytest.mark.parametrize("replaced", [False, True])
def test_a_score_is_the_log_likelihood_ratio_of_in_to_out(replaced: bool) -> None:
    noise, rate, sums = 0.7, 0.3, np.linspace(-3, 3, 13)

    def likelihood(mean: float) -> np.ndarray:
        return np.exp(-((sums - mean) ** 2) / (2 * noise**2))

    inside, none, opposite = (
        (1 - rate) * likelihood(0) + rate * likelihood(1),
        likelihood(0),
        (1 - rate) * likelihood(0) + rate * likelihood(-1),
    )
    expected = np.log(inside / (opposite if replaced else none))
    assert np.allclose(step_ratio(sums, noise, rate, replaced), expected)


@pytest.mark.parametrize("fault", ["no clip", "a quarter of the noise"])
def test_faults_of_dp_sgd_are_detected(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    real: Callable[..., None] = dp_sgd.NoisedParameters.__init__

    def faulty(
        self: object, parameters: object, norm: float, stream: object, noise: float, size: int
    ) -> None:
        if fault == "no clip":  # a clip so large that the noise, which stays as it was, is that of another
            real(self, parameters, 1e6, stream, noise * norm / 1e6, size)
        else:
            real(self, parameters, norm, stream, noise / 4, size)

    monkeypatch.setattr(dp_sgd.NoisedParameters, "__init__", faulty)
    assert refuted(scored(plan_of(1.0)), budget(1.0))


def test_released_model_is_trained_as_without_canaries() -> None:
    task = task_of()
    plan = plan_of(1e6)  # so little noise that what trains is seen
    moved = []
    for coins in (np.zeros(40, bool), np.ones(40, bool)):
        model = task.model()
        canaried = begin(model, task, task.client_data(0), coins, plan)
        streams = (Randomness(0).stream("batches"), Randomness(0).stream("noise"))
        train_privately(
            canaried.model,
            canaried.loss,
            canaried.examples,
            LocalTraining(0.5, 1, 10),
            PrivateSteps(plan, *streams),
            "book_keeping",
        )
        moved.append(read_arrays(model))
    assert sorted(moved[0]) == sorted(read_arrays(task.model()))
    assert all(np.allclose(moved[0][name], moved[1][name], atol=1e-6) for name in moved[0])
    assert any(not np.allclose(moved[0][name], value) for name, value in read_arrays(task.model()).items())


def test_coins_and_scores_stay_in_the_client_s_file(tmp_path: Path) -> None:
    path = tmp_path / "a.canaries"
    stream = Randomness(0).stream("record canaries", 1)
    coins = coins_in(path, 20, stream)
    assert np.array_equal(coins, coins_in(path, 20, stream)) and 4 < coins.sum() < 16
    with pytest.raises(Refusal, match="began with 20"):
        coins_in(path, 21, stream)
    for number, value in ((1, 3.0), (2, 1.0), (2, 5.0)):  # round 2 was done again
        append(path, number, np.where(coins, value, 0.0))
    with open(path, "ab") as file:
        file.write(b"\x93NUMPY cut short")
    members, others = read_scores([path])
    assert len(members) == coins.sum() and np.allclose(members, 3 + 5)
    assert np.allclose(others, 0)


@pytest.mark.parametrize(
    ("rate", "noise", "steps"), [(0.01, 0.7, 1000), (0.1, 2.0, 100), (0.3, 1.0, 10), (1.0, 5.0, 100)]
)
def test_secret_batches_lie_below_the_gaussian_curve(rate: float, noise: float, steps: int) -> None:
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(PoissonBatches(rate, steps).event(GaussianDpEvent(noise)))
    epsilon = accountant.get_epsilon(DELTA)
    mu = gaussian_mu(epsilon, DELTA)
    for smaller in np.linspace(0, 0.95, 12) * epsilon:
        assert accountant.get_delta(smaller) <= gaussian_delta(mu, smaller) * 1.01 + 1e-4


def test_a_run_audits_its_clients_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["task=digits", "privacy=record", "audit=full", "audit.looks=1", "num_rounds=1"]
    outcome = run_quietly([*overrides, "task.num_clients=20"], tmp_path)
    assert outcome.exit_code == 0
    (odd,) = outcome.result["audit"]["memorisation"]
    assert odd["name"] == "odd_examples" and odd["refutes"]
    assert odd.keys() == {"name", "p_value", "shown", "refutes"}  # readers of result.json go by these
    records = outcome.result["audit"]["records"]
    assert records["claimed"] == 3.0 and min(*records["p_values"].values(), odd["p_value"]) > 0.001
    assert outcome.result["audit"]["verdict"] == "consistent"
    assert list((tmp_path / "client_ledgers").glob("*.canaries")) and (tmp_path / "audit.png").exists()
    assert audit_run(tmp_path) == 0
    assert "measured of records" in capsys.readouterr().out


def test_a_run_that_claims_too_little_of_records_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both units at once: the canaries of records lie under the clients' noise, and are read at the clients."""
    real = PoissonBatches.event
    monkeypatch.setattr(
        PoissonBatches, "event", lambda self, mechanism: real(replace(self, steps=1), mechanism)
    )
    overrides = ["task=digits", "privacy=record_and_client", "audit=full", "audit.looks=1", "num_rounds=1"]
    small = ["task.num_clients=10", "cohort=all", "audit.canaries=0", "batch_size=40", "local_epochs=10"]
    outcome = run_quietly([*overrides, *small], tmp_path)
    assert outcome.exit_code == 5 and outcome.result["audit"]["verdict"] == "violated"
    (alarm,) = (each for each in outcome.result["audit"]["alarms"] if each["test"] == "records")
    assert alarm["level"] == "red"
    assert audit_run(tmp_path) == 3


def test_canary_rows_of_lazy_data_are_those_of_tensors() -> None:
    data = task_of(20).client_data(0)
    coins = np.array([True, False, False, True])
    pairs = [(data.inputs[row], data.targets[row]) for row in range(len(data))]
    whole, lazy = with_canary_rows(data, coins, 3), with_canary_rows(LazyExamples(pairs), coins, 3)
    assert len(whole) == len(lazy) == len(data) + 4
    rows = torch.tensor([0, len(data) - 1, len(data), len(data) + 1, len(data) + 3])
    for one, other in zip(whole.batch(rows), lazy.batch(rows), strict=True):
        assert torch.equal(one, other)
    inputs, targets = lazy.batch(rows)
    assert inputs[:, 0].tolist() == [0, 0, 3, -4, 6] and not inputs[2:, 1:].any()
    assert targets[2:].tolist() == [data.targets[0]] * 3
    assert not len(with_canary_rows(LazyExamples([]), coins))
