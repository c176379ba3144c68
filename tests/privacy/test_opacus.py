"""The ledger behind an unmodified Opacus engine: what it counts, when it stops training, what it goes on with."""

import doctest
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from opacus import PrivacyEngine
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.utils.adaptive_clipping.adaptive_clipping_utils import PrivacyEngineAdaptiveClipping
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedveil.privacy.opacus
from fedveil.privacy import Budget, BudgetExhausted, Refusal
from fedveil.privacy.ledger.ledger import verify
from fedveil.privacy.opacus import LedgerAccountant

DELTA = 1e-5
RATE = 1 / 4

pytestmark = pytest.mark.filterwarnings("ignore:Secure RNG|Full backward hook|Optimal order")


@pytest.fixture(autouse=True)
def seeded_by_the_system() -> Iterator[None]:
    state = torch.get_rng_state()
    torch.seed()
    yield
    torch.set_rng_state(state)


class Training:
    """A linear model on 200 examples, under Opacus as its documents show it."""

    def __init__(
        self,
        path: Path,
        epsilon: float = 8.0,
        simulated: bool = False,
        engine: PrivacyEngine | None = None,
        **options: Any,
    ) -> None:
        inputs = torch.randn(200, 4)
        data = TensorDataset(inputs, (inputs.sum(1) > 0).long())
        self.engine = engine or PrivacyEngine()
        budget = Budget("record", epsilon, DELTA)
        self.accountant = LedgerAccountant(path, budget, owner="clinic-7", simulated=simulated)
        self.engine.accountant = self.accountant
        net = nn.Linear(4, 2)
        self.net, self.optimizer, *criterion, self.loader = self.engine.make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.5),
            data_loader=DataLoader(data, batch_size=50),
            **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options},
        )
        self.loss = criterion[0] if criterion else nn.functional.cross_entropy

    def epoch(self) -> None:
        for inputs, labels in self.loader:
            self.optimizer.zero_grad()
            self.loss(self.net(inputs), labels).backward()
            self.optimizer.step()

    def parameters(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in self.net.parameters()])


def charge(accountant: LedgerAccountant, noise: float, rate: float, steps: int) -> None:
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=rate)


def test_the_docstrings_example_runs() -> None:
    done = doctest.testmod(fedveil.privacy.opacus)
    assert done.failed == 0 and done.attempted > 8


