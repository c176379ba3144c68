"""Accountant that puts a durable ledger behind an unmodified Opacus `PrivacyEngine`.

Needs `pip install 'fedveil[opacus]'`, or any other extra that brings Opacus and torch.
"""

import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dp_accounting.dp_event import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

from ..base.refusal import Refusal
from .budget import Adversary, Budget, Release, Unit
from .ledger.acts import acting_user
from .ledger.hash_chain import Head
from .ledger.ledger import Ledger
from .plan import Plan

try:
    import torch
    from opacus.accountants import IAccountant, register_accountant
    from opacus.optimizers import DPOptimizer
    from opacus.optimizers.adaclipoptimizer import AdaClipDPOptimizer
except ModuleNotFoundError as missing:
    remedy = f"fedveil.privacy.opacus needs {missing.name}: pip install 'fedveil[opacus]'"
    raise Refusal("extra", "opacus", remedy) from missing

__all__ = ["LedgerAccountant"]

MECHANISM = "opacus"  # of every step on the ledger
BY_HAND = 2**32  # seeds below it are taken for a user's: torch's own are 64 random bits of the system


@dataclass(frozen=True)
class _Batches:
    """`Sampling` of a plan of Poisson batches of examples."""

    sample_rate: float
    name: str = "poisson batches"

    def event(self, mechanism: DpEvent) -> DpEvent:
        return _sampled(self.sample_rate, mechanism)


