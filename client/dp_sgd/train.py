"""DP-SGD (Abadi et al. 2016, arXiv:1607.00133): local training with record-level privacy.

Batches, noise and accounting are fedveil's own. One of five engines computes clipped sums: Opacus' hooks hold every
example's gradient, and the other engines are tested against them; its ghost clipping uses a second backward pass
instead; `book_keeping` uses one pass, for torch's recurrent layers and attention too, `vmap` one that torch repeats for
each example, and `one_by_one` a pass for each. Opacus is imported only where its engines are taken. All attach to the
unwrapped model (``wrap_model=False``), so parameter names stay those of the server. The noise comes from a cryptographic
stream.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...base.refusal import Refusal
from ...messages.local_training import LocalTraining
from ...privacy.mechanisms.discrete_gaussian import MAX_SIGMA, add_on_lattice
from ...privacy.mechanisms.randomness import Stream
from ...privacy.plan import Plan
from ...strategies.record_plan import PoissonBatches
from ...tasks.arrays import copied_buffers
from ...tasks.batch_memory import AUTO, BatchParts, trained_at_once
from ...tasks.data import Batches, Data, leaves, padded, placeholder
from ...tasks.independence import check_step
from ...tasks.optimizers import follow_epochs, optimizer_of
from ...tasks.protocol import Objective
from ..training.sgd import layout_of, with_fast_kernels
from . import sketched
from .book_keeping import book_keeping, obstacle
from .clipped import ClippedParameters, ClippedSums
from .forward import Forward, TaskFailed
from .own_passes import by_vmap, one_by_one, repeats

if TYPE_CHECKING:
    from ...tasks.data import Inputs

logger = logging.getLogger("fedveil.client")

NOISE_BLOCK = 1 << 18  # numbers drawn at a time, which stay in a core's caches
STEPS_OF_NOISE = 1 << 20  # of the lattice, in a standard deviation: draws of 32 bits
LOOKED_AT = 128  # steps from one in which independence is measured to the next
MIN_STEPS = 256  # ratio of sigma to its part for rounding, which then adds 0.4 %; less only at `MAX_SIGMA`

_steps: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # taken by each model, see `clipping`
_engines: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], str]] = WeakKeyDictionary()  # see `engine_of`


def lattice_of(noise_multiplier: float, max_grad_norm: float, coordinates: int) -> tuple[int, float]:
    """Return the standard deviation, in lattice steps, and the size of a step, for exact noise on a clipped sum.

    Rounding moves each coordinate by at most half a step, so two sums that differ by a vector of norm at most
    `max_grad_norm` differ by at most sqrt(coordinates) steps more after rounding. The noise is `noise_multiplier` times
    that sensitivity: sigma = noise_multiplier * (max_grad_norm / step + sqrt(coordinates)), solved for the step.

    Args:
      noise_multiplier: of the event that accounts for the noise, at least 0.
      max_grad_norm: largest norm of one record's part in the sum.
      coordinates: number of coordinates of the sum.

    Returns:
      The pair, (0, 1.0) without noise.

    Raises:
      Refusal: the noise for the rounding takes half of the finest lattice's steps.
    """
    if not noise_multiplier:
        return 0, 1.0
    rounding = noise_multiplier * math.sqrt(coordinates)
    if not rounding <= MAX_SIGMA / 2:
        remedy = f"no lattice has room for this noise on {coordinates} coordinates; use less"
        raise Refusal("noise_multiplier", noise_multiplier, remedy)
    sigma = min(MAX_SIGMA, max(STEPS_OF_NOISE, math.ceil(MIN_STEPS * rounding)))
    return sigma, noise_multiplier * max_grad_norm / (sigma - rounding)


class NoisedParameters(ClippedParameters):
    """Parameters with exact noise from a cryptographic stream on their clipped sums.

    Args:
      parameters: the parameters.
      max_grad_norm: as of `ClippedParameters`.
      stream: from which the noise is drawn.
      noise_multiplier: standard deviation of the noise over the norm; 0 adds none.
      expected_batch_size: by which a noised sum is divided, at least 1.

    Attributes:
      flat: sum, and after `make_means` noised mean gradient, of all parameters, shape (d,).
      views: parts of `flat`, in each parameter's shape.
      sigma, step_size: of the noise, as `lattice_of` returns them; sigma is 0 without noise.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        max_grad_norm: float,
        stream: Stream,
        noise_multiplier: float,
        expected_batch_size: int,
    ) -> None:
        super().__init__(parameters, max_grad_norm)
        self.stream, self.expected_batch_size = stream, expected_batch_size
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.params])
        parts = self.flat.split([p.numel() for p in self.params])
        self.views = [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]
        self.sigma, self.step_size = lattice_of(noise_multiplier, max_grad_norm, len(self.flat))

    def make_means(self) -> None:
        """Turn the clipped sums on the parameters into means with discrete Gaussian noise, on a lattice; see `lattice_of`.

        The noise consists of integers, as in sums of clients, so floating-point rounding does not distort it (Mironov
        2012). Later values are computed from them.

        Raises:
          FloatingPointError: a sum is not finite; nothing is released.
        """
        torch.cat([parameter.summed_grad.reshape(-1) for parameter in self.params], out=self.flat)
        for block in self.flat.split(NOISE_BLOCK):
            if not bool(block.sum().isfinite()):
                raise FloatingPointError("a clipped sum is not finite")
            if self.sigma:
                host_block = block.cpu()  # the block itself on the CPU, and then `copy_` does nothing
                add_on_lattice(host_block.numpy(), self.sigma, self.step_size, self.stream)
                block.copy_(host_block)
            block.div_(self.expected_batch_size)
        for parameter, view in zip(self.params, self.views, strict=True):
            parameter.grad = view