@pytest.mark.parametrize(("noise", "rate", "steps"), [(1.0, 0.25, 16), (0.8, 0.05, 60), (1.5, 1.0, 5)])
def test_epsilon_is_that_of_other_accountants(tmp_path: Path, noise: float, rate: float, steps: int) -> None:
    with LedgerAccountant(tmp_path / "a.ledger", Budget("record", 50.0, DELTA), owner="a") as ours:
        charge(ours, noise, rate, steps)
        found = ours.get_epsilon(DELTA)
    renyi, prv = RDPAccountant(), PRVAccountant()
    renyi.history = prv.history = [(noise, rate, steps)]
    event = GaussianDpEvent(noise) if rate == 1 else PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
    pld = PLDAccountant(value_discretization_interval=1e-4).compose(SelfComposedDpEvent(event, steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found == pytest.approx(pld.get_epsilon(DELTA), rel=1e-3)
        assert found == pytest.approx(prv.get_epsilon(DELTA), rel=0.01)
        assert found < renyi.get_epsilon(DELTA)


def test_training_stops_inside_the_step_that_does_not_fit(tmp_path: Path) -> None:
    training = Training(tmp_path / "a.ledger", epsilon=4.0)
    with pytest.raises(BudgetExhausted, match="the record budget is spent"):
        for _ in range(100):
            training.epoch()
    steps = len(training.accountant)
    assert 0 < steps < 100 and training.engine.get_epsilon(DELTA) <= 4.0
    assert all(p.grad is None for p in training.net.parameters())
    before = training.parameters()
    with pytest.raises(BudgetExhausted):
        training.epoch()
    assert torch.equal(before, training.parameters()) and len(training.accountant) == steps


def test_restart_goes_on_with_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    first = Training(path, epsilon=8.0)
    first.epoch()
    spent = first.engine.get_epsilon(DELTA)
    first.accountant.close()
    second = Training(path, epsilon=8.0)
    assert second.engine.get_epsilon(DELTA) == spent and len(second.accountant) == 4
    second.epoch()
    assert second.engine.get_epsilon(DELTA) > spent
    assert second.accountant.history == [(1.0, RATE, 8)]
    second.accountant.close()
    assert verify(path, DELTA).epsilon == pytest.approx(second.engine.get_epsilon(DELTA))


def test_the_planned_noise_affords_the_steps_and_no_more(tmp_path: Path) -> None:
    with LedgerAccountant(tmp_path / "a.ledger", Budget("record", 3.0, DELTA), owner="a") as accountant:
        charge(accountant, 2.0, RATE, 3)
        noise = accountant.noise_multiplier(sample_rate=RATE, steps=20)
        charge(accountant, noise, RATE, 20)
        assert accountant.get_epsilon(DELTA) == pytest.approx(3.0, rel=1e-2)
        with pytest.raises(BudgetExhausted):
            charge(accountant, noise, RATE, 2)


def test_a_checkpoint_finds_its_ledger_again_and_no_other(tmp_path: Path) -> None:
    path, saved = tmp_path / "a.ledger", tmp_path / "model.pt"
    training = Training(path)
    copied = tmp_path / "rolled_back.ledger"
    training.accountant.close()
    copied.write_bytes(path.read_bytes())
    training = Training(path)
    training.epoch()
    training.engine.save_checkpoint(path=saved, module=training.net, optimizer=training.optimizer)
    trained = training.parameters()
    training.accountant.close()
    again = Training(path)
    again.engine.load_checkpoint(path=saved, module=again.net, optimizer=again.optimizer)
    assert torch.equal(again.parameters(), trained) and len(again.accountant) == 4
    again.accountant.close()
    path.unlink()
    copied.rename(path)
    with pytest.raises(Refusal, match="rolled back"):
        Training(path).engine.load_checkpoint(path=saved, module=training.net)
    with pytest.raises(ValueError, match="of the accountant 'rdp'"):
        again.accountant.load_state_dict({"history": [], "mechanism": "rdp"})


def test_noise_from_a_seed_is_refused_on_real_data(tmp_path: Path) -> None:
    torch.manual_seed(3)
    training = Training(tmp_path / "a.ledger")
    with pytest.raises(
        Refusal, match=r"seed=3: noise that can be repeated can be subtracted; call torch.seed"
    ):
        training.epoch()
    assert len(training.accountant) == 0
    torch.seed()
    training.epoch()
    own = Training(tmp_path / "b.ledger", noise_generator=torch.Generator().manual_seed(7))
    with pytest.raises(Refusal, match="seed=7"):
        own.epoch()
    torch.manual_seed(3)
    Training(tmp_path / "c.ledger", simulated=True).epoch()


def test_event_beyond_every_accountant_is_refused(tmp_path: Path) -> None:
    accumulating = Training(tmp_path / "a.ledger", poisson_sampling=False)
    with pytest.raises(Refusal, match="accumulated_iterations=2"):
        for inputs, labels in accumulating.loader:
            nn.functional.cross_entropy(accumulating.net(inputs), labels).backward()
            if accumulating.optimizer.accumulated_iterations == 2:
                accumulating.optimizer.step()
    options = {"target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10.0}
    options |= {"min_clipbound": 0.1, "unclipped_num_std": 5.0}
    ghost = {"engine": PrivacyEngineAdaptiveClipping(), "criterion": nn.CrossEntropyLoss()}
    for name, kind in (
        ("b", {"clipping": "adaptive", **options}),
        ("g", {"grad_sample_mode": "ghost", **ghost}),
    ):
        adaptive = Training(tmp_path / f"{name}.ledger", **kind)
        start = adaptive.parameters()
        with pytest.raises(Refusal, match="clipping='adaptive'"):
            adaptive.epoch()
        assert torch.equal(start, adaptive.parameters()) and not len(adaptive.accountant)
    with pytest.raises(Refusal, match=r"counts no earlier run; make_private\(noise_multiplier="):
        accumulating.engine.make_private_with_epsilon(
            module=nn.Linear(4, 2),
            optimizer=accumulating.optimizer,
            data_loader=accumulating.loader,
            target_epsilon=1.0,
            target_delta=DELTA,
            epochs=1,
            max_grad_norm=1.0,
        )
    with pytest.raises(Refusal, match="unit='client'"):
        LedgerAccountant(tmp_path / "c.ledger", Budget("client", 1.0, DELTA), owner="c")


def test_a_large_batch_in_parts_is_one_step(tmp_path: Path) -> None:
    training = Training(tmp_path / "a.ledger", epsilon=10.0)
    with BatchMemoryManager(
        data_loader=training.loader, max_physical_batch_size=16, optimizer=training.optimizer
    ) as loader:
        training.loader = loader
        training.epoch()
    assert training.accountant.history == [(1.0, RATE, 4)]


def test_noise_of_nothing_is_never_afforded(tmp_path: Path) -> None:
    with LedgerAccountant(tmp_path / "a.ledger", Budget("record", 1e6, DELTA), owner="a") as accountant:
        with pytest.raises(BudgetExhausted) as spent:
            charge(accountant, 0.0, RATE, 1)
        assert math.isinf(spent.value.would_be)