class LedgerAccountant(IAccountant):
    """Accountant of Opacus that charges every optimiser step to a ledger before the step is made.

    A step beyond the budget is never made: `optimizer.step()` raises `BudgetExhausted`, the parameters do not change,
      and the gradients are cleared. Charges are permanent: the next process that opens the same file continues with the
      remaining budget. One process at a time holds the file.

    Every step checks what the accounting requires: a step is one Poisson batch (no accumulated batches), clipping is
      not Opacus' `adaptive` (its count of clipped gradients is not accounted), and on real data the noise is not
      seeded. The accountant cannot check `poisson_sampling=True`, Opacus' default, and relies on it.

    Args:
        path: the ledger's file, in an existing folder; created if missing.
        budget: budget of one record, for all releases on this file.
        owner: a lasting name of the data set, the same in every run.
        simulated: whether the data are public or synthetic. Only then may the noise come from a seed.

    Raises:
        Refusal: the budget's unit is not `record`, or the ledger is damaged, another's, or in use.

    Example:
        >>> import tempfile, torch
        >>> from opacus import PrivacyEngine
        >>> from fedveil.privacy import Budget, BudgetExhausted
        >>> from fedveil.privacy.opacus import LedgerAccountant
        >>> inputs = torch.randn(200, 4)
        >>> data = torch.utils.data.TensorDataset(inputs, (inputs.sum(1) > 0).long())
        >>> net = torch.nn.Linear(4, 2)
        >>> engine = PrivacyEngine()
        >>> engine.accountant = LedgerAccountant(
        ...     tempfile.mkdtemp() + "/patients.ledger", Budget("record", 4.0, 1e-5), owner="clinic-7"
        ... )
        >>> net, optimizer, loader = engine.make_private(
        ...     module=net,
        ...     optimizer=torch.optim.SGD(net.parameters(), lr=0.5),
        ...     data_loader=torch.utils.data.DataLoader(data, batch_size=50),
        ...     noise_multiplier=1.5,
        ...     max_grad_norm=1.0,
        ... )
        >>> try:
        ...     for _ in range(100):
        ...         for batch, labels in loader:
        ...             optimizer.zero_grad()
        ...             torch.nn.functional.cross_entropy(net(batch), labels).backward()
        ...             optimizer.step()
        ... except BudgetExhausted as spent:
        ...     print(str(spent).split(":")[0])
        the record budget is spent
        >>> engine.get_epsilon(1e-5) <= 4.0 and len(engine.accountant) > 10
        True
    """

    def __init__(self, path: Path | str, budget: Budget, *, owner: str, simulated: bool = False) -> None:
        if budget.unit is not Unit.RECORD:
            remedy = "Opacus hides single examples; give a budget of unit record"
            raise Refusal("unit", str(budget.unit), remedy)
        self.ledger = Ledger.open(path, budget, owner=owner, simulated=simulated)
        self.ledger.origin = {"who": acting_user()}
        weakref.finalize(self, self.ledger.close)
        self.simulated = simulated
        self._run = uuid.uuid4().hex  # new noise in every process needs new keys on the ledger
        self._steps = 0  # charged by this process; the next step's number is its round on the ledger

    @classmethod
    def mechanism(cls) -> str:
        """Return the accountant's name in a checkpoint."""
        return "fedveil"

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Charge one step; the hook calls this after Opacus has drawn the noise and before the parameters change.

        Args:
            noise_multiplier: noise standard deviation over the clipping norm of one example's gradient.
            sample_rate: probability in (0, 1] with which each example is in the batch.

        Raises:
            BudgetExhausted: the step does not fit the budget; nothing is charged.
            Refusal: a parameter is out of range, or the ledger is closed.
            LedgerUnavailable: the ledger could not be written.
        """
        event = _sampled(sample_rate, GaussianDpEvent(float(noise_multiplier)))
        rng = "seeded" if self.simulated else "system"
        events = dict.fromkeys(Adversary, event)
        release = Release(Unit.RECORD, self._run, self._steps + 1, MECHANISM, events, rng)
        self.ledger.reserve_new(release)
        self.ledger.commit(release.key, durable=False)
        self._steps += 1

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[DPOptimizer], None]:
        """Return the hook that Opacus calls in every step of its optimiser.

        Args:
            sample_rate: probability in (0, 1] with which each example is in a batch.
        """

        def charge(optimizer: DPOptimizer) -> None:
            try:
                self._require_accountable(optimizer)
                self.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=sample_rate)
            except BaseException:
                optimizer.zero_grad(set_to_none=True)  # noised gradients that nobody has paid for
                raise

        return charge

    def get_epsilon(self, delta: float, *args: Any, **kwargs: Any) -> float:
        """Return the epsilon that all of the ledger has spent at `delta`, earlier runs included.

        Args:
            delta: in (0, 1).
            *args: ignored; Opacus' other accountants take more.
            **kwargs: ignored.
        """
        return self.ledger.epsilon(delta)

    def noise_multiplier(self, *, sample_rate: float, steps: int) -> float:
        """Return the smallest noise with which this many further steps fit the remaining budget.

        Use it instead of `make_private_with_epsilon`, which does not count earlier runs.

        Args:
            sample_rate: probability in (0, 1] with which each example is in a batch; `1 / len(data_loader)`.
            steps: at least 1.

        Returns:
            Noise standard deviation over the clipping norm, for `make_private(noise_multiplier=...)`.

        Raises:
            Refusal: the budget is spent, or no noise fits.
        """
        budget, prior = self.ledger.budget, self.ledger.events(Adversary.MODEL)
        plan = Plan(budget.unit, budget.adjacency, _Batches(sample_rate), 1.0, steps).calibrate(budget, prior)
        return plan.noise_over_clip

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """(noise_multiplier, sample_rate, steps) of the ledger's Gaussian steps, as Opacus keeps its history."""
        entries = map(_history_entry, self.ledger.events(Adversary.MODEL))
        return [entry for entry in entries if entry is not None]

    def __len__(self) -> int:
        """Return how many steps the ledger holds."""
        return sum(steps for _, _, steps in self.history)

    def state_dict(self, destination: Any = None) -> Any:
        """Return the state for a checkpoint: the history, and the ledger's head.

        Args:
            destination: a mapping to add it to; None creates one.
        """
        state = {"history": self.history, "mechanism": self.mechanism(), "head": tuple(self.ledger.head)}
        if destination is None:
            return state
        destination |= state
        return destination

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that the ledger still contains the checkpoint's head; the ledger itself is not reset.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: it is another accountant's.
            Refusal: the ledger was truncated or rolled back since.
        """
        if state_dict.get("mechanism") != self.mechanism():
            text = f"a checkpoint of the accountant {state_dict.get('mechanism')!r}, not {self.mechanism()!r}"
            raise ValueError(text)
        self.ledger.require(Head(*state_dict["head"]))

    def close(self) -> None:
        """Let the next process have the ledger."""
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def _require_accountable(self, optimizer: DPOptimizer) -> None:
        """Refuse a step whose cost the accounting does not cover: see the class."""
        # Adaptive ghost clipping sets the attribute. Its count relies on the size of a batch, which is private.
        if isinstance(optimizer, AdaClipDPOptimizer) or hasattr(optimizer, "_adjusted_noise_multiplier"):
            remedy = "it releases a count of clipped gradients that no accountant is told of; use flat or per_layer"
            raise Refusal("clipping", "adaptive", remedy)
        batches = int(optimizer.accumulated_iterations)
        if batches > 1:
            remedy = "one example may be in several batches of a step; use BatchMemoryManager for large ones"
            raise Refusal("accumulated_iterations", batches, remedy)
        if self.simulated or optimizer.secure_mode:
            return
        seed = (optimizer.generator or _generator_of(optimizer.params[0].device)).initial_seed()
        if seed < BY_HAND:
            remedy = "noise that can be repeated can be subtracted; call torch.seed() before the first step"
            raise Refusal("seed", seed, remedy)


def _refuse_by_name() -> IAccountant:
    """Refuse the accountant that `make_private_with_epsilon` creates by its name: it would plan without the ledger."""
    remedy = "counts no earlier run; make_private(noise_multiplier=accountant.noise_multiplier(...)) does"
    raise Refusal("make_private_with_epsilon", "with a LedgerAccountant", remedy)


register_accountant(LedgerAccountant.mechanism(), _refuse_by_name)  # pyright: ignore[reportArgumentType]


def _generator_of(device: torch.device) -> torch.Generator:
    """Return the generator from which Opacus draws noise on a device if it was given none."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _sampled(rate: float, mechanism: DpEvent) -> DpEvent:
    return mechanism if rate == 1 else PoissonSampledDpEvent(float(rate), mechanism)


def _history_entry(event: DpEvent) -> tuple[float, float, int] | None:
    """Return (noise_multiplier, sample_rate, steps) of an event of the ledger; None if it is no Gaussian."""
    rate, steps = 1.0, 1
    if isinstance(event, SelfComposedDpEvent):
        steps, event = event.count, event.event
    if isinstance(event, PoissonSampledDpEvent):
        rate, event = event.sampling_probability, event.event
    return (event.noise_multiplier, rate, steps) if isinstance(event, GaussianDpEvent) else None