@dataclass(frozen=True)
class PrivateSteps:
    """Steps of one training by DP-SGD.

    Attributes:
      plan: its sampling is `PoissonBatches`, its clipping norm bounds each example's gradient.
      draws: stream of the batches.
      noise: stream of the noise.
      after: called after each step, while the parameters' gradients are its noised means.
      examples_at_once: limit of the examples in memory, as of `trained_at_once`.
    """

    plan: Plan
    draws: Stream
    noise: Stream
    after: Callable[[], None] = lambda: None
    examples_at_once: str = AUTO


def train_privately(
    model: nn.Module,
    task: Objective,
    data: Data,
    training: LocalTraining,
    steps: PrivateSteps,
    gradients: str = "hooks",
) -> None:
    """Train the model in place by DP-SGD. The caller first charges `steps.plan.event()`, which covers all steps.

    An example whose gradient is not finite adds nothing to its step. An optimiser receives only noised means.

    Args:
      model: without batch normalisation, in the state that the server sent.
      task: gives the loss, a mean over a batch.
      data: the client's own.
      training: optimiser, learning rate and weight of FedProx's pull; batches and their number come from the plan.
      steps: the plan, and the streams of its steps.
      gradients: a name of `ENGINES`, as `chosen_engine` returns it.

    Raises:
      Refusal: a layer's batch is not the batch of examples, or ghost clipping cannot train the model.
    """
    plan = steps.plan
    assert isinstance(plan.sampling, PoissonBatches)
    batch_size = max(1, round(plan.sampling.sample_rate * len(data)))
    parameters = [p for p in model.parameters() if p.requires_grad]
    task_optimizer = optimizer_of(task, parameters, training, plan.noise_std / batch_size)
    follow_epochs(task_optimizer, -(-plan.sampling.steps // training.local_epochs))
    noised = NoisedParameters(
        parameters, plan.clipping_norm, steps.noise, plan.noise_std / plan.clipping_norm, batch_size
    )
    start = [p.detach().clone() for p in parameters] if training.proximal_mu else []
    with clipping(model, task, data, noised, gradients, steps.examples_at_once) as clip:
        for batch in plan.sampling.draw(len(data), steps.draws):
            clip(batch)
            noised.make_means()
            if task_optimizer is not None:
                task_optimizer.step()
            else:
                for value, view in zip(parameters, noised.views, strict=True):
                    value.data.add_(view, alpha=-training.learning_rate)
            steps.after()
            if training.proximal_mu:  # FedProx's proximal step, which reads no data
                for value, origin in zip(parameters, start, strict=True):
                    value.data.add_(value.data - origin, alpha=-training.learning_rate * training.proximal_mu)


@contextmanager
def clipping(
    model: nn.Module,
    task: Objective,
    data: Batches,
    clipped: ClippedParameters,
    gradients: str,
    examples_at_once: str = AUTO,
) -> Generator[Callable[[NDArray[np.intp]], None]]:
    """Yield the function that writes the clipped sum over some rows, without noise, to `summed_grad` of the parameters.

    Buffers that a layer writes meanwhile depend on the data without noise: they are restored after each part of the rows.

    `gradients` names an engine, `clipped` has parameters and clipping norm, `examples_at_once` is the limit of
    `trained_at_once`; other arguments as of `train_privately`.
    """
    forward = Forward(model, task, data, _lay_out(model, gradients), [*model.modules()])
    buffers = copied_buffers(model)

    def look(rows: Tensor) -> None:
        """Check, in each `LOOKED_AT`th step on a CPU, that the model still keeps the examples in these rows independent."""
        step = _steps.get(model, 0)
        if step % LOOKED_AT == 0 and clipped.params[0].device.type == "cpu":
            check_step(model, task, lambda: padded(data.batch(rows), parts.size(len(rows))), step)
            _restore_buffers(model, buffers)
        _steps[model] = step + 1  # not counted if the check fails: the model's next step is then checked, too

    def clip(rows: NDArray[np.intp]) -> None:
        totals: list[Tensor] = []  # float64, as the parts may be many
        first, *others = torch.from_numpy(rows).split(parts.rows)
        for part in (first, *others):
            _clip(part, parts, clipped_sums, clipped)
            _restore_buffers(model, buffers)
            if others:
                totals = _with_sums(totals, clipped)
        if others:
            clipped.write(totals)
        if len(first) > 1:  # no step mixes examples that are alone
            look(first)

    model.train()
    parts = trained_at_once(examples_at_once, model, data, whole_gradients=gradients in ("hooks", "vmap"))
    try:
        with warnings.catch_warnings(), ENGINES[gradients](model, forward, clipped) as clipped_sums:
            # The warning's case is intended: the hooks read the outputs' gradients, and inputs need none.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield clip
    finally:
        clipped.clear()
        _restore_buffers(model, buffers)


def _restore_buffers(model: nn.Module, copies: Mapping[str, Tensor]) -> None:
    """Set the model's buffers to the copies with their names."""
    for name, value in copies.items():
        buffer = model.get_buffer(name)
        if not torch.equal(buffer, value):
            buffer.copy_(value)


def _clip(rows: Tensor, parts: BatchParts, clipped_sums: ClippedSums, clipped: ClippedParameters) -> None:
    """Write the clipped sum over the rows to the parameters, without the examples whose gradients are not finite.

    If the task's code fails on a batch, each example is taken alone, and one on which it fails is left out: failing for
    the whole step would reveal it, and so would an example that fits in no batch with others.
    """
    while len(rows):
        for parameter in clipped.params:
            parameter.summed_grad = None  # the sum of the previous step must not remain
        try:
            finite = clipped_sums(rows, parts.size(len(rows)))
        except TaskFailed:
            if len(rows) == 1:
                logger.exception("an example is left out of a step because the task fails on it")
                break
            totals: list[Tensor] = []
            for row in rows.split(1):
                _clip(row, parts, clipped_sums, clipped)
                totals = _with_sums(totals, clipped)
            clipped.write(totals)
            return
        if bool(finite.all()):
            return
        rows = rows[finite.cpu()]
    # A step without examples still adds noise: its absence would reveal an empty batch.
    clipped.write(clipped.zeros())


def _with_sums(totals: Sequence[Tensor], clipped: ClippedParameters) -> list[Tensor]:
    """Return the totals, float64, with the sums on the parameters; empty totals are zeros."""
    sums: list[Tensor] = [parameter.summed_grad.double() for parameter in clipped.params]
    for each, total in zip(sums, totals, strict=False):
        each.add_(total)
    return sums


def hooks(
    model: nn.Module, forward: Forward, clipped: ClippedParameters
) -> AbstractContextManager[ClippedSums]:
    """Return the context of `opacus_engines.hooks`; importing Opacus takes as long as many rounds."""
    from .opacus_engines import hooks

    return hooks(model, forward, clipped)


def ghost(
    model: nn.Module, forward: Forward, clipped: ClippedParameters
) -> AbstractContextManager[ClippedSums]:
    """Return the context of `opacus_engines.ghost`, as `hooks` does."""
    from .opacus_engines import ghost

    return ghost(model, forward, clipped)


ENGINES: Mapping[
    str, Callable[[nn.Module, Forward, ClippedParameters], AbstractContextManager[ClippedSums]]
] = {
    "hooks": hooks,
    "ghost": ghost,
    "book_keeping": book_keeping,
    "vmap": by_vmap,
    "one_by_one": one_by_one,
}


def engine_of(gradients: str, model: nn.Module, data: Batches, compressed: bool = False) -> str:
    """Return what `chosen_engine` does, chosen once for each model and shape of inputs: choosing takes as long as a step."""
    parts = leaves(placeholder(data, 1))
    key = (gradients, compressed, len(data) > 0, *((tuple(each.shape), each.dtype) for each in parts))
    engines = _engines.setdefault(model, {})
    if key not in engines:
        engines[key] = chosen_engine(gradients, model, data, compressed)
    return engines[key]


def chosen_engine(gradients: str, model: nn.Module, data: Batches, compressed: bool = False) -> str:
    """Return the engine to train with, which depends on the model and the shapes of the data, never on their values.

    `auto` chooses book-keeping if possible, because no other is faster (`python -m fedveil.benchmarks dp_sgd`), ghost
    clipping if an embedding would be held for every example, vmap if torch can repeat the model's pass, hooks if they see
    every example in every layer, and one example at a time for all other models.

    Args:
      gradients: `auto`, or the name of the engine.
      model: to be trained.
      data: for the shape of an input.
      compressed: whether gradients are compressed before they are clipped: the engine must then hold each whole one.

    Raises:
      Refusal: the engine of this name cannot train the model, or does not hold whole gradients to be compressed.
    """
    if compressed and gradients not in ("auto", *sketched.ENGINES):
        remedy = "does not hold whole gradients, which compression needs; use auto"
        raise Refusal("privacy.gradients", gradients, remedy)
    if gradients == "one_by_one":
        return gradients
    model.train()
    # A dimension that is not the batch may have one of the two sizes by chance, but not both.
    batches = [placeholder(data, size) for size in (2, 3)]
    reason = None  # why book-keeping cannot train the model
    if gradients in ("auto", "book_keeping") and not compressed:
        reason = obstacle(model, batches[0]) or obstacle(model, batches[1])
        if reason is None:
            return "book_keeping"
    # A client without data trains nothing, and its placeholders have no rows to look at.
    looks = [each for each in batches if len(data)]
    if gradients == "auto":
        # Hooks and vmap would hold an embedding for each example.
        embeds = any(type(m) is nn.Embedding and m.weight.requires_grad for m in model.modules())
        ghost_fits = embeds and not compressed and _hooks_work(model, looks) and _ghost_works(model, batches)
        return "ghost" if ghost_fits else _whole(model, looks)
    if gradients == "vmap" and not all(repeats(model, each) for each in looks):
        reason = "vmap cannot repeat a pass, or misses a gradient,"
    if gradients in ("hooks", "ghost") and not _hooks_work(model, looks):
        reason = "Opacus does not see each example, or each use of a weight,"
    if reason is not None:
        remedy = f"{reason} in this model; use auto or {_whole(model, looks)}"
        raise Refusal("privacy.gradients", gradients, remedy)
    if gradients == "ghost" and not _ghost_works(model, batches):
        text = "the model has several outputs or tied weights; use auto"
        raise Refusal("privacy.gradients", gradients, text)
    return gradients


def _whole(model: nn.Module, batches: Sequence[Inputs]) -> str:
    """Return the fastest engine that can train a model of those that hold whole gradients."""
    if all(repeats(model, each) for each in batches):
        return "vmap"
    return "hooks" if _hooks_work(model, batches) else "one_by_one"


def _hooks_work(model: nn.Module, batches: Sequence[Inputs]) -> bool:
    from .opacus_engines import hooks_see

    return all(hooks_see(model, each) for each in batches)


def _ghost_works(model: nn.Module, batches: Sequence[Inputs]) -> bool:
    from .opacus_engines import ghost_can

    return ghost_can(model, batches[0])


def _lay_out(model: nn.Module, gradients: str) -> torch.memory_format:
    """Convert the model's kernels to the layout in which the engine is correct and fast; return that of its images."""
    if gradients == "book_keeping":
        return layout_of(with_fast_kernels(model))
    for kernel in model.parameters():
        if kernel.dim() == 4:
            # Opacus' unfold2d assumes contiguous images, and is wrong for outputs of channels-last kernels.
            kernel.data = kernel.data.clone(memory_format=torch.contiguous_format)
    return torch.contiguous_format
