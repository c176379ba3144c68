"""Secrets that a simulation plants at its clients, so that an audit can look for them in the model.

Carlini et al. 2019 (arXiv:1802.08232): each secret is drawn uniformly from a known space; if the model did not memorise
it, its rank by loss among all candidates is uniform too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..privacy.audit.memorisation import Exposure, Memorised, exposure, fisher
from ..privacy.refusal import Refusal
from .arrays import load_arrays
from .protocol import Task

# How often secrets of each kind are planted, every copy at another client; the last kind is the control.
COPIES = (1, 4, 16, 0)
DIGITS = 4
CANDIDATES = 10**DIGITS
CONSONANTS = "bcdfgjkqvwxz"  # no word of English is made of these alone


@dataclass(frozen=True)
class Secret:
    """A PIN after a prefix of its own: ``copies`` clients hold it, none if it is 0."""

    prefix: str
    pin: int
    clients: tuple[int, ...]

    @property
    def copies(self) -> int:
        return len(self.clients)

    @property
    def text(self) -> str:
        """What a client holds."""
        return f"{self.prefix}{self.pin:0{DIGITS}d}."


@runtime_checkable
class SecretTask(Task, Protocol):
    """A task that plants secrets; only ever on data that are simulated."""

    @property
    def secrets(self) -> tuple[Secret, ...]: ...

    def secret_losses(self, model: nn.Module, secret: Secret) -> NDArray[np.float64]:
        """The model's loss on each PIN that the secret might have been, (CANDIDATES,), in order."""
        ...


def draw_secrets(each: int, num_clients: int, seed: int) -> tuple[Secret, ...]:
    """`each` secrets of every kind of `COPIES`.

    Raises Refusal if there are fewer clients than copies.
    """
    if each and num_clients < max(COPIES):
        remedy = f"a secret is planted at {max(COPIES)} clients; give that many clients, or no secrets"
        raise Refusal("task.secrets", each, remedy)
    # Not the stream that deals examples, which takes the same seed.
    generator = np.random.default_rng([seed, num_clients, CANDIDATES])
    secrets: list[Secret] = []
    for copies in COPIES:
        for _ in range(each):
            name = "".join(generator.choice(list(CONSONANTS), 5))
            clients = generator.choice(num_clients, copies, replace=False) if copies else ()
            pin = int(generator.integers(CANDIDATES))
            secrets.append(Secret(f"\nid {name} is ", pin, tuple(int(client) for client in clients)))
    return tuple(secrets)


@dataclass(frozen=True)
class ExposureProbe:
    """A `MemorisationProbe` of a task's secrets: for each kind that was planted, the exact ranks pooled by Fisher."""

    task: SecretTask

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> list[Memorised]:
        """One test a kind; beside each, in bits, its mean exposure and that of secrets that were planted nowhere."""
        del number
        found = exposures(self.task, arrays)
        control = found.pop(0)
        return [
            Memorised(
                f"exposure_x{copies}",
                fisher([each.p_value for each in ranks]),
                {"bits": mean_bits(ranks), "unplanted": mean_bits(control)},
            )
            for copies, ranks in found.items()
        ]


def exposures(task: SecretTask, arrays: Mapping[str, NDArray[np.generic]]) -> dict[int, list[Exposure]]:
    """The exposure of every secret under the model of these arrays, by how often it was planted."""
    model = task.model()
    load_arrays(model, arrays)
    model.eval()
    found: dict[int, list[Exposure]] = {copies: [] for copies in COPIES}
    for secret in task.secrets:
        losses = task.secret_losses(model, secret)
        ranked = exposure(float(losses[secret.pin]), np.delete(losses, secret.pin))
        found[secret.copies].append(ranked)
    return found


def mean_bits(ranks: list[Exposure]) -> float:
    """The mean exposure: 1.44 where nothing was memorised, log2(CANDIDATES) = 13.3 at most."""
    return sum(each.bits for each in ranks) / len(ranks)
