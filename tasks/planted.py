"""Secrets that a simulation plants at its clients, so that an audit can look for them in the model.

Carlini et al. 2019 (arXiv:1802.08232): each secret is drawn uniformly from a known space. If the model did not memorise
it, its rank by loss among all candidates is uniform too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..base.refusal import Refusal
from ..privacy.audit.memorisation import Exposure, MemorisationResult, exposure, fisher
from .arrays import load_arrays
from .protocol import Task

# Copies of a secret of each kind, every copy at another client; the last kind is the control.
COPIES = (1, 4, 16, 0)
DIGITS = 4
CANDIDATES = 10**DIGITS
CONSONANTS = "bcdfgjkqvwxz"  # no English word consists only of these
SENTENCE = "\nid {} is "  # before a PIN, with its name


@dataclass(frozen=True)
class Secret:
    """PIN after a unique prefix.

    Attributes:
      prefix: text before the PIN.
      pin: 0 to candidates - 1.
      clients: those that hold it; empty for a control.
      digits: number of digits of the PIN, at least 1.
    """

    prefix: str
    pin: int
    clients: tuple[int, ...]
    digits: int = DIGITS

    @property
    def copies(self) -> int:
        """Number of clients that hold it."""
        return len(self.clients)

    @property
    def candidates(self) -> int:
        """Number of PINs with these digits."""
        return 10**self.digits

    @property
    def text(self) -> str:
        """Text that a client holds."""
        return self.text_of(self.pin)

    def text_of(self, pin: int) -> str:
        """Return the text with another PIN, 0 to candidates - 1."""
        return f"{self.prefix}{pin:0{self.digits}d}."


@runtime_checkable
class SecretTask(Task, Protocol):
    """Task that plants secrets; its data must be simulated."""

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """Secrets of every kind, controls included."""
        ...

    def secret_losses(self, model: nn.Module, secret: Secret) -> NDArray[np.float64]:
        """Return the model's loss on each candidate PIN of the secret, shape (candidates,).

        Args:
          model: model to test.
          secret: secret whose prefix stands before the PINs.
        """
        ...


def draw_secrets(
    each: int, num_clients: int, seed: int, sentence: str = SENTENCE, digits: int = DIGITS
) -> tuple[Secret, ...]:
    """Return secrets of every kind of `COPIES`, at clients drawn from a seed.

    Args:
      each: number of secrets of each kind.
      num_clients: number of clients.
      seed: of names, PINs and clients.
      sentence: text before a PIN, with {} in place of its name.
      digits: number of digits of a PIN.

    Raises:
      Refusal: there are too few clients.
    """
    if each and num_clients < max(COPIES):
        remedy = f"a secret is planted at {max(COPIES)} clients; use that many or more, or no secrets"
        raise Refusal("task.secrets", each, remedy)
    # CANDIDATES keeps this stream apart from the one that deals examples by the same seed.
    generator = np.random.default_rng([seed, num_clients, CANDIDATES])
    secrets: list[Secret] = []
    for copies in COPIES:
        for _ in range(each):
            name = "".join(generator.choice(list(CONSONANTS), 5))
            clients = generator.choice(num_clients, copies, replace=False) if copies else ()
            pin = int(generator.integers(10**digits))
            own = tuple(int(client) for client in clients)
            secrets.append(Secret(sentence.format(name), pin, own, digits))
    return tuple(secrets)


@dataclass(frozen=True)
class ExposureProbe:
    """`MemorisationProbe` of a task's secrets: for each planted kind, exact ranks pooled by Fisher's method."""

    task: SecretTask

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> list[MemorisationResult]:
        """Return one test for each kind, with mean exposures in bits; arguments as of `MemorisationProbe.look`."""
        by_copies = exposures(self.task, arrays)
        control = by_copies.pop(0)
        return [
            MemorisationResult(
                f"exposure_x{copies}",
                fisher([each.p_value for each in ranks]),
                {"bits": mean_bits(ranks), "unplanted": mean_bits(control), "limit": most_bits(ranks)},
            )
            for copies, ranks in by_copies.items()
        ]


def exposures(task: SecretTask, arrays: Mapping[str, NDArray[np.generic]]) -> dict[int, list[Exposure]]:
    """Return the exposures of all secrets in a model of these arrays by their number of copies, 0 for controls."""
    model = task.model()
    load_arrays(model, arrays)
    model.eval()
    by_copies: dict[int, list[Exposure]] = {copies: [] for copies in COPIES}
    for secret in task.secrets:
        losses = task.secret_losses(model, secret)
        ranked = exposure(float(losses[secret.pin]), np.delete(losses, secret.pin))
        by_copies[secret.copies].append(ranked)
    return by_copies


def mean_bits(ranks: list[Exposure]) -> float:
    """Return the mean exposure in bits: 1.44 is expected if nothing was memorised; at most `most_bits`."""
    return sum(each.bits for each in ranks) / len(ranks)


def most_bits(ranks: list[Exposure]) -> float:
    """Return the largest possible exposure in bits: 13.3 of four digits, 10.0 of three."""
    return math.log2(ranks[0].candidates)
