"""Tasks whose accuracy in bfloat16 stands beside that in float32: images, with two models, and an LSTM of text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fedveil as fv

from ..tasks import AnnouncedTask
from ..tasks.shipped import mnist5k, shakespeare
from ..tasks.shipped.shakespeare import ALPHABET, CONTEXT
from . import digits_cnn

SEED = 3
CLIENTS = 100  # roles of the text


class Reader(nn.Module):
    """An LSTM from characters, shape (n, CONTEXT + l - 1), to scores, shape (n, l, characters)."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), 16)
        self.cells = nn.LSTM(16, width, batch_first=True)
        self.scores = nn.Linear(width, len(ALPHABET))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores of the characters after the first CONTEXT ones."""
        return self.scores(self.cells(self.embedding(inputs))[0][:, CONTEXT - 1 :])


class Characters(AnnouncedTask):
    """Characters of Shakespeare's roles, which an LSTM predicts."""

    def model(self) -> nn.Module:
        """Return the model, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return Reader()


# The task, its learning rate, and as many rounds as it takes to learn.
TASKS: dict[str, tuple[Callable[[], Any], float, int]] = {
    "mnist5k": (mnist5k.load, 20.0, 20),
    "digits-cnn": (digits_cnn.load, 0.1, 10),
    "shakespeare-lstm": (lambda: Characters(CLIENTS, lambda: shakespeare.load(CLIENTS)), 2.0, 20),
}


def accuracy_of(name: str, dtype: str, seed: int) -> float:
    """Return the held-out accuracy, in percent, of a run without privacy.

    Args:
      name: a key of `TASKS`.
      dtype: of `engine.dtype`.
      seed: of the run.
    """
    load, rate, rounds = TASKS[name]
    settings: dict[str, Any] = {"engine": {"dtype": dtype}, "learning_rate": rate, "audit": "off"}
    ran = fv.simulate(load(), privacy="none", num_rounds=rounds, seed=seed, quiet=True, **settings)
    lines = (ran.folder / "metrics.jsonl").read_text().splitlines()
    return 100 * [row["accuracy"] for row in map(json.loads, lines) if "accuracy" in row][-1]
