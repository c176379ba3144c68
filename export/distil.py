"""Distillation of a released model into a smaller one, on public inputs (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..base.refusal import Refusal
from ..tasks import Task
from ..tasks.data import BATCH, as_data

# Long schedules on mixed inputs make students agree (Beyer et al. 2022, arXiv:2106.05237).
STEPS, ROWS = 3000, 128
LEARNING_RATE = 3e-3
TEMPERATURE = 2.0  # for small students Hinton et al., section 3, found 2.5 to 4 best; below 2 the targets are hardly soft
SEED = 0
PUBLIC = "name public data, or data of people who have agreed: learning from clients' data must be charged to a ledger"


def check_public(task: Task, config: Mapping[str, Any], public: Path, inputs: Tensor) -> None:
    """Refuse clients' data, on which distilling is no post-processing; a part of a client's examples is not recognised.

    Args:
      task: task of the run, with its clients' data if they are on this machine.
      config: configuration of the run.
      public: path of the public inputs.
      inputs: the public inputs, shape (n, ...).

    Raises:
      Refusal: the path lies in the folder of the clients' data or contains it, or the inputs contain all examples of a
        client.
    """
    folder = config["task"].get("folder")
    if folder is not None:
        private, public_path = Path(folder).resolve(), public.resolve()
        if public_path.is_relative_to(private) or private.is_relative_to(public_path):
            raise Refusal("--public", str(public), f"is in the clients' data folder, {folder}; {PUBLIC}")
    rows = set(_digests(inputs.numpy()))
    clients = (set(_client_digests(task, client)) for client in range(task.num_clients))
    count = sum(digests <= rows for digests in clients if digests)
    if count:
        remedy = f"holds all examples of {count} of the run's {task.num_clients} clients; {PUBLIC}"
        raise Refusal("--public", str(public), remedy)


def _client_digests(task: Task, client: int) -> Iterator[bytes]:
    """Yield a hash of each of a client's inputs that is one tensor; others cannot be compared with public inputs."""
    data = as_data(task.client_data(client))
    for rows in torch.arange(len(data)).split(BATCH):
        inputs = data.batch(rows)[0]
        if isinstance(inputs, Tensor):
            yield from _digests(inputs.numpy())


def _digests(rows: NDArray[Any]) -> Iterator[bytes]:
    """Return a hash of each row's bytes; equal rows of clients and of public inputs have the same."""
    return (hashlib.blake2b(np.ascontiguousarray(row).tobytes(), digest_size=16).digest() for row in rows)


def distil(teacher: nn.Module, student: nn.Module, inputs: Tensor, classifies: bool) -> None:
    """Train the student in place to reproduce the teacher's outputs on public inputs and on mixtures of two.

    Args:
      teacher: the released model.
      student: a smaller model, whose parameters are trained; it is left in evaluation mode, as the teacher is.
      inputs: public inputs, shape (n, ...); integers, such as words, are not mixed.
      classifies: whether several outputs of a row are logits of classes.

    Raises:
      Refusal: the student does not take the inputs, or has other outputs.
    """
    shape = _check_outputs(teacher, student, inputs)
    draw = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.Adam(student.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    has_logits = classifies and len(shape) > 1 and shape[-1] > 1
    loss: Callable[[Tensor, Tensor], Tensor] = _divergence if has_logits else nn.functional.mse_loss
    student.train()
    for _ in range(STEPS):
        batch, other = (inputs[torch.randint(len(inputs), (ROWS,), generator=draw)] for _ in range(2))
        if inputs.is_floating_point():
            share = torch.rand(ROWS, *[1] * (inputs.dim() - 1), generator=draw)
            batch = share * batch + (1 - share) * other
        with torch.no_grad():
            targets = teacher(batch)
        optimizer.zero_grad()
        loss(student(batch), targets).backward()
        optimizer.step()
        schedule.step()
    student.eval()


def _check_outputs(teacher: nn.Module, student: nn.Module, inputs: Tensor) -> torch.Size:
    """Put both models into evaluation mode; return the shape of their outputs for two rows, or refuse a student of another."""
    try:
        with torch.no_grad():
            teacher_shape, student_shape = (model.eval()(inputs[:2]).shape for model in (teacher, student))
    except (RuntimeError, IndexError, TypeError) as error:
        remedy = f"does not take the run's inputs, shape (n, {tuple(inputs.shape[1:])}): {str(error).splitlines()[0]}"
        raise Refusal("--student", type(student).__name__, remedy) from None
    if teacher_shape != student_shape:
        remedy = f"has outputs of shape {tuple(student_shape)} for two rows; the released model has {tuple(teacher_shape)}"
        raise Refusal("--student", type(student).__name__, remedy)
    return teacher_shape


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence of softened logits, times TEMPERATURE squared to keep gradients' scale."""
    soft = nn.functional.softmax(teacher / TEMPERATURE, -1)
    logs = nn.functional.log_softmax(student / TEMPERATURE, -1)
    return TEMPERATURE**2 * nn.functional.kl_div(logs, soft, reduction="batchmean")
