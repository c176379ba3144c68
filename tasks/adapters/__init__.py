"""Adapters: tasks from models of other libraries, one file for each library."""

from collections.abc import Callable

import torch
from torch import nn


def made_once(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a factory's model, drawn from a fixed seed and so equal in all processes; restore the random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()
