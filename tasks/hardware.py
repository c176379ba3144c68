"""Hardware that clients train on: the device, the precision, and the client's data on the device.

The model and one client's data are on the device; sums, their lattice and their noise stay on the CPU. Training on the
CPU runs the same code without moving data.
"""

from __future__ import annotations

import copy
import os
import re
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..base.refusal import Refusal
from .data import Data, Examples, mapped

CPU = torch.device("cpu")
# The quota of a container, as it sees it: microseconds of each period, and the period.
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_WORKER = [0]  # number of this process among the workers of its engine


def be_worker(number: int) -> None:
    """Set the number of this process among its engine's workers, from 0, which selects the GPU of `device_of`."""
    _WORKER[0] = number


def check_device(name: str, field: str = "engine.device") -> None:
    """Refuse a missing device; the GPU itself is not initialised, so that workers can be forked afterwards.

    Args:
      name: `auto`, `cpu`, `mps`, `cuda`, or one GPU as `cuda:N`.
      field: configuration key, for a refusal.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", name):
        raise Refusal(field, name, "give auto, cpu, mps, cuda, or one GPU as cuda:N")
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count()
    if kind == "cuda" and (count == 0 or int(number or 0) >= count):
        there = f"there are {count} (cuda:0 to cuda:{count - 1})" if count else "there is none; use cpu"
        raise Refusal(field, name, f"of the GPUs that torch can use {there}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise Refusal(field, name, "torch sees no Apple GPU here; use cpu")


def check_made_here(model: nn.Module) -> None:
    """Refuse a task's new model with a parameter or a buffer outside the CPU, such as on the meta device."""
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            remedy = "a task must create its model on the CPU; engine.device moves it"
            raise Refusal("model", f"{name} on {value.device}", remedy)


def gpus(name: str) -> int:
    """Return how many GPUs processes can train on at once, on a device of this name; no GPU is initialised."""
    if name not in ("auto", "cuda"):
        return 0
    return torch.cuda.device_count()


def cores() -> int:
    """Return the number of cores that this process may use, at least 1: by its affinity, and by Linux's control group."""
    count = os.cpu_count() or 1
    with suppress(AttributeError):  # of systems that lack it
        count = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # no control group, or one without a quota: "max"
        quota, period = CPU_QUOTA.read_text().split()
        count = min(count, int(quota) // int(period))
    return max(1, count)


def device_of(name: str) -> torch.device:
    """Return the device of a name that `check_device` accepts: for `auto`, this worker's GPU, or the CPU if none."""
    if name in ("auto", "cuda"):
        count = torch.cuda.device_count()
        return torch.device("cuda", _WORKER[0] % count) if count else CPU
    return torch.device(name)


def precision(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Return the context in which a model runs: torch's autocast to a dtype, or for `float32` one without effect."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the copy to a CUDA GPU is asynchronous, from pinned memory."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_cpu(model: nn.Module) -> nn.Module:
    """Return the model if it is on the CPU, otherwise a copy of it there."""
    first = next(model.parameters(), None)
    return model if first is None or first.device.type == "cpu" else copy.deepcopy(model).cpu()


@dataclass(frozen=True)
class OnDevice:
    """Data that are read in batches, each moved to a device."""

    data: Data
    device: torch.device

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, index: Tensor) -> tuple[Any, Tensor]:
        """Return (inputs, targets) of the examples at these positions, on the device."""
        inputs, targets = self.data.batch(index)
        return mapped(lambda each: moved(each, self.device), inputs), moved(targets, self.device)


def placed(data: Data, device: torch.device) -> Data:
    """Return data on a device: tensors are moved at once, and lazily read data batch by batch.

    Args:
      data: data of a client, or held-out data, on the CPU.
      device: device of the model.
    """
    if device.type == "cpu":
        return data
    if isinstance(data, Examples):
        return Examples(mapped(lambda each: moved(each, device), data.inputs), moved(data.targets, device))
    return cast(Data, OnDevice(data, device))  # it has all members that training uses
