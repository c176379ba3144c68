"""Adapters: tasks made of what other libraries train, one file for each library."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def made_once(make: Callable[[], nn.Module]) -> nn.Module:
    """Return what a factory makes, with values that depend on no random state of the caller's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()
